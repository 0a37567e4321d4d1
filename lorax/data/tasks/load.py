"""Splits and their content by task, from files or the hub."""

import os
from pathlib import Path

from lorax.data.documents import Documents
from lorax.data.examples import Examples
from lorax.data.files import digest_of
from lorax.data.tasks.registry import TASKS, get_task
from lorax.data.tasks.task import DocumentReader, ExampleReader, Task
from lorax.errors import LoraxError


def load_split(task: Task | str, split: str, data_dir: str | os.PathLike | None = None) -> Examples:
    """Read one labelled split of a task.

    GLUE is read from `data_dir` if given, else from the first of `$LORAX_GLUE_DIR`, `glue` and
    `../shared/glue` (in the working directory, then in the project) that has the task, else from
    the hub. `reviews` is read from the fetched assets.

    Args:
      task: a task of examples, or its name.
      split: one of `task.splits`.
      data_dir: GLUE's root or the task's own folder.

    Raises:
      LoraxError: unknown task or split, data not found, or a malformed row.
    """
    task = _checked(task, split)
    if isinstance(task.reader, DocumentReader):
        raise LoraxError(f"task {task.name} has documents without labels: use load_documents")
    return task.reader.read(task, split, data_dir)


def load_documents(
    task: Task | str,
    split: str,
    data_dir: str | os.PathLike | None,
    base: str | os.PathLike | None = None,
) -> Documents:
    """Read one split of a task of kind `causal_lm`; docs/data.md has the formats.

    Args:
      task: a task or its name.
      split: one of `task.splits`.
      data_dir: the user's file or folder.
      base: the folder of the tokenizer. Chats need it for their template, E2E for the token
        between prompt and reference.

    Raises:
      LoraxError: unknown task or split, no `data_dir`, or a missing or malformed file.
    """
    task = _checked(task, split)
    if isinstance(task.reader, ExampleReader):
        raise LoraxError(f"task {task.name} has labelled examples: use load_split")
    if data_dir is None:
        raise LoraxError(f"task {task.name} reads your own files: set task.data_dir")
    path, folder = Path(data_dir), None if base is None else Path(base)
    if not path.exists():
        raise LoraxError(f"task.data_dir={str(path)!r}: no such file or folder")
    return task.reader.read(split, path, folder)


def _checked(task: Task | str, split: str) -> Task:
    task = get_task(task) if isinstance(task, str) else task
    if split not in task.splits:
        known = ", ".join(task.splits)
        raise LoraxError(f"task {task.name} has no labelled split {split!r}; known: {known}")
    return task


def content_of(task: str, data_dir: str | os.PathLike | None) -> str | None:
    """The SHA-256 of the sources of a task's splits; None if they cannot be read.

    For a task of labelled examples these are the files of its training and dev splits, where
    `load_split` finds them; for GLUE from the hub they are the examples themselves.

    Args:
      task: a name, known or unknown.
      data_dir: as in `load_split` or `load_documents`.

    Raises:
      LoraxError: an existing file for a decoder cannot be read.
    """
    if task not in TASKS:
        return None
    reader = TASKS[task].reader
    if isinstance(reader, DocumentReader):
        path = None if data_dir is None else Path(data_dir)
        return digest_of(path) if path is not None and path.exists() else None
    try:
        return reader.content(TASKS[task], data_dir)
    except LoraxError:
        return None  # loading it reports the fault
