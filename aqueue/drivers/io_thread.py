"""An event loop in a thread of its own, for connections that must live while tasks keep the main loop busy."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Final, Generic, TypeVar

T = TypeVar("T")

_Errand = tuple[Callable[..., None], tuple[Any, ...]]
#: Seconds that what is not urgent waits.
_SOON: Final = 0.001


class IoThread:
    """Started by the first use; a loop of the same kind as the one that uses it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        #: What is to be called over there, and when it goes there if nothing else does before.
        self._errands: list[_Errand] = []
        self._leaving: asyncio.TimerHandle | None = None

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine over there; cancelling the future cancels it. Call it from an event loop."""
        return asyncio.run_coroutine_threadsafe(work, self._started())

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine over there, and wait for it here."""
        return await asyncio.wrap_future(self.submit(work))

    def call(self, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Call a function over there that does not wait; what it returns or raises is in the future."""
        reply: Reply[T] = Reply()
        self._errands.append((_answer, (reply, function, args)))
        self._leave()
        return reply.future

    def post(self, function: Callable[..., None], *args: Any) -> None:
        """Call a function over there soon: with the next `call`, or within a millisecond.

        The threads share one lock, so what is not urgent should not disturb what is.
        """
        self._errands.append((function, args))
        if self._leaving is None:
            self._leaving = asyncio.get_running_loop().call_later(_SOON, self._leave)

    def _leave(self) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        errands, self._errands = self._errands, []
        self._started().call_soon_threadsafe(_run, errands)

    def call_blocking(self, function: Callable[..., T], *args: Any, timeout: float) -> T:
        """`call`, from a thread without a loop. Raises TimeoutError, RuntimeError when closed."""
        loop = self._loop
        if loop is None:
            raise RuntimeError("closed")

        async def work() -> T:
            return function(*args)

        return asyncio.run_coroutine_threadsafe(work(), loop).result(timeout)

    def close(self) -> None:
        """End the thread; the next use starts another."""
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        self._errands.clear()
        loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(timeout=1.0)

    def _started(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = type(asyncio.get_running_loop())()
            self._thread = threading.Thread(target=_serve, args=(self._loop,), name=self._name, daemon=True)
            self._thread.start()
        return self._loop


class Reply(Generic[T]):
    """An answer that is awaited on the loop where this was made, and given on another."""

    __slots__ = ("_here", "future")

    def __init__(self) -> None:
        self._here = asyncio.get_running_loop()
        self.future: asyncio.Future[T] = self._here.create_future()

    def give(self, value: T) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._here.call_soon_threadsafe(_set_result, self.future, value)

    def fail(self, error: Exception) -> None:
        with suppress(RuntimeError):
            self._here.call_soon_threadsafe(_set_exception, self.future, error)


def _run(errands: Sequence[_Errand]) -> None:
    for function, args in errands:
        function(*args)


def _answer(reply: Reply[T], function: Callable[..., T], args: tuple[Any, ...]) -> None:
    try:
        value = function(*args)
    except Exception as error:  # noqa: BLE001 - it is for the caller
        reply.fail(error)
    else:
        reply.give(value)


def _set_result(answer: asyncio.Future[T], value: T) -> None:
    if not answer.done():
        answer.set_result(value)


def _set_exception(answer: asyncio.Future[Any], error: Exception) -> None:
    if not answer.done():
        answer.set_exception(error)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    loop.run_forever()
    loop.run_until_complete(_cancel_the_rest())
    loop.close()


async def _cancel_the_rest() -> None:
    rest = asyncio.all_tasks() - {asyncio.current_task()}
    for task in rest:
        task.cancel()
    if rest:
        await asyncio.wait(rest, timeout=1.0)
