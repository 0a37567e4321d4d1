"""One table, four formats: plain text, Markdown, LaTeX (booktabs) and CSV."""

import csv
import io
import math
from collections.abc import Sequence

from lorax.analysis.groups import Group, format_value, short_names, varying_keys
from lorax.analysis.table import Table

_LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "±": r"$\pm$",
    "\u00d7": r"$\times$",
    "\u2013": "--",
}
_COSTS = (
    "trainable_params",
    "adapter_params",
    "total_params",
    "seconds_per_step",
    "compile_seconds",
    "seconds_total",
    "step_memory_bytes",
    "peak_rss_bytes",
    "flops_per_step",
    "adapter_bytes",
    "lanes",
)


def to_text(table: Table) -> str:
    """For a terminal: columns aligned with spaces."""
    grid = _grid(table)
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    lines = ["  ".join(_pad(table, widths, row)).rstrip() for row in grid]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join([table.title, *lines, *table.notes]) + "\n"


def to_markdown(table: Table) -> str:
    """A GitHub-flavoured table, aligned in its source too."""
    grid = [[cell.replace("|", r"\|") for cell in row] for row in _grid(table)]
    widths = [max(3, *map(len, column)) for column in zip(*grid, strict=True)]
    lines = ["| " + " | ".join(_pad(table, widths, row)) + " |" for row in grid]
    rule = (
        "-" * (width - 1) + (":" if column.numeric else "-")
        for width, column in zip(widths, table.columns, strict=True)
    )
    lines.insert(1, "| " + " | ".join(rule) + " |")
    notes = "".join(f"\n{note}\n" for note in table.notes)
    return "\n".join(lines) + "\n" + notes


def to_latex(table: Table, label: str) -> str:
    r"""A `table` environment for `\usepackage{booktabs}`; the notes end the caption."""
    spec = "".join("r" if column.numeric else "l" for column in table.columns)
    header, *body = ["    " + " & ".join(map(escape_latex, row)) + r" \\" for row in _grid(table)]
    caption = " ".join(f"{escape_latex(text.rstrip('.'))}." for text in (table.title, *table.notes))
    return "\n".join(
        [
            r"\begin{table}",
            r"  \centering",
            rf"  \caption{{{caption}}}",
            rf"  \label{{{label}}}",
            rf"  \begin{{tabular}}{{{spec}}}",
            r"    \toprule",
            header,
            r"    \midrule",
            *body,
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def to_csv(groups: Sequence[Group]) -> str:
    """Every setting with raw numbers (metrics in [0, 1], bytes, seconds), for further analysis.

    A setting whose trials were all pruned has no row, as in the tables.
    """
    keys = varying_keys(groups)
    stats = ("mean", "std", "median", "low", "high")
    header = [*short_names(keys).values(), "finished", "diverged", "cut", "metric"]
    header += [f"{epoch}_{stat}" for epoch in ("best", "last") for stat in stats]
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([*header, *_COSTS])
    for group in (group for group in groups if group.has_row):
        row = [format_value(group.value(key)) if group.has(key) else "" for key in keys]
        row += [str(len(trials)) for trials in (group.trials, group.diverged, group.cut)]
        row += [group.metric]
        summaries = [group.summary(epoch) for epoch in ("best", "last")]
        row += [_raw(getattr(summary, stat)) for summary in summaries for stat in stats]
        writer.writerow([*row, *(_raw(group.mean(key)) for key in _COSTS)])
    return stream.getvalue()


def escape_latex(text: str) -> str:
    r"""Escape a plain string for LaTeX text.

    >>> escape_latex("q_proj & 50%")
    'q\\_proj \\& 50\\%'
    """
    return "".join(_LATEX.get(character, character) for character in text)


def _grid(table: Table) -> list[list[str]]:
    header = [column.header for column in table.columns]
    return [header, *([cell.text for cell in row] for row in table.rows)]


def _pad(table: Table, widths: Sequence[int], row: Sequence[str]) -> list[str]:
    return [
        text.rjust(width) if column.numeric else text.ljust(width)
        for text, width, column in zip(row, widths, table.columns, strict=True)
    ]


def _raw(value: float) -> str:
    return f"{value:.10g}" if math.isfinite(value) else ""
