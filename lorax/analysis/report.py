"""A sweep's report: tables, figures and one self-contained page, built from files only."""

import base64
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from lorax.analysis import figures, render
from lorax.analysis.findings import Finding, caveats, findings
from lorax.analysis.groups import Group, constant_settings, format_value, group_trials
from lorax.analysis.results import Sweep, Trial, read_sweep
from lorax.analysis.table import (
    Column,
    Table,
    best_table,
    cut_table,
    format_place,
    format_score,
    settings_table,
)
from lorax.errors import LoraxError

MOST_NAMES = 12


@dataclass(frozen=True)
class Report:
    """The content that all formats share.

    Attributes:
      sweep: the sweep that was read.
      groups: its ended trials by setting.
      settings: the table of all settings.
      best: the table of each rank at its best setting; None if there was nothing to choose.
      cut: the trials that halving pruned; None if it pruned none.
      findings: the results in words.
      caveats: how far to trust them.
      warnings: files that could not be read and trials that were left out.
    """

    sweep: Sweep
    groups: tuple[Group, ...]
    settings: Table
    best: Table | None
    cut: Table | None
    findings: tuple[Finding, ...]
    caveats: tuple[str, ...]
    warnings: tuple[str, ...]

    def text(self) -> str:
        """The report for a terminal."""
        parts = [render.to_text(table) for table in self.tables()]
        parts += [_lines(finding.title, *finding.sentences) for finding in self.findings]
        parts.append(_lines(*self.counts(), *(f"warning: {line}" for line in self.warnings)))
        return "\n".join(parts)

    def tables(self) -> list[Table]:
        """The existing tables, the most concise one first."""
        return [table for table in (self.best, self.settings, self.cut) if table is not None]

    def counts(self) -> list[str]:
        """The number of trials of each status, with the names of those that did not finish."""
        cut = len(self.sweep.with_status("cut"))
        head = f"{len(self.sweep.with_status('finished'))} of {len(self.sweep.trials)} finished"
        lines = [f"{head}, {cut} cut by halving" if cut else head]
        for status in ("diverged", "unfinished"):
            names = [trial.id for trial in self.sweep.with_status(status)]
            if names:
                more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
                lines.append(f"{len(names)} {status}: {', '.join(names[:MOST_NAMES])}{more}")
        return lines


def build_report(sweep_dir: str | Path) -> Report:
    """Read a sweep and compute its tables and findings; writes nothing.

    Raises:
      LoraxError: no directory, no trials, or none with a final metric.
    """
    sweep = read_sweep(sweep_dir)
    groups = group_trials(sweep.trials)
    if not any(group.trials for group in groups):
        counts = [f"{len(sweep.with_status(s))} {s}" for s in ("diverged", "unfinished", "cut")]
        raise LoraxError(
            f"{sweep.directory}: nothing to report, none of its {len(sweep.trials)} trials has "
            f"finished ({', '.join(counts)}); wait for one or resume the sweep"
        )
    repeats = [
        f"{trial.id}: left out, another trial has the same setting and seed"
        for group in groups
        for trial in group.repeats
    ]
    return Report(
        sweep,
        tuple(groups),
        settings_table(groups),
        best_table(groups),
        cut_table(groups),
        tuple(findings(groups)),
        tuple(caveats(sweep, groups)),
        (*sweep.warnings, *repeats),
    )


def write_report(sweep_dir: str | Path, output: str | Path | None = None) -> Path:
    """Write `report.md`, `report.html`, `table.tex`, `table.csv` and the figures.

    Args:
      sweep_dir: the directory whose sub-directories are trials.
      output: where to write; None means `<sweep_dir>/report`.

    Returns:
      The path of `report.html`, which needs no other file.
    """
    return save_report(build_report(sweep_dir), output)


def save_report(report: Report, output: str | Path | None = None) -> Path:
    """Write a report that is already built; see `write_report`."""
    directory = Path(output) if output is not None else report.sweep.directory / "report"
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LoraxError(f"{directory}: cannot write the report there ({error.strerror})") from None
    plots = figures.draw(report.groups)
    for plot in plots:
        plot.save(directory)
    context = _context(report, plots, directory)
    files = {
        "table.tex": _latex(report),
        "table.csv": render.to_csv(report.groups),
        "report.md": _template("report.md.j2").render(context),
        "report.html": _template("report.html.j2").render(context),
    }
    for name, text in files.items():
        (directory / name).write_text(text, encoding="utf-8")
    return directory / "report.html"


def _lines(*lines: str) -> str:
    return "\n".join(lines) + "\n"


def _latex(report: Report) -> str:
    tables = {"tab:best": report.best, "tab:settings": report.settings, "tab:cut": report.cut}
    return "\n".join(render.to_latex(table, label) for label, table in tables.items() if table)


def _template(name: str) -> Any:
    environment = Environment(
        loader=PackageLoader("lorax.analysis", "."),
        autoescape=name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["markdown"] = render.to_markdown
    return environment.get_template(name)


def _context(report: Report, plots: Sequence[figures.Plot], directory: Path) -> dict[str, Any]:
    return {
        "report": report,
        "name": report.sweep.directory.resolve().name,
        "definitions": _definitions(report.tables()),
        "shared": {k: format_value(v) for k, v in constant_settings(report.groups).items()},
        "environment": _environment(report.sweep.trials),
        "plots": [(plot, _data_uri(directory / f"{plot.name}.svg")) for plot in plots],
        "trials": [_trial_row(trial, directory) for trial in report.sweep.trials],
    }


def _definitions(tables: Sequence[Table]) -> list[Column]:
    columns = {column.header: column for table in tables for column in table.columns}
    return list(columns.values())


def _environment(trials: Sequence[Trial]) -> dict[str, str]:
    """Every value that any trial reports, most frequent first."""
    seen: dict[str, Counter[str]] = {}
    for trial in trials:
        environment = trial.result.get("environment")
        for key, value in environment.items() if isinstance(environment, Mapping) else ():
            seen.setdefault(key, Counter())[str(value)] += 1
    return {key: ", ".join(v for v, _ in counter.most_common()) for key, counter in seen.items()}


def _trial_row(trial: Trial, directory: Path) -> dict[str, str]:
    files = ("result.json", "config.json")
    path = next(trial.directory / f for f in files if (trial.directory / f).is_file())
    return {
        "id": trial.id,
        "href": Path(os.path.relpath(path.resolve(), directory.resolve())).as_posix(),
        "seed": format_value(trial.config.get("seed")),
        "status": _status(trial),
        "score": format_score(trial.score(), trial.metric),
    }


def _status(trial: Trial) -> str:
    if trial.status == "diverged" and trial.result.get("reason"):
        return f"diverged: {trial.result['reason']}"
    if trial.status == "cut" and math.isfinite(step := trial.cut_number("step")):
        return f"cut at step {step:.0f}, place {format_place(trial)}"
    return trial.status


def _data_uri(svg: Path) -> str:
    # An <img> keeps the ids of several figures apart; the doctype would name a remote DTD.
    text = re.sub(r"<\?xml.*?\?>|<!DOCTYPE.*?>", "", svg.read_text("utf-8"), flags=re.DOTALL)
    encoded = base64.b64encode(text.strip().encode()).decode()
    return f"data:image/svg+xml;base64,{encoded}"
