"""GLUE's tab-separated files: their folders and their content."""

import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lorax.data.examples import Examples
from lorax.data.files import read_text
from lorax.data.tasks.hub import hub_content, load_hub_split
from lorax.data.tasks.task import ExampleReader, Task
from lorax.errors import LoraxError
from lorax.runtime.digest import files_digest

_PROJECT = Path(__file__).resolve().parents[3]
_SCORES = (0.0, 5.0)
_log = logging.getLogger(__name__)


def load_glue(task: Task, split: str, data_dir: str | os.PathLike | None = None) -> Examples:
    """Read one split of a task of GLUE from its TSV file or, without one, from the hub.

    Args:
      task: a task of GLUE.
      split: one of `task.splits`.
      data_dir: as in `find_folder`.

    Raises:
      LoraxError: data not found, or a malformed row.
    """
    folder = find_folder(task, data_dir)
    return read_tsv(task, folder / f"{split}.tsv") if folder else load_hub_split(task, split)


def _content(task: Task, data_dir: str | os.PathLike | None) -> str:
    if folder := find_folder(task, data_dir):
        return files_digest([folder / f"{split}.tsv" for split in ("train", *task.dev_splits)])
    return hub_content(task)


GLUE = ExampleReader(load_glue, _content)


def find_folder(task: Task, data_dir: str | os.PathLike | None = None) -> Path | None:
    """The folder of a task's TSV files.

    Args:
      task: any task except `reviews`.
      data_dir: GLUE's root (with `MRPC/` and so on) or the task's own folder. None looks in
        `$LORAX_GLUE_DIR`, then in `glue` and `../shared/glue` of the working directory and of
        the project.

    Returns:
      The folder, or None if it is in none of these places.

    Raises:
      LoraxError: `data_dir` or `$LORAX_GLUE_DIR` is given but has no such folder.
    """
    if data_dir is not None:
        return _given(task, Path(data_dir))
    places = [base / sub for base in (Path.cwd(), _PROJECT) for sub in ("glue", "../shared/glue")]
    if root := os.environ.get("LORAX_GLUE_DIR"):
        if not Path(root).is_dir():
            raise LoraxError(f"LORAX_GLUE_DIR={root!r} is not a folder: name GLUE's root")
        places.insert(0, Path(root))
    return next((p / task.folder for p in places if (p / task.folder).is_dir()), None)


def _given(task: Task, folder: Path) -> Path:
    for candidate in (folder / task.folder, folder):
        if (candidate / "train.tsv").is_file():
            return candidate
    raise LoraxError(
        f"task.data_dir={str(folder)!r} holds neither {task.folder}/train.tsv nor train.tsv: "
        f"name GLUE's root or the folder of task {task.name}"
    )


def read_tsv(task: Task, path: Path) -> Examples:
    r"""Read one file of GLUE: UTF-8, tab-separated, no quoting.

    Texts are unchanged, trailing blanks included, as on the hub.

    Raises:
      LoraxError: the file is missing, empty, not UTF-8, lacks a column, or has a malformed row;
        the message gives the file and the line.

    >>> import tempfile
    >>> from lorax.data.tasks import TASKS
    >>> path = Path(tempfile.mkdtemp()) / "dev.tsv"
    >>> _ = path.write_text("sentence\tlabel\na gem .\t1\n")
    >>> read_tsv(TASKS["sst2"], path)
    Examples(first=['a gem .'], second=None, labels=array([1], dtype=int32))
    """
    rows = enumerate(_read_lines(path), start=1)
    header = task.header or tuple(next(rows)[1].split("\t"))
    columns = [_index(header, name, path) for name in (*task.text_columns, task.label_column)]
    examples = [
        (*_texts(task, fields, columns[:-1], where), _label(task, fields[columns[-1]], where))
        for where, fields in _rows(task, path, rows, len(header))
    ]
    if not examples:
        raise LoraxError(f"{path}: no examples, only a header")
    *texts, labels = zip(*examples, strict=True)
    dtype = np.float32 if task.kind == "regression" else np.int32
    return Examples(
        first=list(texts[0]),
        second=list(texts[1]) if len(texts) == 2 else None,
        labels=np.asarray(labels, dtype),
    )


def _read_lines(path: Path) -> list[str]:
    text = read_text(path).rstrip("\r\n")
    if not text:
        raise LoraxError(f"{path}: empty file")
    return [line.removesuffix("\r") for line in text.split("\n")]


def _index(header: tuple[str, ...], name: str, path: Path) -> int:
    if name not in header:
        raise LoraxError(f"{path}:1: no column {name!r}; the header has {', '.join(header)}")
    return header.index(name)


def _rows(
    task: Task, path: Path, lines: Iterator[tuple[int, str]], width: int
) -> Iterator[tuple[str, list[str]]]:
    dropped = 0
    for number, line in lines:
        fields = line.split("\t")
        if len(fields) == width:
            yield f"{path}:{number}", fields
        elif task.drop_broken_rows:
            dropped += 1
        else:
            raise LoraxError(f"{path}:{number}: {len(fields)} fields, expected {width}")
    if dropped:
        _log.warning("%s: dropped %d rows that do not have %d fields", path, dropped, width)


def _texts(task: Task, fields: list[str], columns: list[int], where: str) -> list[str]:
    texts = [fields[column] for column in columns]
    for name, text in zip(task.text_columns, texts, strict=True):
        if not text.strip() and not task.allow_empty_text:
            raise LoraxError(f"{where}: {name} is empty")
    return texts


def _label(task: Task, text: str, where: str) -> float:
    return _score(text, where) if task.kind == "regression" else _class_id(task, text, where)


def _class_id(task: Task, text: str, where: str) -> int:
    names = task.labels if task.label_format == "name" else [*map(str, range(len(task.labels)))]
    if text not in names:
        raise LoraxError(f"{where}: unknown label {text!r}; expected one of {', '.join(names)}")
    return names.index(text)


def _score(text: str, where: str) -> float:
    low, high = _SCORES
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not low <= score <= high:
        raise LoraxError(f"{where}: score {text!r} is not a number from {low:g} to {high:g}")
    return score
