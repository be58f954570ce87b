"""What a running task may know of itself: the `Context`, and Celery's ``self`` for those who migrate."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from types import MappingProxyType, SimpleNamespace
from typing import Any, Final, NoReturn, Protocol

from aqueue.attempts import ERRORS, Attempt, attempts_of, snoozes_of
from aqueue.broker import token_of
from aqueue.effects import Effect
from aqueue.errors import RetryTask, SoftTimeLimitExceeded
from aqueue.protocol import NOTHING_FOLLOWS, Message, Request

#: Celery's pause before a retry, when ``self.retry`` is not told one.
_CELERY_RETRY_DELAY: Final = 180.0


class Reporter(Protocol):
    """Stores what a task tells of itself while it runs; the worker."""

    def report(self, request: Request, state: str, meta: Any) -> Awaitable[None]: ...


class Context:
    """One run of one task.

    Asked for by annotation: ``async def task(ctx: Context, x: int)``. Also `current`.
    """

    __slots__ = (
        "_cancelled",
        "_reporter",
        "args",
        "cancel_reason",
        "deliveries",
        "kwargs",
        "loop",
        "max_attempts",
        "receipt",
        "request",
        "soft_limit_passed",
        "state",
        "worker",
    )

    def __init__(
        self,
        request: Request,
        *,
        deliveries: int = 1,
        receipt: str = "",
        max_attempts: int = 1,
        worker: str = "",
        state: Mapping[str, Any] = MappingProxyType({}),
        reporter: Reporter | None = None,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self.request = request
        #: What the task is called with; its own types once the gates are passed.
        self.args: Sequence[Any] = request.args
        self.kwargs: Mapping[str, Any] = request.kwargs
        #: 1 for the first delivery; more after workers were lost while they held this task.
        self.deliveries = deliveries
        self.max_attempts = max_attempts
        #: ``name@host`` of the worker.
        self.worker = worker
        #: What the app's lifespan has made for its tasks.
        self.state: Mapping[str, Any] = state
        #: Why the run is being ended: ``cancelled``, ``timeout``, ``shutdown``, ``lease lost``; None while it is not.
        self.cancel_reason: str | None = None
        #: The soft limit (seconds) that has passed, and of which the task was not told yet by an exception.
        self.soft_limit_passed: float | None = None
        #: Names this claim of the message.
        self.receipt = receipt
        self._reporter = reporter
        #: The worker's event loop; None for a plain call.
        self.loop = loop

    @property
    def id(self) -> str:
        return self.request.id

    @property
    def task(self) -> str:
        """The task's name."""
        return self.request.task

    @property
    def attempt(self) -> int:
        """1 for the first run."""
        return self.request.retries + 1

    @property
    def errors(self) -> tuple[Attempt, ...]:
        """Why the attempts before this one failed, the oldest first; the last ten at most."""
        return attempts_of(self.request.message.headers.get(ERRORS))

    @property
    def snoozes(self) -> int:
        """How often the task has put itself off with ``Snooze``."""
        return snoozes_of(self.request.message.headers)

    @property
    def queue(self) -> str:
        return self.request.message.queue

    @property
    def headers(self) -> dict[str, Any]:
        """The application's own headers of the message."""
        return self.request.headers

    @property
    def root_id(self) -> str:
        return self.request.root_id

    @property
    def parent_id(self) -> str | None:
        return self.request.parent_id

    @property
    def idempotency_key(self) -> str:
        """The same for every delivery, attempt and replay of this task: its id. For interfaces that take such a key.

        What is to count as something new is sent anew. Empty for a plain call.
        """
        return self.request.id

    @property
    def token(self) -> int | None:
        """A fencing number: larger than that of every earlier claim on this broker, as long as it keeps its data.

        For writes such as ``UPDATE ... SET fence = :token WHERE fence < :token``. None on RabbitMQ, which numbers
        no claims, and for a plain call.
        """
        return token_of(self.receipt)

    def effect(self, connection: Any, step: str = "", *, commit: bool = True) -> Effect:
        """A transaction whose writes happen once, however often the task runs: see `aqueue.effects`."""
        return Effect(connection, self.idempotency_key, step, self.token, commit=commit)

    @property
    def cancelled(self) -> bool:
        """Whether the run should end; for loops in thread tasks, which can't be interrupted."""
        return self.cancel_reason is not None or self.soft_limit_passed is not None

    def check(self) -> None:
        """Raise if the run should end; for loops in thread tasks, which can't be interrupted.

        Raises what a coroutine would meet where it waits: SoftTimeLimitExceeded, once, after the soft limit;
        asyncio.CancelledError, with the reason, after the hard one and for whatever else ends the run.
        """
        if self.cancel_reason is not None:
            raise asyncio.CancelledError(self.cancel_reason)
        passed, self.soft_limit_passed = self.soft_limit_passed, None
        if passed is not None:
            raise SoftTimeLimitExceeded(passed)

    @property
    def logger(self) -> "logging.LoggerAdapter[logging.Logger]":
        """A logger named after the task, whose records carry ``task_id`` and ``task_name``."""
        return logging.LoggerAdapter(
            logging.getLogger(f"aqueue.task.{self.task}"), {"task_id": self.id, "task_name": self.task}
        )

    async def progress(self, done: float, total: float | None = None, message: str = "") -> None:
        """Tell how far the task is; seen as state PROGRESS with ``current``, ``total``, ``message``."""
        await self.update_state("PROGRESS", {"current": done, "total": total, "message": message})

    def progress_sync(self, done: float, total: float | None = None, message: str = "") -> None:
        """`progress` for thread tasks."""
        self.update_state_sync("PROGRESS", {"current": done, "total": total, "message": message})

    async def update_state(self, state: str, meta: Any = None) -> None:
        """Store a state of the task's own, with any document."""
        if self._reporter is not None:
            await self._reporter.report(self.request, state, meta)

    def update_state_sync(self, state: str, meta: Any = None) -> None:
        """`update_state` for thread tasks."""
        if self._reporter is not None and self.loop is not None:
            if _running_loop() is self.loop:
                raise RuntimeError("this would block the worker's loop; await Context.update_state(...) instead")
            asyncio.run_coroutine_threadsafe(self.update_state(state, meta), self.loop).result()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    with suppress(RuntimeError):
        return asyncio.get_running_loop()
    return None


_current: ContextVar[Context | None] = ContextVar("aqueue_context", default=None)
enter: Final[Callable[[Context], object]] = _current.set


def current() -> Context | None:
    """The context of the task that is running here, in a coroutine or a thread; None outside of tasks."""
    return _current.get()


def local_context(task: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Context:
    """The context of a plain call, outside of any worker."""
    message = Message(queue="", headers={}, body=b"")
    request = Request(
        id="", task=task, args=list(args), kwargs=kwargs, embed=NOTHING_FOLLOWS, message=message, retries=0, root_id=""
    )
    return Context(request)


class BoundTask:
    """``self`` of a task with ``bind=True``, as far as Celery's tasks use it."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.name = context.task

    @property
    def request(self) -> SimpleNamespace:
        """Celery's ``self.request``: the same names for the same things."""
        request, message = self._context.request, self._context.request.message
        return SimpleNamespace(
            id=request.id,
            task=request.task,
            args=self._context.args,
            kwargs=self._context.kwargs,
            retries=request.retries,
            root_id=request.root_id,
            parent_id=request.parent_id,
            group=request.group,
            group_index=request.group_index,
            eta=message.headers.get("eta"),
            expires=message.headers.get("expires"),
            timelimit=message.headers.get("timelimit"),
            origin=message.headers.get("origin"),
            shadow=request.shadow,
            ignore_result=request.ignore_result,
            headers=request.headers or None,
            correlation_id=message.properties.get("correlation_id"),
            reply_to=message.properties.get("reply_to"),
            hostname=self._context.worker,
            called_directly=not request.id,
            is_eager=False,
            delivery_info={
                "exchange": message.exchange,
                "routing_key": message.routing_key or message.queue,
                "priority": message.priority,
                "redelivered": message.redelivered or self._context.deliveries > 1,
            },
        )

    def retry(
        self, exc: BaseException | None = None, countdown: float | None = None, max_retries: int | None = None
    ) -> NoReturn:
        """Run the task again after ``countdown`` seconds; like Celery's, it raises."""
        attempts = None if max_retries is None else max_retries + 1
        raise RetryTask(_CELERY_RETRY_DELAY if countdown is None else countdown, exc, attempts)

    def update_state(self, state: str, meta: Any = None) -> None:
        """Store a state of the task's own. Raises RuntimeError in a coroutine, which has `Context.update_state`."""
        self._context.update_state_sync(state, meta)
