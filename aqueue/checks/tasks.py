"""What the declarations of tasks show by themselves."""

import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import msgspec

from aqueue.app import AQueue
from aqueue.findings import Finding
from aqueue.retry import Retry
from aqueue.settings import Settings
from aqueue.task import Task

_DAY: Final = 86400.0


def task_findings(app: AQueue) -> Iterator[Finding]:
    if not app.tasks:
        step = "import the modules that declare them, or name them in Settings.include"
        yield Finding("AQ410", f"app {app.name} has no tasks: nothing can run", step)
    yield from _names(app.tasks)
    yield from _main(app)
    if app.settings.timeout > _DAY:
        yield _too_long("every task without a timeout of its own", app.settings.timeout)
    for name, task in app.tasks.items():
        yield from _times(name, task, app.settings)
        yield from _retry(name, task.definition.retry)
        yield from _arguments(name, task)


def _names(tasks: Mapping[str, Task[..., Any]]) -> Iterator[Finding]:
    alike: defaultdict[str, list[str]] = defaultdict(list)
    #: File, line and name of a function: the names of its task by the module that it is in.
    places: defaultdict[tuple[str, int, str], dict[str, str]] = defaultdict(dict)
    for name, task in tasks.items():
        alike[name.lower()].append(name)
        code = getattr(task.function, "__code__", None)
        if code is not None:
            places[code.co_filename, code.co_firstlineno, code.co_name][task.function.__module__] = name
    for names in alike.values():
        if len(names) > 1:
            step = "rename one: they are easily taken for each other, in routes and by people"
            yield Finding("AQ401", f"tasks {' and '.join(names)} differ in upper and lower case only", step)
    for (file, line, _), by_module in places.items():
        if len(by_module) > 1:
            both, modules = " and task ".join(by_module.values()), " and ".join(by_module)
            what = f"the function at {file}:{line} is task {both}: its module was imported as {modules}"
            yield Finding("AQ402", what, "import it by one name everywhere, or give the task a name=")


def _main(app: AQueue) -> Iterator[Finding]:
    """Tasks of the program that was started: a worker imports its module, and names them after that."""
    for name, task in app.tasks.items():
        function = task.function
        if function.__module__ == "__main__" and name == f"{app.name}.{getattr(function, '__name__', '')}":
            spec = getattr(sys.modules["__main__"], "__spec__", None)
            module = Path(function.__code__.co_filename).stem if spec is None else spec.name
            if module != app.name:
                there = f"{module}.{function.__name__}"
                what = f"task {name} is declared in the program itself; a worker that imports {module} calls it {there}"
                yield Finding("AQ402", what, f"AQueue({module!r}), a name= for the task, or a module of its own")


def _too_long(whose: str, timeout: float) -> Finding:
    what = f"{whose} may run {timeout / 3600:g} hours: one that hangs keeps its slot as long"
    return Finding("AQ403", what, "a timeout under a day; cut longer work into several tasks")


def _times(name: str, task: Task[..., Any], settings: Settings) -> Iterator[Finding]:
    options = task.definition.options
    timeout = task.definition.timeout
    if timeout is not None and timeout > _DAY:
        yield _too_long(f"task {name}", timeout)
    soft, limit = task.definition.soft_timeout, timeout or settings.timeout
    if soft is not None and soft >= limit:
        what = f"the soft_timeout of task {name} ({soft:g} s) is not before its timeout ({limit:g} s)"
        yield Finding("AQ409", what, "make it a few seconds less than the timeout")
    expires, countdown = options.get("expires"), options.get("countdown", 0.0)
    if expires is not None and not isinstance(expires, datetime) and expires <= countdown:
        what = (
            f"task {name} expires after {expires:g} s, before it may start (countdown {countdown:g} s): it never runs"
        )
        yield Finding("AQ405", what, "make expires longer than countdown")


def _retry(name: str, retry: Retry | None) -> Iterator[Finding]:
    if retry is None or retry.attempts == 1:
        return
    if retry.on == () or retry.never in (retry.on, (retry.on,), Exception, BaseException):
        what = f"task {name} has {retry.attempts} attempts, but no error that its Retry wants: it is never tried again"
        yield Finding("AQ404", what, "name errors in on=, and take them out of never=")


def _arguments(name: str, task: Task[..., Any]) -> Iterator[Finding]:
    for parameter, kind in task.codec.required.items():
        for stranger in _strangers(kind):
            named = f"{stranger.__module__}.{stranger.__qualname__}"
            what = f"task {name}: parameter {parameter} is a {named}, which can't travel in a message"
            step = "pass an id or plain values, or make it a dataclass, a pydantic model or a msgspec.Struct"
            yield Finding("AQ406", what, step)


def _strangers(kind: Any) -> Iterator[type[Any]]:
    """The classes in an annotation that no message can carry."""
    try:
        pending: list[Any] = [msgspec.inspect.type_info(kind)]
    except Exception:  # noqa: BLE001 - what can't be inspected is checked by the first call
        return
    while pending:
        info = pending.pop()
        if isinstance(info, msgspec.inspect.CustomType):
            if info.cls is not object and not hasattr(info.cls, "model_validate"):
                yield info.cls
            continue
        for field in ("item_type", "key_type", "value_type"):
            pending += [found] if (found := getattr(info, field, None)) is not None else []
        for field in ("item_types", "types"):
            pending += getattr(info, field, ())
