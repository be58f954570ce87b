"""One delivery while its task runs: how long it may take, and how it is ended early."""

import asyncio
from collections.abc import Callable, Coroutine, Generator, Sequence
from functools import partial
from types import coroutine
from typing import Any, Final, TypeVar

from aqueue.broker import Delivery
from aqueue.context import Context
from aqueue.errors import SoftTimeLimitExceeded
from aqueue.protocol import Request
from aqueue.settings import Settings
from aqueue.task import Task

T = TypeVar("T")

#: Seconds after which the runs of one claim that still go on get timers of their own.
_SOON: Final = 0.05
#: Further seconds until a child process that was killed counts as stuck.
_KILLED: Final = 5.0


class Run:
    """One delivery while its task runs."""

    __slots__ = ("begun", "context", "delivery", "job", "let_go", "limits", "request", "started", "task", "timer")

    def __init__(
        self,
        delivery: Delivery,
        request: Request,
        task: Task[..., Any],
        context: Context,
        started: float,
        limits: "TimeLimits",
    ) -> None:
        self.delivery = delivery
        self.request = request
        self.task = task
        self.context = context
        #: By the loop's clock.
        self.started = started
        self.limits = limits
        self.job: asyncio.Task[None] | None = None
        #: Set by the job itself: a job cancelled before that would never do a thing, not even tell of its end.
        self.begun = False
        #: Its message was settled before the task began.
        self.let_go = False
        self.timer: asyncio.TimerHandle | None = None

    @property
    def is_special(self) -> bool:
        """Whether it needs a process, or was delivered before."""
        return (
            self.task.definition.kind == "process" or self.delivery.deliveries > 1 or self.request.message.redelivered
        )

    def end(self, reason: str) -> None:
        """Have the run end early; the reason, of which the first counts, decides what becomes of the message."""
        if self.context.cancel_reason is None:
            self.context.cancel_reason = reason
            self.limits.ending(self)
            self.interrupt()

    def warn(self, seconds: float) -> None:
        """Tell the task that its soft limit has passed. A thread sees it when it looks; others are interrupted."""
        self.context.soft_limit_passed = seconds
        if self.task.definition.kind != "thread":
            self.interrupt()

    def interrupt(self) -> None:
        """Cancel whatever the run waits for."""
        if self.job is not None and self.begun:
            self.job.cancel()

    def meaning_of(self, error: asyncio.CancelledError) -> BaseException:
        """What the task is to see of a cancellation: it stands for the soft limit, or for itself."""
        passed = self.context.soft_limit_passed
        if passed is None or self.context.cancel_reason is not None or self.job is None:
            return error
        self.context.soft_limit_passed = None
        self.job.uncancel()
        return SoftTimeLimitExceeded(passed)


@coroutine
def warned(work: Coroutine[Any, Any, T], run: Run) -> Generator[Any, Any, T]:
    """Await a run that has a soft limit: its work sees SoftTimeLimitExceeded where it waits, and may go on."""
    step: Callable[[], Any] = partial(work.send, None)
    while True:
        try:
            waited = step()
        except StopIteration as ended:
            value: T = ended.value
            return value
        try:
            step = partial(work.send, (yield waited))
        except GeneratorExit:
            work.close()
            raise
        except asyncio.CancelledError as error:
            step = partial(work.throw, run.meaning_of(error))
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is the work's
            step = partial(work.throw, error)


class TimeLimits:
    """Warns and ends runs that take too long, and tells of those that go on all the same.

    ``stuck`` is told of each run that has not ended ``kill_after`` seconds after it was to end.
    """

    def __init__(self, settings: Settings, loop: asyncio.AbstractEventLoop, stuck: Callable[[Run], None]) -> None:
        self._settings = settings
        self._loop = loop
        self._stuck = stuck

    def hard(self, run: Run) -> float:
        """Seconds the run may take: the message's limit, then the task's, then the app's."""
        return run.request.time_limit or run.task.definition.timeout or self._settings.timeout

    def soft(self, run: Run) -> float | None:
        """Seconds after which it is warned; None when it is not, or when the hard limit comes first."""
        soft = run.request.soft_time_limit or run.task.definition.soft_timeout
        return soft if soft is not None and soft < self.hard(run) else None

    def _first(self, run: Run) -> float:
        return self.soft(run) or self.hard(run)

    def watch(self, runs: Sequence[Run]) -> None:
        """Set timers, but not yet: most runs end soon, and never need one."""
        if runs:
            self._loop.call_later(min(_SOON, *map(self._first, runs)), self._set_timers, runs)

    def _set_timers(self, runs: Sequence[Run]) -> None:
        for run in runs:
            if run.job is not None and not run.job.done() and run.context.cancel_reason is None:
                run.timer = self._loop.call_at(run.started + self._first(run), self._first_passed, run)

    def _first_passed(self, run: Run) -> None:
        soft = self.soft(run)
        if soft is None:
            run.end("timeout")
        else:
            run.timer = self._loop.call_at(run.started + self.hard(run), run.end, "timeout")
            run.warn(soft)

    def ending(self, run: Run) -> None:
        """Look after a run that was told to end. At shutdown its worker does."""
        if run.timer is not None:
            run.timer.cancel()
        if run.context.cancel_reason != "shutdown":
            seconds = self._settings.kill_after + (_KILLED if run.task.definition.kind == "process" else 0.0)
            run.timer = self._loop.call_later(seconds, self._stuck, run)
