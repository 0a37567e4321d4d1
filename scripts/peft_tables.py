"""The figures of `agree_with_peft.py`, as Markdown."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lorax import data
from lorax.analysis.statistics import summarize, welch_interval
from lorax.errors import LoraxError

Record = dict[str, Any]
LIBRARIES = ("peft", "lorax")


def read_record(path: Path) -> Record:
    """A file of earlier figures.

    Raises:
      LoraxError: it is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except ValueError as fault:
        raise LoraxError(f"{path} is damaged ({fault}); delete it") from None


def figures(metrics: dict[str, float]) -> str:
    """Metrics in percent."""
    return ", ".join(f"{name} {100 * value:.2f}" for name, value in metrics.items())


def loss_table(records: list[Record]) -> str:
    """Part `losses` in Markdown."""
    lines = [
        "| task | steps | loss, first 50 | loss, all | dev, PEFT | dev, lorax | differ |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in records:
        dev = r["dev"]
        theirs, ours = (figures(dev["metrics"][name]) for name in LIBRARIES)
        lines.append(
            f"| {r['settings']['task']['name']} | {r['steps']} | {r['relative_first']:.1e} "
            f"| {r['relative_all']:.1e} | {theirs} | {ours} "
            f"| {dev['predictions_that_differ']} of {dev['examples']} |"
        )
    return "\n".join(lines)


def seed_table(records: list[Record]) -> str:
    """Part `seeds` in Markdown: means, their difference, and its Welch interval."""
    lines = [
        "| task | metric | epoch | seeds | PEFT | lorax | difference | 95% interval | 0 in it |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [row for record in records for row in _seed_rows(record)]
    return "\n".join(lines)


def _seed_rows(record: Record) -> Iterator[str]:
    task = record["settings"]["task"]["name"]
    seeds = [seed for seed in record["peft"] if seed in record["lorax"]]
    for metric in data.get_task(task).metrics:
        for place in ("best", "last"):
            theirs, ours = ([record[n][s][place][metric] for s in seeds] for n in LIBRARIES)
            yield f"| {task} | {metric} | {place} | {len(seeds)} | {_comparison(theirs, ours)} |"


def _comparison(theirs: list[float], ours: list[float]) -> str:
    cells = []
    for values in (theirs, ours):
        summary = summarize(values)
        cells.append(f"{100 * summary.mean:.2f} ± {100 * summary.std:.2f}")
    if len(ours) < 2:
        return " | ".join([*cells, "needs two seeds", "", ""])
    cells.append(f"{100 * float(np.mean(ours) - np.mean(theirs)):+.2f}")
    low, high = (100 * end for end in welch_interval(ours, theirs))
    if np.isnan(low):
        return " | ".join([*cells, "no spread", ""])
    return " | ".join([*cells, f"[{low:+.2f}, {high:+.2f}]", "yes" if low <= 0 <= high else "no"])


def print_tables(folder: Path) -> None:
    """Everything that is in `folder`, as Markdown."""
    tables = {"losses": loss_table, "seeds": seed_table}
    for part, table in tables.items():
        if records := [read_record(path) for path in sorted(folder.glob(f"{part}-*.json"))]:
            print(f"\n{table(records)}")
