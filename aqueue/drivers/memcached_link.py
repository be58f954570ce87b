"""One memcached server: its text protocol on one connection.

Spoken here, as neither client for asyncio can lose its server: aiomcache 0.8 spins for ever on a connection that the
server has closed and hands the answer of a cancelled command to the next one; emcache 1.3 waits out the whole deadline
when nobody listens, and has hung in our tests when its server was lost.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Final, NamedTuple, TypeVar

from aqueue.drivers.memcached_servers import Server
from aqueue.errors import StoreUnavailable

T = TypeVar("T")

#: Keys, or commands, that are sent before the answers are read.
_AT_ONCE: Final = 100
#: Answers to a command that writes, and whether it has written.
_WRITTEN: Final = {b"STORED": True, b"NOT_STORED": False, b"EXISTS": False, b"NOT_FOUND": False, b"DELETED": True}


class Item(NamedTuple):
    """What is stored; ``mark`` changes with every write."""

    value: bytes
    mark: bytes


class MemcachedLink:
    """A connection that is made when it is needed, and anew after a failure.

    Every method raises StoreUnavailable, at the latest ``timeout`` seconds after each hundred keys or commands.
    """

    def __init__(self, server: Server, timeout: float) -> None:
        self._server = server
        self._timeout = timeout
        self._turn = asyncio.Lock()
        self._stream: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def read(self, keys: Sequence[bytes]) -> Mapping[bytes, Item]:
        found: dict[bytes, Item] = {}
        for start in range(0, len(keys), _AT_ONCE):
            request = b"gets %b\r\n" % b" ".join(keys[start : start + _AT_ONCE])
            for items in await self._round([request], _items):
                found |= items
        return found

    async def write(self, commands: Sequence[bytes]) -> list[bool]:
        """Whether each has written, or found that somebody else had."""
        done: list[bool] = []
        for start in range(0, len(commands), _AT_ONCE):
            done += await self._round(commands[start : start + _AT_ONCE], _has_written)
        return done

    async def close(self) -> None:
        if self._stream is not None:
            self._drop()
            await asyncio.sleep(0)  # the transport's last callback

    async def _round(
        self, requests: Sequence[bytes], answer: Callable[[asyncio.StreamReader], Awaitable[T]]
    ) -> list[T]:
        try:
            async with asyncio.timeout(self._timeout), self._turn:
                reader, writer = await self._open()
                answered = False
                try:
                    for request in requests:
                        writer.write(request)
                        await writer.drain()
                    answers = [await answer(reader) for _ in requests]
                    answered = True
                finally:
                    if not answered:  # what comes now is for nobody
                        self._drop()
                return answers
        except TimeoutError:
            reason = f"no answer within {self._timeout:g} s"
        except EOFError:
            reason = "the connection was lost"
        except (OSError, _BadAnswerError) as error:
            reason = str(error) or type(error).__name__
        raise StoreUnavailable(f"memcached at {self._server}: {reason}")

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._stream is not None and self._stream[0].at_eof():
            self._drop()
        if self._stream is None:
            if self._server.port:
                self._stream = await asyncio.open_connection(self._server.host, self._server.port)
            else:
                self._stream = await asyncio.open_unix_connection(self._server.host)
        return self._stream

    def _drop(self) -> None:
        if self._stream is not None:
            self._stream[1].transport.abort()
            self._stream = None


def write_command(verb: bytes, key: str, value: bytes, ends: int, *mark: bytes) -> bytes:
    """``add`` or, with an item's mark, ``cas``; flags 0."""
    head = b" ".join((verb, key.encode(), b"0", b"%d" % ends, b"%d" % len(value), *mark))
    return head + b"\r\n" + value + b"\r\n"


class _BadAnswerError(Exception):
    """The server refuses a command, or is no memcached."""


async def _has_written(reader: asyncio.StreamReader) -> bool:
    line = await _line(reader)
    if line not in _WRITTEN:
        raise _BadAnswerError(_told(line))
    return _WRITTEN[line]


async def _items(reader: asyncio.StreamReader) -> dict[bytes, Item]:
    found: dict[bytes, Item] = {}
    while (line := await _line(reader)) != b"END":
        fields = line.split()
        if len(fields) != 5 or fields[0] != b"VALUE" or not fields[3].isdigit():
            raise _BadAnswerError(_told(line))
        data = await reader.readexactly(int(fields[3]) + 2)
        found[fields[1]] = Item(data[:-2], fields[4])
    return found


async def _line(reader: asyncio.StreamReader) -> bytes:
    try:
        return (await reader.readuntil(b"\r\n"))[:-2]
    except asyncio.LimitOverrunError:
        raise _BadAnswerError("it answers like no memcached") from None


def _told(line: bytes) -> str:
    return f"it says {line[:200].decode(errors='replace')!r}"
