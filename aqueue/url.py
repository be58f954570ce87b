"""Connection URLs whose password can't leak: every text form of a `Url` hides it."""

import re
from collections.abc import Mapping
from typing import Final, NoReturn
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from aqueue.errors import ConfigurationError

#: Up to the last @, so that a password with unescaped ``/``, ``@`` or ``:`` is hidden whole.
_CREDENTIALS = re.compile(r"(?<=://)(?!/)(?P<user>[^:]*):.*@", re.DOTALL)
_SECRET_PARAMETERS = re.compile(r"(?i)([?&;][^=&;]*(?:password|secret|token)[^=&;]*=)[^&]*")
#: The secrets of Azure's connection strings. A signature has & in it and goes on up to the next ;.
_AZURE_SECRETS = re.compile(r"(?i)\b(AccountKey=)[^;?]*|\b(SharedAccessSignature=)[^;]*")
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://")
#: What to do about a URL that can't be taken apart.
UNREADABLE = "check host and port, and write special characters in user and password as %XX"

#: Schemes of URLs that lead to one server, as broker and as result store.
REDIS_SCHEMES: Final = ("redis", "rediss", "redis+socket", "unix", "sentinel", "redis+sentinel")
RABBITMQ_SCHEMES: Final = ("amqp", "amqps", "pyamqp", "librabbitmq")


class Url:
    """A parsed URL. ``str``, ``repr`` and ``format`` hide the password, ``reveal()`` shows it.

    Only ``scheme`` and ``query`` are looked at here; each driver reads the rest of its own URLs.
    """

    __slots__ = ("_text", "query", "scheme")

    def __init__(self, text: str) -> None:
        found = _SCHEME.match(text)
        if found is None:
            raise ConfigurationError(f"{mask(text)!r} is no URL; expected something like redis://localhost:6379/0")
        self._text = text
        self.scheme = found["scheme"].lower()
        try:
            self.query: Mapping[str, str] = {key: values[0] for key, values in parse_qs(urlsplit(text).query).items()}
        except ValueError:  # its text repeats parts of the URL, the password among them
            raise ConfigurationError(f"bad URL {self}: {UNREADABLE}") from None

    def reveal(self) -> str:
        """The URL as it was given, password included."""
        return self._text

    @property
    def path(self) -> str:
        """The path with percent escapes decoded: ``/2`` in ``redis://localhost/2``."""
        return unquote(urlsplit(self._text).path)

    def __str__(self) -> str:
        return mask(self._text)

    def __repr__(self) -> str:
        return f"Url({mask(self._text)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Url) and other._text == self._text

    def __hash__(self) -> int:
        return hash(self._text)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a Url holds a password and is not pickled; pass url.reveal() where that is meant")


def split(text: str) -> SplitResult:
    """The parts of one server's URL, its port a number. Raises ValueError, whose text has nothing of a password."""
    try:
        part = urlsplit(text)
        readable = part.port is None or bool(part.hostname)
    except ValueError:
        raise ValueError(UNREADABLE) from None
    # An @ behind the host means that the password has a / or # or ?, and what was read is a piece of it.
    if not readable or (part.netloc and "@" in part.path + part.query + part.fragment):
        raise ValueError(UNREADABLE)
    return part


def mask(text: str) -> str:
    """A URL, or several of one scheme joined by ``;`` or ``,``, with every password replaced by ``***``."""
    scheme, found, _ = text.partition("://")
    if not found:  # no URL at all, but maybe somebody's password
        return mask(f"://{text}").removeprefix("://")
    return "".join(map(_mask_one, re.split(rf"(?=[;,]{re.escape(scheme)}://)", text)))


def _mask_one(url: str) -> str:
    url = _CREDENTIALS.sub(r"\g<user>:***@", url, count=1)
    return _SECRET_PARAMETERS.sub(r"\1***", _AZURE_SECRETS.sub(r"\1\2***", url))
