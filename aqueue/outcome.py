"""How a run ended: one tagged value, made in one place and settled in one place."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import msgspec

from aqueue.context import Context


class Done(msgspec.Struct, frozen=True):
    """The task returned."""

    value: Any


class Failed(msgspec.Struct, frozen=True):
    """The task raised, and no attempt is left or wanted."""

    error: BaseException


class Again(msgspec.Struct, frozen=True):
    """Run the task once more, as the next attempt, after ``delay`` seconds."""

    delay: float
    error: BaseException | None = None


class Snoozed(msgspec.Struct, frozen=True):
    """Run the task once more after ``delay`` seconds, as the same attempt: it was too early."""

    delay: float


class GiveBack(msgspec.Struct, frozen=True):
    """Hand the message back as it came: no attempt was made, or none that counts.

    It goes to the front at once, or after ``delay`` seconds, or ``last`` of all.
    """

    delay: float = 0.0
    last: bool = False


class PutOff(msgspec.Struct, frozen=True):
    """Look again after ``delay`` seconds, with ``headers`` added to remember by."""

    delay: float
    headers: Mapping[str, Any]


class Revoked(msgspec.Struct, frozen=True):
    """The task is not run (any more): ``expired``, or cancelled."""

    reason: str


class Skipped(msgspec.Struct, frozen=True):
    """Done, and nothing is stored."""


class Repeated(msgspec.Struct, frozen=True):
    """Not run: a delivery after the first of a task that has succeeded or was cancelled already. That result stays."""


class Dead(msgspec.Struct, frozen=True):
    """The message goes to the dead letters: ``reason`` is a short code, ``detail`` a sentence.

    Returned by a gate; a task raises `aqueue.Dead`.
    """

    reason: str
    detail: str
    error: BaseException | None = None


Outcome = Done | Failed | Again | Snoozed | GiveBack | PutOff | Revoked | Skipped | Repeated | Dead

#: Before a run; returning an outcome refuses it.
Gate = Callable[[Context], Awaitable[Outcome | None]]
#: The rest of the onion: the next middleware, or the task itself.
CallNext = Callable[[Context], Awaitable[Any]]
#: Around a run: awaits ``call_next(context)`` and returns the task's value.
Middleware = Callable[[Context, CallNext], Awaitable[Any]]
#: After a run: told the outcome and the seconds it took; can't change anything.
Observer = Callable[[Context, Outcome, float], None]


def fold(middleware: list[Middleware], innermost: CallNext) -> CallNext:
    """The onion as one callable; the first middleware is outermost."""
    folded = innermost
    for layer in reversed(middleware):
        folded = _layer(layer, folded)
    return folded


def _layer(layer: Middleware, inner: CallNext) -> CallNext:
    return lambda context: layer(context, inner)
