"""Where a SQL database is, by Celery's ``db+`` URLs, and an engine of SQLAlchemy's for it.

Celery's users name a blocking driver, or none. Here each database has one driver for asyncio: aiosqlite, asyncpg
and asyncmy, which are kept up (aiomysql fails to send bytes beside PyMySQL 1.2, which Celery's users have).
"""

import ssl
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from aqueue.errors import ConfigurationError
from aqueue.url import Url

#: Seconds after which a connection is made anew, as servers and firewalls drop idle ones.
_RECYCLE: Final = 1800


class _Driver(NamedTuple):
    dialect: str
    module: str
    #: Exceptions that SQLAlchemy lets through while it connects.
    errors: tuple[str, ...]
    #: Makes the driver's arguments from the URL's parameters and the seconds it may take.
    arguments: Callable[[Mapping[str, str], float], dict[str, Any]]


class SqlAddress:
    """A database; the text of it hides the password."""

    def __init__(self, url: Url) -> None:
        """Raises ConfigurationError, and ImportError when the driver is not installed."""
        try:
            found = sa.make_url(url.reveal().removeprefix("db+"))
        except (ArgumentError, NoSuchModuleError, ValueError):
            raise ConfigurationError(
                f"bad database URL {url}; expected something like db+postgresql://user:password@host/database, "
                "with special characters in user and password as %XX"
            ) from None
        self._driver = _DRIVERS[found.get_backend_name()]
        if self._driver is _SQLITE and found.database in (None, "", ":memory:"):
            raise ConfigurationError(f"{url} names no file, so no other process could read it: db+sqlite:///results.db")
        module: Any = import_module(self._driver.module)
        self.database = found.get_backend_name()
        #: What is raised for a database that is away, refuses, or is broken.
        self.errors: tuple[type[Exception], ...] = (
            SQLAlchemyError,
            OSError,
            *(getattr(module, name) for name in self._driver.errors),
        )
        self._parameters = {key: value if isinstance(value, str) else value[-1] for key, value in found.query.items()}
        self._sa_url = found.set(drivername=self._driver.dialect, query={})
        self._shown = str(url)
        try:
            self._driver.arguments(self._parameters, 1.0)
        except (KeyError, OSError) as error:
            raise ConfigurationError(f"{url}: can't use the parameter {error}") from None

    def __str__(self) -> str:
        return self._shown

    def engine(self, timeout: float) -> AsyncEngine:
        """Connects when it is first used; connecting, and waiting for a lock, may take ``timeout`` seconds."""
        return create_async_engine(
            self._sa_url,
            pool_pre_ping=True,
            pool_recycle=_RECYCLE,
            hide_parameters=True,
            connect_args=self._driver.arguments(self._parameters, timeout),
        )

    def sentence(self, error: BaseException) -> str:
        """What a driver says of an error, without statements around it, and without the password."""
        text = str(getattr(error, "orig", None) or error) or type(error).__name__
        text = text.splitlines()[0]
        password = self._sa_url.password
        return text.replace(password, "***") if password else text


def _sqlite_arguments(parameters: Mapping[str, str], timeout: float) -> dict[str, Any]:
    _only(parameters, "timeout")
    return {"timeout": float(parameters.get("timeout", timeout))}


def _postgresql_arguments(parameters: Mapping[str, str], timeout: float) -> dict[str, Any]:
    """Libpq's parameters, as psycopg2 takes them, are read by the driver from a URL of its own."""
    kept = {key: value for key, value in parameters.items() if key not in ("connect_timeout", "client_encoding")}
    return {"timeout": timeout, **({"dsn": f"postgresql://?{urlencode(kept)}"} if kept else {})}


def _mysql_arguments(parameters: Mapping[str, str], timeout: float) -> dict[str, Any]:
    _only(parameters, "charset", "unix_socket", "connect_timeout", "ssl_ca", "ssl_cert", "ssl_key")
    kept: dict[str, Any] = {key: value for key, value in parameters.items() if key in ("charset", "unix_socket")}
    if any(key.startswith("ssl_") for key in parameters):
        kept["ssl"] = context = ssl.create_default_context(cafile=parameters.get("ssl_ca"))
        if "ssl_cert" in parameters:
            context.load_cert_chain(parameters["ssl_cert"], parameters.get("ssl_key"))
    return {"connect_timeout": timeout, "charset": "utf8mb4", **kept}


def _only(parameters: Mapping[str, str], *known: str) -> None:
    """What is misspelt, or not ours, is refused rather than left out."""
    for name in parameters:
        if name not in known:
            raise KeyError(f"{name}; known are {', '.join(known)}")


_SQLITE: Final = _Driver("sqlite+aiosqlite", "aiosqlite", ("Error",), _sqlite_arguments)
_DRIVERS: Final = {
    "sqlite": _SQLITE,
    "postgresql": _Driver("postgresql+asyncpg", "asyncpg", ("PostgresError", "InterfaceError"), _postgresql_arguments),
    "mysql": _Driver("mysql+asyncmy", "asyncmy", ("Error",), _mysql_arguments),
    "mariadb": _Driver("mariadb+asyncmy", "asyncmy", ("Error",), _mysql_arguments),
}
