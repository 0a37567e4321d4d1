"""What is known of each task before a file is read: one frozen row a task."""

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from lorax.errors import LoraxError


@dataclass(frozen=True)
class Task:
    """A text task: one or two texts in, a class or a score out; or documents to go on with.

    Attributes:
      name: key of `TASKS`, and the configuration's name on the hub.
      folder: the task's folder in GLUE's layout; elsewhere empty.
      text_columns: one or two columns of the TSV file; none of documents.
      label_column: the column of the label or score.
      kind: `classification` or `regression`, of `load_split`'s examples; or `causal_lm`, the next
        token of `load_documents`' documents.
      labels: class names in official order; empty for other kinds.
      metrics: the first one chooses the best epoch.
      dev_splits: splits scored while training; the first one chooses the best epoch.
      test_splits: labelled splits that choose nothing.
      label_format: how the TSV file writes a class: its `name`, or its `id` in `labels`.
      header: the columns of a file that has no header line.
      hub_columns: text columns on the hub where they differ from `text_columns`.
      drop_broken_rows: rows with a wrong number of fields are dropped with a warning, as the
        hub's copy of the official file does; elsewhere they are refused.
      allow_empty_text: an empty text is data; elsewhere it is refused.
    """

    name: str
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


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_NEXT_TOKEN = ("perplexity", "token_accuracy")

_ALL = (
    Task(
        name="cola",
        folder="CoLA",
        text_columns=("sentence",),
        labels=("unacceptable", "acceptable"),
        metrics=("matthews", "accuracy"),
        header=("source", "label", "annotation", "sentence"),
    ),
    Task(
        name="sst2",
        folder="SST-2",
        text_columns=("sentence",),
        labels=("negative", "positive"),
    ),
    Task(
        name="mrpc",
        folder="MRPC",
        text_columns=("#1 String", "#2 String"),
        label_column="Quality",
        labels=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
        hub_columns=_PAIR,
    ),
    Task(
        name="stsb",
        folder="STS-B",
        text_columns=_PAIR,
        label_column="score",
        kind="regression",
        metrics=("pearson", "spearman"),
    ),
    Task(
        name="rte",
        folder="RTE",
        text_columns=_PAIR,
        labels=_ENTAILMENT,
        label_format="name",
    ),
    Task(
        name="wnli",
        folder="WNLI",
        text_columns=_PAIR,
        labels=("not_entailment", "entailment"),
    ),
    Task(
        name="qnli",
        folder="QNLI",
        text_columns=("question", "sentence"),
        labels=_ENTAILMENT,
        label_format="name",
        allow_empty_text=True,
    ),
    Task(
        name="qqp",
        folder="QQP",
        text_columns=("question1", "question2"),
        label_column="is_duplicate",
        labels=("not_duplicate", "duplicate"),
        metrics=("accuracy", "f1"),
        drop_broken_rows=True,
        allow_empty_text=True,
    ),
    Task(
        name="mnli",
        folder="MNLI",
        text_columns=_PAIR,
        label_column="gold_label",
        labels=("entailment", "neutral", "contradiction"),
        dev_splits=("dev_matched", "dev_mismatched"),
        label_format="name",
        hub_columns=("premise", "hypothesis"),
        allow_empty_text=True,
    ),
    Task(
        name="reviews",
        folder="reviews",
        text_columns=("text",),
        label_column="rating",
        labels=("negative", "positive"),
        test_splits=("test",),
    ),
    Task(name="text", kind="causal_lm", metrics=_NEXT_TOKEN),
    Task(name="instructions", kind="causal_lm", metrics=_NEXT_TOKEN),
    Task(name="e2e", kind="causal_lm", metrics=_NEXT_TOKEN, test_splits=("test",)),
)

TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def get_task(name: str) -> Task:
    """Looks a task up.

    Raises:
      LoraxError: no task has this name.

    >>> get_task("mnli").num_outputs
    3
    >>> get_task("mprc")
    Traceback (most recent call last):
      ...
    lorax.errors.LoraxError: unknown task.name 'mprc': did you mean 'mrpc'? Known: cola, sst2, \
mrpc, stsb, rte, wnli, qnli, qqp, mnli, reviews, text, instructions, e2e
    """
    if name in TASKS:
        return TASKS[name]
    close = get_close_matches(str(name).lower(), TASKS, n=1, cutoff=0.4)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise LoraxError(f"unknown task.name {name!r}: {hint}Known: {', '.join(TASKS)}")
