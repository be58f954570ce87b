"""A handle on a task that was sent, here or by another process."""

import asyncio
from collections.abc import Awaitable, Callable, Generator, Sequence
from typing import Any, Final, Generic, Literal, TypeVar

from aqueue.arguments import ArgumentCodec
from aqueue.attempts import Attempt
from aqueue.errors import ResultIgnored, ResultTimeout, ResultUnknown, TaskFailed, TaskRevoked
from aqueue.results import FAILURE, REVOKED, SUCCESS, RemoteError, Result, ResultStore

R = TypeVar("R")

#: What has become of a wish to cancel a task: it is told to the workers, or came too late.
Cancelled = Literal["requested", "finished"]
#: Cancels tasks: their ids, the reason, whether to end those that run, seconds to remember it.
Canceller = Callable[[Sequence[str], str, bool, float | None], Awaitable[list[Cancelled]]]

#: What `AsyncResult.state` says of an id that nobody has heard of.
UNKNOWN: Final = "UNKNOWN"
#: Seconds a waiter leaves to the store before it looks after its own deadline again.
_WAIT: Final = 30.0


class AsyncResult(Generic[R]):
    """The result of one task. Awaiting it is `get` without a timeout.

    ``store`` gives the result store of the running event loop. ``known`` says that the task was certainly
    sent, so that an empty store means waiting, not an unknown id.
    """

    def __init__(
        self,
        task_id: str,
        store: Callable[[], ResultStore],
        *,
        codec: ArgumentCodec | None = None,
        known: bool = False,
        ignored: bool = False,
        canceller: Canceller | None = None,
    ) -> None:
        self.id = task_id
        self._store = store
        self._codec = codec
        self._known = known
        self._ignored = ignored
        self._canceller = canceller

    async def get(self, timeout: float | None = None) -> R:
        """Wait for the task to end, at most ``timeout`` seconds, and return its value.

        Raises TaskFailed, TaskRevoked, ResultTimeout, ResultUnknown for an id nobody has heard of,
        ResultIgnored for a task that keeps no result, StoreUnavailable.
        """
        if self._ignored:
            raise ResultIgnored(f"task {self.id} keeps no result (ignore_result)")
        loop = asyncio.get_running_loop()
        deadline = None if timeout is None else loop.time() + timeout
        while True:
            left = _WAIT if deadline is None else max(0.0, min(_WAIT, deadline - loop.time()))
            result = await self._store().get(self.id, left)
            if result is not None and result.is_final:
                return self._value_of(result)
            if result is None and not self._known:
                raise ResultUnknown(
                    f"no task {self.id} is known: it was never sent, its result has expired or was forgotten, or a "
                    "Celery client sent it and it has not started yet (then wait with app.result(id, known=True))"
                )
            if deadline is not None and loop.time() >= deadline:
                state = "not started" if result is None else result.state
                raise ResultTimeout(f"task {self.id} has not ended after {timeout:g} s (it is {state})")

    def __await__(self) -> Generator[Any, None, R]:
        return self.get().__await__()

    async def fetch(self) -> Result | None:
        """Everything that is stored now: state, value, traceback, times; None for an unknown id."""
        return await self._store().get(self.id)

    async def state(self) -> str:
        """PENDING, STARTED, RETRY, SUCCESS, FAILURE, REVOKED, one of the task's own, or `UNKNOWN`."""
        result = await self.fetch()
        if result is None:
            return "PENDING" if self._known else UNKNOWN
        return result.state

    async def info(self) -> Any:
        """What the state says: the value, the error, or what the task told of its progress."""
        result = await self.fetch()
        return None if result is None else result.value

    async def attempts(self) -> tuple[Attempt, ...]:
        """The attempts that have failed so far, the oldest first; none for a task that was run once only."""
        result = await self.fetch()
        return () if result is None else result.attempts

    async def ready(self) -> bool:
        """Whether the task has ended, well or not."""
        result = await self.fetch()
        return result is not None and result.is_final

    async def successful(self) -> bool:
        return await self.state() == SUCCESS

    async def failed(self) -> bool:
        return await self.state() == FAILURE

    async def cancel(
        self, reason: str = "cancelled", *, terminate: bool = True, keep: float | None = None
    ) -> Cancelled:
        """Have the task not run, or with ``terminate`` end where it runs; its state is REVOKED then.

        Returns ``finished`` when it has ended already, else ``requested``: workers are told, and one that starts later
        finds it for ``keep`` seconds (by default the app's ``cancel_expires``). A task without a result is always
        ``requested``. Raises InvalidArguments, BrokerUnavailable.
        """
        if self._canceller is None:
            raise RuntimeError("this handle was made without an app; use app.cancel(id)")
        (done,) = await self._canceller([self.id], reason, terminate, keep)
        return done

    async def forget(self) -> None:
        """Delete the stored result."""
        self._known = False
        await self._store().forget(self.id)

    def typed_by(self, codec: ArgumentCodec) -> "AsyncResult[Any]":
        """The same handle, rebuilding values by a task's return annotation."""
        return AsyncResult(
            self.id,
            self._store,
            codec=codec,
            known=self._known,
            ignored=self._ignored,
            canceller=self._canceller,
        )

    def _value_of(self, result: Result) -> R:
        if result.state == SUCCESS:
            value: R = result.value if self._codec is None else self._codec.decode_result(result.value)
            return value
        error = result.value if isinstance(result.value, RemoteError) else RemoteError("Exception", result.value)
        if result.state == REVOKED:
            raise TaskRevoked(self.id, error.text or "revoked")
        raise TaskFailed(self.id, error.exc_type, error.text, error.exc_module, result.traceback)

    def __repr__(self) -> str:
        return f"<AsyncResult {self.id}>"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AsyncResult) and other.id == self.id

    def __hash__(self) -> int:
        return hash(self.id)
