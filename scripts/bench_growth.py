"""Time and memory of a training step as rank, length, batch and targets grow.

    python scripts/bench_growth.py --figure docs/images/growth.png

The default encoder in fp32, without dropout; where it does not grow, LoRA r = 8 on query and value,
a batch of 32 examples of 64 tokens each. Time is the median of `--steps` steps after three that do
not count; memory is XLA's plan for the step, weights included. Full fine-tuning is measured beside
each setting that it depends on.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench_step import Step, timed

MEGA = 1e6
GROWN: dict[str, tuple[Any, ...]] = {
    "rank": (1, 4, 16, 64, 256),
    "tokens": (16, 32, 64, 128, 256),
    "batch": (4, 8, 16, 32, 64),
    "targets": ("q", "qv", "qkvo", "all-linear"),
}
FIXED: dict[str, Any] = {"rank": 8, "tokens": 64, "batch": 32, "targets": "qv"}
OF_THE_ADAPTER = ("rank", "targets")


class Point(NamedTuple):
    """One measurement."""

    axis: str
    value: Any
    mode: str
    seconds: float
    memory: int


def measure(axis: str, value: Any, mode: str, steps: int) -> Point:
    """Time a step with one setting changed."""
    from lorax.config import LoraConfig, ModelConfig, TrainConfig, TrialConfig

    at = FIXED | {axis: value}
    trial = TrialConfig(
        model=ModelConfig(dropout=0.0),
        lora=LoraConfig(rank=at["rank"], targets=at["targets"]),
        train=TrainConfig(mode=mode, batch_size=at["batch"]),
    )
    step = Step(trial, at["tokens"])
    return Point(axis, value, mode, timed(step, steps), step.memory)


def measure_all(steps: int) -> list[Point]:
    """All points; full fine-tuning once for what only the adapter depends on."""
    points = []
    for axis, values in GROWN.items():
        for value in values:
            points.append(measure(axis, value, "lora", steps))
            print(line(points[-1]), flush=True)
        for value in values[:1] if axis in OF_THE_ADAPTER else values:
            points.append(measure(axis, value, "full", steps))
            print(line(points[-1]), flush=True)
    return points


def line(point: Point) -> str:
    """A line of the table."""
    setting = "any" if point.mode == "full" and point.axis in OF_THE_ADAPTER else point.value
    cells = (point.axis, setting, point.mode, f"{1e3 * point.seconds:.0f}")
    return "| " + " | ".join(map(str, (*cells, f"{point.memory / MEGA:.0f}"))) + " |"


def draw(points: Sequence[Point], path: Path) -> None:
    """A column of panels for each setting: time above, memory below."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, len(GROWN), figsize=(11, 5), sharex="col", layout="constrained")
    for column, (axis, values) in enumerate(GROWN.items()):
        for mode, color in (("lora", "#0072b2"), ("full", "#999999")):
            own = [p for p in points if p.axis == axis and p.mode == mode]
            for row, heights in enumerate(
                ([1e3 * p.seconds for p in own], [p.memory / MEGA for p in own])
            ):
                panel = axes[row][column]
                if axis in OF_THE_ADAPTER and mode == "full":
                    panel.axhline(heights[0], color=color, ls="--")
                    continue
                label = "LoRA" if mode == "lora" else "full fine-tuning"
                places = [values.index(p.value) for p in own]
                panel.plot(places, heights, "o-", color=color, label=label)
                panel.spines[["top", "right"]].set_visible(False)
                panel.grid(axis="y", alpha=0.3)
        for panel in axes[:, column]:
            panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
        axes[1][column].set_xticks(range(len(values)), list(map(str, values)))
        axes[1][column].set_xlabel("tokens an example" if axis == "tokens" else axis)
    axes[0][0].set_ylabel("a step, ms")
    axes[1][0].set_ylabel("memory, MB")
    axes[0][1].legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--figure", type=Path, help="where the figure goes")
    options = parser.parse_args()
    from lorax.runtime.process import prepare_process

    prepare_process()
    columns = ("setting", "value", "mode", "ms a step", "MB")
    for cells in (columns, ["---"] * len(columns)):
        print("| " + " | ".join(cells) + " |")
    points = measure_all(options.steps)
    if options.figure:
        draw(points, options.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
