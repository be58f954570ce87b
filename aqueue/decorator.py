"""The types of ``@app.task``: which kind of task a function becomes, and the parameters its callers see."""

import inspect
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeVar, overload

from aqueue.arguments import resolved
from aqueue.context import Context
from aqueue.errors import ConfigurationError
from aqueue.task import AsyncTask, Kind, SyncTask

P = ParamSpec("P")
R = TypeVar("R")


class TaskDecorator(Protocol):
    """What ``@app.task(...)`` returns. A leading `Context` parameter is the worker's to fill in."""

    @overload
    def __call__(self, function: Callable[Concatenate[Context, P], Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[Context, P], R], /) -> SyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[P, R], /) -> SyncTask[P, R]: ...


class BoundTaskDecorator(Protocol):
    """What ``@app.task(bind=True)`` returns: the first parameter, Celery's ``self``, is the worker's."""

    @overload
    def __call__(self, function: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]], /) -> AsyncTask[P, R]: ...
    @overload
    def __call__(self, function: Callable[Concatenate[Any, P], R], /) -> SyncTask[P, R]: ...


def kind_of(function: Callable[..., Any], name: str, run: Kind | None) -> Kind:
    """Where a function runs: where it is told to, if it can. Raises ConfigurationError for what can't be a task."""
    if inspect.isclass(function) or not callable(function):
        raise ConfigurationError(f"task {name!r}: a task is a function, not {function!r:.80}")
    if getattr(function, "__name__", "") == "<lambda>":
        raise ConfigurationError(f"task {name!r}: a lambda has no name that a worker could find again; use def")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigurationError(f"task {name!r}: a generator has no result; return a list")
    if inspect.iscoroutinefunction(function):
        if run not in (None, "coroutine"):
            raise ConfigurationError(f"task {name!r}: run={run!r} is for a plain def; async def runs on the loop")
        return "coroutine"
    if run not in (None, "thread", "process"):
        raise ConfigurationError(f"task {name!r}: a plain def runs in a thread or a process; got run={run!r}")
    if run == "process" and "<" in getattr(function, "__qualname__", "<"):
        raise ConfigurationError(
            f"task {name!r}: a child process finds a task by its name in its module; define it at the top level of one"
        )
    return run or "thread"


_UNITS: Final = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
#: An interpreter with its modules needs about half of this.
_LEAST_MEMORY: Final = 64 * 2**20


def bytes_of(memory: int | str | None, kind: Kind, name: str) -> int | None:
    """``"2G"``, ``"512M"`` or a number of bytes, as bytes. Raises ConfigurationError."""
    if memory is None:
        return None
    if kind != "process":
        raise ConfigurationError(f'task {name!r}: memory= bounds a process of its own; add run="process"')
    found: object = memory
    with suppress(ValueError):
        if isinstance(memory, str):
            number, unit = memory[:-1], memory[-1:].upper()
            found = int(float(number) * _UNITS[unit]) if unit in _UNITS else int(memory)
    if type(found) is not int or not _LEAST_MEMORY <= found < 2**63:
        raise ConfigurationError(f'task {name!r}: memory is bytes or like "512M", 64M or more; got {memory!r:.40}')
    return found


def takes_context(function: Callable[..., Any]) -> bool:
    """Whether the first parameter is annotated as a `Context`."""
    first = next(iter(inspect.signature(function).parameters.values()), None)
    if first is None:
        return False
    found = resolved(function, first.annotation)
    return found is Context or (found is Any and first.annotation in ("Context", "aqueue.Context"))
