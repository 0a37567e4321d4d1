"""Trials that differ in data alone share a program; all others are told apart, with the reason."""

import dataclasses
import re

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from lorax.config import (
    HalvingConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    SweepConfig,
    TaskConfig,
    TrackingConfig,
    TrainConfig,
    TrialConfig,
)
from lorax.sweep.compatibility import even_parts, group_trials, program_settings, why_apart

DATA = {
    "rank": TrialConfig(lora=LoraConfig(rank=64)),
    "alpha": TrialConfig(lora=LoraConfig(alpha=1.0)),
    "scaling": TrialConfig(lora=LoraConfig(scaling="rslora")),
    "targets": TrialConfig(lora=LoraConfig(targets=["q", "mlp"], exclude=["layers.0.query"])),
    "layers": TrialConfig(lora=LoraConfig(layers=[0])),
    "patterns": TrialConfig(
        lora=LoraConfig(rank_pattern={"query": 2}, alpha_pattern={"query": 2.0})
    ),
    "initialiser": TrialConfig(lora=LoraConfig(init="gaussian")),
    "rates": TrialConfig(optimizer=OptimizerConfig(lr=1.0, head_lr=2.0)),
    "schedule": TrialConfig(optimizer=OptimizerConfig(schedule="cosine", warmup_ratio=0.5)),
    "optimizer": TrialConfig(
        optimizer=OptimizerConfig(weight_decay=0.5, clip_norm=None, b1=0.5, b2=0.5, eps=1e-4)
    ),
    "seed": TrialConfig(seed=7),
    "padding": TrialConfig(train=TrainConfig(pad_rank=64)),
    "early stopping": TrialConfig(train=TrainConfig(early_stopping=1)),
    "records": TrialConfig(train=TrainConfig(log_every=1, keep_checkpoints=True)),
    "tracking": TrialConfig(tracking=TrackingConfig(kind="none")),
}
PROGRAM = {
    "task.name": TrialConfig(TaskConfig("cola")),
    "task.max_length": TrialConfig(TaskConfig(max_length=64)),
    "task.max_train_samples": TrialConfig(TaskConfig(max_train_samples=5)),
    "model.source": TrialConfig(model=ModelConfig(source="elsewhere")),
    "model.pooling": TrialConfig(model=ModelConfig(pooling="cls")),
    "model.dropout": TrialConfig(model=ModelConfig(dropout=0.25)),
    "lora.dropout": TrialConfig(lora=LoraConfig(dropout=0.5)),
    "train.batch_size": TrialConfig(train=TrainConfig(batch_size=8)),
    "train.grad_accum": TrialConfig(train=TrainConfig(grad_accum=2)),
    "train.epochs": TrialConfig(train=TrainConfig(epochs=7)),
    "train.max_steps": TrialConfig(train=TrainConfig(max_steps=7)),
    "train.eval_every": TrialConfig(train=TrainConfig(eval_every=7)),
    "train.checkpoint_every": TrialConfig(train=TrainConfig(checkpoint_every=7)),
    "train.precision": TrialConfig(train=TrainConfig(precision="bf16")),
    "train.base_dtype": TrialConfig(train=TrainConfig(base_dtype="bf16")),
    "train.max_shapes": TrialConfig(train=TrainConfig(max_shapes=1)),
    "output_dir": TrialConfig(output_dir="elsewhere"),
    "sweep.name": TrialConfig(sweep=SweepConfig(name="other")),
}


@pytest.mark.parametrize("name", DATA)
def test_what_is_data_does_not_part_trials(name):
    assert group_trials([TrialConfig(), DATA[name]]) == [[0, 1]]
    assert why_apart([TrialConfig(), DATA[name]]) == ""


@pytest.mark.parametrize("name", PROGRAM)
def test_what_shapes_the_program_parts_trials_and_is_named_alone(name):
    trials = [TrialConfig(), PROGRAM[name]]
    assert group_trials(trials) == [[0], [1]]
    values = [program_settings(trial)[name] for trial in trials]
    reason = why_apart(trials)
    assert reason.startswith(f"{name} (") and ";" not in reason
    for value in values:
        assert ("null" if value is None else str(value)) in reason


def test_every_field_of_task_model_and_train_is_either_data_or_parts_trials():
    """A field that is added later parts trials until someone says that it is data."""
    named = {
        f.name for part in (TaskConfig, ModelConfig, TrainConfig) for f in dataclasses.fields(part)
    }
    parted = {name.rpartition(".")[2] for name in program_settings(TrialConfig())}
    free = {"pad_rank", "early_stopping", "log_every", "keep_checkpoints"}
    assert named - parted == free


def test_the_adapters_fields_do_not_part_trials_of_the_head_alone():
    head = TrainConfig(mode="head")
    trials = [TrialConfig(train=head), TrialConfig(train=head, lora=LoraConfig(dropout=0.5))]
    assert group_trials(trials) == [[0, 1]]
    assert group_trials([TrialConfig(), trials[0]]) == [[0], [1]]
    assert why_apart([TrialConfig(), trials[0]]).startswith("train.mode (lora, head)")


def test_full_fine_tuning_shares_with_nobody_but_itself():
    full = [TrialConfig(train=TrainConfig(mode="full"), seed=n) for n in (0, 1, 0)]
    assert group_trials(full) == [[0, 2], [1]]
    assert why_apart(full) == "full fine-tuning freezes nothing to share"
    mixed = why_apart([*full, TrialConfig()])
    assert "train.mode (full, lora)" in mixed and "nothing to share" in mixed


def test_equal_numbers_of_other_types_do_not_part_trials():
    one, other = LoraConfig(dropout=0), LoraConfig(dropout=0.0)
    assert group_trials([TrialConfig(lora=one), TrialConfig(lora=other)]) == [[0, 1]]


def test_halving_and_limits_do_not_part_trials():
    sweep = SweepConfig(halving=HalvingConfig(after=2), max_trials=2, lanes=1)
    assert group_trials([TrialConfig(), TrialConfig(sweep=sweep)]) == [[0, 1]]


CHOICES = st.builds(
    lambda task, rank, seed, drop, mode: TrialConfig(
        task=TaskConfig(task),
        lora=LoraConfig(rank=rank, dropout=drop),
        seed=seed,
        train=TrainConfig(mode=mode),
    ),
    st.sampled_from(["cola", "mrpc"]),
    st.sampled_from([1, 2]),
    st.sampled_from([0, 1]),
    st.sampled_from([0.0, 0.1]),
    st.sampled_from(["lora", "head", "full"]),
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.lists(CHOICES, max_size=12))
def test_groups_are_the_classes_of_equal_programs_in_order(trials):
    groups = group_trials(trials)
    assert sorted(n for group in groups for n in group) == list(range(len(trials)))
    assert all(group == sorted(group) for group in groups)
    assert [group[0] for group in groups] == sorted(group[0] for group in groups)
    place = {n: i for i, group in enumerate(groups) for n in group}
    programs = [program_settings(trial) for trial in trials]
    for n in range(len(trials)):
        for m in range(n):
            assert (place[n] == place[m]) == (programs[n] == programs[m])
    assert bool(why_apart(trials)) == (len(groups) > 1)


def test_a_reason_shows_a_few_values_of_many():
    trials = [TrialConfig(TaskConfig(max_length=length)) for length in range(8, 40)]
    (shown,) = re.findall(r"task.max_length \((.*)\)", why_apart(trials))
    assert shown == "8, 9, 10, 11, 12, 13"


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(1, 60), st.integers(1, 70))
def test_even_parts_are_few_even_and_in_order(count, most):
    parts = even_parts(range(count), most)
    assert [n for part in parts for n in part] == list(range(count))
    sizes = [len(part) for part in parts]
    assert max(sizes) <= most
    assert max(sizes) - min(sizes) <= 1
    assert (len(parts) - 1) * most < count
