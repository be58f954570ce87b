"""The types of ``@app.task``: which kind of task a function becomes, and the parameters its callers see."""

import inspect
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

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


def kind_of(function: Callable[..., Any], name: str) -> Kind:
    """Where a function can run. Raises ConfigurationError for what can't be a task."""
    if inspect.isclass(function) or not callable(function):
        raise ConfigurationError(f"task {name!r}: a task is a function, not {function!r:.80}")
    if getattr(function, "__name__", "") == "<lambda>":
        raise ConfigurationError(f"task {name!r}: a lambda has no name that a worker could find again; use def")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise ConfigurationError(f"task {name!r}: a generator has no result; return a list")
    return "coroutine" if inspect.iscoroutinefunction(function) else "thread"


def takes_context(function: Callable[..., Any]) -> bool:
    """Whether the first parameter is annotated as a `Context`."""
    first = next(iter(inspect.signature(function).parameters.values()), None)
    if first is None:
        return False
    found = resolved(function, first.annotation)
    return found is Context or (found is Any and first.annotation in ("Context", "aqueue.Context"))
