"""Tasks: one row per task in the registry, and one file per kind of reader."""

from lorax.data.tasks.registry import TASKS, get_task

__all__ = ["TASKS", "get_task"]
