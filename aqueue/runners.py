"""Where a task's function runs: on the loop, in a thread of a pool of our own, or in a child process."""

import asyncio
import contextvars
import sys
import threading
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any

from aqueue.context import Context
from aqueue.frames import awaited, callers, place
from aqueue.process_pool import ProcessPool
from aqueue.task import Task


async def run_coroutine(task: Task[..., Any], context: Context) -> Any:
    """Run a coroutine task on this loop."""
    return await task.function(*task.definition.first_arguments(context), *context.args, **context.kwargs)


#: What a call returned, and what it raised.
_Ended = tuple[Any, BaseException | None]


class _Job:
    """A call, and how it ended; errors are carried, as a future can't hold all of them."""

    __slots__ = ("call", "context", "error", "future", "value")

    def __init__(self, call: Callable[[], Any], context: Context, future: "asyncio.Future[_Ended]") -> None:
        self.call = call
        self.context = context
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
        #: What each thread does, or did last, by its identifier.
        self._doing: dict[int, _Job] = {}
        self._unfinished = 0
        #: Set while a wake-up of the loop is on its way; written under the lock.
        self._waking = False
        self._lock = threading.Lock()

    async def run(self, task: Task[..., Any], context: Context) -> Any:
        """Run a plain function; returns what it returns, raises what it raises.

        A thread can't be interrupted: a run that is cancelled ends only when the thread does, so that its slot
        and its lease are kept as long as it works. At shutdown nobody waits for it.
        """
        before = task.definition.first_arguments(context)
        ended = self._submit(lambda: task.function(*before, *context.args, **context.kwargs), context)
        try:
            value, error = await asyncio.shield(ended)
        except asyncio.CancelledError:
            if context.cancel_reason != "shutdown":
                await asyncio.wait([ended])
            raise
        if error is not None:
            raise error
        return value

    def where(self, context: Context) -> str:
        """The line at which a run's thread is."""
        frames = sys._current_frames()  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - documented
        for identifier, job in self._doing.items():
            if job.context is context and not job.future.done() and identifier in frames:
                return f"at {place(callers(frames[identifier]))}"
        return "waiting for a thread"

    def _submit(self, function: Callable[[], Any], context: Context) -> "asyncio.Future[_Ended]":
        job = _Job(partial(contextvars.copy_context().run, function), context, self._loop.create_future())
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
        me = threading.get_ident()
        while (job := self._jobs.get()) is not None:
            self._doing[me] = job
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


class Runners:
    """The innermost of the onion: runs a task where its kind says, and knows where it is."""

    def __init__(self, threads: ThreadPool, processes: ProcessPool, tasks: Mapping[str, Task[..., Any]]) -> None:
        self._threads = threads
        self._processes = processes
        self._tasks = tasks

    def run(self, context: Context) -> Awaitable[Any]:
        task = self._tasks[context.task]
        if task.definition.kind == "coroutine":
            return run_coroutine(task, context)
        if task.definition.kind == "process":
            return self._processes.run(task, context)
        return self._threads.run(task, context)

    async def take(self, context: Context) -> None:
        """Have the process ready that a run needs. Raises WorkerLostError."""
        await self._processes.take(context)

    def give(self, context: Context) -> None:
        """The run has ended, in whatever way."""
        self._processes.give(context)

    def where(self, task: Task[..., Any], context: Context, job: "asyncio.Task[Any] | None") -> str:
        """Where a run is, for people: file and line."""
        if task.definition.kind == "thread":
            return self._threads.where(context)
        if task.definition.kind == "process":
            return self._processes.where(context)
        found = "" if job is None else place(awaited(job.get_coro()))
        return f"at {found}" if found else "at an unknown line"
