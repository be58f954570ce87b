"""Where a task's function runs: on the loop, or in a thread of a pool of our own."""

import asyncio
import contextvars
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any, Final

from aqueue.context import Context
from aqueue.outcome import CallNext
from aqueue.task import Task

#: Reasons to end a run after which nobody waits for a thread that goes on.
_LEAVE_THREAD: Final = ("shutdown", "lease lost")


async def run_coroutine(task: Task[..., Any], context: Context) -> Any:
    """Run a coroutine task on this loop."""
    return await task.function(*task.definition.first_arguments(context), *context.args, **context.kwargs)


#: What a call returned, and what it raised.
_Ended = tuple[Any, BaseException | None]


class _Job:
    """A call, and how it ended; errors are carried, as a future can't hold all of them."""

    __slots__ = ("call", "error", "future", "value")

    def __init__(self, call: Callable[[], Any], future: "asyncio.Future[_Ended]") -> None:
        self.call = call
        self.future = future
        self.value: Any = None
        self.error: BaseException | None = None


class ThreadPool:
    """A fixed number of daemon threads, started as they are needed.

    Jobs that end while the loop is busy are handed over together, with one wake-up.
    """

    def __init__(self, size: int, loop: asyncio.AbstractEventLoop) -> None:
        self._size = size
        self._loop = loop
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._ended: deque[_Job] = deque()
        self._threads: list[threading.Thread] = []
        self._unfinished = 0
        #: Set while a wake-up of the loop is on its way; written under the lock.
        self._waking = False
        self._lock = threading.Lock()

    async def run(self, task: Task[..., Any], context: Context) -> Any:
        """Run a plain function; returns what it returns, raises what it raises.

        A thread can't be interrupted: a run that is cancelled for its timeout ends only when the thread
        does, so that its slot and its lease are kept as long as it works.
        """
        before = task.definition.first_arguments(context)
        ended = self._submit(lambda: task.function(*before, *context.args, **context.kwargs))
        try:
            value, error = await asyncio.shield(ended)
        except asyncio.CancelledError:
            if context.cancel_reason not in _LEAVE_THREAD:
                await asyncio.wait([ended])
            raise
        if error is not None:
            raise error
        return value

    def _submit(self, function: Callable[[], Any]) -> "asyncio.Future[_Ended]":
        job = _Job(partial(contextvars.copy_context().run, function), self._loop.create_future())
        self._unfinished += 1
        if len(self._threads) < min(self._size, self._unfinished):
            thread = threading.Thread(target=self._work, name=f"aqueue-task-{len(self._threads)}", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._jobs.put(job)
        return job.future

    def close(self) -> None:
        """Let idle threads end; those at work end after their job."""
        for _ in self._threads:
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job.value = job.call()
            except BaseException as error:  # noqa: BLE001 - carried to the loop
                job.error = error
            job.call = _nothing  # no reference to arguments outlives the run
            self._hand_over(job)

    def _hand_over(self, job: _Job) -> None:
        with self._lock:
            self._ended.append(job)
            if self._waking:
                return
            self._waking = True
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        with self._lock:
            ended, self._ended = self._ended, deque()
            self._waking = False
        self._unfinished -= len(ended)
        for job in ended:
            if not job.future.done():
                job.future.set_result((job.value, job.error))


def _nothing() -> None:
    return None


def runner_for(threads: ThreadPool, tasks: dict[str, Task[..., Any]]) -> CallNext:
    """The innermost of the onion: run a task where its kind says."""

    def run(context: Context) -> Any:
        task = tasks[context.task]
        if task.definition.kind == "coroutine":
            return run_coroutine(task, context)
        return threads.run(task, context)

    return run
