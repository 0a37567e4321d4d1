import csv
import io
import random

import pytest

from lorax.analysis.groups import (
    MISSING,
    best_choices,
    constant_settings,
    format_value,
    group_trials,
    short_names,
    varying_keys,
)
from lorax.analysis.render import escape_latex, to_csv, to_latex, to_markdown, to_text
from lorax.analysis.results import read_sweep
from lorax.analysis.table import best_table, cut_table, settings_table
from tests.helpers.synthetic_sweep import (
    make_config,
    make_cut_result,
    make_result,
    write_sweep,
    write_trial,
)


def groups_of(path):
    return group_trials(read_sweep(path).trials)


def column(table, header):
    index = [c.header for c in table.columns].index(header)
    return [row[index].text for row in table.rows]


def test_groups_differ_in_more_than_the_seed(sweep):
    groups = groups_of(sweep)
    assert len(groups) == 5 * 2 + 2
    assert all(len(group.trials) == 3 for group in groups)
    assert varying_keys(groups) == ("train.mode", "lora.rank", "optimizer.lr")


def test_rows_are_ordered_head_lora_full_whatever_the_reading_order(sweep):
    trials = list(read_sweep(sweep).trials)
    random.Random(0).shuffle(trials)
    table = settings_table(group_trials(trials))
    assert column(table, "mode") == ["head", *["lora"] * 10, "full"]
    assert column(table, "rank") == [
        MISSING,
        "1",
        "1",
        "2",
        "2",
        "4",
        "4",
        "8",
        "8",
        "64",
        "64",
        MISSING,
    ]
    assert column(table, "lr") == ["5e-4", *["5e-4", "1e-3"] * 5, "1e-4"]


def test_scores_are_times_100_and_match_the_files(sweep):
    groups = groups_of(sweep)
    table = settings_table(groups)
    mean = sum(groups[1].scores()) / 3
    assert column(table, "accuracy (best)")[1].startswith(f"{100 * mean:.2f} ± ")
    assert column(table, "accuracy (last)")[1].startswith(f"{100 * mean - 0.4:.2f} ± ")
    assert column(table, "share %")[-1] == "100.00"
    assert column(table, "memory MiB")[1] == "181"


def test_lora_settings_are_no_difference_without_an_adapter(tmp_path):
    for rank in (1, 8):
        config = make_config("head", rank)
        write_trial(tmp_path, f"head-{rank}", config, make_result(config))
        config = make_config("lora", rank)
        write_trial(tmp_path, f"lora-{rank}", config, make_result(config))
    groups = groups_of(tmp_path)
    assert [group.mode for group in groups] == ["head", "lora", "lora"]
    assert [trial.id for trial in groups[0].repeats] == ["head-8"]
    assert len(groups[0].trials) == 1


def test_bookkeeping_is_no_difference(tmp_path):
    for seed, name in enumerate(("a", "b")):
        config = make_config(seed=seed) | {"sweep": name, "output_dir": name}
        config["tracking"] = {"kind": name}
        write_trial(tmp_path, name, config, make_result(config))
    config = make_config(seed=2)
    config["sweep"] |= {"name": "c", "halving": {"after": 9, "eta": 4}, "mesh": {"trial": 8}}
    write_trial(tmp_path, "c", config, make_result(config))
    (group,) = groups_of(tmp_path)
    assert len(group.trials) == 3
    assert not any(key.startswith("sweep") for key in constant_settings([group]))


def test_source_beside_name_is_one_column(tmp_path):
    for name in ("small", "large"):
        config = make_config()
        config["model"] |= {"name": name, "source": f"assets/{name}"}
        write_trial(tmp_path, name, config, make_result(config))
    assert varying_keys(groups_of(tmp_path)) == ("model.name", "train.mode", "lora.rank")


def test_diverged_are_counted_and_not_averaged(faulty_sweep):
    groups = groups_of(faulty_sweep)
    table = settings_table(groups)
    assert column(table, "seeds") == ["3", "4 (1 diverged)"]
    assert groups[1].summary().n == 3
    assert any("Diverged" in note for note in table.notes)


def test_all_diverged_still_has_its_row(tmp_path):
    config = make_config()
    write_trial(tmp_path, "a", config, make_result(config, status="diverged"))
    table = settings_table(groups_of(tmp_path))
    assert column(table, "seeds") == ["1 (1 diverged)"]
    assert column(table, "accuracy (best)") == [MISSING]


def test_cut_are_counted_and_not_averaged(halved_sweep):
    groups = groups_of(halved_sweep)
    table = settings_table(groups)
    assert column(table, "rank") == ["2", "4", "8"]
    assert column(table, "seeds") == ["3 (2 cut)", "3 (1 cut)", "3"]
    assert column(table, "accuracy (best)") == ["80.20", "80.30 ± 0.14", "80.60 ± 0.20"]
    assert column(table, "accuracy (last)")[0] == "79.80"
    assert any("biased upwards" in note for note in table.notes)


def test_cut_trials_are_listed_with_their_setting(halved_sweep):
    table = cut_table(groups_of(halved_sweep))
    assert column(table, "trial") == ["r1-s0", "r1-s1", "r1-s2", "r2-s1", "r2-s2", "r4-s2"]
    assert column(table, "rank") == ["1", "1", "1", "2", "2", "4"]
    assert column(table, "seed") == ["0", "1", "2", "1", "2", "2"]
    assert set(column(table, "cut at step")) == {"40"}
    assert column(table, "place")[::5] == ["12 of 12 (6 went on)", "7 of 12 (6 went on)"]
    assert column(table, "accuracy so far")[0] == "70.10"


def test_no_list_without_cuts(sweep):
    assert cut_table(groups_of(sweep)) is None
    assert not any("alving" in note for note in settings_table(groups_of(sweep)).notes)


def test_cut_without_numbers_shows_dashes(tmp_path):
    config = make_config()
    result = make_cut_result(config, 0.7, place=2) | {"cut": None, "best": None, "last": None}
    write_trial(tmp_path, "a", config, result)
    table = cut_table(groups_of(tmp_path))
    assert column(table, "cut at step") == column(table, "accuracy so far") == [MISSING]


def test_a_seed_that_finished_elsewhere_is_not_counted_as_cut(tmp_path):
    config = make_config()
    write_trial(tmp_path, "a", config, make_cut_result(config, 0.7, place=2))
    write_trial(tmp_path, "b", config, make_result(config))
    (group,) = groups_of(tmp_path)
    assert (group.trials[0].id, group.cut, group.repeats[0].id) == ("b", (), "a")


def test_survivors_of_halving_are_not_chosen(tmp_path):
    for lr, seed, place in ((1e-3, 0, 0), (1e-3, 1, 0), (4e-3, 0, 0), (4e-3, 1, 4)):
        config = make_config(lr=lr, seed=seed)
        score = 0.9 if lr > 2e-3 else 0.8
        cut = make_cut_result(config, 0.5, place=place)
        result = cut if place else make_result(config, score)
        write_trial(tmp_path, f"{lr}-{seed}", config, result)
    assert column(best_table(groups_of(tmp_path)), "lr") == ["1e-3"]


def test_a_setting_wholly_cut_was_tried(tmp_path):
    for lr, score in ((1e-3, 0.7), (2e-3, 0.8), (4e-3, None)):
        config = make_config(lr=lr)
        result = make_result(config, score) if score else make_cut_result(config, 0.5, place=3)
        write_trial(tmp_path, f"{lr}", config, result)
    groups = groups_of(tmp_path)
    assert column(best_table(groups), "tried") == ["3"]
    assert len(best_choices(groups, ["lora.rank"])[0].among) == 3
    assert column(settings_table(groups), "lr") == ["1e-3", "2e-3"]


@pytest.mark.parametrize(
    ("lanes", "shown", "note"),
    [((1, 1), None, ""), ((6, 6), ["6", "6"], "the whole pack's."),
     ((1, 6), ["1", "6"], "do not compare across lanes.")],
)  # fmt: skip
def test_packed_trials_show_their_lanes(tmp_path, lanes, shown, note):
    for rank, together in zip((1, 2), lanes, strict=True):
        config = make_config(rank=rank)
        write_trial(tmp_path, f"{rank}", config, make_result(config, lanes=together))
    table = settings_table(groups_of(tmp_path))
    has_column = "lanes" in {c.header for c in table.columns}
    assert (column(table, "lanes") if has_column else None) == shown
    assert any("even share" in note for note in table.notes) == bool(shown)
    assert any(line.endswith(note) for line in table.notes)


def test_lanes_that_differ_within_a_row(tmp_path):
    for seed, lanes in enumerate((1, 12)):
        config = make_config(seed=seed)
        write_trial(tmp_path, f"{seed}", config, make_result(config, lanes=lanes))
    assert column(settings_table(groups_of(tmp_path)), "lanes") == ["1\u201312"]


def test_each_rank_at_its_own_best(tmp_path):
    for rank, lr, score in ((1, 1e-3, 0.7), (1, 4e-3, 0.8), (8, 1e-3, 0.9), (8, 4e-3, 0.6)):
        for seed in range(2):
            config = make_config(rank=rank, lr=lr, seed=seed)
            write_trial(tmp_path, f"{rank}-{lr}-{seed}", config, make_result(config, score))
    table = best_table(groups_of(tmp_path))
    assert column(table, "rank") == ["1", "8"]
    assert column(table, "lr") == ["4e-3", "1e-3"]
    assert column(table, "tried") == ["2", "2"]
    assert any("optimistic" in note for note in table.notes)


def test_targets_are_compared_not_tuned(tmp_path):
    write_sweep(tmp_path, ranks=(1, 2), rates=(5e-4, 1e-3), targets=("qv", "qkvo"), references=())
    assert len(best_table(groups_of(tmp_path)).rows) == 4


def test_no_best_table_without_a_choice(tmp_path):
    write_sweep(tmp_path, ranks=(1, 2))
    assert best_table(groups_of(tmp_path)) is None


def test_lower_is_better_for_a_loss(tmp_path):
    for lr, loss in ((1e-3, 0.4), (4e-3, 0.9)):
        config = make_config(lr=lr)
        write_trial(tmp_path, f"{lr}", config, make_result(config, loss, metric="loss"))
    table = best_table(groups_of(tmp_path))
    assert column(table, "lr") == ["1e-3"]
    assert column(table, "loss (best)") == ["0.40"]


def test_further_metrics_get_a_column(tmp_path):
    config = make_config(task="mnli")
    result = make_result(config, 0.84, extra={"accuracy_mismatched": 0.85})
    write_trial(tmp_path, "a", config, result)
    assert column(settings_table(groups_of(tmp_path)), "accuracy mismatched") == ["85.00"]


def test_one_seed_shows_a_dash(tmp_path):
    config = make_config()
    write_trial(tmp_path, "a", config, make_result(config, 0.8))
    table = settings_table(groups_of(tmp_path))
    assert column(table, "95% interval") == [MISSING]
    assert column(table, "accuracy (best)") == ["80.00"]


def test_markdown_structure(sweep):
    table = settings_table(groups_of(sweep))
    header, rule, *rows = to_markdown(table).strip().splitlines()
    assert len(rows) == len(table.rows)
    assert {line.count("|") for line in (header, rule, *rows)} == {len(table.columns) + 1}
    assert set(rule) <= set("|-: ")


def test_markdown_escapes_bars(tmp_path):
    for name in ("q|v", "q|k"):
        config = make_config(targets=name)
        write_trial(tmp_path, name.replace("|", ""), config, make_result(config))
    text = to_markdown(settings_table(groups_of(tmp_path)))
    assert r"q\|v" in text


def test_text_is_aligned(sweep):
    lines = to_text(settings_table(groups_of(sweep))).splitlines()
    assert len({len(line) for line in lines[1:15]}) == 1


def test_latex_structure(sweep):
    table = settings_table(groups_of(sweep))
    text = to_latex(table, "tab:x")
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")]
    assert body.count(r"\\") == len(table.rows)
    assert text.isascii()
    assert r"95\% interval" in text and r"$\pm$" in text
    assert all(text.count(rf"\{rule}") == 1 for rule in ("toprule", "midrule", "bottomrule"))


@pytest.mark.parametrize(
    ("plain", "latex"),
    [
        ("q_proj", r"q\_proj"),
        (r"a\b", r"a\textbackslash{}b"),
        ("50% & $1 #2 {x}", r"50\% \& \$1 \#2 \{x\}"),
        ("~^|", r"\textasciitilde{}\textasciicircum{}\textbar{}"),
        ("80 ± 1 \u00d7 \u2013", r"80 $\pm$ 1 $\times$ --"),
    ],
)
def test_latex_escapes(plain, latex):
    assert escape_latex(plain) == latex


def test_csv_has_raw_numbers(sweep):
    groups = groups_of(sweep)
    rows = list(csv.DictReader(io.StringIO(to_csv(groups))))
    assert len(rows) == len(groups)
    assert rows[0]["rank"] == "" and rows[1]["rank"] == "1"
    assert float(rows[1]["best_mean"]) == pytest.approx(groups[1].summary().mean)
    assert float(rows[1]["trainable_params"]) == 9216 + 148226
    assert {(row["cut"], row["lanes"]) for row in rows} == {("0", "1")}


def test_csv_counts_the_cut(halved_sweep):
    rows = list(csv.DictReader(io.StringIO(to_csv(groups_of(halved_sweep)))))
    assert [(row["rank"], row["finished"], row["cut"], row["lanes"]) for row in rows] == [
        ("2", "1", "2", "6"), ("4", "2", "1", "6"), ("8", "3", "0", "6"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-3, "1e-3"), (0.0004, "4e-4"), (16.0, "16"), (0.1, "0.1"), (None, "none"), (True, "yes"),
     ([0, 1], "0+1"), ({}, "none"), ({"q": 4}, "q: 4"), (2.5e-5, "2.5e-5")],
)  # fmt: skip
def test_values_are_short(value, text):
    assert format_value(value) == text


def test_names_stay_distinct():
    keys = ("task.name", "lora.rank", "lora.dropout", "model.dropout")
    assert list(short_names(keys).values()) == ["task", "rank", "lora.dropout", "model.dropout"]
