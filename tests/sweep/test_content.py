"""Data, tokenizer or base that change under one name: nothing goes on, nothing is mixed."""

import dataclasses
import json
import shutil

import hydra
import numpy as np
import pytest

from lorax.errors import LoraxError
from lorax.launch.application import config_of
from lorax.lora.dropout import GENERATOR
from lorax.runs.adapter import load_adapter
from lorax.runs.content import Content, check_record, content_of, with_content
from lorax.runs.trial import Trial
from lorax.runs.trial_id import recorded_content, trial_dir, trial_id
from lorax.runtime.provenance import command_line
from lorax.sweep import run_packed, run_trials
from lorax.train import check_trial, run_trial
from lorax.train.run import Run

pytestmark = pytest.mark.slow

TRAIN = {"max_steps": 6, "checkpoint_every": 2, "eval_every": 6, "log_every": 1}
KINDS = {
    "serial": lambda trials: [run_trial(trial) for trial in trials],
    "packed": run_packed,
}


def flip_labels(path):
    """The other class for every row; as many bytes as before."""
    header, *rows = path.read_text().splitlines()
    flipped = [f"{row[:-1]}{1 - int(row[-1])}" for row in rows]
    path.write_text("\n".join([header, *flipped]) + "\n")


def swap_words(path):
    tokenizer = json.loads(path.read_text())
    words = tokenizer["model"]["vocab"]
    words["good"], words["bad"] = words["bad"], words["good"]
    path.write_text(json.dumps(tokenizer))


def change_last_byte(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the least bit but a few of a weight
    path.write_bytes(data)


def change_epsilon(path):
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"layer_norm_eps": 1e-3}))


CHANGES = {
    "data": ("glue/SST-2/dev.tsv", flip_labels, "task.data_dir={root}/glue"),
    "tokenizer": ("base/tokenizer.json", swap_words, "the tokenizer of model.source={root}/base"),
    "weights": ("base/model.safetensors", change_last_byte, "the weights or config of model."),
    "config": ("base/config.json", change_epsilon, "the weights or config of model.source={root}"),
}


@pytest.fixture(scope="module")
def own(world, tmp_path_factory):
    """A world whose files may be changed."""
    root = tmp_path_factory.mktemp("own")
    shutil.copytree(world.source, root / "base")
    shutil.copytree(world.data_dir / "SST-2", root / "glue" / "SST-2")
    return dataclasses.replace(world, source=root / "base", data_dir=root / "glue")


@pytest.fixture
def files(own):
    """The world's folder, as it was again after the test."""
    root = own.source.parent
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    yield root
    for path, data in before.items():
        path.write_bytes(data)


def trials_of(own, root, **train):
    """Two trials, which share a program."""
    train = TRAIN | train
    return [own.trial(root, lora={"rank": rank}, train=train) for rank in (1, 2)]


def outcomes(trials):
    """All that a trial has come to, to the bit."""
    found = []
    for trial in trials:
        flat, _, about = load_adapter(trial_dir(trial) / "adapter")
        arrays = {path: np.asarray(leaf).tobytes() for path, leaf in flat.items()}
        found.append(((trial_dir(trial) / "metrics.jsonl").read_bytes(), arrays, about))
    return found


@pytest.fixture(scope="module")
def whole(own, tmp_path_factory):
    """By kind: trials that nothing has interrupted."""
    ran = {kind: trials_of(own, tmp_path_factory.mktemp(kind)) for kind in KINDS}
    for kind, run in KINDS.items():
        run(ran[kind])
    return ran


@pytest.fixture(scope="module", params=KINDS)
def cut_short(own, tmp_path_factory, request):
    """(kind, trials interrupted at step 5 of 6, with a checkpoint at step 4)."""
    root = tmp_path_factory.mktemp("cut")
    settle = Run.settle

    def interrupt(lane, number, lr, loss):
        settle(lane, number, lr, loss)
        if number == 5:
            raise KeyboardInterrupt

    trials = trials_of(own, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "settle", interrupt)
        for group in [trials] if request.param == "packed" else [[trial] for trial in trials]:
            with pytest.raises(KeyboardInterrupt):
                KINDS[request.param](group)
    return request.param, trials


def checkpoints(trials):
    root = trial_dir(trials[0]).parent
    return sorted(path.name for path in root.rglob("checkpoints/*"))


def forget_content(directory):
    """A trial's config as earlier versions wrote it."""
    config = json.loads((directory / "config.json").read_text())
    del config["model"]["content"], config["model"]["tokenizer_content"], config["task"]["content"]
    (directory / "config.json").write_text(json.dumps(config))


def test_a_trial_goes_on_with_what_it_began_with_and_with_nothing_else(cut_short, whole, files):
    kind, trials = cut_short
    run = KINDS[kind]
    before = checkpoints(trials)
    assert "4" in before
    for name, change, place in CHANGES.values():
        saved = (files / name).read_bytes()
        change(files / name)
        with pytest.raises(LoraxError) as fault:
            run(trials)
        line = f"{trial_dir(trials[0])} was trained with another content of "
        assert str(fault.value).startswith(line + place.format(root=files))
        assert "another sweep.name" in str(fault.value) and "\n" not in str(fault.value)
        assert checkpoints(trials) == before
        (files / name).write_bytes(saved)

    # The checkpoint knows, too.
    name, change, _ = CHANGES["data"]
    saved = (files / name).read_bytes()
    configs = {trial_dir(trial): (trial_dir(trial) / "config.json").read_text() for trial in trials}
    for directory in configs:
        forget_content(directory)
    change(files / name)
    with pytest.raises(LoraxError, match=r"was trained with another content of task\.data_dir="):
        run(trials)
    (files / name).write_bytes(saved)
    for directory, config in configs.items():
        (directory / "config.json").write_text(config)

    run(trials)
    assert outcomes(trials) == outcomes(whole[kind])


@pytest.mark.parametrize("run", [run_trial, lambda trial: run_packed([trial])])
def test_a_finished_trial_of_other_content_is_refused(whole, files, run):
    (trial, _) = whole["serial"]
    flip_labels(files / "glue" / "SST-2" / "train.tsv")
    with pytest.raises(LoraxError, match=r"was trained with another content of task\.data_dir="):
        run(trial)


def test_its_content_stands_in_all_that_a_trial_leaves(whole, own):
    for trial in (whole["serial"][0], whole["packed"][1]):
        directory = trial_dir(trial)
        content = content_of(trial)
        digests = {part: x for part, x in dataclasses.asdict(content).items() if part != "masks"}
        assert all(len(digest) == 64 for digest in digests.values())
        assert content.masks is None  # without dropout
        assert recorded_content(directory) == digests
        result = json.loads((directory / "result.json").read_text())
        about = load_adapter(directory / "adapter")[2]
        assert result["content"] == about["content"] == dataclasses.asdict(content)
        assert about["base"]["content"] == content.base


def test_a_result_says_how_it_was_made(whole):
    for kind in KINDS:
        result = json.loads((trial_dir(whole[kind][0]) / "result.json").read_text())
        assert result["seed"] == 0
        assert result["began"] <= result["ended"] and result["ended"].endswith("+00:00")
        assert result["command"] == command_line()
        environment = result["environment"]
        assert environment["jaxlib"] and environment["numpy"] and environment["tokenizers"]
        assert len(environment["commit"].removesuffix("-dirty")) == 40


@pytest.fixture(scope="module")
def composed(own, tmp_path_factory):
    """What Hydra makes of a command line."""
    words = own.overrides(tmp_path_factory.mktemp("command"))
    with hydra.initialize_config_module("conf", version_base=None):
        return hydra.compose("finetune", words)


@pytest.mark.parametrize("part", CHANGES)
def test_a_command_names_the_content_and_another_is_another_trial(composed, files, part):
    first = config_of(composed)
    assert content_of(first) == Content(
        first.task.content, first.model.tokenizer_content, first.model.content
    )
    name, change, place = CHANGES[part]
    change(files / name)
    with pytest.raises(LoraxError) as fault:  # as in a job that starts later
        check_trial(first)
    assert str(fault.value).startswith(place.format(root=files))
    assert "changed since the command was given" in str(fault.value)
    second = config_of(composed)
    assert trial_id(first) != trial_id(second)
    assert not trial_dir(second).exists()


def test_a_finished_trial_of_unknown_content_stays_finished(whole, own, tmp_path, files):
    """As earlier versions left it: found by a command, which names the content in its id."""
    (trial, _) = trials_of(own, tmp_path)
    shutil.copytree(trial_dir(whole["serial"][0]), trial_dir(trial))
    forget_content(trial_dir(trial))
    before = (trial_dir(trial) / "result.json").stat().st_mtime_ns
    named = with_content(trial)
    assert trial_id(named) != trial_id(trial) and trial_dir(named) == trial_dir(trial)
    for run in (run_trials, run_packed):
        (result,) = run([named])
        assert result["status"] == "finished"
    assert (trial_dir(trial) / "result.json").stat().st_mtime_ns == before
    assert [path.name for path in tmp_path.glob("tiny/*lora*")] == [trial_id(trial)]


@pytest.mark.parametrize("missing", ["adapter", "config.json"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_finished_trial_of_which_a_part_is_missing_is_run_again(
    own, whole, tmp_path, caplog, missing, kind
):
    (trial, _) = trials_of(own, tmp_path)
    shutil.copytree(trial_dir(whole["serial"][0]), trial_dir(trial))
    path = trial_dir(trial) / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    (result,) = KINDS[kind]([trial])
    words = f"{trial_dir(trial)} has a result, but no {missing}: the trial is run again"
    assert [r.getMessage() for r in caplog.records if "run again" in r.getMessage()] == [words]
    assert result["status"] == "finished" and path.exists()
    assert outcomes([trial]) == outcomes(whole["serial"][:1])
    caplog.clear()
    KINDS[kind]([trial])
    assert "run again" not in caplog.text


def test_a_base_of_the_hub_is_known_by_its_commit(world, tmp_path, monkeypatch):
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for revision, commit in (("main", "a" * 40), ("v2", "b" * 40)):
        folder = tmp_path / "models--someone--base"
        shutil.copytree(world.source, folder / "snapshots" / commit)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / revision).write_text(commit)
    for revision, letter in ((None, "a"), ("v2", "b")):
        model = {"source": "someone/base", "revision": revision}
        content = content_of(world.trial(tmp_path, model=model))
        assert content.tokenizer == content.base == letter * 40
    absent = content_of(world.trial(tmp_path, model={"source": "someone/else"}))
    assert absent.tokenizer is absent.base is None and absent.data


@pytest.fixture(scope="module")
def dropped(own, tmp_path_factory):
    """A trained trial with dropout, as a version with another generator left it."""
    root = tmp_path_factory.mktemp("dropped")
    trial = own.trial(root, train=TRAIN, lora={"rank": 2, "alpha": 4.0, "dropout": 0.1})
    run_trial(trial)
    path = trial_dir(trial) / "config.json"
    config = json.loads(path.read_text())
    assert config["train"].pop("dropout_generator") == GENERATOR
    path.write_text(json.dumps(config))
    return trial


def test_a_trial_with_masks_of_another_generator_is_never_taken_for_one_of_this(dropped):
    named = with_content(dropped)
    assert named.train.dropout_generator == GENERATOR
    assert trial_dir(named) != trial_dir(dropped) and not trial_dir(named).exists()
    with pytest.raises(LoraxError, match=r"masks drawn by another generator \(threefry, now"):
        run_trial(dropped)


@pytest.mark.parametrize("recorded", [None, {"data": "a" * 64}, {"masks": "threefry"}])
def test_a_checkpoint_of_another_generator_is_refused(dropped, recorded):
    trial, content = Trial.of(dropped), Content(masks=GENERATOR)
    with pytest.raises(LoraxError, match="masks drawn by another generator"):
        check_record(trial, {"content": recorded}, content)
    check_record(trial, {"content": recorded}, Content())  # draws none


@pytest.mark.parametrize(
    ("changes", "generator"),
    [
        ({"model": {"dropout": 0.0}}, None),
        ({"model": {"dropout": None}}, GENERATOR),  # the checkpoint's own is 0.1
        ({"lora": {"dropout": 0.1}}, GENERATOR),
        ({"lora": {"dropout": 0.1}, "train": {"mode": "head"}}, None),
    ],
)
def test_a_command_names_the_generator_where_masks_are_drawn(own, changes, generator):
    trial = own.trial(**changes)
    named = with_content(trial)
    assert named.train.dropout_generator == generator
    without = dataclasses.replace(named.train, dropout_generator=None)
    is_other = trial_id(named) != trial_id(dataclasses.replace(named, train=without))
    assert is_other == (generator is not None)


def test_a_generator_that_is_not_this_versions_is_refused(own, tmp_path):
    trial = own.trial(tmp_path, model={"dropout": 0.1}, train={"dropout_generator": "threefry"})
    with pytest.raises(LoraxError, match=r"train\.dropout_generator=threefry: this version draws"):
        check_trial(trial)


def test_a_generator_in_a_trial_without_dropout_is_refused(own, tmp_path):
    trial = own.trial(tmp_path, train={"dropout_generator": GENERATOR})
    with pytest.raises(
        LoraxError, match=r"train\.dropout_generator=\w+: this trial draws no masks"
    ):
        check_trial(trial)
