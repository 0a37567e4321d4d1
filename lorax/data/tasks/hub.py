"""GLUE from the Hugging Face hub, for machines without the TSV files."""

import hashlib
import json
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from lorax.data.examples import Examples
from lorax.data.tasks.task import Task
from lorax.errors import LoraxError

if TYPE_CHECKING:
    import datasets

REPOSITORY = "nyu-mll/glue"


def load_hub_split(task: Task, split: str) -> Examples:
    """Download one split of GLUE, or read it from the hub's cache.

    Raises:
      LoraxError: the extra `hub` is not installed, or the hub does not answer.
    """
    remedy = f"set task.data_dir to a folder that holds {task.folder}/{split}.tsv"
    try:
        import datasets
    except ImportError as error:
        raise LoraxError(
            f"task {task.name} is not on this disk, and the hub needs `pip install datasets`: "
            f"install it, or {remedy}"
        ) from error
    try:
        dataset = datasets.load_dataset(
            REPOSITORY, task.name, split=split.replace("dev", "validation")
        )
    except Exception as error:  # the hub client's faults share no base class
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise LoraxError(
            f"task {task.name} is not on this disk, and {REPOSITORY} on the hub failed "
            f"({reason}): {remedy}"
        ) from error
    return from_hub(task, dataset)


@lru_cache(maxsize=16)
def hub_content(task: Task) -> str:
    """The SHA-256 of the hub's training and dev examples, computed once per process."""
    sums = hashlib.sha256()
    for split in ("train", *task.dev_splits):
        found = load_hub_split(task, split)
        columns = [found.first, found.second, found.labels.tolist()]
        sums.update(json.dumps([split, *columns]).encode())
    return sums.hexdigest()


def from_hub(task: Task, dataset: "datasets.Dataset") -> Examples:
    """Convert a labelled split of `nyu-mll/glue`; class ids are mapped by name to the task's.

    Raises:
      LoraxError: a column is missing or an example has no label (the hub's test splits).
    """
    columns = task.hub_columns or task.text_columns
    if missing := {*columns, "label"} - {*dataset.column_names}:
        raise LoraxError(f"{REPOSITORY} {task.name}: no column {sorted(missing)[0]!r}")
    texts = [list(dataset[column]) for column in columns]
    return Examples(texts[0], texts[1] if len(texts) == 2 else None, _labels(task, dataset))


def _labels(task: Task, dataset: "datasets.Dataset") -> np.ndarray:
    raw = np.asarray(list(dataset["label"]))
    if task.kind == "regression":
        return raw.astype(np.float32)
    names = getattr(dataset.features["label"], "names", task.labels)
    if set(names) != set(task.labels):
        raise LoraxError(f"{REPOSITORY} {task.name}: labels {names}, expected {task.labels}")
    if raw.min(initial=0) < 0:
        raise LoraxError(f"{REPOSITORY} {task.name}: this split has no labels")
    return np.asarray([task.labels.index(name) for name in names], np.int32)[raw]
