"""Finding the app a command is about: ``module:app``, ``module``, or ``-A`` as in Celery."""

import sys
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from aqueue.app import AQueue
from aqueue.errors import ConfigurationError


def load_app(where: str) -> AQueue:
    """Import ``package.module:name``; without a name the module's only app, or one named ``app``.

    The working directory is importable, as for ``python -m``. Raises ConfigurationError.
    """
    module_name, _, attribute = where.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the app's own import is what fails: its traceback says where
        raise ConfigurationError(_no_module(module_name)) from None
    found = {name: value for name, value in vars(module).items() if isinstance(value, AQueue)}
    if attribute:
        app = getattr(module, attribute, None)
        if isinstance(app, AQueue):
            return app
        near = get_close_matches(attribute, found, 1)
        hint = f"did you mean {module_name}:{near[0]}?" if near else _apps(module_name, found)
        raise ConfigurationError(f"{attribute!r} in module {module_name} is no AQueue; {hint}")
    if len(found) == 1:
        return next(iter(found.values()))
    for name in ("app", "aqueue"):
        if name in found:
            return found[name]
    raise ConfigurationError(f"say which app is meant: {_apps(module_name, found)}")


def _apps(module: str, found: dict[str, AQueue]) -> str:
    if not found:
        return f"module {module} has no AQueue in it; expected something like: app = AQueue({module!r})"
    return "there is " + ", ".join(f"{module}:{name}" for name in found)


def _no_module(name: str) -> str:
    path = name.removesuffix(".py").replace("/", ".")
    if path != name and find_spec(path.partition(".")[0]) is not None:
        return f"{name!r} is a file; name the module: {path}"
    near = get_close_matches(name, [file.stem for file in Path.cwd().glob("*.py")], 1)
    hint = f"did you mean {near[0]}?" if near else "is it spelled right, and is this the folder it is in?"
    return f"there is no module {name!r} to import from {Path.cwd()}; {hint}"
