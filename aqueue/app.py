"""`AQueue`: the registry of tasks, their wiring, and sending. It never runs a task."""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from importlib import import_module
from types import TracebackType
from typing import (
    Any,
    Concatenate,
    Final,
    Literal,
    ParamSpec,
    Protocol,
    Self,
    TypedDict,
    TypeVar,
    Unpack,
    cast,
    get_args,
    overload,
)
from weakref import WeakKeyDictionary

from aqueue.arguments import as_call
from aqueue.async_result import AsyncResult, Cancelled
from aqueue.broker import BrokerFactory
from aqueue.context import Context, current
from aqueue.decorator import BoundTaskDecorator, TaskDecorator, bytes_of, kind_of, takes_context
from aqueue.errors import ConfigurationError
from aqueue.options import NO_OPTIONS, Options, check
from aqueue.outcome import Gate, Middleware, Observer
from aqueue.results import StoreFactory
from aqueue.retry import Retry
from aqueue.sending import Producer, Routes
from aqueue.serialization import Serializer
from aqueue.servers import Servers
from aqueue.settings import Settings
from aqueue.sync_bridge import SyncBridge
from aqueue.task import AsyncTask, Definition, Kind, Signature, SyncTask, Task

P = ParamSpec("P")
R = TypeVar("R")

#: What is promised of a task whose worker dies.
Promise = Literal["at_least_once", "at_most_once"]


class WorkerOptions(TypedDict, total=False):
    """What `AQueue.worker` can be told; see `aqueue.worker.Worker`. Times are in seconds."""

    queues: Sequence[str]
    concurrency: int
    threads: int
    processes: int | None
    name: str
    grace: float
    max_stall: float


class RunningWorker(Protocol):
    """A worker that runs beside other code."""

    name: str
    queues: list[str]

    def stop(self) -> None:
        """Claim nothing more; called again, give back what runs."""
        ...


#: Loaded when a worker is made: an app that only sends needs nothing of it.
_WORKER: Final = "aqueue.worker"
#: Options of a task that its worker reads, not its messages.
_WORKERS_OWN: Final = ("timeout", "soft_timeout")

Lifespan = Callable[["AQueue"], AbstractAsyncContextManager[Mapping[str, Any] | None]]


class AQueue:
    """An app: tasks, a broker to send them through, a store for their results.

    ``broker`` and ``backend`` are URLs, or factories. Without a broker, ``AQUEUE_BROKER_URL`` is used, else the
    SQLite file ``<name>.db`` in the working directory; without a backend, ``AQUEUE_RESULT_BACKEND``, else the
    broker's own server. Declaring tasks connects to nothing; connections are opened by the first use, one set for each
    event loop, and closed by ``async with app``.
    """

    def __init__(
        self,
        name: str = "aqueue",
        *,
        broker: str | BrokerFactory | None = None,
        backend: str | StoreFactory | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.name = name
        self.settings = settings or Settings()
        self.tasks: dict[str, Task[..., Any]] = {}
        self.middleware: list[Middleware] = []
        self.gates: list[Gate] = []
        self.observers: list[Observer] = []
        self.lifespans: list[Lifespan] = []
        self.serializer = Serializer(self.settings.accept_content, self.settings.limits, self.settings.signer)
        self.servers = Servers(name, broker, backend, self.settings)
        self._routes = Routes(self.settings)
        self._producers: WeakKeyDictionary[asyncio.AbstractEventLoop, Producer] = WeakKeyDictionary()
        self._bridge = SyncBridge()

    # --- declaring ---

    @overload
    def task(self, function: Callable[Concatenate[Context, P], Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...
    @overload
    def task(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...
    @overload
    def task(self, function: Callable[Concatenate[Context, P], R], /) -> SyncTask[P, R]: ...
    @overload
    def task(self, function: Callable[P, R], /) -> SyncTask[P, R]: ...
    @overload
    def task(
        self,
        function: None = None,
        /,
        *,
        bind: Literal[True],
        name: str | None = ...,
        retry: Retry | None = ...,
        run: Kind | None = ...,
        memory: int | str | None = ...,
        delivery: Promise = ...,
        **options: Unpack[Options],
    ) -> BoundTaskDecorator: ...
    @overload
    def task(
        self,
        function: None = None,
        /,
        *,
        bind: Literal[False] = ...,
        name: str | None = ...,
        retry: Retry | None = ...,
        run: Kind | None = ...,
        memory: int | str | None = ...,
        delivery: Promise = ...,
        **options: Unpack[Options],
    ) -> TaskDecorator: ...
    def task(
        self,
        function: Callable[..., Any] | None = None,
        /,
        *,
        name: str | None = None,
        bind: bool = False,
        retry: Retry | None = None,
        run: Kind | None = None,
        memory: int | str | None = None,
        delivery: Promise = "at_least_once",
        **options: Any,
    ) -> Any:
        """Make a function a task. ``async def`` runs on the worker's loop, a plain ``def`` in a thread.

        With ``run="process"`` a plain ``def`` runs in a child process, which can be killed; ``memory`` is what the
        process may allocate then, in bytes or as ``"2G"``.

        With ``delivery="at_most_once"`` the message is settled, and that confirmed, before the task begins: whatever
        happens then, it does not begin a second time, but it may never end.

        ``name`` defaults to ``module.function``. ``retry`` says whether and when it runs again, ``bind`` passes
        Celery's ``self``. The other options are defaults for every call, see `Options`. Raises
        ConfigurationError for what can't be a task.
        """
        defaults = check(cast(Options, options))

        def register(function: Callable[..., Any]) -> Task[..., Any]:
            return self._register(function, name, bind, retry, run, memory, delivery, defaults)

        return register if function is None else register(function)

    def _register(
        self,
        function: Callable[..., Any],
        name: str | None,
        bind: bool,
        retry: Retry | None,
        run: Kind | None,
        memory: int | str | None,
        delivery: Promise,
        options: Options,
    ) -> Task[..., Any]:
        name = name or self._name_of(function)
        # The worker's own limits may change while messages wait; only a call's own travel with its message.
        timeout, soft_timeout = options.get("timeout"), options.get("soft_timeout")
        options = cast(Options, {key: value for key, value in options.items() if key not in _WORKERS_OWN})
        kind = kind_of(function, name, run)
        if delivery not in get_args(Promise):
            raise ConfigurationError(
                f"task {name!r}: delivery is {' or '.join(get_args(Promise))}; got {delivery!r:.40}"
            )
        definition = Definition(
            name=name,
            kind=kind,
            memory=bytes_of(memory, kind, name),
            options=options,
            retry=retry,
            timeout=timeout,
            soft_timeout=soft_timeout,
            bind=bind,
            at_most_once=delivery == "at_most_once",
            takes_context=not bind and takes_context(function),
        )
        known = self.tasks.get(name)
        if known is not None and not _same_source(known.function, function):
            raise ConfigurationError(
                f"two tasks are named {name!r}: {_where(known.function)} and {_where(function)}; give one a name="
            )
        made: Task[..., Any] = (AsyncTask if kind == "coroutine" else SyncTask)(self, function, definition)
        self.tasks[name] = made
        return made

    def _name_of(self, function: Callable[..., Any]) -> str:
        """Celery's rule; in ``__main__`` the app's name stands for the module's."""
        module = getattr(function, "__module__", None) or self.name
        return f"{self.name if module == '__main__' else module}.{getattr(function, '__name__', function)}"

    def queues(self) -> list[str]:
        """Every queue that the app names: its default, its routes', its tasks'."""
        return list(dict.fromkeys((self.settings.default_queue, *map(self.queue_of, self.tasks.values()))))

    def queue_of(self, task: Task[..., Any]) -> str:
        """Where a task goes when a call says nothing else."""
        options: Options = {**self._routes(task.name), **task.definition.options}
        return options.get("queue", self.settings.default_queue)

    def add_middleware(self, middleware: Middleware) -> Middleware:
        """Wrap every run; the first added is outermost. Works as a decorator."""
        self.middleware.append(middleware)
        return middleware

    def add_gate(self, gate: Gate) -> Gate:
        """Ask before every run. Works as a decorator."""
        self.gates.append(gate)
        return gate

    def add_observer(self, observer: Observer) -> Observer:
        """Be told of every run. Works as a decorator."""
        self.observers.append(observer)
        return observer

    def lifespan(self, hook: Lifespan) -> Lifespan:
        """Enter an async context manager when a worker starts and leave it when it stops.

        What it yields, a mapping, is seen by tasks as ``Context.state``. Works as a decorator.
        """
        self.lifespans.append(hook)
        return hook

    def worker(self, **options: Unpack[WorkerOptions]) -> AbstractAsyncContextManager[RunningWorker]:
        """A worker beside other code on the running event loop, such as in a web app's lifespan or in a test.

        ``async with app.worker(concurrency=10): ...``; at the end of the block it stops like ``aqueue worker`` does at
        SIGTERM. What breaks it is logged at once, and raised at the end of the block.
        """
        made = import_module(_WORKER).Worker(self, **options)
        running: AbstractAsyncContextManager[RunningWorker] = made.running()
        return running

    # --- sending ---

    async def send(self, signature: Signature[R]) -> AsyncResult[R]:
        """Send one call made with ``task.s(...)``."""
        return await self.producer().send(signature)

    async def send_many(self, signatures: Iterable[Signature[R]]) -> list[AsyncResult[R]]:
        """Send calls in as few round trips as their number allows; all are stored, or an error says which not.

        Raises EnqueueFailed whose ``refused`` maps positions to reasons when only some were refused.
        """
        return await self.producer().send_many(list(signatures))

    async def send_task(
        self,
        name: str,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        **options: Unpack[Options],
    ) -> AsyncResult[Any]:
        """Send a task that is known by name only, such as one of another program."""
        return await self.send(Signature(name, *as_call(args, kwargs), check(options) if options else NO_OPTIONS))

    def send_sync(self, signature: Signature[R]) -> AsyncResult[R]:
        """`send` for code without an event loop. Raises RuntimeError inside a running one."""
        context = current()
        return self._bridge.run(self.send(signature), None if context is None else context.loop)

    def result(self, task_id: str, *, known: bool = False) -> AsyncResult[Any]:
        """The result of a task sent earlier, here or elsewhere.

        With ``known`` an id that the store has never heard of is waited for, as for a task that a Celery
        client has sent and no worker has started.
        """
        return AsyncResult(task_id, lambda: self.producer().store, known=known, canceller=self._cancel)

    # --- cancelling ---

    async def cancel(
        self, task_id: str, reason: str = "cancelled", *, terminate: bool = True, keep: float | None = None
    ) -> Cancelled:
        """Cancel a task by its id, see `AsyncResult.cancel`."""
        (done,) = await self._cancel([task_id], reason, terminate, keep)
        return done

    async def cancel_many(
        self, task_ids: Iterable[str], reason: str = "cancelled", *, terminate: bool = True, keep: float | None = None
    ) -> dict[str, Cancelled]:
        """Cancel tasks in as few round trips as their number allows; what has become of each, by id."""
        ids = list(dict.fromkeys(task_ids))
        return dict(zip(ids, await self._cancel(ids, reason, terminate, keep), strict=True))

    async def _cancel(self, ids: Sequence[str], reason: str, terminate: bool, keep: float | None) -> list[Cancelled]:
        return await self.producer().cancel(ids, reason, terminate, keep)

    # --- connections ---

    def producer(self) -> Producer:
        """The connections of the running event loop, made by the first call."""
        loop = asyncio.get_running_loop()
        producer = self._producers.get(loop)
        if producer is None:
            servers = self.servers
            producer = Producer(
                self.settings, self._routes, self.serializer, servers.broker(), servers.store(), servers.keeper()
            )
            self._producers[loop] = producer
        return producer

    async def __aenter__(self) -> Self:
        self.producer().users += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        producer = self.producer()
        producer.users -= 1
        if producer.users <= 0:
            await self.close()

    async def close(self) -> None:
        """Close the connections of this event loop, and those behind `send_sync`; the next send opens new ones."""
        await self._close_here()
        await self._bridge.close(self._close_here())

    async def _close_here(self) -> None:
        producer = self._producers.pop(asyncio.get_running_loop(), None)
        if producer is not None:
            await producer.close()

    def __repr__(self) -> str:
        return f"<AQueue {self.name} {self.servers.broker_name}>"


def _where(function: Callable[..., Any]) -> str:
    code = getattr(function, "__code__", None)
    return repr(function) if code is None else f"{code.co_filename}:{code.co_firstlineno}"


def _same_source(one: Callable[..., Any], other: Callable[..., Any]) -> bool:
    """Whether two functions are one, imported twice (as ``__main__`` and by its name, or reloaded)."""
    return _where(one) == _where(other)
