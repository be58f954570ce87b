"""Exceptions as text: what is stored of a failure, made so that it can't fail itself (celery-protocol 4.3)."""

import traceback
from pathlib import Path
from typing import Any, Final

from aqueue.errors import AQueueError
from aqueue.results import RemoteError
from aqueue.saferepr import saferepr

_PACKAGE: Final = str(Path(__file__).parent)
#: Frames shown of a traceback, at its start and again at its end.
_FRAMES: Final = 50
_MAX_CHARACTERS: Final = 50_000
_JSON_SCALARS: Final = (str, int, float, bool, type(None))


class TimeLimitExceeded(AQueueError):
    """The run took longer than its hard limit (seconds)."""


class SoftTimeLimitExceeded(AQueueError):
    """The run took longer than its soft limit (seconds)."""


class WorkerLostError(AQueueError):
    """Workers were lost while they held the task, more often than is allowed."""


class NotRegistered(AQueueError):
    """No worker knew the task within the time for it."""


class Rejected(AQueueError):
    """The task refused its message."""


#: Names under which Celery clients know what our workers report.
_CELERY_NAMES: Final[dict[type[BaseException], tuple[str, str]]] = {
    TimeLimitExceeded: ("billiard.exceptions", "TimeLimitExceeded"),
    SoftTimeLimitExceeded: ("billiard.exceptions", "SoftTimeLimitExceeded"),
    WorkerLostError: ("billiard.exceptions", "WorkerLostError"),
    NotRegistered: ("celery.exceptions", "NotRegistered"),
    Rejected: ("celery.exceptions", "Reject"),
}


def remote_error(error: BaseException) -> RemoteError:
    """Class name, arguments and module of an exception, as Celery stores them."""
    kind = type(error)
    module, name = _CELERY_NAMES.get(kind, (kind.__module__, kind.__qualname__))
    return RemoteError(name, [_argument(argument) for argument in error.args], module)


def _argument(value: Any) -> Any:
    if type(value) in _JSON_SCALARS:
        return value[:_MAX_CHARACTERS] if isinstance(value, str) else value
    return saferepr(value)


def traceback_text(error: BaseException) -> str:
    """The traceback of a failure, without aqueue's own frames at its start; cut in the middle when long."""
    try:
        frames = traceback.TracebackException.from_exception(error, compact=True)
        _shorten(frames)
        text = "".join(frames.format())
    except Exception as failure:  # noqa: BLE001 - a failure must be storable, whatever its text does
        text = f"{type(error).__qualname__} (its traceback can't be shown: {type(failure).__name__})"
    if len(text) > _MAX_CHARACTERS:
        half = _MAX_CHARACTERS // 2
        text = f"{text[:half]}\n  [... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"
    return text


def _shorten(shown: traceback.TracebackException) -> None:
    stack = shown.stack
    while len(stack) > 1 and stack[0].filename.startswith(_PACKAGE):
        del stack[0]
    if len(stack) > 2 * _FRAMES:
        del stack[_FRAMES:-_FRAMES]
