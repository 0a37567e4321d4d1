"""The default task: movie-review snippets, each rated by some 20 people from -4 to 4.

The snippets come with vaderSentiment (Hutto and Gilbert, ICWSM 2014; MIT licence). 732 of the
872 dev sentences of SST-2 are among them: a model trained here must not report SST-2.
"""

import hashlib
import math
import os
from pathlib import Path

import numpy as np

from lorax.data.examples import Examples
from lorax.data.tasks.assets import find_asset
from lorax.data.tasks.task import ExampleReader, Task
from lorax.errors import LoraxError
from lorax.runtime.digest import files_digest

FILE_NAME = "movieReviewSnippets_GroundTruth.txt"
_MIN_RATING = 0.5


def load_reviews(task: Task, split: str, data_dir: str | os.PathLike | None = None) -> Examples:
    """Read one split of the reviews: 0 is negative, 1 is positive.

    Snippets rated between -0.5 and 0.5 and repeated texts are dropped.

    Args:
      task: `reviews`.
      split: `train`, `dev` or `test`.
      data_dir: the folder of the unpacked asset; None finds it.

    Raises:
      LoraxError: the asset is missing or a line is malformed.
    """
    del task
    ratings = {
        text: rating
        for text, rating in reversed(_read(_file(data_dir)))
        if abs(rating) >= _MIN_RATING and split_of(text) == split
    }
    texts = [*reversed(ratings)]
    return Examples(texts, None, np.asarray([ratings[text] > 0 for text in texts], np.int32))


def _content(task: Task, data_dir: str | os.PathLike | None) -> str:
    del task
    return files_digest([_file(data_dir)])


REVIEWS = ExampleReader(load_reviews, _content)


def _file(data_dir: str | os.PathLike | None) -> Path:
    folder = find_asset("reviews") if data_dir is None else Path(data_dir)
    return folder / FILE_NAME


def split_of(text: str) -> str:
    """The split of a snippet by the hash of its text: a tenth each for dev and test.

    >>> split_of("Effective but too tepid biopic")
    'test'
    """
    bucket = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10
    return {0: "dev", 1: "test"}.get(bucket, "train")


def _read(path: Path) -> list[tuple[str, float]]:
    try:
        lines = path.read_bytes().decode().split("\r\n")
    except OSError as error:
        raise LoraxError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise LoraxError(f"{path}: not UTF-8 ({error.reason})") from error
    return [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line]


def _parse(line: str, where: str) -> tuple[str, float]:
    fields = line.split("\t")
    if len(fields) != 3:
        raise LoraxError(f"{where}: {len(fields)} fields, expected id, mean rating and text")
    try:
        rating = float(fields[1])
    except ValueError:
        rating = math.nan
    if not abs(rating) <= 4:
        raise LoraxError(f"{where}: rating {fields[1]!r} is not a number from -4 to 4")
    return fields[2], rating
