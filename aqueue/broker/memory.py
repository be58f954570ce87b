"""The in-process broker, for tests and single programs; the shortest reading of the contract.

All event loops of a process see the same messages, which live in the `MemoryServer` that belongs to the
app's URL and die with the process.
"""

import asyncio
import heapq
import threading
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from itertools import count
from types import TracebackType
from typing import Final, Self

from aqueue.broker import (
    Ack,
    BrokerFactory,
    BrokerOptions,
    Bury,
    DeadLetter,
    Delivery,
    Presence,
    QueueDepth,
    Recovered,
    Release,
    Verdict,
    in_turn,
    settling_order,
)
from aqueue.errors import EnqueueFailed
from aqueue.protocol import Message, Unreadable
from aqueue.url import Url


class _Entry:
    """A stored message. ``place`` orders a queue: by urgency, then by age; the front has small numbers."""

    __slots__ = ("due", "lost", "message", "place")

    def __init__(self, message: Message, place: tuple[int, int]) -> None:
        self.message = message
        self.place = place
        self.due = 0.0
        self.lost = 0

    def __lt__(self, other: "_Entry") -> bool:
        return self.place < other.place


class MemoryServer:
    """The shared state. Every method takes the lock; time is monotonic seconds."""

    def __init__(self) -> None:
        self.lock: Final = threading.RLock()
        self.ready: dict[str, list[_Entry]] = {}
        self.parked: list[tuple[float, int, _Entry]] = []
        #: Receipt -> the message, the end of its lease, its holder.
        self.leased: dict[str, tuple[_Entry, float]] = {}
        self.dead: dict[str, tuple[DeadLetter, _Entry]] = {}
        self.workers: dict[str, Presence] = {}
        self.numbers: Final = count(1)
        self.waiters: set[Callable[[], None]] = set()

    def add(self, message: Message, delay: float = 0.0) -> None:
        with self.lock:
            self._place(_Entry(message, (0, 0)), delay)

    def _place(self, entry: _Entry, delay: float, *, front: bool = False) -> None:
        number = next(self.numbers)
        entry.place = (-entry.message.priority, -number if front else number)
        if delay > 0:
            entry.due = time.monotonic() + delay
            heapq.heappush(self.parked, (entry.due, number, entry))
        else:
            heapq.heappush(self.ready.setdefault(entry.message.queue, []), entry)
        for wake in tuple(self.waiters):
            wake()

    def claim(self, queues: Sequence[str], limit: int, lease: float) -> list[Delivery]:
        with self.lock:
            self._tend()
            found: list[Delivery] = []
            while len(found) < limit:
                waiting = [self.ready[queue] for queue in queues if self.ready.get(queue)]
                if not waiting:
                    break
                # The first of the queues whose next message is the most urgent; `min` keeps their order.
                entry = heapq.heappop(min(waiting, key=lambda entries: entries[0].place[0]))
                receipt = str(next(self.numbers))
                self.leased[receipt] = (entry, time.monotonic() + lease)
                found.append(Delivery(entry.message, receipt, entry.lost + 1))
            return found

    def _tend(self) -> None:
        now = time.monotonic()
        while self.parked and self.parked[0][0] <= now:
            _, _, entry = heapq.heappop(self.parked)
            self._place(entry, 0.0)
        for receipt, (entry, ends) in sorted(self.leased.items(), key=lambda item: item[1][0], reverse=True):
            if ends <= now:
                del self.leased[receipt]
                entry.lost += 1
                self._place(entry, 0.0, front=True)

    def next_event(self) -> float:
        """Seconds until a parked message is due or a lease ends."""
        with self.lock:
            moments = [ends for _, ends in self.leased.values()]
            if self.parked:
                moments.append(self.parked[0][0])
            return max(0.0, min(moments) - time.monotonic()) if moments else float("inf")

    def extend(self, receipts: Collection[str], lease: float) -> list[str]:
        with self.lock:
            ends = time.monotonic() + lease
            gone = [receipt for receipt in receipts if receipt not in self.leased]
            for receipt in receipts:
                if receipt in self.leased:
                    self.leased[receipt] = (self.leased[receipt][0], ends)
            return gone

    def settle(self, delivery: Delivery, verdict: Verdict, holder: str) -> bool:
        """Carry out one verdict; False when the lease is no longer held."""
        with self.lock:
            held = self.leased.pop(delivery.receipt, None)
            if held is None:
                return False
            entry = held[0]
            match verdict:
                case Ack(publish=messages):
                    for message in messages:
                        self.add(message, message.delay)
                case Release(delay=delay, last=last):
                    self._place(entry, delay, front=not last)
                case Bury():
                    self.dead[delivery.receipt] = (_dead_letter(delivery, verdict, holder), entry)
            return True


def _dead_letter(delivery: Delivery, verdict: Bury, holder: str) -> DeadLetter:
    return DeadLetter(
        id=delivery.receipt,
        reason=verdict.reason,
        detail=verdict.detail,
        died=datetime.now(timezone.utc),
        deliveries=delivery.deliveries,
        worker=holder,
        message=delivery.message,
    )


class MemoryBroker:
    """A `aqueue.broker.Broker` in this process."""

    pushes = False
    sends_at_once = 1

    def __init__(self, server: MemoryServer, options: BrokerOptions) -> None:
        self.lease = options.lease
        self.holder = ""
        self._server = server
        self._eta_queues = options.eta_queues
        self._turn = 0

    @classmethod
    def factory(cls, url: Url) -> BrokerFactory:
        server = MemoryServer()
        return lambda options: cls(server, options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def now(self) -> float:
        return time.time()

    def keeps(self, place: object) -> bool:
        return False

    async def publish(self, messages: Sequence[Message]) -> None:
        if any(message.exchange for message in messages):
            raise EnqueueFailed("memory:// has no exchanges; send to a queue")
        for message in messages:
            at_once = any(fnmatchcase(message.queue, glob) for glob in self._eta_queues)
            self._server.add(message, 0.0 if at_once else message.delay)

    async def fetch(self, queues: Sequence[str], limit: int, wait: float) -> Sequence[Delivery]:
        loop = asyncio.get_running_loop()
        changed = asyncio.Event()
        deadline = loop.time() + wait
        self._turn += 1
        turned = in_turn(queues, self._turn)

        def wake() -> None:
            with suppress(RuntimeError):  # that loop is closed: nobody waits there
                loop.call_soon_threadsafe(changed.set)

        self._server.waiters.add(wake)
        try:
            while True:
                changed.clear()
                found = self._server.claim(turned, limit, self.lease)
                left = deadline - loop.time()
                if found or left <= 0:
                    return found
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(left, self._server.next_event())):
                        await changed.wait()
        finally:
            self._server.waiters.discard(wake)

    def extend(self, deliveries: Collection[Delivery]) -> Sequence[Delivery]:
        held = {delivery.receipt: delivery for delivery in deliveries}
        return [held[receipt] for receipt in self._server.extend(held, self.lease)]

    def present(self, presence: Presence, seconds: float) -> None:
        if seconds:
            self._server.workers[presence.worker] = presence
        else:
            self._server.workers.pop(presence.worker, None)

    async def settle(self, verdicts: Sequence[tuple[Delivery, Verdict]]) -> Sequence[Delivery]:
        ordered = settling_order(verdicts)
        return [delivery for delivery, verdict in ordered if not self._server.settle(delivery, verdict, self.holder)]

    async def let_go(self, delivery: Delivery) -> bool:
        return not await self.settle([(delivery, Ack())])

    async def waiting(self, queues: Sequence[str]) -> int:
        with self._server.lock:
            return sum(len(self._server.ready.get(queue, ())) for queue in queues)

    def reconnect(self) -> None:
        """There is nothing to listen on."""

    @property
    def inspection(self) -> "MemoryInspection":
        return MemoryInspection(self._server)


class MemoryInspection:
    """A `aqueue.broker.Inspection` of a `MemoryServer`."""

    def __init__(self, server: MemoryServer) -> None:
        self._server = server

    async def queues(self, known: Sequence[str] = ()) -> Sequence[QueueDepth]:
        with self._server.lock:
            leased = [entry.message.queue for entry, _ in self._server.leased.values()]
            parked = [entry.message.queue for _, _, entry in self._server.parked]
            dead = [letter.message.queue for letter, _ in self._server.dead.values()]
            ready = {name: len(entries) for name, entries in self._server.ready.items()}
        names = sorted({*ready, *leased, *parked, *dead})
        return [
            QueueDepth(name, ready.get(name, 0), leased.count(name), parked.count(name), dead.count(name))
            for name in names
        ]

    async def workers(self) -> Sequence[Presence]:
        return sorted(self._server.workers.values(), key=lambda presence: presence.worker)

    async def peek(self, queue: str, limit: int) -> Sequence[Message | Unreadable]:
        with self._server.lock:
            return [entry.message for entry in heapq.nsmallest(limit, self._server.ready.get(queue, []))]

    async def purge(self, queue: str) -> int:
        with self._server.lock:
            ready = self._server.ready.pop(queue, [])
            kept = [item for item in self._server.parked if item[2].message.queue != queue]
            purged = len(ready) + len(self._server.parked) - len(kept)
            self._server.parked[:] = kept
            heapq.heapify(self._server.parked)
            return purged

    async def dead(self, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        with self._server.lock:
            letters = [letter for letter, _ in reversed(self._server.dead.values())]
        return [letter for letter in letters if queue in (None, letter.message.queue)][:limit]

    async def find_dead(self, id: str) -> DeadLetter | None:
        found = self._server.dead.get(id)
        return None if found is None else found[0]

    async def retry_dead(self, ids: Sequence[str]) -> int:
        with self._server.lock:
            found = [entry for _, entry in map(self._server.dead.pop, self._known(ids))]
            for entry in found:
                self._server.add(entry.message)
        return len(found)

    async def drop_dead(self, ids: Sequence[str]) -> int:
        with self._server.lock:
            return len([self._server.dead.pop(id) for id in self._known(ids)])

    def _known(self, ids: Sequence[str]) -> list[str]:
        return [id for id in dict.fromkeys(ids) if id in self._server.dead]

    async def recover(self, *, older_than: float, celery: bool, parked: bool) -> Recovered:
        return Recovered()
