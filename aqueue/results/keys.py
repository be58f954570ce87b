"""Celery's names for results in stores of keys and values (celery-protocol 2.11 and 4.4)."""

from typing import Final

#: Before the task's id.
TASK_PREFIX: Final = "celery-task-meta-"


def task_prefix(global_prefix: str) -> str:
    """What stands before a task's id, with the prefix of an app's keys before it.

    Celery puts ``_`` behind the latter unless it ends in a separator.
    """
    if global_prefix and global_prefix[-1] not in ":_-.":
        global_prefix += "_"
    return global_prefix + TASK_PREFIX
