import os

from lorax.data.examples import Examples
from lorax.data.glue import find_folder, read_tsv
from lorax.data.hub import load_hub_split
from lorax.data.reviews import load_reviews
from lorax.data.tasks import Task, get_task
from lorax.errors import LoraxError


def load_split(task: Task | str, split: str, data_dir: str | os.PathLike | None = None) -> Examples:
    """Reads one labelled split of a task.

    GLUE is taken from `data_dir` if given, else from the first of `$LORAX_GLUE_DIR`, `glue` and
    `../shared/glue` (of the working directory, then of the project) that has the task, else
    from the hub. `reviews` is taken from the fetched assets.

    Args:
      task: a task or its name.
      split: one of `task.splits`.
      data_dir: GLUE's root or the task's own folder.

    Raises:
      LoraxError: unknown task or split, data not found, or a malformed row.
    """
    task = get_task(task) if isinstance(task, str) else task
    if split not in task.splits:
        known = ", ".join(task.splits)
        raise LoraxError(f"task {task.name} has no labelled split {split!r}; known: {known}")
    if task.name == "reviews":
        return load_reviews(split, data_dir)
    folder = find_folder(task, data_dir)
    return read_tsv(task, folder / f"{split}.tsv") if folder else load_hub_split(task, split)
