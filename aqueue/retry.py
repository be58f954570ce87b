"""When and whether a task runs again: a policy, and a pure function of attempt and error."""

import random
from collections.abc import Callable
from typing import ClassVar

import msgspec

from aqueue.errors import ConfigurationError, RetryTask
from aqueue.options import is_seconds

Errors = type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], bool]


class Retry(msgspec.Struct, frozen=True):
    """A retry policy. Times are in seconds.

    ``attempts`` counts every run, the first included. The n-th retry waits ``backoff * 2**(n-1)``, at most
    ``max_backoff``; ``jitter`` shortens each wait at random to between a half and all of it. ``on`` and
    ``never`` say which errors are retried: types, or a function of the error; ``never`` wins.

    Inside a task, ``raise Retry.now(after=30)`` runs it again whatever the policy says of errors, as long
    as attempts are left.
    """

    attempts: int = 3
    backoff: float = 1.0
    max_backoff: float = 600.0
    jitter: bool = True
    on: Errors = Exception
    never: Errors = ()

    #: For a task without a policy that raises ``Retry.now``: Celery's three retries.
    default: ClassVar["Retry"]
    #: For a task without a policy that raises anything else.
    none: ClassVar["Retry"]

    def __post_init__(self) -> None:
        if self.attempts < 1:
            raise ConfigurationError(f"Retry(attempts={self.attempts}): at least 1, which means no retry")
        for name in ("backoff", "max_backoff"):
            _check_seconds(name, getattr(self, name))

    def wants(self, error: BaseException) -> bool:
        """Whether this error is worth another attempt, if one is left."""
        return _matches(self.on, error) and not _matches(self.never, error)

    def delay(self, attempt: int) -> float:
        """Seconds to wait after the given attempt (1 is the first)."""
        exponent = min(attempt - 1, 60)  # 2**60 s is past every max_backoff, and no float overflows
        delay = min(self.max_backoff, self.backoff * 2.0**exponent)
        return delay * random.uniform(0.5, 1.0) if self.jitter else delay

    @staticmethod
    def now(after: float | None = None, error: BaseException | None = None) -> RetryTask:
        """What a task raises to be run again ``after`` seconds, by default after the policy's backoff.

        ``error`` is shown as the reason, and is the failure when no attempt is left.
        """
        if after is not None:
            _check_seconds("after", after)
        return RetryTask(after, error)


def _check_seconds(name: str, seconds: float) -> None:
    if not is_seconds(seconds):
        raise ConfigurationError(f"Retry: {name} is a number of seconds, 0 or more; got {seconds!r:.40}")


def _matches(errors: Errors, error: BaseException) -> bool:
    if isinstance(errors, type | tuple):
        return isinstance(error, errors)
    return errors(error)


Retry.default = Retry(attempts=4)
Retry.none = Retry(attempts=1)
