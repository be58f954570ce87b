"""Exceptions as text: what is stored of a failure, made so that it can't fail itself (celery-protocol 4.3)."""

import traceback
from pathlib import Path
from typing import Any, Final

from aqueue.errors import (
    AQueueError,
    InvalidArguments,
    SoftTimeLimitExceeded,
    TimeLimitExceeded,
    WorkerLostError,
)
from aqueue.results import RemoteError
from aqueue.saferepr import printable, saferepr
from aqueue.serialization import dumps_json

_PACKAGE: Final = str(Path(__file__).parent)
#: Frames shown of a traceback, at its start and again at its end.
_FRAMES: Final = 50
_MAX_CHARACTERS: Final = 50_000
#: Arguments of an exception that are stored.
_MAX_ARGUMENTS: Final = 50


class RemoteTraceback(Exception):
    """The cause of an exception that was raised in a child process: its traceback there, as text."""

    def __init__(self, text: str) -> None:
        super().__init__(f"\n\nIn the child process:\n{text}")
        self.text = text


class ProcessTaskError(AQueueError):
    """Stands for an exception that was raised in a child process and can't be pickled: its type and its text."""

    def __init__(self, type: str, text: str, module: str) -> None:
        super().__init__(type, text, module)
        self.type = type
        self.text = text
        self.module = module

    @classmethod
    def of(cls, error: BaseException) -> "ProcessTaskError":
        return cls(type(error).__qualname__, printable(error), type(error).__module__)

    def __str__(self) -> str:
        return f"{self.type}: {self.text}" if self.text else self.type


class NotRegistered(AQueueError):
    """No worker knew the task within the time for it."""


class MaxRetriesExceeded(AQueueError):
    """The task asked to be run again and had no attempt left."""


class Rejected(AQueueError):
    """The task refused its message."""


class GivenUp(AQueueError):
    """The task gave itself up, by ``Dead``."""


#: Names under which Celery clients know what our workers report.
_CELERY_NAMES: Final[dict[type[BaseException], tuple[str, str]]] = {
    TimeLimitExceeded: ("billiard.exceptions", "TimeLimitExceeded"),
    SoftTimeLimitExceeded: ("billiard.exceptions", "SoftTimeLimitExceeded"),
    WorkerLostError: ("billiard.exceptions", "WorkerLostError"),
    NotRegistered: ("celery.exceptions", "NotRegistered"),
    MaxRetriesExceeded: ("celery.exceptions", "MaxRetriesExceededError"),
    Rejected: ("celery.exceptions", "Reject"),
    InvalidArguments: ("builtins", "TypeError"),
}


def remote_error(error: BaseException) -> RemoteError:
    """Class name, arguments and module of an exception, as Celery stores them."""
    return _told(error, [_argument(argument) for argument in _arguments(error)])


def remote_text(error: BaseException) -> RemoteError:
    """The same as a short text, which every serializer can write."""
    return _told(error, [printable(error)])


def _told(error: BaseException, arguments: list[Any]) -> RemoteError:
    if isinstance(error, ProcessTaskError):
        return RemoteError(error.type, [error.text], error.module)
    kind = type(error)
    module, name = _CELERY_NAMES.get(kind, (kind.__module__, kind.__qualname__))
    return RemoteError(name, arguments, module)


def _arguments(error: BaseException) -> list[Any]:
    try:
        return list(error.args[:_MAX_ARGUMENTS])
    except Exception:  # noqa: BLE001 - a class may make of its arguments what it likes
        return [printable(error)]


def _argument(value: Any) -> Any:
    """What JSON can say stays a value, as far as it is short; the rest becomes text."""
    if isinstance(value, str):
        return str.__str__(value)[:_MAX_CHARACTERS]
    try:
        return value if len(dumps_json(value)) <= _MAX_CHARACTERS else saferepr(value)
    except Exception:  # noqa: BLE001 - the methods of a value may raise anything
        return saferepr(value)


def traceback_text(error: BaseException) -> str:
    """The traceback of a failure, without aqueue's own frames at its start; cut in the middle when long."""
    if isinstance(error.__cause__, RemoteTraceback):
        return error.__cause__.text
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
