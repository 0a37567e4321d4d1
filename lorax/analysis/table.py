"""The table model, and a sweep's tables: all settings, each rank's best, pruned trials."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorax.analysis.groups import (
    CONTEXT,
    MISSING,
    MODES,
    Choice,
    Group,
    best_choices,
    content_notes,
    display,
    format_value,
    is_tuned,
    short_names,
    varying_keys,
)
from lorax.analysis.results import Trial
from lorax.analysis.statistics import Summary
from lorax.metric_direction import lower_is_better

TIMES = "\u00d7"
MIB = 2**20


@dataclass(frozen=True)
class Column:
    """A heading, what it means, and whether its cells are numbers (set flush right)."""

    header: str
    meaning: str
    numeric: bool = True


@dataclass(frozen=True)
class Cell:
    """The text of a cell and its sort key: the text itself unless a number is given."""

    text: str
    number: float | None = None


@dataclass(frozen=True)
class Table:
    """Rows of cells under columns; the notes are below the table in every format."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()


_Entry = tuple[Column, Callable[[Group], Cell]]


def settings_table(groups: Sequence[Group]) -> Table:
    """One row per setting (trials that differ in seed only), without wholly pruned settings."""
    rows = [group for group in groups if group.has_row]
    entries = _setting_entries(groups) + _result_entries(rows) + _cost_entries(groups)
    return _build("All settings", entries, rows, (*_notes(rows), *_cost_notes(groups)))


def best_table(groups: Sequence[Group]) -> Table | None:
    """One row per rank (and task, model, targets ...), each at its own best tuned setting.

    None if no rank finished at more than one setting: the settings table is then sufficient.

    Learning rate, alpha and the other tuned keys (`groups.is_tuned`) are chosen by the mean dev
    metric, so that a rank sweep does not merely measure how well one learning rate fits a rank.
    """
    choices = tuned_choices(groups)
    if all(sum(bool(group.trials) for group in choice.among) == 1 for choice in choices):
        return None
    tried = {id(choice.group): len(choice.among) for choice in choices}
    column = Column("tried", "settings tried for this rank, of which the row is the best")
    entry: _Entry = (column, lambda group: _count(tried[id(group)]))
    best = [choice.group for choice in choices]
    entries = [*_setting_entries(groups), entry, *_result_entries(best)]
    note = (
        "Each row is the best of the settings tried for it all of whose seeds finished (or as "
        "many as of any), by mean dev metric: picked on the "
        "scores it is reported with, so optimistic, the more so the more were tried."
    )
    return _build("Each rank at its own best setting", entries, best, (note, *_notes(best)))


def cut_table(groups: Sequence[Group]) -> Table | None:
    """One row per trial that halving pruned, with its setting; None if it pruned none."""
    if not any(group.cut for group in groups):
        return None
    settings = _setting_entries(groups)
    name = Column("trial", "the name of its directory", numeric=False)
    columns = (name, *(column for column, _ in settings), *_cut_columns(groups))
    rows = tuple(
        (Cell(trial.id), *(cell(group) for _, cell in settings), *_cut_cells(trial))
        for group in groups
        for trial in group.cut
    )
    note = (
        "Halving ended these trials early; they are in no mean, and a setting all of whose trials "
        "were cut is in this table only."
    )
    return Table("Cut by halving", columns, rows, (note,))


def tuned_choices(groups: Sequence[Group]) -> list[Choice]:
    """For each value of the keys that are compared, the best group over the tuned ones."""
    return best_choices(groups, [key for key in varying_keys(groups) if not is_tuned(key)])


def scale(metric: str) -> float:
    """GLUE's convention: scores are shown times 100, losses as they are."""
    return 1.0 if lower_is_better(metric) else 100.0


def format_score(value: float, metric: str) -> str:
    """A score with two decimals in the unit of `scale`; a dash for nan."""
    return _fixed(value * scale(metric), 2)


def metric_title(metric: str) -> str:
    """A metric's name with its unit."""
    return f"{metric} ({TIMES}100)" if scale(metric) == 100.0 else metric


def format_interval(summary: Summary, metric: str) -> str:
    """`[low, high]` in the unit of `scale`; a dash for one seed, or seeds that do not differ."""
    if not math.isfinite(summary.low):
        return MISSING
    return f"[{format_score(summary.low, metric)}, {format_score(summary.high, metric)}]"


def format_place(trial: Trial) -> str:
    """The place of a pruned trial among those that it was compared with: `7 of 8`."""
    place, of = (_fixed(trial.cut_number(key), 0) for key in ("place", "of"))
    return f"{place} of {of}"


def lanes_of(groups: Sequence[Group]) -> list[int]:
    """The distinct `Trial.lanes` of finished trials, whose costs are shown; ascending."""
    return sorted({trial.lanes for group in groups for trial in group.trials})


def were_packed(groups: Sequence[Group]) -> bool:
    """Whether any trial shared its program, even with trials that did not finish."""
    return any(trial.lanes > 1 for group in groups for trial in group.ended)


def main_metric(groups: Sequence[Group]) -> str:
    """The main metric's name, or `dev metric` where tasks differ in it."""
    names = {group.metric for group in groups}
    return names.pop() if len(names) == 1 else "dev metric"


def context_keys(groups: Sequence[Group]) -> list[str]:
    """Those of task and model that vary."""
    return [key for key in varying_keys(groups) if key in CONTEXT]


def _build(
    title: str, entries: Sequence[_Entry], groups: Sequence[Group], notes: tuple[str, ...]
) -> Table:
    rows = tuple(tuple(cell(group) for _, cell in entries) for group in groups)
    return Table(title, tuple(column for column, _ in entries), rows, notes)


def _setting_entries(groups: Sequence[Group]) -> list[_Entry]:
    keys = varying_keys(groups)
    names = short_names(keys)

    def entry(key: str) -> _Entry:
        values = [group.value(key) for group in groups if group.has(key)]
        numeric = any(_is_number(value) for value in values)
        meaning = {
            "train.mode": "what is trained: the head alone, LoRA adapter and head, or everything",
            "lora.rank": "the adapter's rank r",
        }.get(key, f"the setting {key}")
        return Column(names[key], meaning, numeric), lambda group: _setting(group, key)

    return [entry(key) for key in keys]


def _setting(group: Group, key: str) -> Cell:
    if not group.has(key):
        return Cell(MISSING, -math.inf)
    value = group.value(key)
    if key == "train.mode" and value in MODES:
        return Cell(value, MODES.index(value))
    return Cell(display(group, key), float(value) if _is_number(value) else None)


def _result_entries(groups: Sequence[Group]) -> list[_Entry]:
    metric = main_metric(groups)
    unit = f" ({TIMES}100)" if any(scale(group.metric) == 100.0 for group in groups) else ""
    best = Column(
        f"{metric} (best)",
        f"the main dev metric{unit} of each seed at its best epoch: mean ± sample standard "
        "deviation over seeds",
    )
    interval = Column(
        "95% interval", "Student-t interval of that mean over seeds; needs seeds that differ"
    )
    median = Column("median", "the median over seeds at the best epoch, as the LoRA paper reports")
    last = Column(
        f"{metric} (last)",
        "the same metric after the last epoch, which no choice on the dev set has touched: "
        "mean ± sample standard deviation",
    )
    seeds = Column(
        "seeds", "trials that ended, one a seed; those diverged or cut by halving are in no mean"
    )
    return [
        (seeds, _seeds),
        (best, lambda group: _mean_std(group, "best", group.metric)),
        (interval, _interval),
        (median, lambda group: _score(group.summary().median, group.metric)),
        (last, lambda group: _mean_std(group, "last", group.metric)),
        *(_extra_entry(name) for name in _extra_metrics(groups)),
    ]


def _extra_metrics(groups: Sequence[Group]) -> list[str]:
    names = {name for group in groups for trial in group.trials for name in trial.metrics()}
    mains = {group.metric for group in groups}
    return sorted(name for name in names - mains if not lower_is_better(name))


def _extra_entry(name: str) -> _Entry:
    meaning = f"{name} ({TIMES}100) at the epoch that is best by the main metric: mean ± deviation"
    return Column(name.replace("_", " "), meaning), lambda group: _mean_std(group, "best", name)


def _cut_columns(groups: Sequence[Group]) -> tuple[Column, ...]:
    unit = f" ({TIMES}100)" if any(scale(group.metric) == 100.0 for group in groups) else ""
    return (
        Column("seed", "the trial's seed"),
        Column("cut at step", "the optimizer step at which halving ended the trial"),
        Column(
            "place",
            "its place, by the best main dev metric so far, among the trials of its pack that were "
            "compared, and how many of these went on",
        ),
        Column(f"{main_metric(groups)} so far", f"the best main dev metric{unit} up to the cut"),
    )


def _cut_cells(trial: Trial) -> tuple[Cell, ...]:
    seed, went_on = trial.config.get("seed"), _fixed(trial.cut_number("goes_on"), 0)
    place = f"{format_place(trial)} ({went_on} went on)"
    return (
        Cell(format_value(seed), seed if _is_number(seed) else None),
        _number(trial.cut_number("step"), 0),
        Cell(place, _sortable(trial.cut_number("place"))),
        _score(trial.score(), trial.metric),
    )


def _cost_entries(groups: Sequence[Group]) -> list[_Entry]:
    lanes: _Entry = (
        Column("lanes", "trials that shared the program and its time; 1: a trial alone"),
        _lanes,
    )
    return [
        (
            Column("trainable", "trained parameters: adapter and head, or all"),
            lambda group: _number(group.mean("trainable_params"), 0),
        ),
        (
            Column("share %", "trained parameters in percent of all parameters"),
            lambda group: _number(100 * _share(group), 2),
        ),
        (
            Column(
                "s/step",
                "median seconds of an optimizer step, compilation excluded; in a pack, the trial's "
                "even share",
            ),
            lambda group: _significant(group.mean("seconds_per_step")),
        ),
        (
            Column(
                "memory MiB",
                "arguments and temporaries of the compiled step (XLA's analysis); in a pack, the "
                "whole pack's",
            ),
            lambda group: _number(group.mean("step_memory_bytes") / MIB, 0),
        ),
        *([lanes] if were_packed(groups) else []),
    ]


def _notes(groups: Sequence[Group]) -> tuple[str, ...]:
    notes = [*content_notes(groups)]
    if any(group.diverged for group in groups):
        notes.append(
            "Diverged trials are counted under seeds and left out of every mean, which flatters "
            "a row that has some."
        )
    if any(group.cut for group in groups):
        notes.append(
            "Trials that halving cut are counted under seeds and left out of every mean, which is "
            "then over the seeds that did best: biased upwards."
        )
    if any(len(group.trials) == 1 for group in groups):
        notes.append(f"A row of one seed has no deviation and no interval ({MISSING}).")
    if any(group.summary().std == 0.0 for group in groups):
        notes.append(
            f"A row whose seeds all score the same has no interval ({MISSING}): without spread, "
            "nothing tells how sure its mean is."
        )
    return tuple(notes)


def _cost_notes(groups: Sequence[Group]) -> tuple[str, ...]:
    if not were_packed(groups):
        return ()
    note = (
        "Where lanes is above 1, trials ran in a pack: s/step is an even share of the pack's, "
        "memory is the whole pack's"
    )
    is_mixed = len(lanes_of(groups)) > 1
    return (f"{note}; costs do not compare across lanes." if is_mixed else f"{note}.",)


def _lanes(group: Group) -> Cell:
    lanes = lanes_of([group])
    if not lanes:
        return Cell(MISSING, -math.inf)
    return Cell(f"{lanes[0]}\u2013{lanes[-1]}" if len(lanes) > 1 else str(lanes[0]), lanes[-1])


def _share(group: Group) -> float:
    total = group.mean("total_params")
    return group.mean("trainable_params") / total if total else math.nan


def _seeds(group: Group) -> Cell:
    ended, lost = len(group.ended), (("diverged", group.diverged), ("cut", group.cut))
    parts = [f"{len(trials)} {status}" for status, trials in lost if trials]
    return Cell(f"{ended} ({', '.join(parts)})" if parts else str(ended), ended)


def _mean_std(group: Group, epoch: str, metric: str) -> Cell:
    summary = group.summary(epoch, metric)
    mean = format_score(summary.mean, metric)
    spread = f" ± {format_score(summary.std, metric)}" if math.isfinite(summary.std) else ""
    return Cell(mean + spread, _sortable(summary.mean))


def _interval(group: Group) -> Cell:
    summary = group.summary()
    return Cell(format_interval(summary, group.metric), _sortable(summary.low))


def _score(value: float, metric: str) -> Cell:
    return Cell(format_score(value, metric), _sortable(value))


def _count(value: int) -> Cell:
    return Cell(str(value), value)


def _number(value: float, decimals: int) -> Cell:
    return Cell(_fixed(value, decimals), _sortable(value))


def _significant(value: float) -> Cell:
    if not math.isfinite(value):
        return Cell(MISSING, -math.inf)
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return Cell(f"{value:.{digits}f}", value)


def _fixed(value: float, decimals: int) -> str:
    return f"{value:,.{decimals}f}" if math.isfinite(value) else MISSING


def _sortable(value: float) -> float:
    return value if math.isfinite(value) else -math.inf


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
