"""Results in memcached, in the keys and documents of Celery's ``cache+memcached://`` (celery-protocol 4.4).

Celery stores plain documents with flags 0 and the result's life as the key's, and so do we. With several servers the
key's own is found as Celery's client finds it. A server tells nobody of a change, so one look a tick serves everybody
who waits, with one request for up to a hundred keys.
"""

import math
import re
import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Final, Self

from aqueue.drivers.memcached_link import Item, MemcachedLink, write_command
from aqueue.drivers.memcached_servers import Server, choose, parse_servers
from aqueue.errors import AQueueError, BadMessage, ConfigurationError, EncodeError, MessageTooLarge, StoreUnavailable
from aqueue.protocol import Record
from aqueue.results import Documents, Result, StoreFactory, StoreOptions
from aqueue.results.gathering import all_done
from aqueue.results.keys import task_prefix
from aqueue.results.polling import Polling
from aqueue.url import Url

#: What a key may be, by memcached and by Celery's client.
_KEY: Final = re.compile(r"[!-~]{1,250}")
#: The largest item of a server that is not told otherwise (``memcached -I``), in bytes, and what of it is not document.
_ITEM_SIZE: Final = 1024 * 1024
_OVERHEAD: Final = 512
#: Lives over 30 days are read as a point in time, in seconds since 1970.
_LONGEST_LIFE: Final = 30 * 24 * 3600
#: The server's clock ticks in seconds: one second could end at once.
_SHORTEST_LIFE: Final = 2
#: How often a record is tried again because others wrote the same key in between.
_TRIES: Final = 20
_PARAMETERS: Final = frozenset(("item_size", "key_prefix"))


class MemcachedResults:
    """A `aqueue.results.ResultStore` in memcached; see the module's text."""

    reply_to = ""

    def __init__(self, servers: Sequence[Server], prefix: str, item_size: int, options: StoreOptions) -> None:
        self._documents = Documents(options)
        self._expires = options.expires
        self._prefix = prefix
        self._largest = item_size - _OVERHEAD
        self._links = {str(server): MemcachedLink(server, options.timeout) for server in servers}
        self._polling = Polling(self._read)

    @classmethod
    def factory(cls, url: Url) -> StoreFactory:
        """Stores for ``cache+memcached://host:port;host:port/``. Raises ConfigurationError."""
        servers = parse_servers(url, _PARAMETERS)
        prefix = task_prefix(url.query.get("key_prefix", ""))
        item_size = _item_size(url)
        return lambda options: cls(servers, prefix, item_size, options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._polling.close()
        for link in self._links.values():
            await link.close()

    @property
    def place(self) -> None:
        """No broker keeps its messages here."""
        return None

    def record(self, result: Result) -> Record:
        key = self._prefix + result.task_id
        if _KEY.fullmatch(key) is None:
            raise EncodeError(f"the id {result.task_id!r} makes no key of memcached: visible ASCII, 250 in all")
        data = self._documents.encode(result)
        if len(data) > self._largest:
            raise MessageTooLarge(
                f"the result of task {result.task_id} has {len(data)} bytes, memcached takes {self._largest};"
                " keep it elsewhere, or raise memcached's -I and ?item_size= of the store's URL together"
            )
        return Record(key, data, self._expires)

    # --- writing ---

    async def put(self, records: Sequence[Record]) -> None:
        wanted: dict[str, Record] = {}
        for record in records:
            if record.key not in wanted or not self._documents.says_success(wanted[record.key].value):
                wanted[record.key] = record
        for _ in range(_TRIES):
            found = await self._items(list(wanted))
            wanted = {key: record for key, record in wanted.items() if not self._has_succeeded(found.get(key))}
            lost = await self._write([(record, found.get(key)) for key, record in wanted.items()])
            wanted = {key: wanted[key] for key in lost}
            if not wanted:
                return
        raise StoreUnavailable(f"memcached: others keep writing {', '.join(wanted)[:200]} in between")

    def _has_succeeded(self, item: Item | None) -> bool:
        return item is not None and self._documents.says_success(item.value)

    async def _write(self, records: Sequence[tuple[Record, Item | None]]) -> list[str]:
        """Write each over what was read; the keys where that is there no more, or somebody has written first."""
        by_link: dict[MemcachedLink, dict[str, bytes]] = {}
        for record, item in records:
            verb, mark = (b"add", ()) if item is None else (b"cas", (item.mark,))
            command = write_command(verb, record.key, record.value, _expiry(record.ttl), *mark)
            by_link.setdefault(self._link(record.key), {})[record.key] = command
        written = await all_done([link.write(list(commands.values())) for link, commands in by_link.items()])
        return [
            key
            for commands, outcomes in zip(by_link.values(), written, strict=True)
            for key, done in zip(commands, outcomes, strict=True)
            if not done
        ]

    async def announce(self, records: Sequence[Record]) -> None:
        await self._write([(record, None) for record in records])

    async def forget(self, task_id: str) -> None:
        key = self._prefix + task_id
        if _KEY.fullmatch(key) is not None:
            await self._link(key).write([b"delete %b\r\n" % key.encode()])

    # --- reading ---

    async def get(self, task_id: str, wait: float = 0.0) -> Result | None:
        return await self._polling.get(task_id, wait)

    async def _read(self, task_ids: Sequence[str]) -> Mapping[str, Result | AQueueError]:
        items = await self._items([self._prefix + task_id for task_id in task_ids])
        found: dict[str, Result | AQueueError] = {}
        for key, item in items.items():
            task_id = key.removeprefix(self._prefix)
            try:
                found[task_id] = self._documents.decode(task_id, item.value)
            except BadMessage as error:
                found[task_id] = error
        return found

    async def _items(self, keys: Sequence[str]) -> dict[str, Item]:
        """What is stored, with the mark by which a change is noticed."""
        by_link: dict[MemcachedLink, list[bytes]] = {}
        for key in keys:
            if _KEY.fullmatch(key) is not None:
                by_link.setdefault(self._link(key), []).append(key.encode())
        read = await all_done([link.read(names) for link, names in by_link.items()])
        return {key.decode(): item for items in read for key, item in items.items()}

    def _link(self, key: str) -> MemcachedLink:
        if len(self._links) == 1:
            return next(iter(self._links.values()))
        return self._links[choose(list(self._links), key)]


def _expiry(ttl: float | None) -> int:
    """A life in seconds as memcached takes it; 0 is for ever."""
    if not ttl:
        return 0
    if ttl > _LONGEST_LIFE:
        return int(time.time() + ttl)
    return max(_SHORTEST_LIFE, math.ceil(ttl))


def _item_size(url: Url) -> int:
    text = url.query.get("item_size", str(_ITEM_SIZE))
    if not text.isdecimal() or int(text) <= _OVERHEAD:
        raise ConfigurationError(f"{url}: item_size is a number of bytes over {_OVERHEAD}, as memcached's -I has it")
    return int(text)
