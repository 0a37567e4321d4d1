import html.parser
import itertools
import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from experiments.report import main
from lorax.analysis import write_report
from lorax.analysis.figures import draw
from lorax.analysis.findings import findings
from lorax.analysis.groups import group_trials
from lorax.analysis.report import build_report
from lorax.analysis.results import Trial, read_sweep
from lorax.errors import LoraxError
from tests.helpers.synthetic_sweep import (
    make_config,
    make_cut_result,
    make_result,
    write_sweep,
    write_trial,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
VOID = {"meta", "img", "link", "br", "hr", "input"}


class Page(html.parser.HTMLParser):
    """Collects what a page refers to and checks that its tags close in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.links, self.sources = [], [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag not in VOID:
            self.open.append(tag)
        self.links += [attributes["href"]] if "href" in attributes else []
        self.sources += [attributes["src"]] if "src" in attributes else []

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def sentences(path):
    return " ".join(findings(group_trials(read_sweep(path).trials))[0].sentences)


def test_files(sweep):
    page = write_report(sweep)
    assert page == sweep / "report" / "report.html"
    written = {path.name for path in page.parent.iterdir()}
    assert {"report.md", "report.html", "table.tex", "table.csv"} <= written
    for name in ("rank", "curves", "parameters"):
        assert (page.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        ET.parse(page.parent / f"{name}.svg")


def test_page_is_self_contained_and_accessible(sweep):
    text = write_report(sweep).read_text()
    page = Page(text)
    assert len(page.sources) == 3
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert "http:" not in text and "https:" not in text and "@import" not in text
    tags = [tag for tag, _ in page.tags]
    assert tags.count("h1") == 1 and "link" not in tags
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")
    assert "prefers-color-scheme: dark" in text and "@media print" in text


def test_links_lead_to_results(sweep, tmp_path):
    for output in (None, tmp_path / "else" / "where"):
        page = write_report(sweep, output)
        links = Page(page.read_text()).links
        assert len(links) == 36
        assert all((page.parent / link).is_file() for link in links)


def test_markup_in_names_is_escaped(tmp_path):
    for targets in ("<script>alert(1)</script>", "qv"):
        config = make_config(targets=targets)
        write_trial(tmp_path, f"t{len(targets)}", config, make_result(config))
    text = write_report(tmp_path).read_text()
    assert "<script>alert" not in text
    assert "&lt;script&gt;alert" in text


def test_same_bytes_on_every_run(sweep, tmp_path):
    first, second = (write_report(sweep, tmp_path / name).parent for name in ("a", "b"))
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_report_tells_of_every_fault(faulty_sweep):
    report = build_report(faulty_sweep)
    page = write_report(faulty_sweep)
    for text in (report.text(), page.read_text(), (page.parent / "report.md").read_text()):
        assert "1 diverged: diverged" in text
        assert "2 unfinished: broken-result, unfinished" in text
        assert "broken-config/config.json" in text
    assert "diverged: loss is nan at step 7" in page.read_text()


def written(page):
    """The report's texts in every format, without the terminal's."""
    names = ("report.md", "report.html", "table.tex")
    return [(page.parent / name).read_text() for name in names]


def test_every_format_says_what_was_cut_and_when(halved_sweep):
    report = build_report(halved_sweep)
    markdown, html, latex = written(write_report(halved_sweep))
    Page(html)
    for text in (report.text(), markdown, html, latex):
        for part in ("Cut by halving", "r4-s2", "7 of 12 (6 went on)", "3 (2 cut)"):
            assert part in text
        assert "biased upwards" in text
    for text in (report.text(), markdown, html):
        assert "6 of 12 finished, 6 cut by halving" in text
        assert "No trial of rank 1 outlived the halving" in text
    assert "cut at step 40, place 7 of 12" in markdown
    assert r"\label{tab:cut}" in latex


def test_caveats_of_halving(halved_sweep):
    caveats = " ".join(build_report(halved_sweep).caveats)
    assert "Successive halving cut 6 of 12 trials" in caveats
    assert "In 2 of 3 rows halving cut some of the seeds" in caveats
    assert "1 setting has no row" in caveats


def test_no_word_of_halving_or_packs_without_them(sweep):
    report = build_report(sweep)
    text = report.text() + " ".join(report.caveats)
    assert report.cut is None
    assert "alving" not in text and "pack" not in text


def test_findings_flag_survivors(halved_sweep):
    text = sentences(halved_sweep)
    assert "Rank 8 has the highest mean" in text
    assert "Halving cut seeds of ranks 2 and 4" in text


def test_a_rate_wholly_cut_is_no_edge_of_the_grid(tmp_path):
    write_sweep(tmp_path, ranks=(4, 8), rates=(1e-3, 2e-3))
    assert "end of the grid" in sentences(tmp_path)
    for rank, lr in itertools.product((4, 8), (5e-4, 4e-3)):
        config = make_config(rank=rank, lr=lr)
        write_trial(tmp_path, f"cut-{rank}-{lr}", config, make_cut_result(config, 0.5, place=3))
    assert "end of the grid" not in sentences(tmp_path)


def test_figures_pass_over_the_cut(halved_sweep):
    plots = draw(group_trials(read_sweep(halved_sweep).trials))
    (axes,) = plots[0].figure.axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["2", "4", "8"]
    assert all("halving cut" in plot.caption for plot in plots)


def test_a_sweep_of_which_nothing_is_left(tmp_path):
    config = make_config()
    write_trial(tmp_path, "a", config, make_cut_result(config, 0.7, place=2))
    with pytest.raises(LoraxError, match=r"0 diverged, 0 unfinished, 1 cut"):
        build_report(tmp_path)


def test_a_task_of_which_nothing_is_left(halved_sweep):
    config = make_config(task="rte")
    write_trial(halved_sweep, "rte", config, make_cut_result(config, 0.7, place=2))
    report = build_report(halved_sweep)
    assert [finding.title for finding in report.findings] == ["reviews"]
    assert len(report.settings.rows) == 3 and len(report.cut.rows) == 7
    assert write_report(halved_sweep).is_file()


@pytest.mark.parametrize(("lanes", "mixed"), [((8, 8), False), ((1, 8), True), ((4, 8), True)])
def test_caveats_of_packing(tmp_path, lanes, mixed):
    for rank, together in zip((1, 2), lanes, strict=True):
        config = make_config(rank=rank)
        write_trial(tmp_path, f"{rank}", config, make_result(config, lanes=together))
    caveats = " ".join(build_report(tmp_path).caveats)
    assert "even shares of the pack's" in caveats and "memory is the whole pack's" in caveats
    assert (f"{lanes[0]} and 8 lanes" in caveats) == mixed
    assert ("packed and unpacked" in caveats) == (1 in lanes)


def test_noise_is_called_noise(tmp_path):
    text = sentences(write_sweep(tmp_path, gain=0.0, seeds=5))
    assert "within seed noise (one-way ANOVA over 5 ranks: F(4, 20)" in text
    assert "not proof that they are equal" in text


def test_a_real_difference_is_called_one(tmp_path):
    text = sentences(write_sweep(tmp_path, gain=0.02, seeds=5))
    assert "Rank 64 has the highest mean" in text
    assert "differ by more than seed noise" in text and "p < 0.001" in text
    assert "ahead of ranks 1, 2, 4 and 8" in text
    assert "Rank 64 minus the head alone: +" in text


def test_single_seeds_claim_nothing(tmp_path):
    text = sentences(write_sweep(tmp_path, seeds=1))
    assert "nothing can be said about seed noise" in text
    assert "too few seeds for an interval" in text
    assert "ANOVA" not in text


def write_scores(root, scores, *, metric="accuracy", **point):
    """A trial for each seed's score of each rank; `point` adds to the best evaluation."""
    for rank, seeds in scores.items():
        for seed, score in enumerate(seeds):
            config = make_config(rank=rank, seed=seed)
            result = make_result(config, score, metric=metric)
            result["best"] |= point
            write_trial(root, f"r{rank}-s{seed}", config, result)
    return root


def test_without_spread_nothing_is_tested(tmp_path):
    text = sentences(write_scores(tmp_path, {1: [0.7, 0.7], 2: [0.9, 0.9], 4: [0.8, 0.8]}))
    assert "Rank 2 has the highest mean: accuracy 90.00 (the same for all 2 seeds, no" in text
    assert "The scores of rank 2 and of ranks 1 and 4 do not vary over seeds" in text
    assert not any(word in text for word in ("ahead", "excludes zero", "ANOVA", "told apart"))
    table = build_report(tmp_path).settings
    assert any("all score the same has no interval" in note for note in table.notes)


def test_equal_means_have_no_winner(tmp_path):
    text = sentences(write_scores(tmp_path / "all", {r: [0.1] * (r + 2) for r in (1, 2, 4)}))
    assert "All 3 ranks have the same mean: accuracy 10.00. None is ahead." in text
    assert "highest" not in text
    scores = {1: [0.7, 0.8], 2: [0.85, 0.95], 4: [0.9, 0.9]}
    text = sentences(write_scores(tmp_path / "two", scores))
    assert "Ranks 2 and 4 share the highest mean: accuracy 90.00." in text
    assert "Rank 2 cannot be told apart from ranks 1 and 4" in text
    assert "Differences among ranks are within seed noise" in text


@pytest.mark.parametrize(
    ("score", "metric", "point"),
    [(0.68, "accuracy", {"constant": True}), (0.0, "matthews", {})],  # of today, and of before
)
def test_constant_predictions_are_named(tmp_path, score, metric, point):
    write_scores(tmp_path, {1: [score], 2: [score, score]}, metric=metric, **point)
    write_scores(tmp_path, {4: [0.7, 0.8]}, metric=metric)
    report = build_report(tmp_path)
    text = " ".join(report.findings[0].sentences)
    assert "3 of 3 trials of ranks 1 and 2 predict the same for every dev example" in text
    assert any(line.startswith("3 of 5 finished trials predict the") for line in report.caveats)
    assert "predict the same" not in sentences(write_sweep(tmp_path / "other"))


def test_a_correlation_of_exactly_zero_is_no_constant_where_trials_record_it():
    result = {"status": "finished", "best": {"step": 1, "metrics": {"matthews": 0.0}}}
    assert Trial("a", Path("a"), {}, result).is_constant
    assert not Trial("a", Path("a"), {}, {**result, "content": {}}).is_constant


def test_rates_that_do_as_well_are_no_edge_of_the_grid(tmp_path):
    for n, lr in enumerate((1e-3, 2e-3, 4e-3)):
        config = make_config(lr=lr)
        write_trial(tmp_path, f"t{n}", config, make_result(config, 0.8))
    assert "end of the grid" not in sentences(tmp_path)


def test_an_edge_of_the_grid_is_named(tmp_path):
    assert "end of the grid" in sentences(write_sweep(tmp_path, rates=(1e-3, 4e-3)))


def test_caveat_of_one_learning_rate(tmp_path):
    caveats = " ".join(build_report(write_sweep(tmp_path)).caveats)
    assert "share one learning rate" in caveats
    assert "alpha / rank falls" in caveats


def test_figures_for_every_task(tmp_path):
    write_sweep(tmp_path, task="mrpc")
    write_sweep(tmp_path, task="rte")
    groups = group_trials(read_sweep(tmp_path).trials)
    names = [plot.name for plot in draw(groups)]
    assert names == [f"{n}-{i}" for i in (1, 2) for n in ("rank", "curves", "parameters")]
    assert [finding.title for finding in findings(groups)] == ["mrpc", "rte"]


def test_rank_axis_and_lines(sweep):
    plot = draw(group_trials(read_sweep(sweep).trials))[0]
    (axes,) = plot.figure.axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["1", "2", "4", "8", "64"]
    labels = [text.get_text() for text in plot.figure.legends[0].get_texts()]
    assert labels[:2] == ["lr 5e-4", "lr 1e-3"]
    assert labels[2].startswith("head only, 7") and labels[3] == "full fine-tuning"


def test_alpha_tied_to_rank_is_one_line(tmp_path):
    for rank in (1, 2, 4):
        config = make_config(rank=rank, alpha=2.0 * rank)
        write_trial(tmp_path, f"{rank}", config, make_result(config))
    plot = draw(group_trials(read_sweep(tmp_path).trials))[0]
    assert [text.get_text() for text in plot.figure.legends[0].get_texts()] == ["LoRA"]


@pytest.mark.parametrize("mode", ["head", "full"])
def test_a_sweep_of_references_alone(tmp_path, mode):
    config = make_config(mode)
    write_trial(tmp_path, "a", config, make_result(config))
    assert "No LoRA trial has finished" in write_report(tmp_path).read_text()


def test_old_results_without_costs(tmp_path):
    config = make_config()
    best = {"step": 1, "epoch": 1.0, "metrics": {"accuracy": 0.8}}
    result = {"status": "finished", "metric": "accuracy", "best": best, "last": None}
    write_trial(tmp_path, "a", config, result)
    assert write_report(tmp_path).is_file()


def test_command_line(sweep, tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "experiments.report", str(sweep), "--output", str(tmp_path / "o")],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONIOENCODING": "utf-8"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "All settings" in run.stdout
    assert str(tmp_path / "o" / "report.html") in run.stdout


def test_faults_are_one_line_and_status_2(tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    going = tmp_path / "going"
    write_trial(going, "a", make_config())
    for path in (tmp_path / "nowhere", empty, going):
        assert main([str(path)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith(f"error: {path}: ")
        assert captured.err.count("\n") == 1
    with pytest.raises(LoraxError, match=r"none of its 1 trials has finished \(0 diverged, 1 unf"):
        write_report(going)


def test_output_that_cannot_be_written(sweep, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([str(sweep), "--output", str(tmp_path / "file")]) == 2
    assert "cannot write the report there" in capsys.readouterr().err
