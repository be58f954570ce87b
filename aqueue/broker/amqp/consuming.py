"""The consuming side on RabbitMQ, on the event loop of an I/O thread.

The server pushes; how much is said by each consumer's own prefetch, never a global one. Credit is open while
somebody fetches, for as many messages as that somebody can start, and for a moment after: what a fetch leaves open
would otherwise fetch for nobody. Messages that came and were not taken wait here, and go back when nobody takes them.

A prefetch can't be changed, so more credit is one more consumer. Less is what comes of waiting: to cancel a consumer
while messages are on their way to it makes a quorum queue count them as failed.

A claim is the channel's: it ends with the connection. It also ends here when its lease is not renewed, so that a
worker that hangs gives its messages to others, as on every broker.
"""

import asyncio
import logging
from bisect import insort
from collections import deque
from collections.abc import Collection, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, Final
from uuid import uuid4

import msgspec
from pamqp import commands

from aqueue.backoff import pause
from aqueue.broker import BrokerOptions
from aqueue.broker.amqp.broadcast import Broadcasts
from aqueue.broker.amqp.messages import priority_of
from aqueue.broker.amqp.topology import Topology
from aqueue.drivers.amqp_address import AmqpAddress
from aqueue.drivers.amqp_codec import Delivered, ack_frame, requeue_frame
from aqueue.drivers.amqp_connection import AmqpConnection, Channel, ChannelClosed, ConnectionLost
from aqueue.drivers.amqp_methods import Consume, QueueDeclare, QueueDelete
from aqueue.drivers.io_thread import Reply

logger = logging.getLogger("aqueue.broker")

#: Seconds between signs of life. The server takes a worker for dead after two or three of them; so long a task may hold
#: the interpreter, in which nobody here can say anything.
_HEARTBEAT: Final = 60.0
#: Seconds that a message stays here untaken, and that credit stays open with nobody fetching.
LINGER: Final = 1.0
#: A consumer's prefetch has two bytes, and 0 means no limit.
_MOST_CREDIT: Final = 65535
#: Consumers at one queue; above that, those without credit are ended.
_MOST_CONSUMERS: Final = 4
#: Seconds after which a cancelled consumer delivers nothing more.
_ECHO: Final = 10.0
#: Looks for what a queue still holds, when a fetch can't wait; seconds between them.
_LOOKS: Final = 20
_LOOK_AGAIN: Final = 0.005


class Claim(msgspec.Struct):
    """A message handed out. ``receipt`` names this handing out, and no other."""

    receipt: str
    queue: str
    delivered: Delivered


class Order:
    """What one fetch asks for, and what it has claimed."""

    __slots__ = ("claims", "limit", "queues", "reply", "serving", "wait")

    def __init__(self, queues: Sequence[str], limit: int, wait: float) -> None:
        self.queues = queues
        self.limit = limit
        #: Seconds.
        self.wait = wait
        #: Fails with ConnectionLost, ChannelClosed, Malformed.
        self.reply: Reply[list[Claim]] = Reply()
        self.serving: asyncio.Task[None] | None = None
        self.claims: list[Claim] = []


class _Consumer:
    """Our standing order at a queue: ``prefetch`` messages at once, of which ``unacked`` are with us."""

    __slots__ = ("prefetch", "queue", "started", "tag", "unacked")

    def __init__(self, queue: str, tag: str, prefetch: int, started: asyncio.Future[Any]) -> None:
        self.queue = queue
        self.tag = tag
        self.prefetch = prefetch
        self.unacked = 0
        #: The server's answer to the order.
        self.started = started

    @property
    def credit(self) -> int:
        return max(0, self.prefetch - self.unacked)


class _Entry:
    """A message in our hands, waiting or handed out."""

    __slots__ = ("consumer", "delivered", "ends", "order")

    def __init__(self, consumer: _Consumer, delivered: Delivered, order: tuple[int, int]) -> None:
        self.consumer = consumer
        self.delivered = delivered
        #: The most urgent first, then as they came.
        self.order = order
        #: When its lease ends.
        self.ends = 0.0


class Consumption:
    """See the module's text. Everything here happens on the I/O thread's loop."""

    def __init__(self, address: AmqpAddress, options: BrokerOptions, broadcasts: Broadcasts) -> None:
        self._address = address
        self._options = options
        self._broadcasts = broadcasts
        self._heartbeat = _HEARTBEAT if address.heartbeat is None else address.heartbeat
        #: Half-open links are found out within twice this time (seconds).
        self._patience = max(1.0, options.lease / 3)
        self._opening = asyncio.Lock()
        self._failures = 0
        self._connection: AmqpConnection | None = None
        self._channel: Channel | None = None
        self._topology: Topology | None = None
        self._tags = count(1)
        self._receipts = count(1)
        self._prefix = uuid4().hex[:8]
        #: The queues of each fetch that is under way.
        self._asking: list[Sequence[str]] = []
        self._arrived = asyncio.Event()
        self._sweeping: asyncio.TimerHandle | None = None
        #: When it is due, by the loop's clock.
        self._sweep_due = 0.0
        self._start_afresh()

    def _start_afresh(self) -> None:
        """Nothing of an ended connection is left: it can't be acknowledged on another."""
        self._topology = None
        self._channel = None
        self._consumers: dict[str, list[_Consumer]] = {}
        #: When a queue was last asked for.
        self._asked: dict[str, float] = {}
        #: By consumer tag, those that may still deliver.
        self._ordered: dict[str, _Consumer] = {}
        #: Tags of those that we have cancelled, and when.
        self._ended: deque[tuple[float, str]] = deque()
        #: Waiting, by `_Entry.order`.
        self._waiting: list[_Entry] = []
        #: By receipt, handed out.
        self._held: dict[str, _Entry] = {}
        #: Delivery tags without an acknowledgement, in the order they came.
        self._unacked: dict[int, None] = {}

    # --- claiming ---

    def serve(self, order: Order) -> None:
        """Claim messages, and reply."""
        order.serving = asyncio.get_running_loop().create_task(self._serve(order))

    async def _serve(self, order: Order) -> None:
        try:
            order.reply.give(await self._claim(order))
        except Exception as error:  # noqa: BLE001 - it is for the caller
            order.reply.fail(error)

    async def _claim(self, order: Order) -> list[Claim]:
        """Raises ConnectionLost, ChannelClosed."""
        queues, limit, wait = order.queues, order.limit, order.wait
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait
        self._asking.append(queues)
        try:
            while True:
                await self._open()
                self._arrived.clear()
                opened = await self._order(queues, limit)
                if opened or (wait <= 0 and not self._waiting):
                    await self._look(queues, limit)
                order.claims = self._take(queues, limit)
                left = deadline - loop.time()
                if order.claims or left <= 0:
                    return order.claims
                with suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await self._arrived.wait()
                order.claims = self._take(queues, limit)
                if order.claims:
                    return order.claims
        finally:
            self._asking.remove(queues)

    def _take(self, queues: Collection[str], limit: int) -> list[Claim]:
        now = asyncio.get_running_loop().time()
        taken: list[_Entry] = []
        left: list[_Entry] = []
        for position, entry in enumerate(self._waiting):
            if len(taken) == limit:
                left += self._waiting[position:]
                break
            (taken if entry.consumer.queue in queues else left).append(entry)
        self._waiting = left
        claims: list[Claim] = []
        for entry in taken:
            entry.ends = now + self._options.lease
            receipt = f"{self._prefix}.{next(self._receipts)}"
            self._held[receipt] = entry
            claims.append(Claim(receipt, entry.consumer.queue, entry.delivered))
        if claims and self._sweeping is None:
            self._sweep_later()
        return claims

    async def _order(self, queues: Sequence[str], limit: int) -> bool:
        """Open as much credit as there is demand; whether any was opened just now."""
        self._asked.update(dict.fromkeys(queues, asyncio.get_running_loop().time()))
        wanted = limit - sum(entry.consumer.queue in queues for entry in self._waiting)
        if wanted <= 0:
            return False
        share = -(-wanted // len(queues))
        opened = False
        for name in queues:
            credit = self._credit(name)
            if name not in self._consumers:
                await self._consume(name, share)
            elif not credit or (len(queues) == 1 and credit < wanted // 2):
                await self._consume(name, wanted - credit)
            else:
                continue
            opened = True
        return opened

    def _credit(self, name: str) -> int:
        return sum(consumer.credit for consumer in self._consumers.get(name, ()))

    async def _consume(self, name: str, credit: int) -> None:
        """One more consumer of this queue."""
        assert self._channel is not None, "opened before"
        assert self._topology is not None, "opened before"
        channel = self._channel
        await self._topology.declare(name)
        await self._topology.declare_arrival(name)
        self._forget_ended()
        consumers = self._consumers.setdefault(name, [])
        if len(consumers) >= _MOST_CONSUMERS:
            for exhausted in [consumer for consumer in consumers if not consumer.credit]:
                self._end(exhausted, channel)
        tag, prefetch = f"aq{next(self._tags)}", min(credit, _MOST_CREDIT)
        channel.request(commands.Basic.Qos(prefetch_count=prefetch))
        consumer = _Consumer(name, tag, prefetch, channel.request(Consume(queue=name, consumer_tag=tag)))
        self._ordered[tag] = consumer
        consumers.append(consumer)
        await asyncio.shield(consumer.started)

    def _cancel(self, name: str) -> list[asyncio.Future[Any]]:
        """Open no more credit at a queue; what has been delivered stays ours.

        In the futures are the server's answers, behind which a classic queue delivers nothing more.
        """
        channel = self._channel
        if channel is None or channel.closed is not None:
            return []
        answers = [self._end(consumer, channel) for consumer in tuple(self._consumers.get(name, ()))]
        self._consumers.pop(name, None)
        return [answer for answer in answers if answer is not None]

    def _end(self, consumer: _Consumer, channel: Channel) -> asyncio.Future[Any] | None:
        """Not before it has begun: RabbitMQ's channel would break."""
        consumer.prefetch = 0
        self._consumers[consumer.queue].remove(consumer)
        if not consumer.started.done():
            consumer.started.add_done_callback(lambda _: self._send_cancel(consumer, channel))
            return None
        return self._send_cancel(consumer, channel)

    def _send_cancel(self, consumer: _Consumer, channel: Channel) -> asyncio.Future[Any] | None:
        if channel.closed is not None:
            return None
        self._ended.append((asyncio.get_running_loop().time(), consumer.tag))
        return channel.request(commands.Basic.Cancel(consumer_tag=consumer.tag))

    def _forget_ended(self) -> None:
        """A quorum queue delivers for a moment after it has answered a cancel."""
        long_ago = asyncio.get_running_loop().time() - _ECHO
        while self._ended and self._ended[0][0] < long_ago:
            self._ordered.pop(self._ended.popleft()[1], None)

    async def _look(self, queues: Sequence[str], limit: int) -> None:
        """Wait until what the queues hold now is here, so that the most urgent is not overtaken."""
        channel = self._channel
        assert channel is not None, "opened before"
        for _ in range(_LOOKS):
            asked = [channel.request(QueueDeclare(queue=name, passive=True)) for name in queues]
            ready = {name: (await answer).message_count for name, answer in zip(queues, asked, strict=True)}
            await channel.catch_up()  # the counts overtake what is on its way to us
            if len(self._waiting) >= limit or not any(self._would_come(name, ready[name]) for name in queues):
                return
            await asyncio.sleep(_LOOK_AGAIN)

    def _would_come(self, name: str, ready: int) -> bool:
        return ready > 0 and self._credit(name) > 0

    # --- settling ---

    def held(self, receipts: Collection[str]) -> set[str]:
        """Those of the receipts that are still ours."""
        return {receipt for receipt in receipts if receipt in self._held}

    def settle(self, done: Sequence[str], released: Sequence[str]) -> set[str]:
        """Acknowledge, and put back to the front of what waits here; returns the receipts that are not ours."""
        refused = {receipt for receipt in (*done, *released) if receipt not in self._held}
        for receipt in released:
            if receipt not in refused:
                self._put_back(self._held.pop(receipt))
        self._acknowledge([self._held.pop(receipt) for receipt in done if receipt not in refused])
        return refused

    async def catch_up(self) -> None:
        """Wait until the server has read what we wrote. Raises ConnectionLost, ChannelClosed."""
        channel = self._channel
        if channel is None:
            raise ConnectionLost("the connection was lost before the server had answered")
        try:
            async with asyncio.timeout(self._options.timeout):
                await channel.catch_up()
        except TimeoutError:
            raise ConnectionLost("no answer in time") from None

    def abandon(self, order: Order) -> None:
        """Nobody takes what a fetch has claimed, or is about to."""
        if order.serving is not None:
            order.serving.cancel()
        for claim in order.claims:
            entry = self._held.pop(claim.receipt, None)
            if entry is not None:
                self._put_back(entry)

    def _put_back(self, entry: _Entry) -> None:
        insort(self._waiting, entry, key=_order_of)
        self._arrived.set()

    def _acknowledge(self, entries: Sequence[_Entry]) -> None:
        """One frame for all up to a tag where that is possible, one each for the rest."""
        channel = self._channel
        if not entries or channel is None:
            return
        tags = {entry.delivered.tag for entry in entries}
        upto = together = 0
        for tag in self._unacked:
            if tag not in tags:
                break
            upto = tag
            together += 1
        if together < 2:
            upto = 0  # it has a frame of its own, like the rest
        frames = [ack_frame(channel.number, upto, True)] if upto else []
        for entry in entries:
            tag = entry.delivered.tag
            entry.consumer.unacked -= 1
            del self._unacked[tag]
            if tag > upto:
                frames.append(ack_frame(channel.number, tag, False))
        with suppress(ConnectionLost):  # then they come again
            channel.connection.write_all(frames)

    # --- leases ---

    def extend(self, receipts: Collection[str]) -> list[str]:
        """Renew leases; returns the receipts that are no longer ours."""
        ends = asyncio.get_running_loop().time() + self._options.lease
        gone: list[str] = []
        for receipt in receipts:
            entry = self._held.get(receipt)
            if entry is None:
                gone.append(receipt)
            else:
                entry.ends = ends
        return gone

    def _sweep_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._sweep_due = loop.time() + self._options.lease / 4
        self._sweeping = loop.call_at(self._sweep_due, self._sweep)

    def _sweep(self) -> None:
        """Give up what was not renewed in time; the server counts it as lost, or the next holder does."""
        now = asyncio.get_running_loop().time()
        if now - self._sweep_due > self._options.lease / 4:  # everything here stood still, and so did the renewals
            for entry in self._held.values():
                entry.ends += now - self._sweep_due
        ended = [receipt for receipt, entry in self._held.items() if entry.ends <= now]
        if ended and self._channel is not None:
            logger.warning("gave back %d messages whose leases had ended", len(ended))
            self._requeue([self._held.pop(receipt) for receipt in ended], self._channel)
        self._sweeping = None
        if self._held:
            self._sweep_later()

    def _requeue(self, entries: Sequence[_Entry], channel: Channel) -> None:
        """Each to its place in its queue, and not to us again at once."""
        for name in {entry.consumer.queue for entry in entries}:
            self._cancel(name)
        frames: list[bytes] = []
        for entry in entries:
            entry.consumer.unacked -= 1
            del self._unacked[entry.delivered.tag]
            frames.append(requeue_frame(channel.number, entry.delivered.tag))
        with suppress(ConnectionLost):
            channel.connection.write_all(frames)
        self._arrived.set()

    # --- what nobody takes ---

    async def untaken(self, *, all: bool = False) -> list[Claim]:
        """Claim what waits here and is taken by nobody, for it to be sent back.

        ``all``: at the end, whatever waits. Else what comes from queues that nobody has asked for since `LINGER`.
        """
        if all and self._consumers:
            await asyncio.wait([consumer.started for several in self._consumers.values() for consumer in several])
        now = asyncio.get_running_loop().time()
        unasked = [name for name in self._consumers if all or self._is_unasked(name, now)]
        cancelled = [answer for name in unasked for answer in self._cancel(name)]
        if all and cancelled:  # else what is on its way comes back counted
            await asyncio.wait(cancelled)
        queues = {entry.consumer.queue for entry in self._waiting if all or self._is_unasked(entry.consumer.queue, now)}
        return self._take(queues, len(self._waiting)) if queues else []

    def _is_unasked(self, name: str, now: float) -> bool:
        return not any(name in queues for queues in self._asking) and now - self._asked.get(name, 0.0) >= LINGER

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing that `untaken` will have to look after."""
        asked = {name for queues in self._asking for name in queues}
        return not self._waiting and asked.issuperset(self._consumers)

    # --- the connection ---

    async def _open(self) -> None:
        async with self._opening:
            if self._channel is not None and self._channel.closed is None:
                return
            if self._failures:
                await asyncio.sleep(pause(self._failures))
            try:
                await self._connect()
            except ConnectionLost:
                self._failures += 1
                raise
            self._failures = 0

    async def _connect(self) -> None:
        if self._connection is not None and self._connection.lost is None:
            self._connection.end(ConnectionLost("its channel was closed"))
        connection = await AmqpConnection.connect(
            self._address, self._heartbeat, self._failures, patience=self._patience
        )
        connection.on_lost = self._lost
        connection.on_silence = self._ask_for_a_sign
        self._connection = connection
        channel = await connection.open_channel()
        channel.on_delivery = self._delivered
        channel.on_cancel = self._cancelled
        channel.on_close = self._closed
        queues, delayed_type = self._options.queues, self._options.delayed_queue_type
        self._topology = Topology(connection, queues, self._broadcasts, delayed_type)
        self._channel = channel

    def _ask_for_a_sign(self) -> None:
        """Heartbeats are rare. Who is asked answers."""
        if self._channel is not None and self._channel.closed is None:
            self._channel.request(commands.Basic.Qos(prefetch_count=0))

    def _closed(self, error: Exception) -> None:
        """The server refused something on our channel: what it had delivered is lost to us."""
        assert self._connection is not None, "it has the channel"
        self._connection.end(ConnectionLost(f"{self._address.shown}: {error}"))

    def _lost(self, error: ConnectionLost) -> None:
        if self._held or self._waiting:
            logger.warning("%s; %d messages in hand go back to it", error, len(self._held) + len(self._waiting))
        self._start_afresh()
        self._arrived.set()

    def reconnect(self) -> None:
        """What is in hand goes back to the server."""
        if self._connection is not None:
            self._connection.end(ConnectionLost("given up: messages wait and nothing is delivered"))

    async def close(self) -> None:
        if self._sweeping is not None:
            self._sweeping.cancel()
        if self._connection is not None:
            await self._delete_our_own()
            await self._connection.close()

    async def _delete_our_own(self) -> None:
        """What is broadcast from now on is not for us. Never raises."""
        channel = self._channel
        if channel is None or channel.closed is not None:
            return
        with suppress(TimeoutError, ConnectionLost, ChannelClosed):
            async with asyncio.timeout(1.0):
                for name in self._broadcasts.ours():
                    await channel.call(QueueDelete(queue=name))

    # --- told by the server ---

    def _delivered(self, delivered: Delivered) -> None:
        consumer = self._ordered.get(delivered.consumer_tag)
        if consumer is None:
            assert self._channel is not None, "it has delivered"
            self._channel.connection.write(requeue_frame(delivered.channel, delivered.tag))
            return
        consumer.unacked += 1
        self._unacked[delivered.tag] = None
        order = (-priority_of(delivered.properties), delivered.tag)
        insort(self._waiting, _Entry(consumer, delivered, order), key=_order_of)
        self._arrived.set()

    def _cancelled(self, tag: str) -> None:
        """The server ended a consumer: its queue was deleted, or its node is down. The next round makes it again."""
        consumer = self._ordered.pop(tag, None)
        if consumer is None:  # just when we ended it ourselves
            return
        logger.warning("%s ended our consumer of queue %s: was it deleted?", self._address.shown, consumer.queue)
        consumers = self._consumers.get(consumer.queue, [])
        if consumer in consumers:
            consumers.remove(consumer)
        if not consumers:
            self._consumers.pop(consumer.queue, None)
        if self._topology is not None:
            self._topology.forget(consumer.queue)
        self._arrived.set()


def _order_of(entry: _Entry) -> tuple[int, int]:
    return entry.order
