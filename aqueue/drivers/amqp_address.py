"""Where RabbitMQ is: amqp://, amqps://, pyamqp:// and librabbitmq:// URLs, as Celery takes them.

``amqp://user:password@host:5672/vhost``; several hosts for fail-over are whole URLs joined by ``;``. No path, ``/``
and ``//`` (or ``/%2F``) are the virtual host ``/``.
"""

import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import unquote

from aqueue.errors import ConfigurationError
from aqueue.url import Url, split

#: What a URL may say after ``?``: kombu's names, and those of RabbitMQ's own URIs.
_ALIASES: Final = {
    "cacertfile": "ssl_ca_certs",
    "certfile": "ssl_certfile",
    "keyfile": "ssl_keyfile",
    "server_name_indication": "server_hostname",
}
_PARAMETERS: Final = frozenset(
    "heartbeat connection_timeout verify auth_mechanism name "
    "ssl_ca_certs ssl_certfile ssl_keyfile ssl_cert_reqs ssl_check_hostname server_hostname".split()
)
_UNVERIFIED: Final = ("none", "cert_none", "verify_none")


@dataclass(frozen=True, slots=True, kw_only=True)
class AmqpAddress:
    """A parsed URL. ``hosts`` are tried in turn."""

    shown: str
    hosts: tuple[tuple[str, int], ...]
    virtual_host: str = "/"
    username: str = "guest"
    password: str = field(default="guest", repr=False)
    #: ``PLAIN``, or ``EXTERNAL`` where a client certificate says who we are.
    mechanism: str = "PLAIN"
    tls: Mapping[str, str] | None = field(default=None)
    #: Seconds; None: what suits the connection.
    heartbeat: float | None = None
    connect_timeout: float = 5.0
    #: Shown to people who look at the server's connections.
    name: str = ""

    @classmethod
    def parse(cls, url: Url) -> "AmqpAddress":
        """Raises ConfigurationError for what the URL can't mean."""
        try:
            parts = [split(one) for one in url.reveal().split(";")]
            query = {_ALIASES.get(name, name): value for name, value in url.query.items()}
            unknown = set(query) - _PARAMETERS
            if unknown:
                known = ", ".join(sorted({*_PARAMETERS, *_ALIASES}))
                raise ValueError(f"unknown parameter {', '.join(sorted(unknown))}; known are {known}")
            first = parts[0]
            secure = url.scheme == "amqps"
            return cls(
                shown=str(url),
                hosts=tuple((unquote(p.hostname or "localhost"), p.port or (5671 if secure else 5672)) for p in parts),
                virtual_host=unquote(first.path[1:]) or "/",
                username=unquote(first.username) if first.username else "guest",
                password=unquote(first.password) if first.password else "guest",
                mechanism=_mechanism(query.get("auth_mechanism", "plain")),
                tls={name: value for name, value in query.items() if _is_tls(name)} if secure else None,
                heartbeat=_seconds(query, "heartbeat"),
                connect_timeout=_seconds(query, "connection_timeout") or 5.0,
                name=query.get("name", ""),
            )
        except ValueError as error:
            raise ConfigurationError(f"bad RabbitMQ URL {url}: {error}") from None

    def ssl_context(self) -> ssl.SSLContext | None:
        """None without TLS. Raises ConfigurationError for files that can't be read."""
        if self.tls is None:
            return None
        try:
            context = ssl.create_default_context(cafile=self.tls.get("ssl_ca_certs"))
            if "ssl_certfile" in self.tls:
                context.load_cert_chain(self.tls["ssl_certfile"], self.tls.get("ssl_keyfile"))
        except OSError as error:
            raise ConfigurationError(f"the certificates for {self.shown} can't be used: {error}") from None
        if self.tls.get("ssl_check_hostname", "true").lower() in ("false", "0", "no"):
            context.check_hostname = False
        if self.tls.get("verify", self.tls.get("ssl_cert_reqs", "")).lower() in _UNVERIFIED:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context


def _mechanism(text: str) -> str:
    if text.lower() not in ("plain", "external"):
        raise ValueError(f"auth_mechanism is plain or external; got {text[:40]!r}")
    return text.upper()


def _is_tls(name: str) -> bool:
    return name.startswith("ssl_") or name in ("verify", "server_hostname")


def _seconds(query: Mapping[str, str], name: str) -> float | None:
    text = query.get(name)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= 3600:
        raise ValueError(f"{name} is a number of seconds; got {text[:40]!r}")
    return seconds
