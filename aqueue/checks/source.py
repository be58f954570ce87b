"""What the source of tasks shows: calls that stop the event loop for everybody, and swallowed cancellation."""

import ast
import inspect
from collections.abc import Iterable, Iterator, Mapping
from textwrap import dedent
from types import ModuleType
from typing import Any, Final

from aqueue.findings import Finding
from aqueue.task import Task

_HTTP: Final = frozenset("delete get head options patch post put request stream".split())
_CONNECT: Final = frozenset(("connect",))
#: Package to the functions in it that wait for something, by their last names.
_BLOCKING: Final[Mapping[str, frozenset[str]]] = {
    "MySQLdb": _CONNECT,
    "httpx": _HTTP,
    "os": frozenset("popen system wait waitpid".split()),
    "psycopg": _CONNECT,
    "psycopg2": _CONNECT,
    "pymysql": _CONNECT,
    "requests": _HTTP | {"Session", "session"},
    "shutil": frozenset("copytree make_archive rmtree unpack_archive".split()),
    "smtplib": frozenset(("SMTP", "SMTP_SSL")),
    "socket": frozenset("create_connection getaddrinfo gethostbyname".split()),
    "sqlite3": _CONNECT,
    "subprocess": frozenset("call check_call check_output getoutput run".split()),
    "time": frozenset(("sleep",)),
    "urllib": frozenset("urlopen urlretrieve".split()),
}
#: What modules in C call themselves.
_ALIASES: Final = {"posix": "os", "io": "builtins"}
_INSTEAD: Final = {"time": "await asyncio.sleep(...)", "requests": "await httpx.AsyncClient().get(...)"}
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def source_findings(tasks: Iterable[Task[..., Any]]) -> Iterator[Finding]:
    for task in tasks:
        function = inspect.unwrap(task.function)
        tree, file, line = _parsed(function)
        if tree is None:
            continue
        names = {**getattr(function, "__globals__", {}), **_imported(tree)}
        if isinstance(tree, ast.AsyncFunctionDef):
            for node, called in _blocking(tree, names):
                where = f"{file}:{line + node.lineno - 1}"
                shown = called.removeprefix("builtins.")
                what = f"coroutine task {task.name} calls {shown} ({where}): meanwhile no other task runs"
                instead = _INSTEAD.get(called.partition(".")[0], "await asyncio.to_thread(...)")
                yield Finding("AQ407", what, f"{instead}, or a plain `def` task, which runs in a thread")
        for handler in _swallowing(tree):
            where = f"{file}:{line + handler.lineno - 1}"
            what = f"task {task.name} swallows its own end ({where}): timeouts, shutdown, Retry.now"
            yield Finding("AQ408", what, "catch Exception, or end the handler by `raise`")


def _parsed(function: Any) -> tuple[_Function | None, str, int]:
    """The function's definition, its file, and the line on which the source begins; None without a source."""
    try:
        lines, line = inspect.getsourcelines(function)
        tree = ast.parse(dedent("".join(lines))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None, "", 0
    return (tree if isinstance(tree, _Function) else None), inspect.getsourcefile(function) or "?", line


def _imported(tree: ast.AST) -> dict[str, str]:
    """What imports inside of a function bind, as dotted names."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                found[alias.asname or alias.name.partition(".")[0]] = (
                    alias.name if alias.asname else alias.name.partition(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _blocking(tree: ast.AsyncFunctionDef, names: Mapping[str, Any]) -> Iterator[tuple[ast.Call, str]]:
    for node, in_loop in _own_nodes(tree):
        if not isinstance(node, ast.Call):
            continue
        called = _dotted(node.func, names)
        package, _, rest = called.partition(".")
        last = rest.rpartition(".")[2]
        if last in _BLOCKING.get(package, ()) or (in_loop and called == "builtins.open"):
            yield node, called


def _own_nodes(tree: _Function) -> Iterator[tuple[ast.AST, bool]]:
    """What runs when the function does, not what it defines; and whether it is in a loop."""
    pending: list[tuple[ast.AST, bool]] = [(node, False) for node in tree.body]
    while pending:
        node, in_loop = pending.pop(0)
        if isinstance(node, _Function | ast.Lambda | ast.ClassDef):
            continue
        yield node, in_loop
        inside = in_loop or isinstance(node, ast.For | ast.While | ast.AsyncFor)
        pending += [(child, inside) for child in ast.iter_child_nodes(node)]


def _dotted(node: ast.expr, names: Mapping[str, Any]) -> str:
    """``requests.get`` for what is called, whatever it was imported as; "" when only a run can say."""
    attributes: list[str] = []
    while isinstance(node, ast.Attribute):
        attributes.insert(0, node.attr)
        node = node.value
    if not isinstance(node, ast.Name):
        return ""
    root = names.get(node.id)
    if root is None:
        name = "builtins.open" if node.id == "open" else ""
    elif isinstance(root, str):
        name = root
    elif isinstance(root, ModuleType):
        name = root.__name__
    elif attributes:
        return ""  # of an object
    else:
        name = f"{getattr(root, '__module__', '')}.{getattr(root, '__qualname__', '')}"
    package, dot, rest = name.lstrip("_").partition(".")
    return ".".join([f"{_ALIASES.get(package, package)}{dot}{rest}", *attributes]) if name else ""


def _swallowing(tree: _Function) -> Iterator[ast.ExceptHandler]:
    for node, _ in _own_nodes(tree):
        if isinstance(node, ast.ExceptHandler) and _catches_everything(node.type) and not _raises(node):
            yield node


def _raises(handler: ast.ExceptHandler) -> bool:
    return any(isinstance(node, ast.Raise) for node in ast.walk(handler))


def _catches_everything(kind: ast.expr | None) -> bool:
    if kind is None:
        return True
    names = kind.elts if isinstance(kind, ast.Tuple) else [kind]
    return any(ast.unparse(name).rpartition(".")[2] in ("BaseException", "CancelledError") for name in names)
