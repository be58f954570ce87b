"""The worker's child processes, in which tasks with ``run="process"`` run; see `aqueue.process_child`.

::

    worker ─┬─ child: a fresh interpreter, never a fork; imports the tasks' modules once; kept for the next task
            └─ child ── whatever a task starts: in the child's process group, and killed with it

A child runs one task at a time. It is told to end by a message, and killed when it does not. One that dies takes
its own task along and nothing else: the run fails with `WorkerLostError`, which says how it died.
"""

import asyncio
import logging
import os
import pickle
import signal
import socket
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, Final, NoReturn, cast

import msgspec

from aqueue.context import Context
from aqueue.errors import (
    ConfigurationError,
    EncodeError,
    InvalidArguments,
    MessageTooLarge,
    SoftTimeLimitExceeded,
    StoreUnavailable,
    WorkerLostError,
)
from aqueue.failures import ProcessTaskError, RemoteTraceback
from aqueue.process_link import (
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
from aqueue.processes import how_it_ended, oom_kills, resident
from aqueue.protocol import NOTHING_FOLLOWS
from aqueue.saferepr import printable
from aqueue.settings import Settings
from aqueue.task import Task

#: Run by a fresh interpreter, which has to find this package wherever it is.
_CODE: Final = "import sys; sys.path.insert(0, {!r}); from aqueue.process_child import main; main({}, {})"
_CHILD: Final = "aqueue.process_child"
#: Seconds between a child's last word and its death, or the other way round; then it is helped.
_LAST_WORDS: Final = 1.0
#: Seconds in which a child must have imported its modules.
_START: Final = 300.0
#: Seconds that idle children may take to end by themselves, and busy ones when the worker ends.
_FAREWELL: Final = 3.0


class Died(msgspec.Struct, frozen=True):
    """How a call ended: its process is gone. ``code`` is the exit code, or minus the number of a signal."""

    code: int


Answer = Returned | Raised | Died


class LostValue:
    """Stands for a result that could not be handed over: storing it fails, and says why."""

    def __init__(self, problem: str) -> None:
        self.problem = problem

    def __json__(self) -> NoReturn:
        raise TypeError(self.problem)

    def __reduce__(self) -> NoReturn:
        raise TypeError(self.problem)


class Child(asyncio.Protocol):
    """One child process, as its worker sees it."""

    def __init__(self, process: asyncio.subprocess.Process, lifeline: int) -> None:
        self.process = process
        self._lifeline = lifeline
        self._unpacker = Unpacker()
        self._transport: asyncio.WriteTransport | None = None
        self._disconnected = asyncio.Event()
        self._context: Context | None = None
        self._answer: asyncio.Future[Answer] | None = None
        self._telling: set[asyncio.Task[None]] = set()
        #: Set when calls can be answered at once, or never.
        self.ready = asyncio.Event()
        #: Calls so far.
        self.calls = 0
        #: To be let go after the call that it runs.
        self.worn = False
        #: Ends with the process; its result is the exit code.
        self.death = asyncio.create_task(self._watch())

    # --- the connection ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        for message in self._unpacker.feed(data):
            self._receive(message)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disconnected.set()

    def send(self, message: msgspec.Struct) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(pack(message))

    def _receive(self, message: Any) -> None:
        match message:
            case Returned() | Raised():
                self.worn |= isinstance(message, Raised) and message.worn
                self._conclude(message)
            case Ready():
                self.ready.set()
            case State() if self._context is not None:
                telling = asyncio.create_task(self._tell(self._context, message))
                self._telling.add(telling)
                telling.add_done_callback(self._telling.discard)
            case Logged(record=told):
                record = logging.makeLogRecord(told)
                logger = logging.getLogger(record.name)
                if logger.isEnabledFor(record.levelno):
                    logger.handle(record)
            case _:
                pass

    async def _tell(self, context: Context, message: State) -> None:
        error: Exception | None = None
        try:
            await context.update_state(message.state, pickle.loads(message.meta))  # noqa: S301 - our own child's
        except Exception as problem:  # noqa: BLE001 - raised again where the task is
            error = problem
        if error is not None and type(error) not in (EncodeError, MessageTooLarge, StoreUnavailable):
            error = RuntimeError(printable(error))
        self.send(Told(message.number, error))

    # --- a call ---

    def runs(self, context: Context) -> bool:
        return self._context is context

    def begin(self, call: Call, context: Context) -> "asyncio.Future[Answer]":
        """Send a call; the future gets its answer, whatever becomes of the process."""
        self.calls += 1
        self._context = context
        self._answer = asyncio.get_running_loop().create_future()
        if self.death.done():
            self._conclude(Died(self.death.result()))
        self.send(call)
        return self._answer

    def _conclude(self, answer: Answer) -> None:
        self._context = None
        if self._answer is not None and not self._answer.done():
            self._answer.set_result(answer)

    # --- the end ---

    def kill(self) -> None:
        """End the process and all it has started, at once."""
        self.worn = True
        if self.death.done():
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def let_go(self) -> None:
        """Have the process end by itself, and soon."""
        self.worn = True
        self.send(Exit())
        asyncio.get_running_loop().call_later(_FAREWELL, self.kill)

    async def _watch(self) -> int:
        """See the process end: by itself, or cut off from us, or killed; returns how."""
        exiting = asyncio.create_task(self.process.wait())
        lost = asyncio.create_task(self._disconnected.wait())
        await asyncio.wait([exiting, lost], return_when=asyncio.FIRST_COMPLETED)
        await asyncio.wait([exiting, lost], timeout=_LAST_WORDS)
        self.kill()
        code = await exiting
        lost.cancel()
        os.close(self._lifeline)
        if self._transport is not None:
            self._transport.abort()
        self.worn = True
        self.ready.set()
        self._conclude(Died(code))
        return code


def check_not_in_a_child() -> None:
    """Raises ConfigurationError where a worker is made by a script that its child process imports."""
    if _CHILD in sys.modules:
        raise ConfigurationError(
            "a child process of a worker imports this script, which would start one more worker: put the code that "
            'starts it under `if __name__ == "__main__":`'
        )


class ProcessPool:
    """Children, as many as there are runs at once, each started when it is first needed, and kept."""

    def __init__(self, tasks: Mapping[str, Task[..., Any]], settings: Settings) -> None:
        self._tasks = tasks
        self._settings = settings
        self._loop = asyncio.get_running_loop()
        self._children: set[Child] = set()
        #: For whom each child is that is not idle.
        self._taken: dict[Context, Child] = {}
        #: The one used last is used first: it is the warmest.
        self._idle: list[Child] = []
        self._starting: set[asyncio.Task[Child]] = set()
        self._oom_kills = oom_kills()

    async def run(self, task: Task[..., Any], context: Context) -> Any:
        """Run a task in a child; returns what it returns, raises what it raises.

        Raises InvalidArguments for arguments that can't be pickled, WorkerLostError when the child dies. Returns
        or raises only when the task doesn't run any more: a run that is cancelled ends or is killed first.
        """
        arguments = _arguments(task, context)
        await self.take(context)
        child = self._taken[context]
        call = _call(task, context, child.calls + 1, arguments)
        answered = child.begin(call, context)
        try:
            while not answered.done():
                try:
                    await asyncio.wait([answered])
                except SoftTimeLimitExceeded as error:
                    child.send(Warn(call.number, error.args[0]))
        except asyncio.CancelledError:
            await self._end(child, call, answered, context.cancel_reason or "cancelled")
            answer = answered.result()
            if not isinstance(answer, Returned) or context.cancel_reason != "shutdown":
                raise
        return self._value(task, answered.result())

    async def _end(self, child: Child, call: Call, answered: "asyncio.Future[Answer]", reason: str) -> None:
        patience = self._settings.kill_after
        child.send(End(call.number, reason))
        try:
            await asyncio.wait([answered], timeout=min(patience, _FAREWELL) if reason == "shutdown" else patience)
        finally:
            if not answered.done():
                child.kill()
        await asyncio.wait([answered])

    # --- children ---

    async def take(self, context: Context) -> None:
        """Have a child ready for a run, until `give`. Raises WorkerLostError when none can be had."""
        if context in self._taken and not self._taken[context].worn:
            return
        while self._idle:
            child = self._idle.pop()
            if not child.worn:
                self._taken[context] = child
                return
        starting = self._loop.create_task(self._start())
        self._starting.add(starting)
        try:
            await asyncio.wait([starting])
        except asyncio.CancelledError:
            starting.add_done_callback(self._spare)
            raise
        finally:
            starting.add_done_callback(self._starting.discard)
        self._taken[context] = starting.result()

    def give(self, context: Context) -> None:
        """The run needs its child no more."""
        child = self._taken.pop(context, None)
        if child is not None:
            self._keep(child)

    def _spare(self, starting: "asyncio.Task[Child]") -> None:
        """Keep a child for which nobody waits any more."""
        if not starting.cancelled() and starting.exception() is None:
            self._keep(starting.result())

    def _keep(self, child: Child) -> None:
        if child.worn or self._is_used_up(child):
            child.let_go()
        else:
            self._idle.append(child)

    def _is_used_up(self, child: Child) -> bool:
        tasks, memory = self._settings.process_max_tasks, self._settings.process_max_memory
        if tasks is not None and child.calls >= tasks:
            return True
        return memory is not None and resident(child.process.pid) > memory

    async def _start(self) -> Child:
        ours, theirs = socket.socketpair()
        watched, lifeline = os.pipe()
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    sys.executable,
                    *_flags(),
                    "-c",
                    _CODE.format(str(Path(__file__).parent.parent), theirs.fileno(), watched),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), watched),
                    start_new_session=True,
                )
        except OSError as error:
            ours.close()
            os.close(lifeline)
            raise WorkerLostError(f"no child process could be started: {error}") from error
        finally:
            os.close(watched)
        child = Child(process, lifeline)
        self._children.add(child)
        child.death.add_done_callback(lambda _: self._children.discard(child))
        await self._loop.create_unix_connection(lambda: child, sock=ours)
        setup = _setup(self._tasks.values())
        child.send(setup)
        try:
            await asyncio.wait_for(child.ready.wait(), _START)
        except TimeoutError:
            child.kill()
        if child.worn:
            how = how_it_ended(await child.death, out_of_memory=False)
            raise WorkerLostError(f"a child process ended while it imported {', '.join(setup.modules)}: {how}")
        return child

    def where(self, context: Context) -> str:
        """In which process a run is."""
        return next((f"in process {child.process.pid}" for child in self._children if child.runs(context)), "")

    async def close(self) -> None:
        """End all children; those that are idle by themselves."""
        idle, self._idle = self._idle, []
        for child in idle:
            child.let_go()
        while self._starting or self._children.difference(idle):
            for child in self._children.difference(idle):
                child.kill()
            ending: list[asyncio.Future[Any]] = [*self._starting, *(child.death for child in self._children)]
            await asyncio.wait(ending, timeout=_LAST_WORDS, return_when=asyncio.FIRST_COMPLETED)
        if idle:
            await asyncio.wait([child.death for child in idle])

    # --- answers ---

    def _value(self, task: Task[..., Any], answer: Answer) -> Any:
        match answer:
            case Returned(value=value, problem=problem):
                return LostValue(problem) if value is None else _rebuilt(value)
            case Raised(traceback=traceback):
                raise _error(answer) from RemoteTraceback(traceback)
            case Died(code=code):
                how = self._cause(code, task.definition.memory)
                raise WorkerLostError(f"the process that ran {task.name} ended: {how}")

    def _cause(self, code: int, memory: int | None) -> str:
        before, self._oom_kills = self._oom_kills, oom_kills()
        how = how_it_ended(code, self._oom_kills > before)
        if code == -signal.SIGKILL and self._oom_kills == before:
            how += ", which is how a system that is out of memory ends processes"
        return how if memory is None else f"{how}, under a memory limit of {memory:,} bytes"


def _arguments(task: Task[..., Any], context: Context) -> bytes:
    try:
        return pickle.dumps((list(context.args), dict(context.kwargs)))
    except Exception as error:  # the methods of a value may raise anything
        raise InvalidArguments(
            f"the arguments of {task.name} can't be pickled, so its process can't have them: {printable(error)}"
        ) from error


def _call(task: Task[..., Any], context: Context, number: int, arguments: bytes) -> Call:
    message = msgspec.structs.replace(context.request.message, body=b"", announce=None)
    return Call(
        number=number,
        module=task.function.__module__,
        qualname=task.function.__qualname__,
        takes_context=task.definition.takes_context,
        bind=task.definition.bind,
        request=msgspec.structs.replace(context.request, args=[], kwargs={}, embed=NOTHING_FOLLOWS, message=message),
        deliveries=context.deliveries,
        receipt=context.receipt,
        max_attempts=context.max_attempts,
        worker=context.worker,
        arguments=arguments,
        memory=task.definition.memory,
    )


def _rebuilt(value: bytes) -> Any:
    try:
        return pickle.loads(value)  # noqa: S301 - our own child's
    except Exception as error:  # noqa: BLE001 - a class may do anything when it is made
        return LostValue(f"it can't be rebuilt from its pickle: {printable(error)}")


def _error(told: Raised) -> BaseException:
    if told.error is not None:
        with suppress(Exception):
            found = pickle.loads(told.error)  # noqa: S301 - our own child's
            if isinstance(found, BaseException):
                return found
    return ProcessTaskError(told.type, told.text, told.module)


def _setup(tasks: Iterable[Task[..., Any]]) -> Setup:
    modules = sorted({task.function.__module__ for task in tasks if task.definition.kind == "process"})
    preparation = {"name": "aqueue-task", "sys_path": sys.path, "sys_argv": sys.argv, "dir": str(Path.cwd())}
    if "__main__" in modules:
        preparation |= _script()
    return Setup(
        preparation=preparation,
        modules=[module for module in modules if module != "__main__"],
        log_level=logging.getLogger().getEffectiveLevel(),
    )


def _script() -> dict[str, str]:
    """Where the program that runs here is found again; a child imports it as ``__mp_main__``."""
    sys.modules["__mp_main__"] = sys.modules["__main__"]  # what a child pickles of it is found here, too
    spec: object = getattr(sys.modules["__main__"], "__spec__", None)
    if isinstance(spec, ModuleSpec):
        return {"init_main_from_name": spec.name}
    path: object = getattr(sys.modules["__main__"], "__file__", None)
    return {"init_main_from_path": str(Path(path).absolute())} if isinstance(path, str) else {}


def _flags() -> list[str]:
    """Of this interpreter, for one that is to be like it."""
    flags = [f"-W{option}" for option in sys.warnoptions] + ["-O"] * sys.flags.optimize
    return flags + (["-X", "dev"] if sys.flags.dev_mode else [])
