"""Where a Redis server is: redis://, rediss://, redis+socket://, unix:// and sentinel:// URLs.

One `RedisAddress` serves both kinds of connection that aqueue opens, asyncio and threads. Every timeout is
set here: drivers have changed theirs between versions.
"""

import asyncio
import ssl
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, cast
from urllib.parse import SplitResult, unquote

import redis.asyncio.connection as for_loop
import redis.asyncio.sentinel
import redis.connection as for_thread
import redis.exceptions
import redis.sentinel

from aqueue.errors import ConfigurationError
from aqueue.url import Url, split

_PARAMETERS: Final = frozenset(
    "db virtual_host key_prefix master_name sentinel_username sentinel_password client_name "
    "ssl_cert_reqs ssl_ca_certs ssl_certfile ssl_keyfile ssl_check_hostname".split()
)
_CERT_REQS: Final = {"none": ssl.CERT_NONE, "optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED}

# The driver's own types are incomplete; what is used of it is said here.


class LoopConnection:
    """A connection of the driver's, for asyncio: it connects and logs in."""

    def __init__(self, made: Any) -> None:
        self._made = made

    async def connect(self) -> None:
        """Raises redis' errors, OSError."""
        await self._made.connect()

    def transport(self) -> asyncio.Transport:
        """What carries its bytes. To be taken over when it is connected; the driver waits for nothing then.

        Raises redis' ConnectionError when it has ended already, which nobody else would be told.
        """
        reader, transport = self._made._reader, self._made._writer.transport  # noqa: SLF001 - no other way to them
        if reader.at_eof() or transport.is_closing():
            raise redis.exceptions.ConnectionError("the server closed the connection")
        return cast(asyncio.Transport, transport)

    async def disconnect(self) -> None:
        await self._made.disconnect(nowait=True)


class ThreadConnection(Protocol):
    """A blocking connection of the driver's."""

    def send_command(self, *args: Any) -> None: ...

    def read_response(self) -> Any: ...

    def disconnect(self) -> None: ...


_Loop: Final[Any] = for_loop
_Thread: Final[Any] = for_thread
_LoopSentinel: Final[Any] = redis.asyncio.sentinel.Sentinel
_ThreadSentinel: Final[Any] = redis.sentinel.Sentinel
#: Of an error reply's text: redis' exception for it.
error_of_reply: Final[Callable[[str], Exception]] = _Loop.DefaultParser.parse_error


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisAddress:
    """A parsed URL. ``key_prefix`` goes before every key and channel (Celery's ``global_keyprefix``)."""

    shown: str
    host: str = "localhost"
    port: int = 6379
    path: str = ""
    db: int = 0
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: Mapping[str, Any] | None = None
    sentinels: tuple[tuple[str, int], ...] = ()
    sentinel_auth: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    master_name: str = ""
    key_prefix: str = ""
    client_name: str | None = None
    connect_timeout: float = 5.0

    @classmethod
    def parse(cls, url: Url) -> "RedisAddress":
        """Raises ConfigurationError for what the URL can't mean."""
        try:
            parts = _parts(url)
            unknown = set(url.query) - _PARAMETERS
            if unknown:
                raise ValueError(
                    f"unknown parameter {', '.join(sorted(unknown))}; known are {', '.join(sorted(_PARAMETERS))}"
                )
            if "sentinel" in url.scheme:
                return cls(**_common(url, parts[0], parts[-1].path), **_sentinels(url, parts))
            (part,) = parts
            if url.scheme in ("redis+socket", "unix"):
                return cls(**_common(url, part, ""), path=_socket(part))
            host, port = _host(part, 6379)
            tls = _tls(url) if url.scheme == "rediss" else None
            return cls(**_common(url, part, part.path), host=host, port=port, tls=tls)
        except ValueError as error:
            raise ConfigurationError(f"bad Redis URL {url}: {error}") from None

    def same_database(self, other: "RedisAddress") -> bool:
        """Whether two URLs lead to the same database of the same server."""
        return all(
            getattr(self, name) == getattr(other, name)
            for name in ("host", "port", "path", "db", "sentinels", "master_name")
        )

    async def loop_connection(self) -> LoopConnection:
        """A connection for asyncio, not yet connected; asks the Sentinels where the master is."""
        where = self._where
        if self.sentinels:
            asking = _LoopSentinel(self.sentinels, sentinel_kwargs=self._sentinel_options())
            try:
                where["host"], where["port"] = await asking.discover_master(self.master_name)
            finally:
                for sentinel in asking.sentinels:
                    await sentinel.aclose()
        return LoopConnection(self._kind(_Loop)(**where, **self._options(None), protocol=3))

    def thread_connection(self, timeout: float) -> ThreadConnection:
        """A blocking connection for use in one thread; every reply is due within ``timeout`` seconds."""
        where = self._where
        if self.sentinels:
            asking = _ThreadSentinel(self.sentinels, sentinel_kwargs=self._sentinel_options())
            try:
                where["host"], where["port"] = asking.discover_master(self.master_name)
            finally:
                for sentinel in asking.sentinels:
                    sentinel.close()
        made: ThreadConnection = self._kind(_Thread)(**where, **self._options(timeout))
        return made

    @property
    def _where(self) -> dict[str, Any]:
        return {"path": self.path} if self.path else {"host": self.host, "port": self.port}

    def _kind(self, driver: Any) -> Any:
        if self.path:
            return driver.UnixDomainSocketConnection
        return driver.Connection if self.tls is None else driver.SSLConnection

    def _options(self, timeout: float | None) -> dict[str, Any]:
        return {
            "db": self.db,
            "username": self.username,
            "password": self.password,
            "client_name": self.client_name,
            "socket_timeout": timeout,
            "socket_connect_timeout": self.connect_timeout,
            **(self.tls or {}),
        }

    def _sentinel_options(self) -> dict[str, Any]:
        return {
            "socket_timeout": self.connect_timeout,
            "socket_connect_timeout": self.connect_timeout,
            **self.sentinel_auth,
        }


def _common(url: Url, part: SplitResult, path: str) -> dict[str, Any]:
    return {
        "shown": str(url),
        "db": _database(url, path),
        "username": unquote(part.username) if part.username else None,
        "password": unquote(part.password) if part.password else None,
        "key_prefix": url.query.get("key_prefix", ""),
        "client_name": url.query.get("client_name"),
    }


def _parts(url: Url) -> list[SplitResult]:
    """The URL, or one for each Sentinel. Raises ValueError, whose text has nothing of a password."""
    text = url.reveal()
    return [split(one) for one in (text.split(";") if "sentinel" in url.scheme else [text])]


def _host(part: SplitResult, port: int) -> tuple[str, int]:
    return unquote(part.hostname or "localhost"), part.port or port


def _socket(part: SplitResult) -> str:
    path = unquote(part.path)
    if part.hostname or not path.strip("/"):
        raise ValueError("name the socket by its whole path, like redis+socket:///run/redis.sock")
    return path


def _database(url: Url, path: str) -> int:
    text = url.query.get("db") or url.query.get("virtual_host") or path.strip("/") or "0"
    if not text.isdecimal():
        raise ValueError(f"the database is a number, like /0; got {text[:40]!r}")
    return int(text)


def _sentinels(url: Url, parts: list[SplitResult]) -> dict[str, Any]:
    if "master_name" not in url.query:
        raise ValueError("add the name of the master: ?master_name=mymaster")
    auth = {name: url.query[f"sentinel_{name}"] for name in ("username", "password") if f"sentinel_{name}" in url.query}
    return {
        "sentinels": tuple(_host(part, 26379) for part in parts),
        "master_name": url.query["master_name"],
        "sentinel_auth": auth,
    }


def _tls(url: Url) -> dict[str, Any]:
    wanted = url.query.get("ssl_cert_reqs", "required").lower().removeprefix("cert_")
    if wanted not in _CERT_REQS:
        raise ValueError(f"ssl_cert_reqs is one of {', '.join(_CERT_REQS)}; got {wanted[:40]!r}")
    check_hostname = url.query.get("ssl_check_hostname", "true").lower() not in ("false", "0", "no")
    options: dict[str, Any] = {
        "ssl_cert_reqs": _CERT_REQS[wanted],
        "ssl_check_hostname": check_hostname and wanted == "required",
    }
    for name in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
        if name in url.query:
            options[name] = url.query[name]
    return options
