"""Rows of a report are trials of one identity: settings with an effect, and content."""

import pytest

from lorax.analysis.findings import findings
from lorax.analysis.groups import group_trials, varying_keys
from lorax.analysis.render import to_csv
from lorax.analysis.results import read_sweep
from lorax.analysis.table import best_table, settings_table
from tests.helpers.synthetic_sweep import make_config, make_result, write_trial


def write(root, number, score=0.8, *, mode="lora", rank=8, seed=0, **changes):
    """A trial; `train={"epochs": 2}` and its like change fields."""
    config = make_config(mode, rank, seed)
    for part, fields in changes.items():
        config[part] |= fields
    write_trial(root, f"trial-{number}", config, make_result(config, score))


def groups_of(root):
    return group_trials(read_sweep(root).trials)


def column(table, header):
    index = [c.header for c in table.columns].index(header)
    return [row[index].text for row in table.rows]


PARTS = {
    "data": ("task", "content"),
    "tokenizer": ("model", "tokenizer_content"),
    "base": ("model", "content"),
}


@pytest.mark.parametrize("part", PARTS)
def test_trials_of_other_content_never_share_a_row(tmp_path, part):
    section, name = PARTS[part]
    for number, digest in enumerate(["a" * 64, "a" * 64, "b" * 64, None]):
        write(tmp_path, number, seed=number, **{section: {name: digest}})
    groups = groups_of(tmp_path)
    assert sorted(len(group.trials) for group in groups) == [1, 1, 2]
    table = settings_table(groups)
    assert column(table, name) == [f"{part} {x}" for x in ("unknown", "aaaaaaaa", "bbbbbbbb")]
    (note,) = [note for note in table.notes if "content" in note]
    assert note.startswith(f"Trials were trained on several contents of {part} under one name")
    assert "Of unknown content are" in note
    assert "a" * 64 in to_csv(groups)


def test_nothing_is_chosen_or_compared_across_contents(tmp_path):
    for number, (digest, rank, lr, score) in enumerate(
        [("a", 1, 1e-3, 0.7), ("a", 8, 1e-3, 0.6), ("b", 8, 1e-3, 0.9), ("b", 8, 2e-3, 0.8)]
    ):
        content = {"task": {"content": digest * 64}, "optimizer": {"lr": lr}}
        write(tmp_path, number, score, rank=rank, **content)
    write(tmp_path, 9, 0.5, mode="head", task={"content": "b" * 64})
    groups = groups_of(tmp_path)
    best = best_table(groups)
    assert sorted(zip(column(best, "content"), column(best, "rank"), strict=True)) == [
        ("data aaaaaaaa", "1"),
        ("data aaaaaaaa", "8"),
        ("data bbbbbbbb", "8"),
        ("data bbbbbbbb", "\u2013"),
    ]
    first, second = findings(groups)
    assert first.title.startswith("data aaaaaaaa") and second.title.startswith("data bbbbbbbb")
    assert "Rank 1 has the highest mean" in first.sentences[0]
    assert not any("the head alone" in sentence for sentence in first.sentences)
    assert any("Rank 8 minus the head alone: +40.00" in line for line in second.sentences)


def test_the_content_of_several_tasks_is_no_difference_beside_their_names(tmp_path):
    for number, task in enumerate(["reviews", "cola"]):
        write(tmp_path, number, task={"name": task, "content": task[0] * 64})
    groups = groups_of(tmp_path)
    assert "task.content" not in varying_keys(groups)
    assert not [note for note in settings_table(groups).notes if "content" in note]


SAME = {
    "epochs beside max_steps": [{"train": {"max_steps": 9, "epochs": n}} for n in (1, 3)],
    "the order of names": [
        {"lora": {"rank_pattern": order}}
        for order in ({"query": 2, "value": 4}, {"value": 4, "query": 2})
    ],
    "the head's own rate": [
        {"mode": "head", "optimizer": {"lr": lr, "head_lr": 0.1}} for lr in (1e-3, 1e-2)
    ],
}


@pytest.mark.parametrize("why", SAME)
def test_settings_without_effect_do_not_part_seeds(tmp_path, why):
    for seed, changes in enumerate(SAME[why]):
        write(tmp_path, seed, seed=seed, **changes)
    (group,) = groups_of(tmp_path)
    assert len(group.trials) == 2
    assert not {"train.epochs", "optimizer.head_lr"} & {*varying_keys([group])}


def test_the_order_of_overlapping_patterns_parts_rows(tmp_path):
    for number, order in enumerate([{"query": 2, ".*": 4}, {".*": 4, "query": 2}]):
        write(tmp_path, number, lora={"rank_pattern": order})
    groups = groups_of(tmp_path)
    assert [len(group.trials) for group in groups] == [1, 1]
    assert not any(group.repeats for group in groups)
    shown = column(settings_table(groups), "rank_pattern")
    assert sorted(shown) == [".*: 4, query: 2", "query: 2, .*: 4"]


def test_trials_of_another_dropout_generator_have_rows_of_their_own(tmp_path):
    for number, generator in enumerate([None, "lowbias32"]):
        changes = {"lora": {"dropout": 0.1}, "train": {"dropout_generator": generator}}
        write(tmp_path, number, **changes)
    table = settings_table(groups_of(tmp_path))
    shown = ["masks threefry", "masks lowbias32"]
    assert column(table, "dropout_generator") == shown
    (note,) = [note for note in table.notes if "another dropout generator" in note]
    assert "threefry, of an earlier version" in note


def test_the_dropout_generator_is_no_difference_beside_the_rate(tmp_path):
    for number, (rate, generator) in enumerate([(0.0, None), (0.1, "lowbias32")]):
        changes = {"lora": {"dropout": rate}, "train": {"dropout_generator": generator}}
        write(tmp_path, number, **changes)
    groups = groups_of(tmp_path)
    assert "train.dropout_generator" not in varying_keys(groups)
    assert not [note for note in settings_table(groups).notes if "generator" in note]
