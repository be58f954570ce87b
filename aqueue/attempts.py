"""What became of a task's earlier attempts: a short history that travels with its message, in one header of ours."""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from aqueue.saferepr import printable
from aqueue.serialization import dumps_headers

#: The header: a list of objects with the fields of `Attempt`, the oldest first.
ERRORS: Final = "aqueue_errors"
#: The header that counts how often the task has put itself off.
SNOOZES: Final = "aqueue_snoozes"
#: Headers by which a message remembers; they are no more the application's own than Celery's are.
REMEMBERED: Final = frozenset((ERRORS, SNOOZES))

#: The last so many are kept, and fewer when they take more bytes than that: a message must not grow with each retry.
_MOST: Final = 10
_MOST_BYTES: Final = 2048
#: Characters.
_LONGEST_TEXT: Final = 200
_LONGEST_NAME: Final = 100


class Attempt(msgspec.Struct, frozen=True):
    """An attempt that failed."""

    #: 1 for the first run.
    number: int
    #: When it failed, as unix time.
    time: float
    #: ``name@host`` of the worker.
    worker: str
    #: The class of the error.
    type: str
    #: What it said, in 200 characters at most.
    text: str


def attempts_of(told: Any) -> tuple[Attempt, ...]:
    """The attempts that a header or a result tells of, the oldest first; none where that can't be read."""
    if told is None:
        return ()
    try:
        return tuple(msgspec.convert(told, list[Attempt]))
    except (msgspec.ValidationError, UnicodeError):  # somebody else's, under the same name
        return ()


def remembered(headers: Mapping[str, Any], attempt: Attempt) -> list[dict[str, Any]]:
    """The header that also tells of ``attempt``."""
    cut = Attempt(
        attempt.number,
        round(attempt.time, 3),
        printable(attempt.worker, _LONGEST_NAME),
        printable(attempt.type, _LONGEST_NAME),
        printable(attempt.text, _LONGEST_TEXT),
    )
    told = [msgspec.structs.asdict(one) for one in (*attempts_of(headers.get(ERRORS)), cut)][-_MOST:]
    while len(told) > 1 and len(dumps_headers({ERRORS: told})) > _MOST_BYTES:
        del told[0]
    return told


def snoozes_of(headers: Mapping[str, Any]) -> int:
    """How often the task has put itself off."""
    told = headers.get(SNOOZES)
    return told if type(told) is int and told > 0 else 0
