"""Tasks as users see them: `Task`, and a `Signature` of one call.

Nothing here sends or runs: a task hands its calls to the `Sender` it belongs to, which is the app.
"""

from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from typing import Any, Generic, Literal, ParamSpec, Protocol, TypeVar, Unpack

import msgspec

from aqueue.arguments import ArgumentCodec, as_call
from aqueue.async_result import AsyncResult
from aqueue.context import BoundTask, Context, local_context
from aqueue.options import Options, check, merged
from aqueue.retry import Retry

P = ParamSpec("P")
R = TypeVar("R")

#: Where a task's function runs.
Kind = Literal["coroutine", "thread", "process"]


class Definition(msgspec.Struct, frozen=True, kw_only=True):
    """What the decorator was told about a task."""

    name: str
    kind: Kind
    #: Defaults for every call.
    options: Options
    retry: Retry | None = None
    #: Seconds a run may take; None leaves it to the app's settings.
    timeout: float | None = None
    #: Seconds after which it is warned.
    soft_timeout: float | None = None
    #: Bytes that a child process may have while it runs this.
    memory: int | None = None
    #: Its message is settled before it begins: it may be lost, it never runs twice.
    at_most_once: bool = False
    #: The first parameter is a `Context`.
    takes_context: bool = False
    #: The first parameter is Celery's ``self``.
    bind: bool = False

    def first_arguments(self, context: Context) -> tuple[Any, ...]:
        """What stands before the caller's arguments."""
        if self.takes_context:
            return (context,)
        return (BoundTask(context),) if self.bind else ()


class Signature(msgspec.Struct, Generic[R], frozen=True):
    """One call of a task, to be sent later or together with others."""

    task: str
    args: Sequence[Any] = ()
    kwargs: Mapping[str, Any] = msgspec.field(default_factory=dict[str, Any])
    options: Options = msgspec.field(default_factory=Options)
    #: How arguments and result travel; None for a task that is only known by name.
    codec: ArgumentCodec | None = None


class Sender(Protocol):
    """What tasks need of their app."""

    async def send(self, signature: Signature[R]) -> AsyncResult[R]: ...

    async def send_many(self, signatures: Iterable[Signature[R]]) -> list[AsyncResult[R]]: ...

    def send_sync(self, signature: Signature[R]) -> AsyncResult[R]: ...

    def result(self, task_id: str) -> AsyncResult[Any]: ...


class TaskCall(Generic[P, R]):
    """A task with options for one call."""

    def __init__(self, sender: Sender, name: str, codec: ArgumentCodec, options: Options) -> None:
        self._sender = sender
        self._name = name
        self._codec = codec
        self._options = options

    def s(self, *args: P.args, **kwargs: P.kwargs) -> Signature[R]:
        """A call, to be sent later or together with others."""
        return Signature(self._name, args, kwargs, self._options, self._codec)

    async def send(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """Send a call; returns when the broker holds it.

        Raises InvalidArguments, EncodeError, MessageTooLarge before anything is sent, EnqueueFailed or
        EnqueueUnknown when the broker did not take it within the app's ``send_timeout``.
        """
        return await self._sender.send(self.s(*args, **kwargs))

    def send_sync(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """`send` for code without an event loop. Raises RuntimeError inside a running one."""
        return self._sender.send_sync(self.s(*args, **kwargs))


class Task(TaskCall[P, R]):
    """A function that can be sent. Made by ``@app.task``.

    ``P`` are the parameters that a caller gives, ``R`` is what the task returns. What a call of the task
    itself returns is added by `AsyncTask` and `SyncTask`.
    """

    def __init__(self, sender: Sender, function: Callable[..., Any], definition: Definition) -> None:
        skip = int(definition.takes_context or definition.bind)
        super().__init__(sender, definition.name, ArgumentCodec(function, definition.name, skip), definition.options)
        self.name = definition.name
        self.function = function
        self.definition = definition
        self.codec = self._codec
        self.__doc__ = function.__doc__
        self.__wrapped__ = function

    def options(self, **options: Unpack[Options]) -> TaskCall[P, R]:
        """This task with options for one call: ``await task.options(countdown=60).send(1)``.

        Raises InvalidArguments for an option that makes no sense.
        """
        return TaskCall(self._sender, self.name, self._codec, merged(self._options, check(options)))

    async def send_many(self, signatures: Iterable[Signature[R]]) -> list[AsyncResult[R]]:
        """Send many calls, made with `s`, in as few round trips as their number allows."""
        return await self._sender.send_many(signatures)

    async def delay(self, *args: P.args, **kwargs: P.kwargs) -> AsyncResult[R]:
        """Celery's name for `send`."""
        return await self.send(*args, **kwargs)

    async def apply_async(
        self, args: Sequence[Any] | None = None, kwargs: Mapping[str, Any] | None = None, **options: Unpack[Options]
    ) -> AsyncResult[R]:
        """Celery's way to send with options; `options` keeps the types of the arguments."""
        found = merged(self._options, check(options)) if options else self._options
        return await self._sender.send(Signature(self.name, *as_call(args, kwargs), found, self._codec))

    def result(self, task_id: str) -> AsyncResult[R]:
        """The result of a call sent earlier, maybe by another process; typed."""
        return self._sender.result(task_id).typed_by(self._codec)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before = self.definition.first_arguments(local_context(self.name, args, kwargs))
        return self.function(*before, *args, **kwargs)


class AsyncTask(Task[P, R]):
    """A coroutine function; calling it is calling the function."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        call: Coroutine[Any, Any, R] = self._call(args, kwargs)
        return call


class SyncTask(Task[P, R]):
    """A plain function, which a worker runs in a thread or a child process; calling it is calling the function."""

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        value: R = self._call(args, kwargs)
        return value
