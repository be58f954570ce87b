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
from itertools import count, islice
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
    Visit,
    in_turn,
    settling_order,
)
from aqueue.broker.history import NO_HISTORY, History, Loss
from aqueue.broker.memory_control import MemoryControl, MemoryRevocations
from aqueue.errors import EnqueueFailed
from aqueue.protocol import Message, Unreadable
from aqueue.url import Url


class _Entry:
    """A stored message. ``place`` orders a queue: by urgency, then by age; the front has small numbers."""

    __slots__ = ("due", "history", "lost", "message", "place")

    def __init__(self, message: Message, place: tuple[int, int], history: History = NO_HISTORY) -> None:
        self.message = message
        self.place = place
        self.due = 0.0
        self.lost = 0
        self.history = history

    def __lt__(self, other: "_Entry") -> bool:
        return self.place < other.place


class _Claim:
    """Who holds a message, since when (unix time) and until when; ``cause``: why it was lost, said before it was."""

    __slots__ = ("cause", "claimed", "ends", "entry", "holder")

    def __init__(self, entry: _Entry, holder: str, ends: float) -> None:
        self.entry = entry
        self.holder = holder
        self.claimed = time.time()
        self.ends = ends
        self.cause = ""


class MemoryServer:
    """The shared state. Every method takes the lock; time is monotonic seconds."""

    def __init__(self) -> None:
        self.lock: Final = threading.RLock()
        self.ready: dict[str, list[_Entry]] = {}
        self.parked: list[tuple[float, int, _Entry]] = []
        self.leased: dict[str, _Claim] = {}
        #: Receipts of claims that were lost -> what was lost, as long as it is not settled.
        self.lost: dict[str, _Entry] = {}
        self.dead: dict[str, DeadLetter] = {}
        self.workers: dict[str, Presence] = {}
        self.numbers: Final = count(1)
        self.waiters: set[Callable[[], None]] = set()
        self.revocations: Final = MemoryRevocations()

    def add(self, message: Message, delay: float = 0.0, history: History = NO_HISTORY) -> None:
        with self.lock:
            self._place(_Entry(message, (0, 0), history), delay)

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

    def claim(self, queues: Sequence[str], limit: int, options: BrokerOptions, holder: str) -> list[Delivery]:
        with self.lock:
            self._tend(options)
            found: list[Delivery] = []
            while len(found) < limit:
                waiting = [self.ready[queue] for queue in queues if self.ready.get(queue)]
                if not waiting:
                    break
                # The first of the queues whose next message is the most urgent; `min` keeps their order.
                entry = heapq.heappop(min(waiting, key=lambda entries: entries[0].place[0]))
                receipt = str(next(self.numbers))
                self.leased[receipt] = _Claim(entry, holder, time.monotonic() + options.lease)
                found.append(Delivery(entry.message, receipt, entry.lost + 1, entry.history))
            return found

    def _tend(self, options: BrokerOptions) -> None:
        now = time.monotonic()
        while self.parked and self.parked[0][0] <= now:
            _, _, entry = heapq.heappop(self.parked)
            self._place(entry, 0.0)
        for receipt, claim in sorted(self.leased.items(), key=lambda item: item[1].entry, reverse=True):
            if claim.ends <= now:
                self._take_back(receipt, claim, options)

    def _take_back(self, receipt: str, claim: _Claim, options: BrokerOptions) -> None:
        del self.leased[receipt]
        entry = claim.entry
        entry.lost += 1
        entry.history = entry.history.after_loss(Loss(claim.holder, claim.claimed, time.time(), claim.cause, receipt))
        self.lost[receipt] = entry
        self._place(entry, options.pause_after(entry.lost), front=True)

    def explain(self, receipts: Collection[str], cause: str) -> None:
        with self.lock:
            for receipt in receipts:
                if receipt in self.leased:
                    self.leased[receipt].cause = cause
                elif receipt in self.lost:
                    entry = self.lost[receipt]
                    entry.history = entry.history.explained(receipt, cause)

    def _forget(self, entry: _Entry) -> None:
        """It is settled: its losses matter no more."""
        if entry.lost:
            self.lost = {receipt: lost for receipt, lost in self.lost.items() if lost is not entry}

    def next_event(self) -> float:
        """Seconds until a parked message is due or a lease ends."""
        with self.lock:
            moments = [claim.ends for claim in self.leased.values()]
            if self.parked:
                moments.append(self.parked[0][0])
            return max(0.0, min(moments) - time.monotonic()) if moments else float("inf")

    def extend(self, receipts: Collection[str], lease: float) -> list[str]:
        with self.lock:
            ends = time.monotonic() + lease
            gone = [receipt for receipt in receipts if receipt not in self.leased]
            for receipt in receipts:
                if receipt in self.leased:
                    self.leased[receipt].ends = ends
            return gone

    def settle(self, delivery: Delivery, verdict: Verdict, holder: str) -> bool:
        """Carry out one verdict; False when the lease is no longer held."""
        with self.lock:
            held = self.leased.pop(delivery.receipt, None)
            if held is None:
                return False
            entry = held.entry
            match verdict:
                case Ack(publish=messages):
                    self._forget(entry)
                    for message in messages:
                        self.add(message, message.delay)
                case Release(delay=delay, last=last):
                    self._place(entry, delay, front=not last)
                case Bury():
                    self._forget(entry)
                    self.dead[delivery.receipt] = _dead_letter(delivery, verdict, holder)
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
        history=delivery.history,
    )


class MemoryBroker:
    """A `aqueue.broker.Broker` in this process."""

    pushes = False
    sends_at_once = 1

    def __init__(self, server: MemoryServer, options: BrokerOptions) -> None:
        self.lease = options.lease
        self.holder = ""
        self.control = MemoryControl(server.revocations)
        self._server = server
        self._options = options
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
        await self.control.close()

    def now(self) -> float:
        return time.time()

    def keeps(self, place: object) -> bool:
        return False

    async def publish(self, messages: Sequence[Message]) -> None:
        if any(message.exchange for message in messages):
            raise EnqueueFailed("memory:// has no exchanges; send to a queue")
        for message in messages:
            at_once = any(fnmatchcase(message.queue, glob) for glob in self._options.eta_queues)
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
                found = self._server.claim(turned, limit, self._options, self.holder)
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

    async def waiting(self, queues: Sequence[str]) -> bool:
        with self._server.lock:
            return any(self._server.ready.get(queue) for queue in queues)

    def reconnect(self) -> None:
        """There is nothing to listen on."""

    @property
    def losses(self) -> "MemoryLosses":
        return MemoryLosses(self._server)

    @property
    def inspection(self) -> "MemoryInspection":
        return MemoryInspection(self._server)


class MemoryLosses:
    """`aqueue.broker.Losses` of a `MemoryServer`."""

    def __init__(self, server: MemoryServer) -> None:
        self._server = server

    async def explain(self, receipts: Collection[str], cause: str) -> None:
        self._server.explain(receipts, cause)

    async def give_back_untaken(self) -> None:
        pass


class MemoryInspection:
    """A `aqueue.broker.Inspection` of a `MemoryServer`."""

    def __init__(self, server: MemoryServer) -> None:
        self._server = server

    async def queues(self, known: Sequence[str] = ()) -> Sequence[QueueDepth]:
        with self._server.lock:
            leased = [claim.entry.message.queue for claim in self._server.leased.values()]
            parked = [entry.message.queue for _, _, entry in self._server.parked]
            dead = [letter.message.queue for letter in self._server.dead.values()]
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

    async def dead(
        self, queue: str | None = None, limit: int = 100, where: Callable[[DeadLetter], bool] | None = None
    ) -> Sequence[DeadLetter]:
        letters = (letter for letter in self._letters()[::-1] if queue in (None, letter.message.queue))
        return list(islice(filter(where, letters) if where else letters, limit))

    def _letters(self) -> list[DeadLetter]:
        with self._server.lock:
            return list(self._server.dead.values())

    async def sift_dead(self, visit: Visit, page: int = 500) -> tuple[int, int]:
        retried = dropped = 0
        letters = self._letters()
        for start in range(0, len(letters), page):
            sifted = await visit(letters[start : start + page])
            retried += await self.retry_dead(sifted.retry)
            dropped += await self.drop_dead(sifted.drop)
        return retried, dropped

    async def find_dead(self, id: str) -> DeadLetter | None:
        return self._server.dead.get(id)

    async def retry_dead(self, ids: Sequence[str]) -> int:
        with self._server.lock:
            found = [self._server.dead.pop(id) for id in self._known(ids)]
            for letter in found:
                assert isinstance(letter.message, Message), "memory:// holds nothing else"
                self._server.add(letter.message, history=letter.after_replay(time.time()))
        return len(found)

    async def drop_dead(self, ids: Sequence[str]) -> int:
        with self._server.lock:
            return len([self._server.dead.pop(id) for id in self._known(ids)])

    def _known(self, ids: Sequence[str]) -> list[str]:
        return [id for id in dict.fromkeys(ids) if id in self._server.dead]

    async def recover(self, *, older_than: float, celery: bool, parked: bool) -> Recovered:
        return Recovered()
