"""The consuming side on Redis: claim, wait for more, bring back what is due.

An idle worker waits on server-assisted tracking: looking at the lists makes the server say when one of
them changes, whoever pushed, and nothing is taken before it can be leased. One connection is kept for
this, so that waiting never stands behind other work.
"""

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

from redis.exceptions import RedisError

from aqueue.broker import BrokerOptions, Delivery, in_turn, or_hand_back
from aqueue.broker.redis.envelope import unpack
from aqueue.broker.redis.keys import Keys
from aqueue.broker.redis.losses import LOSSES_TTL, read_history
from aqueue.broker.redis.scripts import CLAIM, SETTLE, SETTLE_KEYS, TEND
from aqueue.drivers.redis_address import RedisAddress
from aqueue.drivers.redis_link import LinkLost, RedisLink

logger = logging.getLogger("aqueue.broker")

#: How many messages one call claims, or brings back: keeps each call short for the server.
_CLAIM_BATCH: Final = 500
_TEND_BATCH: Final = 200
#: Seconds between looks at the lists on a server without tracking.
_POLL: Final = 0.2


class ServerClock:
    """The server's clock, carried on by our monotonic one between the times we hear it."""

    def __init__(self) -> None:
        self._ahead = time.time() - time.monotonic()

    def heard(self, milliseconds: int) -> None:
        self._ahead = milliseconds / 1000 - time.monotonic()

    def told(self, reply: "asyncio.Future[Any]") -> None:
        """The answer to TIME: seconds and microseconds."""
        if not reply.cancelled() and reply.exception() is None:
            seconds, microseconds = map(int, reply.result())
            self.heard(seconds * 1000 + microseconds // 1000)

    def now(self) -> float:
        return time.monotonic() + self._ahead


class Claims:
    """See the module's text."""

    def __init__(self, address: RedisAddress, keys: Keys, options: BrokerOptions) -> None:
        self.clock = ServerClock()
        self._keys = keys
        self._options = options
        self._link = RedisLink(address, options.timeout)
        self._link.on_open.append(self._track)
        self._link.on_lost.append(self._look)
        self._link.on_push("invalidate", self._told)
        self._tracking = True
        self._turn = 0
        self._private = self._keys.ours("")[0].encode()
        self._parked = self._keys.ours("parked")[0].encode()
        #: One of our lists, or the schedule, has changed or may have.
        self._lists_changed = asyncio.Event()
        self._parked_changed = asyncio.Event()
        self._tending: asyncio.Task[None] | None = None

    async def fetch(self, queues: Sequence[str], limit: int, wait: float, holder: str) -> list[Delivery]:
        if self._tending is None:
            self._tending = asyncio.create_task(self._tend_forever())
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait
        while True:
            self._lists_changed.clear()
            found = await self._claim(queues, limit, holder)
            left = deadline - loop.time()
            if found or left <= 0:
                return found
            with suppress(TimeoutError):
                async with asyncio.timeout(left if self._tracking else min(left, _POLL)):
                    await self._lists_changed.wait()
            if loop.time() >= deadline and not self._lists_changed.is_set():
                return []

    def reconnect(self) -> None:
        """Whoever claims or waits asks again, on another connection."""
        self._link.lose("given up: messages wait and nothing is claimed")

    async def close(self) -> None:
        if self._tending is not None:
            self._tending.cancel()
            await asyncio.wait([self._tending])
        await self._link.close()

    # --- claiming ---

    async def _claim(self, queues: Sequence[str], limit: int, holder: str) -> list[Delivery]:
        self._turn += 1
        lists = self._keys.lists(in_turn(queues, self._turn))
        keys = [*self._keys.ours("seq", "leases", "leased", "lost"), *lists]
        args = (min(limit, _CLAIM_BATCH), round(self._options.lease * 1000), holder)
        reply = await or_hand_back(self._link.run(CLAIM, keys, args), self._hand_back)
        self.clock.heard(reply[0])
        if reply[1]:
            logger.error("can't claim from %s", reply[1].decode(errors="replace"))
        limits = self._options.limits
        found: list[Delivery] = []
        for i in range(2, len(reply), 3):
            receipt = reply[i].decode()
            queue = self._keys.queue_of(receipt.partition(":")[2])
            message = unpack(reply[i + 2], queue, limits)
            if reply[i + 1] == b"0":
                found.append(Delivery(message, receipt))
            else:
                lost, history = read_history(reply[i + 1])
                found.append(Delivery(message, receipt, 1 + lost, history))
        return found

    async def _hand_back(self, reply: list[Any]) -> None:
        """Release what was claimed for a caller that is gone."""
        receipts: list[bytes] = reply[2::3]
        args: list[Any] = [len(receipts)]
        for receipt in reversed(receipts):
            args += (receipt, "release", 0, "", "", "", 0)
        if receipts:
            await self._link.run(SETTLE, self._keys.ours(*SETTLE_KEYS), args)

    # --- waiting ---

    def _track(self) -> None:
        """Ask to be told of changes; whatever happened while the link was down may be one."""
        (tracking,) = self._link.send(("CLIENT", "TRACKING", "ON", "NOLOOP"))
        tracking.add_done_callback(self._tracked)
        self._look()

    def _look(self) -> None:
        self._lists_changed.set()
        self._parked_changed.set()

    def _tracked(self, reply: "asyncio.Future[Any]") -> None:
        if reply.cancelled() or isinstance(reply.exception(), LinkLost):
            return
        error = reply.exception()
        self._tracking = error is None
        if error is not None:
            logger.warning("the server has no tracking (%s): looking for messages every %s s", error, _POLL)

    def _told(self, push: list[Any]) -> None:
        names: list[bytes] | None = push[1]  # None after a flush of everything
        if names is None or self._parked in names:
            self._parked_changed.set()
        if names is None or any(not name.startswith(self._private) for name in names):
            self._lists_changed.set()

    # --- tending ---

    async def _tend_forever(self) -> None:
        """Until cancelled, bring back what is due; every worker does, and doing it twice is harmless."""
        interval = self._options.lease / 4
        while True:
            pause = interval * random.uniform(0.75, 1.0)
            self._parked_changed.clear()
            try:
                pause = min(pause, await self._tend())
            except (LinkLost, RedisError) as error:
                logger.debug("could not look after leases and parked messages: %s", error)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._parked_changed.wait()

    async def _tend(self) -> float:
        """One round; returns the seconds until the next parked message is due."""
        keys = self._keys.ours("leases", "leased", "suspects", "lost", "parked", "parked:messages", "seq", "nothing")
        patience = round(self._options.lease * 500)
        pauses = [round(pause * 1000) for pause in self._options.pauses()]
        now, ready, taken_back, due = await self._link.run(TEND, keys, (_TEND_BATCH, patience, LOSSES_TTL, *pauses))
        self.clock.heard(now)
        if taken_back:
            logger.warning("took back %d messages of workers that let their leases end", taken_back)
        if ready + taken_back:
            self._lists_changed.set()  # our own changes are not told
        if max(ready, taken_back) >= _TEND_BATCH:
            return 0.0
        return max(0.0, (due - now) / 1000) if due >= 0 else float("inf")
