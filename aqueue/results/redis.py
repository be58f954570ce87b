"""Results on Redis, in Celery's keys and documents (celery-protocol 4.4).

``celery-task-meta-<id>`` holds the document and is also the channel on which it is published. Who waits
subscribes first and reads second, so nothing that happens in between is missed, and reads again from
time to time, as pub/sub forgets what nobody heard.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Final, Self

from aqueue.drivers import redis_checks
from aqueue.drivers.redis_address import RedisAddress
from aqueue.drivers.redis_link import RedisLink, Value, look_away, raising
from aqueue.drivers.redis_records import PUT, record_arguments
from aqueue.errors import StoreUnavailable
from aqueue.findings import Finding, Use
from aqueue.protocol import Record
from aqueue.results import Documents, Result, StoreFactory, StoreOptions
from aqueue.results.keys import task_prefix
from aqueue.url import Url

#: Subscriptions that nobody needs any more end together: at so many, or after so many seconds.
_MOST_UNHEARD: Final = 100
_UNHEARD_FOR: Final = 1.0
#: Seconds after which a waiter reads the key again, whatever was or was not published.
_READ_AGAIN: Final = 10.0


class RedisResults:
    """A `aqueue.results.ResultStore` on Redis; one connection, shared by all who wait."""

    reply_to = ""

    def __init__(self, address: RedisAddress, options: StoreOptions) -> None:
        self._documents = Documents(options)
        self._expires = options.expires
        self._address = address
        self._prefix = task_prefix(address.key_prefix)
        self._link = RedisLink(address, options.timeout)
        self._link.on_push("message", self._published)
        self._link.on_open.append(self._listen_again)
        self._link.on_lost.append(self._forget_subscriptions)
        #: Who waits for news of which key.
        self._listeners: dict[str, set[_News]] = {}
        #: Holds every key of the listeners while the link is up, and some that nobody waits for any more.
        self._subscribed: set[str] = set()
        self._unheard: list[str] = []
        self._unsubscribing: asyncio.TimerHandle | None = None

    @classmethod
    def factory(cls, url: Url) -> StoreFactory:
        address = RedisAddress.parse(url)
        return lambda options: cls(address, options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._forget_subscriptions()
        await self._link.close()

    async def check(self, use: Use) -> Sequence[Finding]:
        with raising(StoreUnavailable):
            known = await redis_checks.facts(self._link)
            found = await redis_checks.common(self._link, known, f"{self._prefix}nothing")
        policy = "" if known is None else redis_checks.evicts(known)
        if policy:
            what = (
                f"{self._address.shown} throws keys away when its memory is full ({policy}): results may be lost early"
            )
            found.append(Finding("AQ109", what, "CONFIG SET maxmemory-policy noeviction, and write it to redis.conf"))
        return found

    @property
    def place(self) -> RedisAddress | None:
        return self._address if self._documents.status_is_readable else None

    def record(self, result: Result) -> Record:
        return Record(self._prefix + result.task_id, self._documents.encode(result), self._expires)

    async def put(self, records: Sequence[Record]) -> None:
        with raising(StoreUnavailable):
            if not self._documents.status_is_readable:
                records = [record for record in records if not await self._has_succeeded(record)]
            args: list[Value] = []
            for record in records:
                args += record_arguments(record)[1:]
            await self._link.run(PUT, [record.key for record in records], args)

    async def _has_succeeded(self, record: Record) -> bool:
        """Read the document as a client would: no script can look into it."""
        data = await self._link.call("GET", record.key)
        return data is not None and self._documents.says_success(data)

    async def announce(self, records: Sequence[Record]) -> None:
        with raising(StoreUnavailable):
            await self._link.call_all([_set_if_absent(record) for record in records])

    async def get(self, task_id: str, wait: float = 0.0) -> Result | None:
        key = self._prefix + task_id
        with raising(StoreUnavailable):
            if wait > 0:
                return await self._wait(task_id, key, wait)
            return self._decode(task_id, await self._link.call("GET", key))

    def _decode(self, task_id: str, data: bytes | None) -> Result | None:
        return None if data is None else self._documents.decode(task_id, data)

    async def forget(self, task_id: str) -> None:
        with raising(StoreUnavailable):
            await self._link.call("DEL", self._prefix + task_id)

    # --- waiting ---

    async def _wait(self, task_id: str, key: str, wait: float) -> Result | None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait
        await self._link.ready()
        reply = self._subscribe_and_read(key)
        news = _News()
        listeners = self._listeners.setdefault(key, set())
        listeners.add(news)
        try:
            data = await reply
            while True:
                result = self._decode(task_id, data)
                left = deadline - loop.time()
                if left <= 0 or (result is not None and result.is_final):
                    return result
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(left, _READ_AGAIN)):
                        await news.arrived.wait()
                data = news.take() or await self._link.call("GET", key)
        finally:
            listeners.discard(news)
            if not listeners and self._listeners.pop(key, None) is not None:
                self._unsubscribe_later(key)

    def _subscribe_and_read(self, key: str) -> "asyncio.Future[bytes | None]":
        commands = [("GET", key)] if key in self._subscribed else [("SUBSCRIBE", key), ("GET", key)]
        *subscribed, data = self._link.send(*commands)
        look_away(subscribed)
        self._subscribed.add(key)
        return data

    def _unsubscribe_later(self, key: str) -> None:
        self._unheard.append(key)
        if len(self._unheard) >= _MOST_UNHEARD:
            self._unsubscribe()
        elif self._unsubscribing is None:
            self._unsubscribing = asyncio.get_running_loop().call_later(_UNHEARD_FOR, self._unsubscribe)

    def _unsubscribe(self) -> None:
        """End the subscriptions that nobody needs, if they have not ended with the link."""
        unheard = self._subscribed.intersection(self._forget_unheard()).difference(self._listeners)
        if unheard:
            self._subscribed -= unheard
            look_away(self._link.send(*[("UNSUBSCRIBE", key) for key in unheard]))

    def _forget_unheard(self) -> list[str]:
        if self._unsubscribing is not None:
            self._unsubscribing.cancel()
            self._unsubscribing = None
        unheard, self._unheard = self._unheard, []
        return unheard

    def _listen_again(self) -> None:
        if self._listeners:
            self._subscribed.update(self._listeners)
            look_away(self._link.send(*[("SUBSCRIBE", key) for key in self._listeners]))
        self._read_again()

    def _forget_subscriptions(self) -> None:
        """They end with the link."""
        self._forget_unheard()
        self._subscribed.clear()
        self._read_again()

    def _read_again(self) -> None:
        """Something may have been published while the link was down."""
        for listeners in self._listeners.values():
            for news in listeners:
                news.arrived.set()

    def _published(self, push: list[Any]) -> None:
        for news in self._listeners.get(push[1].decode(), ()):
            news.document = push[2]
            news.arrived.set()


class _News:
    """What one waiter has been told: a document, or (None) that it should read the key."""

    __slots__ = ("arrived", "document")

    def __init__(self) -> None:
        self.arrived = asyncio.Event()
        self.document: bytes | None = None

    def take(self) -> bytes | None:
        self.arrived.clear()
        document, self.document = self.document, None
        return document


def _set_if_absent(record: Record) -> tuple[Value, ...]:
    key, value, ttl = record_arguments(record)
    return ("SET", key, value, "NX", "PX", ttl) if ttl else ("SET", key, value, "NX")
