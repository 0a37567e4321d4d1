"""Figures of a sweep: metric by rank, learning curves, metric by trained parameters.

Matplotlib's object interface only: no pyplot, no window, no global state left behind.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from lorax.analysis.findings import describe
from lorax.analysis.groups import CONTEXT, Group, best_choices, partition, varying_keys
from lorax.analysis.results import Trial
from lorax.analysis.table import format_score, metric_title, scale

# Okabe and Ito's colours, distinct for all common forms of colour vision; without yellow.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
REFERENCES = {"full": ("#000000", "--", "full fine-tuning"), "head": ("#767676", ":", "head only")}
MARKERS = "osD^vP"
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "svg.fonttype": "path",
    "svg.hashsalt": "lorax",
}


@dataclass(frozen=True)
class Plot:
    """A figure with its file stem, its caption, and its alternative text."""

    name: str
    figure: Figure
    caption: str
    alt: str

    def save(self, directory: Path) -> None:
        """Write `<name>.png` at 200 dpi and `<name>.svg`, the same bytes on every run."""
        with mpl.rc_context(STYLE):
            self.figure.savefig(directory / f"{self.name}.png", dpi=200)
            self.figure.savefig(directory / f"{self.name}.svg", metadata={"Date": None})


def draw(groups: Sequence[Group]) -> list[Plot]:
    """All figures of a sweep, one set per task and model."""
    keys = varying_keys(groups)
    contexts = partition(groups, [key for key in keys if key in CONTEXT])
    plots = []
    with mpl.rc_context(STYLE):
        for index, context in enumerate(contexts, 1):
            suffix = f"-{index}" if len(contexts) > 1 else ""
            title = describe(context[0], [key for key in keys if key in CONTEXT])
            figures = (rank_figure, curves_figure, parameters_figure)
            drawn = (make(context, title) for make in figures)
            note = _about_cut(context)
            plots += [Plot(p.name + suffix, p.figure, p.caption + note, p.alt) for p in drawn if p]
    return plots


def rank_figure(groups: Sequence[Group], title: str = "") -> Plot | None:
    """The main metric against rank: one line per other setting, and horizontal references."""
    lora = _finished(groups, "lora")
    if not lora:
        return None
    lines = partition(lora, _line_keys(lora))
    highlights = [choice.group for choice in best_choices(lora, ["lora.rank"])]
    crowded = len(lines) > len(PALETTE)
    figure = Figure(figsize=(7.0, 4.4), layout="constrained")
    axes = figure.add_subplot()
    for index, line in enumerate(lines):
        if crowded:
            axes.plot(*_rank_means(line), color="#b8b8b8", lw=0.8, marker=".", ms=4)
        else:
            shift = 2.0 ** (0.09 * (index - (len(lines) - 1) / 2))
            _seed_line(axes, line, _line_label(line, lora), index, shift)
    if crowded:
        axes.plot([], [], color="#b8b8b8", lw=0.8, label=f"{len(lines)} settings")
        _seed_line(axes, highlights, "each rank at its best setting", 0, 1.0)
    _limit_scores(axes, lora, _reference_groups(groups))
    _draw_references(axes, groups)
    _rank_axis(axes, sorted({group.rank for group in lora}))
    axes.set(xlabel="LoRA rank", ylabel=f"dev {metric_title(lora[0].metric)}", title=title)
    _legend(figure, axes)
    best = max(highlights, key=Group.signed_score)
    return Plot(
        "rank",
        figure,
        f"Dev {best.metric} against rank at each seed's best epoch. Lines join means over seeds, "
        "bars are 95% Student-t intervals of the mean (cut at the axis where very wide), small "
        "dots single seeds; horizontal lines and bands are the references.",
        f"Line chart of dev {best.metric} by LoRA rank{_where(title)}; the best mean is "
        f"{format_score(best.summary().mean, best.metric)} at rank {best.rank}.",
    )


def curves_figure(groups: Sequence[Group], title: str = "") -> Plot | None:
    """Training loss and dev metric by step, each rank at its best setting."""
    lora = [choice.group for choice in best_choices(_finished(groups, "lora"), ["lora.rank"])]
    shown = lora + _reference_groups(groups)
    if not any(trial.records for group in shown for trial in group.trials):
        return None
    metric = shown[0].metric
    figure = Figure(figsize=(9.0, 3.9), layout="constrained")
    left, right = figure.subplots(1, 2)
    for group in shown:
        style = _curve_style(group, [group.rank for group in lora])
        _plot(left, _mean_curve(group.trials, "train", "loss"), _smooth, style)
        points = _mean_curve(group.trials, "eval", group.metric)
        marker = "o" if len(points) <= 30 else ""
        _plot(right, points, lambda y: y * scale(metric), style | {"marker": marker, "ms": 3})
    left.set(xlabel="optimizer step", ylabel="training loss, smoothed")
    right.set(xlabel="optimizer step", ylabel=f"dev {metric_title(metric)}")
    figure.suptitle(title, fontsize=10)
    _legend(figure, left, right)
    return Plot(
        "curves",
        figure,
        "Learning curves, each rank at its best setting: means over seeds up to the last step "
        "that all of them reached. The training loss is a centred moving average.",
        f"Two line charts by optimizer step{_where(title)}: training loss and dev {metric}, "
        "a line for each rank and reference.",
    )


def parameters_figure(groups: Sequence[Group], title: str = "") -> Plot | None:
    """The main metric against the number of trained parameters."""
    finished = [group for group in groups if group.trials]
    best = [choice.group for choice in best_choices(finished, ["train.mode", "lora.rank"])]
    shown = [group for group in best if group.mean("trainable_params") > 0]
    lora = [group for group in shown if group.mode == "lora"]
    if len(shown) < 3 or not lora:
        return None
    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log")
    _limit_scores(axes, lora, _reference_groups(groups))
    parameters = np.array([group.mean("trainable_params") for group in lora])
    label = "LoRA, rank above"
    _error_points(axes, parameters, lora, color=PALETTE[0], marker="o", label=label)
    for group in _reference_groups(groups):
        color, _, label = REFERENCES[group.mode]
        mean = group.summary().mean * scale(group.metric)
        low, high = axes.get_ylim()
        if not low <= mean <= high:
            label = _off_axis(label, mean, axes)
        x = np.array([group.mean("trainable_params")])
        _error_points(axes, x, [group], color=color, ls="none", marker="s", label=label)
    _label_ranks(axes, parameters, lora)
    axes.set(xlabel="trained parameters", ylabel=f"dev {metric_title(shown[0].metric)}")
    axes.set_title(title)
    _legend(figure, axes)
    return Plot(
        "parameters",
        figure,
        "Dev score against trained parameters (log scale), each rank at its best setting; bars "
        "are 95% Student-t intervals of the mean over seeds.",
        f"Scatter chart of dev {shown[0].metric} by trained parameters{_where(title)}.",
    )


def _finished(groups: Sequence[Group], mode: str) -> list[Group]:
    return [group for group in groups if group.mode == mode and group.trials]


def _reference_groups(groups: Sequence[Group]) -> list[Group]:
    """The best row of each mode without an adapter."""
    references = _finished(groups, "head") + _finished(groups, "full")
    return [choice.group for choice in best_choices(references, ["train.mode"])]


def _line_keys(lora: Sequence[Group]) -> list[str]:
    """The keys that distinguish lines: not the rank, nor keys derived from it (alpha = 2 r)."""
    tied = partition(lora, ["lora.rank"])
    keys = [key for key in varying_keys(lora) if key not in {"lora.rank", "train.mode"}]
    return [key for key in keys if any(len(partition(part, [key])) > 1 for part in tied)]


def _line_label(line: Sequence[Group], lora: Sequence[Group]) -> str:
    return describe(line[0], _line_keys(lora)) or "LoRA"


def _rank_means(line: Sequence[Group]) -> tuple[list[int], list[float]]:
    ordered = sorted(line, key=lambda group: group.rank)
    means = [group.summary().mean * scale(group.metric) for group in ordered]
    return [group.rank for group in ordered], means


def _seed_line(axes: Axes, line: Sequence[Group], label: str, index: int, shift: float) -> None:
    ordered = sorted(line, key=lambda group: group.rank)
    x = np.array([group.rank for group in ordered]) * shift
    color, marker = PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)]
    _error_points(axes, x, ordered, color=color, marker=marker, label=label)
    for position, group in zip(x, ordered, strict=True):
        scores = np.array(group.scores()) * scale(group.metric)
        dots = np.full(len(scores), position)
        axes.scatter(dots, scores, s=9, color=color, alpha=0.4, linewidths=0)


def _error_points(axes: Axes, x: np.ndarray, groups: Sequence[Group], **style: Any) -> None:
    summaries = [group.summary() for group in groups]
    unit = scale(groups[0].metric)
    y = np.array([summary.mean for summary in summaries]) * unit
    reach = np.array([summary.high - summary.mean for summary in summaries]) * unit
    axes.errorbar(
        x,
        y,
        yerr=np.nan_to_num(reach),
        ms=5,
        lw=1.4,
        elinewidth=1.2,
        capsize=2.5,
        **style,
    )


def _label_ranks(axes: Axes, x: np.ndarray, groups: Sequence[Group]) -> None:
    """Write ranks above their intervals, from the largest down, where there is room."""
    low, high = np.log(axes.get_xlim())
    taken = math.inf
    for position, group in sorted(zip(x, groups, strict=True), key=lambda pair: -pair[0]):
        if taken - math.log(position) > 0.03 * (high - low):
            taken = math.log(position)
            summary, unit = group.summary(), scale(group.metric)
            top = (summary.high if math.isfinite(summary.high) else summary.mean) * unit
            axes.annotate(
                str(group.rank),
                (position, min(top, axes.get_ylim()[1])),
                xytext=(0, 4),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )


def _limit_scores(axes: Axes, groups: Sequence[Group], references: Sequence[Group]) -> None:
    """Fit the axis to the seeds, and to intervals and references of a similar range."""
    unit = scale(groups[0].metric)
    seeds = np.concatenate([group.scores() for group in groups]) * unit
    room = max(float(np.ptp(seeds)), 5e-3 * abs(float(seeds.mean())), 1e-9)
    floor, ceiling = seeds.min() - room, seeds.max() + room
    wanted = [seeds.min(), seeds.max()]
    for summary in (group.summary() for group in groups):
        ends = np.array([summary.low, summary.high]) * unit
        wanted += np.clip(ends[np.isfinite(ends)], floor, ceiling).tolist()
    means = [group.summary().mean * unit for group in references]
    wanted += [mean for mean in means if floor <= mean <= ceiling]
    margin = 0.06 * max(max(wanted) - min(wanted), room)
    axes.set_ylim(min(wanted) - margin, max(wanted) + margin)


def _draw_references(axes: Axes, groups: Sequence[Group]) -> None:
    low, high = axes.get_ylim()
    for group in _reference_groups(groups):
        color, line, label = REFERENCES[group.mode]
        summary, unit = group.summary(), scale(group.metric)
        mean = summary.mean * unit
        if not low <= mean <= high:
            label = _off_axis(label, mean, axes)
            axes.plot([], [], color=color, ls=line, lw=1.3, label=label)
            continue
        axes.axhline(mean, color=color, ls=line, lw=1.3, label=label, zorder=1.5)
        if math.isfinite(summary.low):
            axes.axhspan(summary.low * unit, summary.high * unit, color=color, alpha=0.08, lw=0)
    axes.set_ylim(low, high)


def _off_axis(label: str, mean: float, axes: Axes) -> str:
    return f"{label}, {mean:.2f} ({'below' if mean < axes.get_ylim()[0] else 'above'} the axis)"


def _rank_axis(axes: Axes, ranks: Sequence[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator([float(rank) for rank in ranks]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(min(ranks) * 2**-0.5, max(ranks) * 2**0.5)


def _curve_style(group: Group, ranks: Sequence[int]) -> dict[str, Any]:
    if group.mode != "lora":
        color, line, label = REFERENCES[group.mode]
        return {"color": color, "ls": line, "lw": 1.3, "label": label}
    place = sorted(ranks).index(group.rank) / max(1, len(ranks) - 1)
    shade = mpl.colormaps["viridis"](0.88 * (1 - place))
    return {"color": shade, "lw": 1.5, "label": f"rank {group.rank}"}


def _mean_curve(trials: Sequence[Trial], kind: str, key: str) -> Mapping[int, float]:
    """Means over seeds, at the steps that all seeds reached."""
    curves = [curve for trial in trials if (curve := trial.curve(kind, key))]
    if not curves:
        return {}
    shared = set.intersection(*(set(curve) for curve in curves))
    return {step: float(np.mean([curve[step] for curve in curves])) for step in sorted(shared)}


def _plot(
    axes: Axes,
    points: Mapping[int, float],
    transform: Callable[[np.ndarray], np.ndarray],
    style: Mapping[str, Any],
) -> None:
    if points:
        axes.plot(list(points), transform(np.array(list(points.values()))), **style)


def _smooth(y: np.ndarray) -> np.ndarray:
    """A centred moving average over a fifteenth of the curve, shorter at both ends."""
    width = max(1, len(y) // 15)
    kernel = np.ones(width)
    return np.convolve(y, kernel, "same") / np.convolve(np.ones_like(y), kernel, "same")


def _legend(figure: Figure, *all_axes: Axes) -> None:
    """One legend below everything, the references last."""
    entries: dict[str, Any] = {}
    for axes in all_axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    references = tuple(label for _, _, label in REFERENCES.values())
    labels = sorted(entries, key=lambda label: label.startswith(references))
    width = max(map(len, labels), default=1) + 6
    columns = max(1, min(len(labels), int(figure.get_figwidth() * 14) // width))
    handles = [entries[label] for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def _about_cut(groups: Sequence[Group]) -> str:
    if not any(group.cut and group.trials for group in groups):
        return ""
    return " Seeds that halving cut are left out, which biases the means upwards."


def _where(title: str) -> str:
    return f" ({title})" if title else ""


__all__ = ["Plot", "curves_figure", "draw", "parameters_figure", "rank_figure"]
