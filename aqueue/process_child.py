"""A child process: runs one task after the other for its worker, see `aqueue.process_pool`.

The task runs in the main thread. A second thread listens to the worker: what the task is to learn while it runs
becomes a signal to the main thread, which raises it there. The process and all it has started end when the
worker does, however that happens.
"""

import asyncio
import fcntl
import logging
import os
import pickle
import resource
import signal
import socket
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from multiprocessing import spawn
from operator import attrgetter
from queue import SimpleQueue
from types import FrameType
from typing import Any, Final

import msgspec

from aqueue.context import BoundTask, Context, current, enter
from aqueue.errors import EncodeError, RetryTask, SoftTimeLimitExceeded
from aqueue.failures import ProcessTaskError, traceback_text
from aqueue.process_link import (
    MAX_VALUE,
    Call,
    End,
    Exit,
    Logged,
    Raised,
    Ready,
    Returned,
    Setup,
    State,
    Told,
    Unpacker,
    Warn,
    pack,
)
from aqueue.saferepr import printable
from aqueue.task import Task

_CHUNK: Final = 256 * 1024
#: Raised in the task; from outside it means nothing, as the worker decides when a task ends.
_INTERRUPT: Final = signal.SIGTERM


class Link:
    """The child's end of the connection; may be used by several threads."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._unpacker = Unpacker()
        self._sending = threading.Lock()
        os.register_at_fork(after_in_child=connection.close)

    def send(self, message: msgspec.Struct) -> None:
        data = pack(message)
        with self._sending:
            self._connection.sendall(data)

    def receive(self) -> Iterator[Any]:
        """What the worker says, until it is gone."""
        with suppress(OSError):
            while data := self._connection.recv(_CHUNK):
                yield from self._unpacker.feed(data)


class ChildContext(Context):
    """What a task in a child process may know of itself: what it tells is stored by the worker."""

    __slots__ = ("tell",)

    #: Set for each call.
    tell: Callable[[str, Any], None]

    async def update_state(self, state: str, meta: Any = None) -> None:
        self.tell(state, meta)

    def update_state_sync(self, state: str, meta: Any = None) -> None:
        self.tell(state, meta)


class Job:
    """One call, from its arrival to its answer."""

    def __init__(self, call: Call, tell: Callable[[str, Any], None]) -> None:
        self.call = call
        self.context = ChildContext(
            call.request,
            deliveries=call.deliveries,
            receipt=call.receipt,
            max_attempts=call.max_attempts,
            worker=call.worker,
        )
        self.context.tell = tell
        #: The task's own code runs, so that an interruption may be raised in it.
        self.open = False
        self._ended = False

    def run(self) -> Any:
        call, context = self.call, self.context
        function = _function(call)
        request = context.request
        request.args, request.kwargs = pickle.loads(call.arguments)  # noqa: S301 - our own worker's
        context.args, context.kwargs = request.args, request.kwargs
        before = (context,) if call.takes_context else (BoundTask(context),) if call.bind else ()
        enter(context)
        with _memory(call.memory):
            try:
                self.open = True
                context.check()  # it may have been ended on its way to us
                return function(*before, *context.args, **context.kwargs)
            except MemoryError as error:
                if call.memory is not None and not error.args:
                    error.args = (f"out of memory: this task may have {call.memory:,} bytes",)
                raise
            finally:
                self.open = False

    def interrupt(self) -> None:
        """Raise in the task what it is to learn, once."""
        context = self.context
        if not self.open or self._ended:
            return
        if context.cancel_reason is not None:
            self._ended = True
            raise asyncio.CancelledError(context.cancel_reason)
        passed, context.soft_limit_passed = context.soft_limit_passed, None
        if passed is not None:
            raise SoftTimeLimitExceeded(passed)


class Child:
    """Answers calls, one at a time."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._main = threading.get_ident()
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._replies: SimpleQueue[Told] = SimpleQueue()
        self._telling = threading.Lock()
        self._told = 0
        #: The last call that came.
        self._job: Job | None = None

    def serve(self, setup: Setup, messages: Iterator[Any]) -> None:
        """Answer calls until there are no more."""
        signal.signal(_INTERRUPT, self._on_signal)
        os.register_at_fork(before=_hold_signal, after_in_parent=_take_signal, after_in_child=_restore_signal)
        threading.Thread(target=self._listen, args=(messages,), name="aqueue-listen", daemon=True).start()
        root = logging.getLogger()
        to_worker = _ToWorker(self._link)
        root.addHandler(to_worker)
        root.setLevel(setup.log_level)
        os.register_at_fork(after_in_child=lambda: root.removeHandler(to_worker))  # it can't reach the worker
        failure = _prepare(setup)
        self._link.send(Ready())
        while (job := self._jobs.get()) is not None:
            self._link.send(_answer(job, failure))
            signal.signal(_INTERRUPT, self._on_signal)  # whatever the task made of it

    def _listen(self, messages: Iterator[Any]) -> None:
        for message in messages:
            match message:
                case Call():
                    self._job = Job(message, self._tell)
                    self._jobs.put(self._job)
                case Warn(seconds=seconds) if self._job is not None and message.number == self._job.call.number:
                    self._job.context.soft_limit_passed = seconds
                    signal.pthread_kill(self._main, _INTERRUPT)
                case End(reason=reason) if self._job is not None and message.number == self._job.call.number:
                    self._job.context.cancel_reason = reason
                    signal.pthread_kill(self._main, _INTERRUPT)
                case Told():
                    self._replies.put(message)
                case Exit():
                    self._jobs.put(None)
                case _:
                    pass  # about a call that has been answered meanwhile
        os.killpg(os.getpgrp(), signal.SIGKILL)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._job is not None:
            self._job.interrupt()

    def _tell(self, state: str, meta: Any) -> None:
        """Have the worker store a state. Raises what storing it raised there."""
        with self._telling:
            self._told += 1
            try:
                data = pickle.dumps(meta)
            except Exception as error:  # the methods of a value may raise anything
                raise EncodeError(f"the state {state} can't be pickled: {printable(error)}") from error
            self._link.send(State(self._told, state, data))
            while (reply := self._replies.get()).number != self._told:
                pass  # to one that was interrupted while it waited
        if reply.error is not None:
            raise reply.error


class _ToWorker(logging.Handler):
    """Hands log records to the worker, whose logging is set up."""

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link

    def emit(self, record: logging.LogRecord) -> None:
        told = {key: value for key, value in vars(record).items() if isinstance(value, str | int | float | None)}
        told |= {"msg": self.format(record), "args": None, "exc_text": None, "stack_info": None}
        context = current()
        if context is not None:
            told = {"task_id": context.id, "task_name": context.task, **told}
        with suppress(OSError):  # the worker is gone, and we go, too
            self._link.send(Logged(told))


def _hold_signal() -> None:
    """What a task forks has the signal for itself, as it is by default, from its first moment."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [_INTERRUPT])


def _take_signal() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [_INTERRUPT])


def _restore_signal() -> None:
    signal.signal(_INTERRUPT, signal.SIG_DFL)
    _take_signal()


def _prepare(setup: Setup) -> BaseException | None:
    """Import what the tasks need, and return why the script itself could not be.

    Any other module that can't be imported is tried again, and told of, by the call that needs it.
    """
    failure: BaseException | None = None
    try:
        spawn.prepare(dict(setup.preparation))
    except (Exception, SystemExit) as error:  # noqa: BLE001 - it is the user's code
        failure = error
    for module in setup.modules:
        with suppress(Exception, SystemExit):
            import_module(module)
    return failure


def _function(call: Call) -> Callable[..., Any]:
    found = attrgetter(call.qualname)(import_module(call.module))
    return found.function if isinstance(found, Task) else found


@contextmanager
def _memory(limit: int | None) -> Generator[None]:
    """Bound what the process itself may allocate, in bytes."""
    if limit is None:
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (min(limit, before[1]) if before[1] >= 0 else limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def _answer(job: Job, failure: BaseException | None) -> Returned | Raised:
    try:
        if failure is not None and job.call.module == "__main__":
            raise failure
        value = job.run()
    except BaseException as error:  # noqa: BLE001 - carried to the worker
        return _raised(error)
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
    try:
        data = pickle.dumps(value)
    except Exception as error:  # noqa: BLE001 - the methods of a value may raise anything
        return Returned(None, f"{printable(type(value).__qualname__)} can't be pickled: {printable(error)}")
    if len(data) > MAX_VALUE:
        return Returned(None, f"{len(data):,} bytes are too many to be handed over, the limit is {MAX_VALUE:,}")
    return Returned(data)


def _raised(error: BaseException) -> Raised:
    if isinstance(error, RetryTask) and error.error is not None and _pickled(error.error) is None:
        error.error = ProcessTaskError.of(error.error)
        error.args = (error.after, error.error, error.attempts)
    kind = type(error)
    return Raised(
        error=_pickled(error),
        module=kind.__module__,
        type=kind.__qualname__,
        text=printable(error),
        traceback=traceback_text(error),
        worn=isinstance(error, MemoryError),
    )


def _pickled(error: BaseException) -> bytes | None:
    """The exception, if it survives the journey."""
    try:
        data = pickle.dumps(error)
        same = type(pickle.loads(data)) is type(error)  # noqa: S301 - just made
    except Exception:  # noqa: BLE001 - a class may do anything when it is taken apart or made
        return None
    return data if same and len(data) <= MAX_VALUE else None


def _end_with_the_worker(lifeline: int) -> None:
    """Have the kernel kill this process and all of its group when the other end of a pipe is closed.

    So it happens even while a task holds the interpreter's lock. Where there is no such thing, `Child` does it.
    """
    if hasattr(fcntl, "F_SETSIG"):
        fcntl.fcntl(lifeline, fcntl.F_SETOWN, -os.getpgrp())
        fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
        fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)


def main(connection: int, lifeline: int) -> None:
    """Serve the worker at the other end of two inherited file descriptors."""
    os.set_inheritable(connection, False)
    os.set_inheritable(lifeline, False)
    _end_with_the_worker(lifeline)
    link = Link(socket.socket(fileno=connection))
    messages = link.receive()
    for setup in messages:
        Child(link).serve(setup, messages)
        return
