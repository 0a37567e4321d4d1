"""`sweep.plan=true`: the packs of a sweep, with their predicted and measured costs."""

import sys
from collections.abc import Sequence
from typing import Any

from lorax.config import TrialConfig
from lorax.runs.pack_dir import read_record
from lorax.sweep.compatibility import why_apart
from lorax.sweep.cost import GIB, memory_limit
from lorax.sweep.pack import Pack
from lorax.sweep.run_sweep import checked, plan_sweep
from lorax.sweep.words import counted

COLUMNS = ("pack", "trials", "rank", "at once", "padded", "GiB", "s/step", "seconds")


def show_plan_if_asked(trials: Sequence[TrialConfig]) -> None:
    """With `sweep.plan=true`, print the plan and end the process.

    Raises:
      SystemExit: status 0, after the plan is printed.
    """
    if any(trial.sweep.plan for trial in trials):
        print_plan(trials)
        raise SystemExit(0)


def print_plan(trials: Sequence[TrialConfig]) -> None:
    """Print the plan of all trials, including ended ones, with measurements of earlier runs.

    Raises:
      LoraxError: as `lorax.sweep.run_packed`.
    """
    unique = list(dict.fromkeys(checked(trials)))
    packs = plan_sweep(unique, with_times=True)
    print(table(COLUMNS, [row for pack in packs for row in _rows(pack)]))
    limit = memory_limit(trials[0]) / GIB
    shape = f"{counted(len(unique), 'trial')} in {counted(len(packs), 'pack')}"
    print(f"{shape}; memory limit {limit:.1f} GiB")
    if reason := why_apart([trial.config for trial in unique]):
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


def _rows(pack: Pack) -> list[list[str]]:
    """A pack as predicted, and as measured if it was trained."""
    predicted, measured = pack.predicted, _measured(pack)
    shape = [str(len(pack.trials)), str(predicted["rank"]), str(predicted["side_by_side"])]
    padded = f"{100 * (predicted['padding'] or 0):.0f}%"
    costs = [_gib(predicted["memory_bytes"]), *_times(predicted)]
    rows = [[pack.name, *shape, padded, *costs]]
    if measured:
        rows.append(["  measured", *[""] * 4, _gib(measured.get("peak_bytes")), *_times(measured)])
    return rows


def _measured(pack: Pack) -> dict[str, Any]:
    record = read_record(pack.directory)
    measured = record.get("measured") if record else None
    items = measured.items() if isinstance(measured, dict) else ()
    return {name: value for name, value in items if isinstance(value, int | float)}


def _times(facts: dict[str, Any]) -> list[str]:
    return [_seconds(facts.get(name)) for name in ("seconds_per_step", "seconds")]


def _gib(number: float | None) -> str:
    return "" if number is None else f"{number / GIB:.2f}"


def _seconds(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:.3g}" if number < 100 else f"{number:,.0f}"
