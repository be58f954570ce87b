"""The RabbitMQ broker: Celery's exchanges, queues and arguments, on a link of our own (celery-protocol section 3).

Two connections. One sends, with confirms, on the event loop of whoever sends. The other consumes, on the loop of a
thread of its own, so that heartbeats go on while a task keeps the main loop busy; an alarm that stops the first
leaves the second alone. A worker has a third, in that thread, on which it hears of cancelled tasks.

============================  =========================================================================
a claim                       is the channel's: a lost connection gives everything back at once
deliveries                    counted by the server on quorum queues, else by a header of ours: what comes back
                              is sent again with its count, to the end of its queue, before it is handed out
a delay                       Celery's ladder of queues, in whole seconds, never early
front of the queue            what a worker gives back waits with it; what it leaves at its end goes to the
                              back, uncounted, as the server would count what it takes back itself
verdicts that send            published, confirmed, then acknowledged: at worst twice, never lost
a broadcast                   a queue of each worker's own, `aqueue.broker.amqp.broadcast`
remote control                likewise, and kept nowhere else, `aqueue.broker.amqp.control`
============================  =========================================================================
"""

import asyncio
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import CancelledError as FutureCancelled
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, Final, Self

import msgspec

from aqueue.broker import (
    Ack,
    BrokerFactory,
    BrokerOptions,
    Bury,
    Delivery,
    Presence,
    Release,
    Verdict,
    arguments_of,
    or_hand_back,
    settling_order,
)
from aqueue.broker.amqp import checks
from aqueue.broker.amqp.broadcast import Broadcasts
from aqueue.broker.amqp.consuming import LINGER, Claim, Consumption, Order
from aqueue.broker.amqp.control import AmqpControl
from aqueue.broker.amqp.dead import letter
from aqueue.broker.amqp.inspection import AmqpInspection
from aqueue.broker.amqp.messages import ROOMY, Unpacked, memory, pack, unpack
from aqueue.broker.amqp.topology import Needed, Topology, delayed_route
from aqueue.broker.history import Loss
from aqueue.drivers.amqp_address import AmqpAddress
from aqueue.drivers.amqp_codec import Delivered, Malformed
from aqueue.drivers.amqp_connection import AmqpConnection, ChannelClosed, ConnectionLost
from aqueue.drivers.amqp_publisher import Publication, Publisher
from aqueue.drivers.io_thread import IoThread
from aqueue.errors import Border, BrokerUnavailable, EnqueueFailed
from aqueue.findings import Finding, Use
from aqueue.protocol import Message
from aqueue.url import Url

logger = logging.getLogger("aqueue.broker")

#: Seconds that sending back what nobody took may take at the end.
_FAREWELL: Final = 3.0


class AmqpBroker:
    """A `aqueue.broker.Broker` on RabbitMQ 3.10 or newer."""

    pushes = True
    sends_at_once = 8  # the server takes 100 us and more for each message that it must keep

    def __init__(self, address: AmqpAddress, options: BrokerOptions) -> None:
        self.lease = options.lease
        self.holder = ""
        self._address = address
        self._options = options
        self._publisher = Publisher(address, options.timeout)
        #: What is declared on the publisher's connection.
        self._topology: Topology | None = None
        self._broadcasts = Broadcasts(options.queues)
        self._io = IoThread("aqueue-rabbitmq")
        self.control = AmqpControl(address, options, self._publisher, self._io, lambda: self.holder)
        self._consumption: Consumption | None = None
        #: What came, by receipt, for those that nobody can read: they are buried as they came.
        self._unreadable: dict[str, Delivered] = {}
        self._tidying: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @classmethod
    def factory(cls, url: Url) -> BrokerFactory:
        address = AmqpAddress.parse(url)
        return lambda options: cls(address, options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._tidying is not None:
            self._tidying.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self.control.close()
        consumption, self._consumption = self._consumption, None
        if consumption is not None:
            try:
                async with asyncio.timeout(_FAREWELL):
                    await self._send_back(consumption, await self._io.run(consumption.untaken(all=True)))
            except (TimeoutError, BrokerUnavailable, ConnectionLost, ChannelClosed) as reason:
                logger.warning("what was not started comes back counted: %s", reason)
            await self._io.run(consumption.close())
        self._io.close()
        await self._publisher.close()

    @property
    def losses(self) -> "AmqpBroker":
        return self

    async def explain(self, receipts: Collection[str], cause: str) -> None:
        """Nothing is done: the server doesn't tell who held a message, so nobody can be told why it was lost."""

    async def give_back_untaken(self) -> None:
        consumption = self._consumption
        if consumption is not None:
            with _BORDER:
                await self._send_back(consumption, await self._io.run(consumption.untaken(all=True)))

    @property
    def inspection(self) -> AmqpInspection:
        return AmqpInspection(self._publisher, self._declare)

    async def check(self, use: Use) -> Sequence[Finding]:
        with Border(BrokerUnavailable, ConnectionLost, ChannelClosed, TimeoutError):
            connection = await self._publisher.connection()
            return await checks.check(connection, self._address.shown, self._options.queues, self._broadcasts, use)

    def now(self) -> float:
        """This machine's clock: RabbitMQ tells nobody its own."""
        return time.time()

    def keeps(self, place: object) -> bool:
        return False

    # --- sending ---

    async def publish(self, messages: Sequence[Message]) -> None:
        publications: list[Publication] = []
        positions: list[int] = []
        refused: dict[int, str] = {}
        needed = Needed()
        for position, message in enumerate(messages):
            try:
                publications.append(self._route(message, needed))
                positions.append(position)
            except Malformed as error:
                refused[position] = str(error)
        try:
            if publications:
                await self._publish(publications, needed)
        except EnqueueFailed as error:
            if error.refused is None and not refused:
                raise
            why = error.refused or dict.fromkeys(range(len(publications)), str(error))
            refused |= {positions[number]: reason for number, reason in why.items()}
        if refused:
            raise EnqueueFailed(f"not stored: {'; '.join(sorted(set(refused.values())))}", refused=refused)

    async def _publish(self, publications: Sequence[Publication], needed: Needed) -> None:
        try:
            await self._publisher.publish(publications, lambda connection: self._declare(connection, needed))
        except BrokerUnavailable:
            if self._topology is not None:  # what was deleted behind our back is made again by the next
                self._topology.forget_all()
            raise

    def _route(self, message: Message, needed: Needed, headers: Mapping[str, Any] | None = None) -> Publication:
        """Where a message goes, and what must be there for that. Raises Malformed."""
        if message.exchange:
            packed = pack(message, exchange=message.exchange, routing_key=message.routing_key, headers=headers)
            needed.exchanges.add(message.exchange)
        elif message.queue in self._broadcasts:  # its ETA is for each worker to keep
            packed = pack(message, exchange=self._broadcasts.exchange_of(message.queue), headers=headers)
            needed.broadcasts.add(message.queue)
        elif message.delay <= 0 or self._keeps_its_eta(message.queue):
            packed = pack(message, headers=headers)
            needed.queues.add(message.queue)
        else:
            exchange, routing_key = delayed_route(message.queue, message.delay)
            packed = pack(message, exchange=exchange, routing_key=routing_key, headers=headers)
            needed.delayed.add(message.queue)
        return packed

    def _keeps_its_eta(self, queue: str) -> bool:
        """Messages for queues of Celery's leave at once: their ETA is for the worker to keep."""
        return any(fnmatchcase(queue, glob) for glob in self._options.eta_queues)

    async def _declare(self, connection: AmqpConnection, needed: Needed) -> None:
        if self._topology is None or self._topology.connection is not connection:
            queues, delayed_type = self._options.queues, self._options.delayed_queue_type
            self._topology = Topology(connection, queues, self._broadcasts, delayed_type)
        await self._topology.declare_all(needed)

    # --- working ---

    async def fetch(self, queues: Sequence[str], limit: int, wait: float) -> Sequence[Delivery]:
        queues = self._broadcasts.consumed(queues)
        deadline = time.monotonic() + wait
        while True:
            claims = await self._claim(queues, limit, max(0.0, deadline - time.monotonic()))
            if not claims:
                return []
            needed = Needed()
            found, later = self._unpacked(claims, needed)
            if later:
                found = await or_hand_back(self._count(found, later, needed), self._hand_back)
            if found:
                return found

    async def _claim(self, queues: Sequence[str], limit: int, wait: float) -> list[Claim]:
        if self._consumption is None:
            self._consumption = Consumption(self._address, self._options, self._broadcasts)
        consumption = self._consumption
        order = Order(queues, limit, wait)
        self._io.post(consumption.serve, order)
        with _BORDER:
            try:
                return await order.reply.future
            except asyncio.CancelledError:
                await self._io.call(consumption.abandon, order)
                raise
            finally:
                self._tidy_later()

    def _unpacked(self, claims: Sequence[Claim], again: Needed) -> tuple[list[Delivery], list[tuple[str, Publication]]]:
        """Claims as deliveries; and what is not to be run yet, by receipt, as it is to be sent again.

        That is what came back uncounted, and what was lost so often that it has to wait.
        """
        found: list[Delivery] = []
        later: list[tuple[str, Publication]] = []
        for claim in claims:
            unpacked = unpack(claim.delivered, claim.queue)
            history = unpacked.history.after_loss(_came_back()) if unpacked.came_back else unpacked.history
            delivery = Delivery(unpacked.message, claim.receipt, 1 + unpacked.lost, history)
            if not isinstance(unpacked.message, Message):
                self._unreadable[claim.receipt] = claim.delivered
            else:
                pause = self._pause(unpacked, claim.queue)
                sent_again = None if unpacked.counted and not pause else self._again(delivery, pause, again)
                if sent_again is not None and len(sent_again.properties) <= ROOMY:
                    later.append((claim.receipt, sent_again))
                    continue
            found.append(delivery)
        return found, later

    def _pause(self, unpacked: Unpacked, queue: str) -> float:
        """Seconds that a message has to wait because of its losses.

        Sent again it would be a new message for the server, whose own limit, if it has been given one, shall hold.
        """
        if not unpacked.came_back or "x-delivery-limit" in arguments_of(self._options.queues, queue).arguments:
            return 0.0
        return self._options.pause_after(unpacked.lost)

    async def _count(
        self, found: list[Delivery], later: Sequence[tuple[str, Publication]], needed: Needed
    ) -> list[Delivery]:
        """Send again what is not to be run yet, with its count; it is none of ``found``."""
        receipts = [receipt for receipt, _ in later]
        try:
            await self._publish([publication for _, publication in later], needed)
        except BrokerUnavailable:
            await self._finish([], [*receipts, *(delivery.receipt for delivery in found)])
            raise
        await self._finish(receipts, [])
        return found

    async def _publish_again(self, publications: Sequence[Publication]) -> None:
        """Straight to queues that were there a moment ago."""
        await self._publish(publications, Needed(queues={one.routing_key for one in publications}))

    async def _hand_back(self, found: Sequence[Delivery]) -> None:
        await self._finish([], [delivery.receipt for delivery in found])

    async def settle(self, verdicts: Sequence[tuple[Delivery, Verdict]]) -> Sequence[Delivery]:
        ordered = settling_order(verdicts)
        released = [delivery.receipt for delivery, verdict in ordered if _stays_here(verdict)]
        done = [delivery.receipt for delivery, verdict in ordered if isinstance(verdict, Ack) and not verdict.publish]
        refused = await self._finish(done, released)
        sending = [pair for pair in ordered if _sends(pair[1])]  # last: it waits while the server takes nothing
        if sending:
            ours = await self._held([delivery.receipt for delivery, _ in sending])
            await self._send([pair for pair in sending if pair[0].receipt in ours])
            refused |= await self._finish([delivery.receipt for delivery, _ in sending], [])
        for delivery, _ in ordered:
            self._unreadable.pop(delivery.receipt, None)
        return [delivery for delivery, _ in verdicts if delivery.receipt in refused] if refused else ()

    async def _send(self, verdicts: Sequence[tuple[Delivery, Verdict]]) -> None:
        """Everything that verdicts put somewhere, confirmed. Raises BrokerUnavailable."""
        publications: list[Publication] = []
        needed = Needed()
        for delivery, verdict in verdicts:
            try:
                publications += self._sendings(delivery, verdict, needed)
            except Malformed as error:
                bury = Bury("unsendable", f"what follows from it can't be sent: {error}")
                publications += self._sendings(delivery, bury, needed)
        if publications:
            await self._publish(publications, needed)

    def _sendings(self, delivery: Delivery, verdict: Verdict, needed: Needed) -> list[Publication]:
        """What a verdict sends. Raises Malformed."""
        match verdict:
            case Ack(publish=follow_ups):
                return [self._route(message, needed) for message in follow_ups]
            case Bury():
                needed.dead = True
                return [letter(delivery, verdict, self.holder, self._unreadable.get(delivery.receipt, _NOTHING))]
            case Release(delay=delay):
                return [self._again(delivery, delay, needed)]

    def _again(self, delivery: Delivery, delay: float, needed: Needed) -> Publication:
        """The same message once more, with the losses it has met so far."""
        message = delivery.message
        assert isinstance(message, Message), "what can't be read is buried"
        later = msgspec.structs.replace(message, delay=delay)
        headers = memory(delivery.deliveries - 1, delivery.history)
        again = self._route(later, needed, headers)
        return again if not headers or len(again.properties) <= ROOMY else self._route(later, needed)

    async def _held(self, receipts: Sequence[str]) -> set[str]:
        if self._consumption is None:
            return set()
        return await self._io.call(self._consumption.held, receipts)

    async def _finish(self, done: Sequence[str], released: Sequence[str]) -> set[str]:
        if self._consumption is None:
            return {*done, *released}
        with _BORDER:
            return await self._io.call(self._consumption.settle, done, released)

    async def let_go(self, delivery: Delivery) -> bool:
        if self._consumption is None or await self.settle([(delivery, Ack())]):
            return False
        with _BORDER:
            await self._io.run(self._consumption.catch_up())
        return True

    async def waiting(self, queues: Sequence[str]) -> bool:
        return await self.inspection.waiting(self._broadcasts.consumed(queues))

    def reconnect(self) -> None:
        if self._consumption is not None:
            self._io.post(self._consumption.reconnect)

    def extend(self, deliveries: Collection[Delivery]) -> Sequence[Delivery]:
        held = {delivery.receipt: delivery for delivery in deliveries}
        consumption = self._consumption
        if consumption is None or not held:
            return list(held.values())
        try:
            gone = self._io.call_blocking(consumption.extend, held, timeout=self._options.timeout)
        except (TimeoutError, RuntimeError, FutureCancelled) as error:
            raise BrokerUnavailable(f"could not renew leases: {str(error) or 'no answer in time'}") from None
        return [held[receipt] for receipt in gone]

    def present(self, presence: Presence, seconds: float) -> None:
        """There is no place for it."""

    # --- what nobody takes ---

    def _tidy_later(self) -> None:
        if self._tidying is None:
            self._tidying = asyncio.get_running_loop().call_later(LINGER, self._tidy)

    def _tidy(self) -> None:
        self._tidying = None
        if self._consumption is not None:
            task = asyncio.create_task(self._tidy_up(self._consumption))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _tidy_up(self, consumption: Consumption) -> None:
        """Close what credit nobody uses, and send back what nobody took."""
        try:
            await self._send_back(consumption, await self._io.run(consumption.untaken()))
        except (BrokerUnavailable, ConnectionLost, ChannelClosed) as error:
            logger.debug("could not send back what nobody took: %s", error)
        if not consumption.is_idle and self._consumption is consumption:
            self._tidy_later()

    async def _send_back(self, consumption: Consumption, claims: Sequence[Claim]) -> None:
        publications = [_as_it_came(claim) for claim in claims]
        try:
            if publications:
                await self._publish_again(publications)
        except BrokerUnavailable:
            await self._io.call(consumption.settle, [], [claim.receipt for claim in claims])
            raise
        await self._io.call(consumption.settle, [claim.receipt for claim in claims], [])


_BORDER: Final = Border(BrokerUnavailable, ConnectionLost, ChannelClosed, Malformed)
_NOTHING: Final = Delivered(0, "", 0, False, "", "")


def _stays_here(verdict: Verdict) -> bool:
    """Back to the front: it waits with us, for whichever of our fetches comes next."""
    return isinstance(verdict, Release) and verdict.delay <= 0 and not verdict.last


def _sends(verdict: Verdict) -> bool:
    return bool(verdict.publish) if isinstance(verdict, Ack) else not _stays_here(verdict)


def _as_it_came(claim: Claim) -> Publication:
    """A message that nobody started, with the losses it has met so far."""
    unpacked = unpack(claim.delivered, claim.queue)
    if not isinstance(unpacked.message, Message):
        return Publication("", claim.queue, claim.delivered.properties, claim.delivered.body, "")
    roomy = len(claim.delivered.properties) <= ROOMY
    return pack(unpacked.message, headers=memory(unpacked.lost, unpacked.history) if roomy else None)


def _came_back() -> Loss:
    """The server doesn't tell who held it, or since when."""
    return Loss("", None, time.time())
