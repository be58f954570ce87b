"""The end of the road: verdicts gather in a mailbox, and one settler carries out whatever is there.

Results are stored first, the broker settles second, so a settled task always has its result. While the
broker or the store is away everything waits here, still leased, and is tried again; nothing is dropped.
Batches grow with load, and an idle worker adds no waiting.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from aqueue.backoff import pause
from aqueue.broker import Ack, Broker, Delivery, Release, Verdict
from aqueue.errors import BrokerUnavailable, EnqueueUnknown, StoreUnavailable
from aqueue.results import ResultStore

logger = logging.getLogger("aqueue.worker")

#: Verdicts in one call; keeps each call short for the server.
_BATCH: Final = 500

Settlement = tuple[Delivery, Verdict]


class Settler:
    """See the module's text. ``settled`` is told each delivery that is done with."""

    def __init__(self, broker: Broker, store: ResultStore, settled: Callable[[Sequence[Settlement]], None]) -> None:
        self._broker = broker
        self._store = store
        self._settled = settled
        self._mailbox: list[Settlement] = []
        #: What follows from runs whose messages were settled before they began.
        self._let_go: list[Ack] = []
        self._arrived = asyncio.Event()
        self._closing = False
        #: Settled together with the verdict, by a broker that keeps the results, too.
        self._together = broker.keeps(store.place)
        #: Verdicts refused because the lease was no longer held.
        self.stale = 0

    @property
    def backlog(self) -> int:
        return len(self._mailbox) + len(self._let_go)

    def post(self, delivery: Delivery, verdict: Verdict) -> None:
        self._mailbox.append((delivery, verdict))
        self._arrived.set()

    def post_let_go(self, verdict: Ack) -> None:
        """Like `post`, for a run whose message is settled already."""
        self._let_go.append(verdict)
        self._arrived.set()

    def close(self) -> None:
        """Have `run` end when the mailbox is empty."""
        self._closing = True
        self._arrived.set()

    async def run(self) -> None:
        """Settle what arrives, until closed."""
        while self.backlog or not self._closing:
            await self._arrived.wait()
            if self._mailbox:
                await self._settle_some()
            if self._let_go:
                await self._finish_let_go(self._let_go[0])
                del self._let_go[0]
            if not self.backlog and not self._closing:
                self._arrived.clear()

    async def _settle_some(self) -> None:
        batch = self._mailbox[:_BATCH]
        failures = 0
        while True:
            try:
                refused = await self._settle(batch)
                break
            except (BrokerUnavailable, StoreUnavailable) as error:
                failures += 1
                if failures == 1:
                    logger.warning("can't settle %d tasks, trying again: %s", len(batch), error)
                await asyncio.sleep(pause(failures))
        del self._mailbox[: len(batch)]
        if refused and not failures:  # after a failure our first try may have been carried out unheard
            self.stale += len(refused)
            logger.warning("%d settled by nobody: their leases had ended, and they will run again", len(refused))
        self._settled(batch)

    async def _finish_let_go(self, verdict: Ack) -> None:
        """Its result is stored, and what follows is sent, which can't be one step any more."""
        failures = 0
        record, messages = verdict.record, verdict.publish
        while record is not None or messages:
            try:
                if record is not None:
                    await self._store.put([record])
                    record = None
                if messages:
                    await self._broker.publish(messages)
                    messages = ()
            except EnqueueUnknown as error:
                logger.error("a retry may have been sent or not, and is not sent again: %s", error)
                return
            except (BrokerUnavailable, StoreUnavailable) as error:
                failures += 1
                if failures == 1:
                    logger.warning("can't store what came of a task, trying again: %s", error)
                await asyncio.sleep(pause(failures))

    async def _settle(self, batch: list[Settlement]) -> Sequence[Delivery]:
        if not self._together:
            records = [verdict.record for _, verdict in batch if not isinstance(verdict, Release) and verdict.record]
            if records:
                await self._store.put(records)
            batch = [(delivery, _without_record(verdict)) for delivery, verdict in batch]
        return await self._broker.settle(batch)


def _without_record(verdict: Verdict) -> Verdict:
    if isinstance(verdict, Release) or verdict.record is None:
        return verdict
    if isinstance(verdict, Ack):
        return Ack(publish=verdict.publish)
    return msgspec.structs.replace(verdict, record=None)
