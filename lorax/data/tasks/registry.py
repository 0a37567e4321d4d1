"""All tasks: one frozen row each, with the reader of its splits."""

from difflib import get_close_matches

from lorax.data.tasks.e2e import load_e2e
from lorax.data.tasks.glue import GLUE
from lorax.data.tasks.instructions import load_instructions
from lorax.data.tasks.reviews import REVIEWS
from lorax.data.tasks.task import DocumentReader, Task
from lorax.data.tasks.text_file import load_text
from lorax.errors import LoraxError

_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
_NEXT_TOKEN = ("perplexity", "token_accuracy")

_ALL = (
    Task(
        name="cola",
        reader=GLUE,
        folder="CoLA",
        text_columns=("sentence",),
        labels=("unacceptable", "acceptable"),
        metrics=("matthews", "accuracy"),
        header=("source", "label", "annotation", "sentence"),
    ),
    Task(
        name="sst2",
        reader=GLUE,
        folder="SST-2",
        text_columns=("sentence",),
        labels=("negative", "positive"),
    ),
    Task(
        name="mrpc",
        reader=GLUE,
        folder="MRPC",
        text_columns=("#1 String", "#2 String"),
        label_column="Quality",
        labels=("not_equivalent", "equivalent"),
        metrics=("accuracy", "f1"),
        hub_columns=_PAIR,
    ),
    Task(
        name="stsb",
        reader=GLUE,
        folder="STS-B",
        text_columns=_PAIR,
        label_column="score",
        kind="regression",
        metrics=("pearson", "spearman"),
    ),
    Task(
        name="rte",
        reader=GLUE,
        folder="RTE",
        text_columns=_PAIR,
        labels=_ENTAILMENT,
        label_format="name",
    ),
    Task(
        name="wnli",
        reader=GLUE,
        folder="WNLI",
        text_columns=_PAIR,
        labels=("not_entailment", "entailment"),
    ),
    Task(
        name="qnli",
        reader=GLUE,
        folder="QNLI",
        text_columns=("question", "sentence"),
        labels=_ENTAILMENT,
        label_format="name",
        allow_empty_text=True,
    ),
    Task(
        name="qqp",
        reader=GLUE,
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
        reader=GLUE,
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
        reader=REVIEWS,
        folder="reviews",
        text_columns=("text",),
        label_column="rating",
        labels=("negative", "positive"),
        test_splits=("test",),
    ),
    Task(
        name="text",
        reader=DocumentReader(load_text),
        kind="causal_lm",
        metrics=_NEXT_TOKEN,
    ),
    Task(
        name="instructions",
        reader=DocumentReader(load_instructions),
        kind="causal_lm",
        metrics=_NEXT_TOKEN,
    ),
    Task(
        name="e2e",
        reader=DocumentReader(load_e2e),
        kind="causal_lm",
        metrics=_NEXT_TOKEN,
        test_splits=("test",),
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def get_task(name: str) -> Task:
    """Look a task up by name.

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
