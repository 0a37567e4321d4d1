import hashlib
import json
import os
from functools import lru_cache
from pathlib import Path

from lorax.data.documents import Documents
from lorax.data.e2e import load_e2e
from lorax.data.examples import Examples
from lorax.data.files import digest_of
from lorax.data.glue import find_folder, read_tsv
from lorax.data.hub import load_hub_split
from lorax.data.instructions import load_instructions
from lorax.data.reviews import load_reviews, reviews_file
from lorax.data.tasks import TASKS, Task, get_task
from lorax.data.text_file import load_text
from lorax.errors import LoraxError
from lorax.runtime.digest import files_digest


def load_split(task: Task | str, split: str, data_dir: str | os.PathLike | None = None) -> Examples:
    """Reads one labelled split of a task.

    GLUE is taken from `data_dir` if given, else from the first of `$LORAX_GLUE_DIR`, `glue` and
    `../shared/glue` (of the working directory, then of the project) that has the task, else
    from the hub. `reviews` is taken from the fetched assets.

    Args:
      task: a task of examples, or its name.
      split: one of `task.splits`.
      data_dir: GLUE's root or the task's own folder.

    Raises:
      LoraxError: unknown task or split, data not found, or a malformed row.
    """
    task = _checked(task, split)
    if task.kind == "causal_lm":
        raise LoraxError(f"task {task.name} has documents without labels: use load_documents")
    if task.name == "reviews":
        return load_reviews(split, data_dir)
    folder = find_folder(task, data_dir)
    return read_tsv(task, folder / f"{split}.tsv") if folder else load_hub_split(task, split)


def load_documents(
    task: Task | str,
    split: str,
    data_dir: str | os.PathLike | None,
    base: str | os.PathLike | None = None,
) -> Documents:
    """Reads one split of a task of kind `causal_lm`; docs/data.md has the formats.

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
    if task.kind != "causal_lm":
        raise LoraxError(f"task {task.name} has labelled examples: use load_split")
    if data_dir is None:
        raise LoraxError(f"task {task.name} reads your own files: set task.data_dir")
    path, folder = Path(data_dir), None if base is None else Path(base)
    if not path.exists():
        raise LoraxError(f"task.data_dir={str(path)!r}: no such file or folder")
    if task.name == "text":
        return load_text(split, path)
    reader = load_e2e if task.name == "e2e" else load_instructions
    return reader(split, path, folder)


def _checked(task: Task | str, split: str) -> Task:
    task = get_task(task) if isinstance(task, str) else task
    if split not in task.splits:
        known = ", ".join(task.splits)
        raise LoraxError(f"task {task.name} has no labelled split {split!r}; known: {known}")
    return task


def content_of(task: str, data_dir: str | os.PathLike | None) -> str | None:
    """The SHA-256 of what a task's splits are read from; None where it cannot be read.

    Of a task of labelled examples these are the files of its training and dev splits, wherever
    `load_split` finds them; of GLUE from the hub the examples themselves.

    Args:
      task: a name, known or not.
      data_dir: as of `load_split` or `load_documents`.

    Raises:
      LoraxError: a decoder's file that is there and cannot be read.
    """
    if task not in TASKS:
        return None
    if TASKS[task].kind == "causal_lm":
        path = None if data_dir is None else Path(data_dir)
        return digest_of(path) if path is not None and path.exists() else None
    try:
        files = _example_files(TASKS[task], data_dir)
        return files_digest(files) if files else _hub_content(task)
    except LoraxError:
        return None  # loading it says why


def _example_files(task: Task, data_dir: str | os.PathLike | None) -> list[Path]:
    """The files that training and dev examples are read from; none where they are on the hub."""
    if task.name == "reviews":
        return [reviews_file(data_dir)]
    folder = find_folder(task, data_dir)
    return [folder / f"{split}.tsv" for split in ("train", *task.dev_splits)] if folder else []


@lru_cache(maxsize=16)
def _hub_content(task: str) -> str:
    """The SHA-256 of the training and dev examples that the hub gives, once a process."""
    sums = hashlib.sha256()
    for split in ("train", *TASKS[task].dev_splits):
        found = load_hub_split(TASKS[task], split)
        columns = [found.first, found.second, found.labels.tolist()]
        sums.update(json.dumps([split, *columns]).encode())
    return sums.hexdigest()
