"""The description of a task, and the readers of its splits."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorax.data.documents import Documents
from lorax.data.examples import Examples


@dataclass(frozen=True)
class ExampleReader:
    """Reads a task of labelled examples.

    Attributes:
      read: (task, split, `data_dir` or None) -> the examples of that split.
      content: (task, `data_dir` or None) -> the SHA-256 of the sources of training and dev
        examples.
    """

    read: Callable[["Task", str, str | os.PathLike | None], Examples]
    content: Callable[["Task", str | os.PathLike | None], str]


@dataclass(frozen=True)
class DocumentReader:
    """Reads a task of documents.

    Attributes:
      read: (split, the user's file or folder, the tokenizer's folder or None) -> the documents of
        that split.
    """

    read: Callable[[str, Path, Path | None], Documents]


@dataclass(frozen=True)
class Task:
    """A text task: one or two texts in, a class or a score out; or documents for a decoder.

    Attributes:
      name: key of `TASKS`, and the configuration's name on the hub.
      reader: of its splits.
      folder: the task's folder in GLUE's layout; elsewhere empty.
      text_columns: one or two columns of the TSV file; none of documents.
      label_column: the column of the label or score.
      kind: `classification` or `regression`, of `load_split`'s examples; or `causal_lm`, the next
        token of `load_documents`' documents.
      labels: class names in official order; empty for other kinds.
      metrics: the first one chooses the best epoch.
      dev_splits: splits scored while training; the first one chooses the best epoch.
      test_splits: labelled splits that are not used to choose anything.
      label_format: how the TSV file writes a class: its `name`, or its `id` in `labels`.
      header: the columns of a file that has no header line.
      hub_columns: text columns on the hub where they differ from `text_columns`.
      drop_broken_rows: rows with a wrong number of fields are dropped with a warning, as the
        hub's copy of the official file does; elsewhere they are refused.
      allow_empty_text: an empty text is data; elsewhere it is refused.
    """

    name: str
    reader: ExampleReader | DocumentReader
    folder: str = ""
    text_columns: tuple[str, ...] = ()
    label_column: str = "label"
    kind: Literal["classification", "regression", "causal_lm"] = "classification"
    labels: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("accuracy",)
    dev_splits: tuple[str, ...] = ("dev",)
    test_splits: tuple[str, ...] = ()
    label_format: Literal["id", "name"] = "id"
    header: tuple[str, ...] | None = None
    hub_columns: tuple[str, ...] | None = None
    drop_broken_rows: bool = False
    allow_empty_text: bool = False

    @property
    def num_outputs(self) -> int:
        """Width of the head: the number of classes, 1 for regression, 0 (no head) for causal_lm."""
        return 0 if self.kind == "causal_lm" else len(self.labels) or 1

    @property
    def splits(self) -> tuple[str, ...]:
        """Every labelled split."""
        return ("train", *self.dev_splits, *self.test_splits)
