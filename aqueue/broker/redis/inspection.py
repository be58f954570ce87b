"""Looking into Redis queues, for people: depths, dead letters, recovery. Never on a worker's road."""

import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from datetime import datetime, timezone
from typing import Any, Final

import msgspec

from aqueue.broker import DeadLetter, Presence, QueueDepth, Recovered, Visit
from aqueue.broker.history import History
from aqueue.broker.redis.envelope import unpack
from aqueue.broker.redis.keys import STEPS, Keys, binding_parts, matching_queues
from aqueue.broker.redis.losses import LOSSES_TTL, deaths_of
from aqueue.broker.redis.scripts import RECOVER, RECOVER_UNACKED, RETRY_DEAD
from aqueue.drivers.redis_link import RedisLink, raising
from aqueue.errors import BrokerUnavailable
from aqueue.protocol import Message, Unreadable
from aqueue.serialization import Limits

#: Entries looked at in one call.
_PAGE: Final = 500
_BINDINGS: Final = "_kombu.binding."


class RedisInspection:
    """A `aqueue.broker.Inspection` of one Redis database."""

    def __init__(self, link: RedisLink, keys: Keys, limits: Limits) -> None:
        self._link = link
        self._keys = keys
        self._limits = limits

    async def queues(self, known: Sequence[str] = ()) -> Sequence[QueueDepth]:
        with raising(BrokerUnavailable):
            leased = await self._by_queue("leases")
            parked = await self._by_queue("parked")
            dead = await self._dead_by_queue()
            names = await self._names() | set(leased) | set(parked) | set(dead)
            ready = {name: await self._ready(name) for name in names}
        return [QueueDepth(name, ready[name], leased[name], parked[name], dead[name]) for name in sorted(names)]

    async def workers(self) -> Sequence[Presence]:
        found: list[Presence] = []
        with raising(BrokerUnavailable):
            async for key in self._keys_like(self._keys.ours("worker:*")[0], "string"):
                told = await self._link.call("GET", key)
                if told is not None:
                    found.append(msgspec.json.decode(told, type=Presence))
        return sorted(found, key=lambda presence: presence.worker)

    async def peek(self, queue: str, limit: int) -> Sequence[Message | Unreadable]:
        found: list[Message | Unreadable] = []
        with raising(BrokerUnavailable):
            for name in self._keys.lists([queue]):
                if len(found) < limit:
                    waiting = await self._link.call("LRANGE", name, len(found) - limit, -1)
                    found += [unpack(raw, queue, self._limits) for raw in reversed(waiting)]
        return found

    async def purge(self, queue: str) -> int:
        purged = 0
        with raising(BrokerUnavailable):
            for name in self._keys.lists([queue]):
                purged += await self._link.call("LLEN", name)
                await self._link.call("DEL", name)
            parked, messages = self._keys.ours("parked", "parked:messages")
            async for ids in self._pages(parked):
                mine = [id for id in ids if self._queue(id) == queue]
                if mine:
                    purged += await self._link.call("ZREM", parked, *mine)
                    await self._link.call("HDEL", messages, *mine)
        return purged

    # --- dead letters ---

    async def dead(
        self, queue: str | None = None, limit: int = 100, where: Callable[[DeadLetter], bool] | None = None
    ) -> Sequence[DeadLetter]:
        found: list[DeadLetter] = []
        start = 0
        index = self._keys.ours("dead")[0]
        with raising(BrokerUnavailable):
            while len(found) < limit:
                page = await self._link.call("ZREVRANGE", index, start, start + _PAGE - 1, "WITHSCORES")
                letters = [letter for letter, _ in await self._letters([(id.decode(), died) for id, died in page])]
                found += [letter for letter in letters if queue in (None, letter.message.queue)]
                found = [letter for letter in found if where is None or where(letter)]
                start += _PAGE
                if len(page) < _PAGE:
                    break
        return found[:limit]

    async def sift_dead(self, visit: Visit, page: int = 500) -> tuple[int, int]:
        retried = dropped = 0
        with raising(BrokerUnavailable):
            # A letter has the number of the claim that ended with it, so one of later has a larger number.
            last = int(await self._link.call("GET", self._keys.ours("seq")[0]) or 0)
            after = (float("-inf"), b"")
            while entries := await self._dead_after(after, last, page):
                letters = await self._letters([(id.decode(), died) for died, id in entries])
                sifted = await visit([letter for letter, _ in letters])
                retried += await self.retry_dead(sifted.retry)
                dropped += await self.drop_dead(sifted.drop)
                after = entries[-1]
        return retried, dropped

    async def _dead_after(self, after: tuple[float, bytes], last: int, limit: int) -> list[tuple[float, bytes]]:
        """When letters died (ms), and their ids, in this order: those that follow one that may be gone by now."""
        start = 0
        while True:
            page = await self._link.call(
                "ZRANGEBYSCORE", self._keys.ours("dead")[0], after[0], "+inf", "WITHSCORES", "LIMIT", start, limit
            )
            entries = [(float(died), id) for id, died in page if int(id) <= last]
            entries = [entry for entry in entries if entry > after]
            if entries or len(page) < limit:
                return entries
            start += limit

    async def find_dead(self, id: str) -> DeadLetter | None:
        with raising(BrokerUnavailable):
            died = await self._link.call("ZSCORE", self._keys.ours("dead")[0], id)
            letters = [] if died is None else await self._letters([(id, died)])
        return letters[0][0] if letters else None

    async def _letters(self, entries: Sequence[tuple[str, float]]) -> list[tuple[DeadLetter, dict[str, Any]]]:
        """Letters, and what was written down when they died."""
        if not entries:
            return []
        messages, letters = self._keys.ours("dead:messages", "dead:letters")
        ids = [id for id, _ in entries]
        raws = await self._link.call("HMGET", messages, *ids)
        whys = [json.loads(why or b"null") for why in await self._link.call("HMGET", letters, *ids)]
        return [
            (self._letter(id, died, raw, why), why)
            for (id, died), raw, why in zip(entries, raws, whys, strict=True)
            if raw is not None and why is not None
        ]

    def _letter(self, id: str, died: float, raw: bytes, why: dict[str, Any]) -> DeadLetter:
        return DeadLetter(
            id=id,
            reason=why["reason"],
            detail=why["detail"],
            died=datetime.fromtimestamp(float(died) / 1000, timezone.utc),
            deliveries=why["deliveries"],
            worker=why["worker"],
            message=unpack(raw, why["queue"], self._limits),
            history=msgspec.convert(why.get("history", {}), History),
        )

    async def retry_dead(self, ids: Sequence[str]) -> int:
        moved = 0
        with raising(BrokerUnavailable):
            for start in range(0, len(ids), _PAGE):
                moved += await self._retry(ids[start : start + _PAGE])
        return moved

    async def _retry(self, ids: Sequence[str]) -> int:
        now = time.time()
        args: list[str | bytes | int] = [LOSSES_TTL]
        scores = await self._link.call("ZMSCORE", self._keys.ours("dead")[0], *ids)
        for letter, why in await self._letters([(id, died) for id, died in zip(ids, scores, strict=True) if died]):
            args += (letter.id, why["list"], deaths_of(letter.after_replay(now)))
        keys = self._keys.ours("dead", "dead:messages", "dead:letters", "lost")
        moved: int = await self._link.run(RETRY_DEAD, keys, args)
        return moved

    async def drop_dead(self, ids: Sequence[str]) -> int:
        if not ids:
            return 0
        index, messages, letters = self._keys.ours("dead", "dead:messages", "dead:letters")
        with raising(BrokerUnavailable):
            dropped: int = await self._link.call("ZREM", index, *ids)
            await self._link.call("HDEL", messages, *ids)
            await self._link.call("HDEL", letters, *ids)
        return dropped

    # --- recovery ---

    async def recover(self, *, older_than: float, celery: bool, parked: bool) -> Recovered:
        with raising(BrokerUnavailable):
            leased, left = await self._give_back("leases", "leased")
            waiting = (await self._give_back("parked", "parked:messages"))[0] if parked else 0
            unacked, unread = await self._give_back_unacked(older_than) if celery else (0, 0)
        return Recovered(leased=leased, parked=waiting, unacked=unacked, left=left + unread)

    async def _give_back(self, index: str, messages: str) -> tuple[int, int]:
        keys = self._keys.ours(index, messages)
        given = 0
        ids = [id async for page in self._pages(keys[0]) for id in page]
        for start in range(0, len(ids), _PAGE):
            given += await self._link.run(RECOVER, keys, (index, *ids[start : start + _PAGE]))
        return given, len(ids) - given

    async def _give_back_unacked(self, older_than: float) -> tuple[int, int]:
        """kombu's entry is ``[envelope, exchange, routing key]``, its score the fetching worker's clock."""
        hash_name, index = f"{self._keys.prefix}unacked", f"{self._keys.prefix}unacked_index"
        seconds, microseconds = await self._link.call("TIME")
        latest = int(seconds) + int(microseconds) / 1e6 - older_than
        given = left = 0
        for tag in await self._link.call("ZRANGEBYSCORE", index, "-inf", latest):
            entry = await self._link.call("HGET", hash_name, tag)
            target = await self._target(entry)
            if target is None:
                left += 1
            else:
                name, envelope = target
                given += await self._link.run(RECOVER_UNACKED, (hash_name, index, name), (tag, entry, envelope))
        return given, left

    async def _target(self, entry: bytes | None) -> tuple[str, bytes] | None:
        """The list to give an entry back to and the envelope, marked as redelivered; None when nothing says which."""
        try:
            envelope, exchange, routing_key = json.loads(entry or b"")
            queue = routing_key or exchange
            if exchange and exchange != routing_key:
                bindings = await self._link.call("SMEMBERS", self._keys.binding(exchange))
                queue = matching_queues(bindings, routing_key)[0]
            priority = int(envelope["properties"].get("priority") or 0)
            envelope["headers"]["redelivered"] = True
            envelope["properties"].setdefault("delivery_info", {})["redelivered"] = True
            step = max(step for step in STEPS if step <= max(0, priority))
            return self._keys.step_list(queue, step), json.dumps(envelope).encode()
        except (ValueError, TypeError, LookupError, AttributeError):
            return None

    # --- looking ---

    async def _names(self) -> set[str]:
        """Queues with bindings or with messages; control and event queues are none."""
        names: set[str] = set()
        async for key in self._keys_like(self._keys.binding("*"), "set"):
            exchange = key.removeprefix(self._keys.binding(""))
            if not exchange.endswith(("celery.pidbox", "celeryev")):
                members = await self._link.call("SMEMBERS", key)
                names.update(queue for _, _, queue in map(binding_parts, members))
        async for key in self._keys_like(f"{self._keys.prefix}*", "list"):
            queue = self._keys.queue_of(key)
            if queue not in names and not queue.endswith("celery.pidbox") and await self._holds_messages(key):
                names.add(queue)
        return names

    async def _holds_messages(self, name: str) -> bool:
        """Other programs may keep lists in the same database."""
        raw = await self._link.call("LINDEX", name, -1)
        return raw is not None and isinstance(unpack(raw, name, self._limits), Message)

    async def _keys_like(self, pattern: str, kind: str) -> AsyncIterator[str]:
        cursor = 0
        while True:
            cursor, found = await self._link.call("SCAN", cursor, "MATCH", pattern, "COUNT", _PAGE, "TYPE", kind)
            for key in found:
                yield key.decode(errors="replace")
            cursor = int(cursor)
            if not cursor:
                return

    async def _ready(self, queue: str) -> int:
        return sum([await self._link.call("LLEN", name) for name in self._keys.lists([queue])])

    async def _dead_by_queue(self) -> Counter[str]:
        counted: Counter[str] = Counter()
        cursor = 0
        while True:
            cursor, found = await self._link.call("HSCAN", self._keys.ours("dead:letters")[0], cursor, "COUNT", _PAGE)
            counted.update(json.loads(letter)["queue"] for letter in found[1::2])
            cursor = int(cursor)
            if not cursor:
                return counted

    async def _by_queue(self, index: str) -> Counter[str]:
        counted: Counter[str] = Counter()
        async for ids in self._pages(self._keys.ours(index)[0]):
            counted.update(self._queue(id) for id in ids)
        return counted

    def _queue(self, id: str) -> str:
        return self._keys.queue_of(id.partition(":")[2])

    async def _pages(self, index: str) -> AsyncIterator[list[str]]:
        cursor = 0
        while True:
            cursor, found = await self._link.call("ZSCAN", index, cursor, "COUNT", _PAGE)
            cursor = int(cursor)
            yield [id.decode() for id in found[::2]]
            if not cursor:
                return
