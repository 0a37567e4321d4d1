"""`sweep.plan=true`: how trials would be packed, what it would cost, what it did cost."""

import sys
from collections.abc import Sequence
from typing import Any

from lorax.config import TrialConfig
from lorax.sweep.cost import GIB, memory_limit
from lorax.sweep.groups import group_trials, why_apart
from lorax.sweep.pack import Pack, read_record
from lorax.sweep.packed import checked
from lorax.sweep.planner import plan_packs

COLUMNS = (
    "pack",
    "trials",
    "rank",
    "side by side",
    "padding",
    "memory, predicted",
    "measured",
    "s/step, predicted",
    "measured",
    "seconds, predicted",
    "measured",
)


def show_plan_if_asked(trials: Sequence[TrialConfig]) -> None:
    """With `sweep.plan=true`, print the plan and end the process.

    Raises:
      SystemExit: status 0, when it was asked for.
    """
    if any(trial.sweep.plan for trial in trials):
        print_plan(trials)
        raise SystemExit(0)


def print_plan(trials: Sequence[TrialConfig]) -> None:
    """Print the plan of all trials, ended ones included, with what was measured in earlier runs.

    Raises:
      LoraxError: as `lorax.sweep.run_packed`.
    """
    trials = checked(trials)
    groups = [[trials[n] for n in group] for group in group_trials(trials)]
    packs = [pack for group in groups for pack in plan_packs(group, with_times=True)]
    print(table(COLUMNS, [_row(pack) for pack in packs]))
    limit = memory_limit(trials[0]) / GIB
    print(f"{len(trials)} trials in {len(packs)} packs; memory limit {limit:.1f} GiB")
    if reason := why_apart(trials):
        print(f"apart, as they differ in {reason}")
    sys.stdout.flush()


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Rows under columns, in Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    widths = [max(len(line[n]) for line in lines) for n in range(len(columns))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def _row(pack: Pack) -> list[str]:
    predicted, measured = pack.predicted, _measured(pack)
    return [
        pack.name,
        str(len(pack.trials)),
        str(predicted["rank"]),
        str(predicted["side_by_side"]),
        f"{100 * (predicted['padding'] or 0):.0f}%",
        _gib(predicted["memory_bytes"]),
        _gib(measured.get("peak_bytes")),
        _seconds(predicted.get("seconds_per_step")),
        _seconds(measured.get("seconds_per_step")),
        _seconds(predicted.get("seconds")),
        _seconds(measured.get("seconds")),
    ]


def _measured(pack: Pack) -> dict[str, Any]:
    return (read_record(pack.directory) or {}).get("measured") or {}


def _gib(number: float | None) -> str:
    return "" if number is None else f"{number / GIB:.2f} GiB"


def _seconds(number: float | None) -> str:
    return "" if number is None else f"{number:.3g}"
