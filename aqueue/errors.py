"""Every exception aqueue raises, in one tree. This module imports nothing of aqueue.

::

    AQueueError
    ├── ConfigurationError (ValueError)   a URL, a setting or a task definition that can't work
    ├── InvalidArguments (TypeError)      the arguments don't fit the task; names the parameter
    ├── EncodeError (ValueError)          a value that can't be put into a message or a result
    ├── MessageTooLarge (ValueError)      over the size limit; nothing was sent
    ├── BrokerUnavailable                 the broker can't be reached or refuses to work
    │   ├── EnqueueFailed                 nothing was stored
    │   ├── EnqueueUnknown                may be stored or not; carries the ids
    │   └── ControlRefused                its permissions don't let us tell workers, or be told
    ├── StoreUnavailable                  the result store can't be reached or refuses to work
    ├── BadMessage                        bytes from the wire that can't be read as a task
    ├── TimeLimitExceeded                 the run took longer than it may
    ├── SoftTimeLimitExceeded             raised inside a task that takes long; also asyncio.CancelledError
    ├── WorkerLostError                   the process that ran the task died under it
    └── ResultError
        ├── TaskFailed                    the task raised; carries the remote type, text, traceback
        ├── TaskRevoked                   the task was cancelled or expired before it ended
        ├── ResultTimeout (TimeoutError)  no result within the caller's time
        ├── ResultUnknown (LookupError)   nobody has heard of this task id
        └── ResultIgnored                 the task keeps no result

    ControlFlow (BaseException)           raised by task code to say what happens next
    ├── RetryTask                         run again later, as the next attempt; see ``Retry.now``
    ├── Snooze                            run again later, as the same attempt
    ├── Reject                            give the message back, or bury it
    ├── Dead                              give up: bury the message now, whatever the policy says
    └── Ignore                            done, and keep no result

``ControlFlow`` is not an ``Exception``, so that ``except Exception`` in a task can't swallow it.
"""

import asyncio
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Final


class AQueueError(Exception):
    """Base of every error that aqueue raises."""


class Border:
    """``with Border(BrokerUnavailable, OSError):`` - what a driver raises becomes one of ours, with its text.

    It stands on the road of every task, and takes a fifth of the time of a generator's context manager.
    """

    def __init__(self, error: type[AQueueError], *foreign: type[Exception], prefix: str = "") -> None:
        self._error: Final = error
        self._foreign: Final = foreign
        self._prefix: Final = prefix

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if isinstance(error, self._foreign):
            raise self._error(f"{self._prefix}{error}") from None


class ConfigurationError(AQueueError, ValueError):
    """A URL, a setting or a task definition that can't work as written."""


class InvalidArguments(AQueueError, TypeError):
    """The arguments of a call don't fit the task's signature or annotations."""


class EncodeError(AQueueError, ValueError):
    """A value can't be written with the serializer chosen for it."""


class MessageTooLarge(AQueueError, ValueError):
    """A message or a result is over the size limit; nothing was sent or stored."""


class BrokerUnavailable(AQueueError):
    """The broker can't be reached, or answers that it can't work now."""


class EnqueueFailed(BrokerUnavailable):
    """Messages were certainly not stored. Sending them again is safe.

    ``refused`` maps positions in the batch to reasons when only those were refused and all others were
    stored; it is None when nothing was stored.
    """

    def __init__(self, message: str, refused: Mapping[int, str] | None = None) -> None:
        super().__init__(message)
        self.refused = refused


class EnqueueUnknown(BrokerUnavailable):
    """The connection broke after the messages had left: they may be stored or not.

    ``ids`` holds the task ids concerned. Sending again with the same ids is safe where the broker also
    keeps the results (see ``docs/guarantees.md``); elsewhere the tasks may run twice.
    """

    def __init__(self, message: str, ids: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.ids = tuple(ids)


class ControlRefused(BrokerUnavailable):
    """The broker's permissions don't let us tell workers which tasks are cancelled, or be told."""


class StoreUnavailable(AQueueError):
    """The result store can't be reached, or answers that it can't work now."""


class BadMessage(AQueueError):
    """Bytes from the wire that can't be read as a task.

    ``reason`` is a short stable code (``undecodable``, ``bad_body``, ``too_deep``...), the one under
    which the message is found among the dead letters; ``detail`` says what was wrong with it, in 500
    characters at most.
    """

    def __init__(self, reason: str, detail: str) -> None:
        detail = detail[:500]
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class TimeLimitExceeded(AQueueError):
    """The run took longer than its limit (seconds), and was ended."""


class SoftTimeLimitExceeded(AQueueError, asyncio.CancelledError):
    """Raised inside a task whose soft limit (seconds) has passed; it may catch it, and go on until its hard one.

    In a coroutine it comes where the task waits. It is a cancellation, too, so that whatever the task is in the
    midst of (`asyncio.TaskGroup`, say) ends what it has started; an ``except Exception`` sees it all the same.
    """


class WorkerLostError(AQueueError):
    """A process was lost while it ran the task; the text says how, as far as that is known."""


class ResultError(AQueueError):
    """Base of what ``AsyncResult.get`` raises instead of returning the task's value."""


class TaskFailed(ResultError):
    """The task raised an exception.

    The remote exception is told, never rebuilt: no class named by a message is imported or made.

    ``type`` is its class name (``ValueError``), ``module`` the module of that class or ``None``,
    ``message`` its arguments as text, ``traceback`` the remote traceback as text or ``None``.
    """

    def __init__(
        self, task_id: str, type: str, message: str, module: str | None = None, traceback: str | None = None
    ) -> None:
        super().__init__(f"{type}: {message}" if message else type)
        self.task_id = task_id
        self.type = type
        self.message = message
        self.module = module
        self.traceback = traceback

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text}\n\nRemote traceback:\n{self.traceback.rstrip()}" if self.traceback else text


class TaskRevoked(ResultError):
    """The task was cancelled, terminated or expired; ``reason`` says which."""

    def __init__(self, task_id: str, reason: str) -> None:
        super().__init__(f"task {task_id} did not run to its end: {reason}")
        self.task_id = task_id
        self.reason = reason


class ResultTimeout(ResultError, TimeoutError):
    """No result within the time given to ``get``. The result can still be fetched later."""


class ResultUnknown(ResultError, LookupError):
    """Neither a sent task nor a result is known under this id."""


class ResultIgnored(ResultError):
    """The task was defined or sent with ``ignore_result``: there is nothing to fetch."""


class ControlFlow(BaseException):
    """Base of the exceptions by which task code says what happens to it next."""


class RetryTask(ControlFlow):
    """Run this task again. Made by ``Retry.now``; counts as an attempt.

    ``after`` is the delay in seconds, ``None`` for the task's own backoff. ``error`` is shown in the
    RETRY state and becomes the failure when no attempt is left. ``attempts`` overrides the policy's.
    """

    def __init__(
        self, after: float | None = None, error: BaseException | None = None, attempts: int | None = None
    ) -> None:
        super().__init__(after, error, attempts)
        self.after = after
        self.error = error
        self.attempts = attempts


class Snooze(ControlFlow):
    """Not now: run this task again after ``after`` seconds. It is no failure, and doesn't count as an attempt.

    The task decides how often: ``Context.snoozes`` counts. Raises ConfigurationError for no number of seconds.
    """

    def __init__(self, after: float) -> None:
        # A hundred years; more is a mistake, and past what clocks can say.
        if type(after) not in (int, float) or not 0 <= after <= 100 * 366 * 86400:
            raise ConfigurationError(f"Snooze: after is a number of seconds, 0 or more; got {after!r:.40}")
        super().__init__(after)
        self.after = after


class Dead(ControlFlow):
    """Give this task up at once, however many attempts are left: its message is buried, its state is FAILURE.

    A buried message is found with ``aqueue dead list``.
    """

    def __init__(self, reason: str = "given up by the task") -> None:
        super().__init__(reason)
        self.reason = reason


class Reject(ControlFlow):
    """Refuse the message: ``requeue=True`` puts it at the back of its queue, otherwise it is buried.

    A buried message is found with ``aqueue dead list``.
    """

    def __init__(self, reason: str = "rejected by the task", requeue: bool = False) -> None:
        super().__init__(reason, requeue)
        self.reason = reason
        self.requeue = requeue


class Ignore(ControlFlow):
    """The task is done and leaves no result and no state."""
