"""Tasks: a row each in the registry, and a file for each kind of reader."""

from lorax.data.tasks.registry import TASKS, get_task

__all__ = ["TASKS", "get_task"]
