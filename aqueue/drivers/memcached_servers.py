"""The servers of a ``cache+memcached://`` URL, and which of them has a key."""

from collections.abc import Collection, Sequence
from typing import Final, NamedTuple

from aqueue.errors import ConfigurationError
from aqueue.url import UNREADABLE, Url

_PORT: Final = 11211


class Server(NamedTuple):
    """Where a memcached listens: a host with a port, or the path of a socket (port 0)."""

    host: str
    port: int

    def __str__(self) -> str:
        """The name by which Celery's client spreads keys."""
        return f"{self.host}:{self.port}" if self.port else self.host


def parse_servers(url: Url, known: Collection[str]) -> list[Server]:
    """The servers of a URL with none but ``known`` parameters, each once. Raises ConfigurationError."""
    text = url.reveal().partition("://")[2].partition("?")[0].rstrip("/")
    if unknown := set(url.query).difference(known):
        raise ConfigurationError(f"{url}: unknown {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    if "@" in text:
        raise ConfigurationError(f"{url}: memcached is used without user and password; leave out what is before the @")
    found = [_server(part, url) for part in text.split(";") if part]
    if not found:
        raise ConfigurationError(f"{url} names no server; expected something like cache+memcached://localhost:11211/")
    return list(dict.fromkeys(found))


def _server(text: str, url: Url) -> Server:
    text = text.removeprefix("unix:")
    if text.startswith("/"):
        return Server(text, 0)
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        host, port = text, str(_PORT)
    if not (port.isdecimal() and 0 < int(port) < 65536):
        raise ConfigurationError(f"bad URL {url}: {UNREADABLE}")
    return Server(host.removeprefix("[").removesuffix("]"), int(port))


def choose(servers: Sequence[str], key: str) -> str:
    """The server of a key, as Celery's client chooses it: that with the highest hash of both names.

    Of equals the one whose name is the greater.
    """
    return max(servers, key=lambda server: (murmur3(f"{server}-{key}".encode()), server))


def murmur3(data: bytes) -> int:
    """MurmurHash3, 32 bits, seed 0."""
    mixed = 0
    whole = len(data) & ~3
    for start in range(0, whole, 4):
        mixed ^= _scramble(int.from_bytes(data[start : start + 4], "little"))
        mixed = (_rotate(mixed, 13) * 5 + 0xE6546B64) & 0xFFFFFFFF
    mixed ^= _scramble(int.from_bytes(data[whole:], "little"))
    mixed ^= len(data)
    mixed = (mixed ^ (mixed >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    return mixed ^ (mixed >> 16)


def _scramble(word: int) -> int:
    return _rotate(word * 0xCC9E2D51 & 0xFFFFFFFF, 15) * 0x1B873593 & 0xFFFFFFFF


def _rotate(word: int, bits: int) -> int:
    return (word << bits | word >> (32 - bits)) & 0xFFFFFFFF
