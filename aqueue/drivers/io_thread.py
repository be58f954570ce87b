"""An event loop in a thread of its own, for connections that must live while tasks keep the main loop busy."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")


class IoThread:
    """Started by the first use; a loop of the same kind as the one that uses it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Start a coroutine over there; cancelling the future cancels it. Call it from an event loop."""
        if self._loop is None:
            self._start(type(asyncio.get_running_loop())())
        assert self._loop is not None, "started above"
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine over there, and wait for it here."""
        return await asyncio.wrap_future(self.submit(work))

    def call(self, function: Callable[..., T], *args: Any) -> asyncio.Future[T]:
        """Call a function over there that does not wait; what it returns or raises is in the future."""
        assert self._loop is not None, "something has been submitted before"
        here = asyncio.get_running_loop()
        answer: asyncio.Future[T] = here.create_future()
        self._loop.call_soon_threadsafe(_answer, here, answer, function, args)
        return answer

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
        loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None and thread is not None:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(timeout=1.0)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._thread = threading.Thread(target=_serve, args=(loop,), name=self._name, daemon=True)
        self._thread.start()


def _answer(
    loop: asyncio.AbstractEventLoop, answer: asyncio.Future[T], function: Callable[..., T], args: tuple[Any, ...]
) -> None:
    try:
        value = function(*args)
    except Exception as error:  # noqa: BLE001 - it is for the caller
        loop.call_soon_threadsafe(_set_exception, answer, error)
    else:
        loop.call_soon_threadsafe(_set_result, answer, value)


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
