"""Remote control on Redis: what is revoked lies in keys of ours, and kombu's channel tells of it (celery-protocol 2.9).

::

    aqueue:revoked          zset    task id -> when it is forgotten, in ms of the server's clock
    aqueue:revoked:why      hash    task id -> why, as JSON
    aqueue:revoked:version  string  another number after each change

All three end with the last of what they hold. ``/<db>.celery.pidbox`` is the channel on which Celery's clients and ours
broadcast; both are heard by both kinds of workers.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec
from redis.exceptions import NoPermissionError

from aqueue.broker import BrokerOptions
from aqueue.broker.control import MOST_KEPT, Inbox
from aqueue.broker.redis.envelope import pack, unpack
from aqueue.broker.redis.keys import Keys
from aqueue.broker.redis.scripts import REVOKE, REVOKED
from aqueue.drivers.redis_link import RedisLink, Value, raising
from aqueue.errors import Border, BrokerUnavailable, ControlRefused
from aqueue.pidbox import EXCHANGE, Revocation, Revoked

logger = logging.getLogger("aqueue.control")

#: Ids in one call: keeps each call short for the server.
_BATCH: Final = 500


class _Why(msgspec.Struct):
    reason: str
    terminate: bool


class RedisControl:
    """A `aqueue.broker.control.Control` on a link of a broker's. ``node`` names the worker that listens."""

    durable = True

    def __init__(self, link: RedisLink, keys: Keys, options: BrokerOptions, node: Callable[[], str]) -> None:
        self._link = link
        self._keys = keys
        self._options = options
        self._node = node
        self._channel = f"{keys.prefix}/{link.address.db}.{EXCHANGE}"
        self._inbox = Inbox()
        self._listening = False
        #: What is kept, with its ends in ms of the server's clock, and the version of it.
        self._kept: list[tuple[str, _Why, float]] = []
        self._version = b""
        link.on_push("message", self._published)
        link.on_lost.append(self._lost)

    async def revoke(self, ids: Sequence[str], revocation: Revocation) -> None:
        why = msgspec.json.encode(_Why(revocation.reason, revocation.terminate))
        keys = self._keys.ours("nothing", "seq", "revoked", "revoked:why", "revoked:version")
        for start in range(0, len(ids), _BATCH):
            some = ids[start : start + _BATCH]
            messages = [pack(message) for message in self._options.pidbox.revoke(some, revocation)]
            ttl = max(1, round(revocation.keep * 1000))
            args: list[Value] = [ttl, why, MOST_KEPT, self._channel, len(messages), *messages, *some]
            with raising(BrokerUnavailable), _REFUSED:
                forgotten = await self._link.run(REVOKE, keys, args)
            if forgotten:
                logger.warning("%d cancelled tasks are forgotten: over %d at once are not kept", forgotten, MOST_KEPT)

    async def revoked(self) -> Revoked:
        keys = self._keys.ours("revoked", "revoked:why", "revoked:version")
        with raising(BrokerUnavailable), _REFUSED:
            now, version, *changed = await self._link.run(REVOKED, keys, (self._version,))
        if changed:
            self._version = version
            self._kept = list(_read(*changed))
        return {
            id: Revocation(why.reason, why.terminate, (ends - now) / 1000) for id, why, ends in self._kept if ends > now
        }

    async def news(self, wait: float) -> Revoked:
        with raising(BrokerUnavailable), _REFUSED:
            await self._listen()
        return await self._inbox.take(wait)

    async def _listen(self) -> None:
        if self._listening:
            return
        self._inbox.check()
        await self._link.ready()
        (subscribed,) = self._link.send(("SUBSCRIBE", self._channel))
        await subscribed
        self._listening = True

    async def close(self) -> None:
        """The link ends with its broker."""

    def _lost(self) -> None:
        """The subscription ended with the link."""
        if self._listening:
            self._listening = False
            self._inbox.miss(f"lost the connection to {self._link.address.shown}")

    def _published(self, push: list[Any]) -> None:
        message = unpack(push[2], EXCHANGE, self._options.limits)
        self._inbox.put(self._options.pidbox.read(message, self._node()))


def _read(ends: list[bytes], reasons: list[bytes]) -> Iterator[tuple[str, _Why, float]]:
    """A reply of revoked.lua; what is not of our writing is left out."""
    why = dict(zip(reasons[::2], reasons[1::2], strict=True))
    for id, end in zip(ends[::2], ends[1::2], strict=True):
        with suppress(KeyError, msgspec.DecodeError, UnicodeError):
            yield id.decode(), _decode_why(why[id]), float(end)


_REFUSED: Final = Border(ControlRefused, NoPermissionError)
_decode_why = msgspec.json.Decoder(_Why).decode
