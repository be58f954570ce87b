"""Exchanges, queues and bindings as Celery declares them (celery-protocol 3.2, 3.7).

What exists is used as it is: each declaration first asks (passively), so that a queue made by somebody with other
arguments is no error. Asking for what is not there costs a channel, so this has one of its own.

Delays use Celery's own ladder: 28 queues whose messages wait 1, 2, 4... seconds and then move on. The first 28
words of a routing key are the delay in binary, its last is the queue. Celery binds the end of the ladder by
``#.<queue>``, which also catches queues whose names end alike; our binding says each word. Celery's clients climb the
ladder by themselves and leave it to the workers to bind its end, so ours do so, too.
"""

import asyncio
import logging
from collections.abc import Mapping
from typing import Any, Final

import msgspec
from pamqp import commands

from aqueue.broker import Queue, arguments_of
from aqueue.broker.amqp.broadcast import EXPIRES, OWN, Broadcasts
from aqueue.drivers.amqp_connection import AmqpConnection, Channel, ChannelClosed
from aqueue.drivers.amqp_methods import ExchangeDeclare, QueueBind, QueueDeclare
from aqueue.errors import EnqueueFailed

logger = logging.getLogger("aqueue.broker")

#: Where messages die; see `aqueue.broker.amqp.dead`.
DEAD: Final = "aqueue.dead"
LEVELS: Final = 28
#: Seconds; the ladder holds nothing longer. Who waits longer is looked at then, and sent on.
LONGEST_DELAY: Final = (1 << LEVELS) - 1
_ARRIVAL: Final = "celery_delayed_delivery"
#: AMQP's codes for a channel that was closed.
NOT_FOUND: Final = 404
_REFUSED: Final = 403


def delayed_route(queue: str, delay: float) -> tuple[str, str]:
    """The exchange and the routing key for a delay in seconds, rounded up to whole ones."""
    seconds = min(max(1, -int(-delay // 1)), LONGEST_DELAY)
    bits = ".".join(f"{seconds:0{LEVELS}b}")
    return _level(seconds.bit_length() - 1), f"{bits}.{queue}"


def _end_of_ladder(key: str) -> str:
    return "*." * LEVELS + key


def _level(level: int) -> str:
    return f"celery_delayed_{level}"


class Needed(msgspec.Struct):
    """What must be there before messages are sent."""

    #: Of somebody else: they are not made.
    exchanges: set[str] = msgspec.field(default_factory=set[str])
    queues: set[str] = msgspec.field(default_factory=set[str])
    #: Queues at the end of the ladder.
    delayed: set[str] = msgspec.field(default_factory=set[str])
    #: Names of broadcasts, whose queues are for their workers to make.
    broadcasts: set[str] = msgspec.field(default_factory=set[str])
    dead: bool = False


class Topology:
    """What one connection has declared."""

    def __init__(
        self, connection: AmqpConnection, queues: Mapping[str, Queue], broadcasts: Broadcasts, delayed_type: str
    ) -> None:
        self.connection = connection
        self._queues = queues
        self._broadcasts = broadcasts
        self._delayed_type = delayed_type
        self._channel: Channel | None = None
        self._lock = asyncio.Lock()
        self._declared: set[str] = set()
        #: Queues, and the keys by which the ladder ends at them.
        self._delayed: set[tuple[str, str]] = set()
        self._ladder = False

    async def declare_all(self, needed: Needed) -> None:
        """Raises EnqueueFailed for an exchange that is not there, ChannelClosed, ConnectionLost."""
        for name in needed.exchanges:
            if not await self._has_exchange(name):
                raise EnqueueFailed(f"unroutable: there is no exchange {name!r}")
        for name in needed.queues - self._declared:
            await self.declare(name)
        for name in needed.delayed:
            await self._end_ladder_at(name, name)
        for name in needed.broadcasts - self._declared:
            async with self._lock:
                await self._declare_exchange(self._broadcasts.exchange_of(name), "fanout")
                self._declared.add(name)
        if needed.dead:
            await self._declare_dead()

    async def declare(self, name: str) -> None:
        """Have a queue, its exchange and its binding. Raises ChannelClosed, ConnectionLost."""
        if name in self._declared:
            return
        async with self._lock:
            await self._declare(name)

    async def declare_arrival(self, name: str) -> None:
        """Have the ladder end at a queue to which Celery clients send by it: section 3.7 says which these are.

        Without it what they send for later is lost when its time has come.
        """
        queue = arguments_of(self._queues, name)
        skipped = queue.exchange_type == "direct" or self._broadcasts.name_of(name) is not None
        if skipped or not any(one.is_quorum for one in self._queues.values()):
            return
        key = queue.routing_key or name
        try:
            await self._end_ladder_at(name, key)
        except ChannelClosed as error:
            if error.code != _REFUSED:
                raise
            logger.warning("what Celery clients send to queue %s for later may be lost: %s", name, error)
            self._delayed.add((name, key))

    async def _end_ladder_at(self, name: str, key: str) -> None:
        """Have the ladder of delays, and its end bound to a queue."""
        if (name, key) in self._delayed:
            return
        async with self._lock:
            await self._declare(name)
            if not self._ladder:
                await self._declare_ladder()
                self._ladder = True
            await self._call(QueueBind(queue=name, exchange=_ARRIVAL, routing_key=_end_of_ladder(key)))
            self._delayed.add((name, key))

    async def _declare_dead(self) -> None:
        async with self._lock:
            if DEAD not in self._declared and not await self._has_queue(DEAD):
                await self._call(QueueDeclare(queue=DEAD, durable=True))
            self._declared.add(DEAD)

    async def _has_exchange(self, name: str) -> bool:
        async with self._lock:
            return await self._exists(ExchangeDeclare(exchange=name, passive=True))

    def forget(self, name: str) -> None:
        """A queue has been deleted."""
        self._declared.discard(name)
        self._delayed = {end for end in self._delayed if end[0] != name}

    def forget_all(self) -> None:
        """Anything may have been deleted."""
        self._declared.clear()
        self._delayed.clear()
        self._ladder = False

    async def _declare(self, name: str) -> None:
        broadcast = self._broadcasts.name_of(name)
        queue = arguments_of(self._queues, broadcast or name)
        there = await self._has_queue(name)
        if not there:
            if name.startswith(OWN) and not broadcast:
                raise EnqueueFailed(f"unroutable: queue {name!r} was one worker's own, and is gone with it")
            arguments = {**({"x-expires": EXPIRES} if broadcast else {}), **queue.all_arguments}
            await self._call(QueueDeclare(queue=name, durable=True, arguments=arguments))
            await self._bind_to_ladder_if_any(name)
        try:
            if broadcast:
                await self._bind(name, self._broadcasts.exchange_of(broadcast), "fanout", "")
            elif not name.startswith(OWN):
                key = name if queue.routing_key is None else queue.routing_key
                await self._bind(name, queue.exchange or name, queue.exchange_type, key)
        except ChannelClosed as error:
            if not there or error.code != _REFUSED:
                raise
            # It has been bound by who made it; messages of ours go straight to it.
        self._declared.add(name)

    async def _bind_to_ladder_if_any(self, name: str) -> None:
        """For what is on its way to the queue that had this name before."""
        key = _end_of_ladder(name)
        if len(key.encode()) <= 255 and await self._exists(ExchangeDeclare(exchange=_ARRIVAL, passive=True)):
            await self._call(QueueBind(queue=name, exchange=_ARRIVAL, routing_key=key))

    async def _bind(self, name: str, exchange: str, exchange_type: str, key: str) -> None:
        await self._declare_exchange(exchange, exchange_type)
        await self._call(QueueBind(queue=name, exchange=exchange, routing_key=key))

    async def _declare_exchange(self, name: str, exchange_type: str) -> None:
        if not await self._exists(ExchangeDeclare(exchange=name, passive=True)):
            await self._call(ExchangeDeclare(exchange=name, exchange_type=exchange_type, durable=True))

    async def _declare_ladder(self) -> None:
        """Section 3.7. Whoever makes it begins at one end, so with both ends there it is whole."""
        if await self._has_queue(_level(0)) and await self._has_queue(_level(LEVELS - 1)):
            return
        for name in (_ARRIVAL, *map(_level, range(LEVELS))):
            await self._call(ExchangeDeclare(exchange=name, exchange_type="topic", durable=True))
        for level in range(LEVELS):
            await self._declare_level(level)

    async def _declare_level(self, level: int) -> None:
        name = _level(level)
        below = _level(level - 1) if level else _ARRIVAL
        above = "*." * (LEVELS - 1 - level)
        if not await self._has_queue(name):
            arguments: dict[str, Any] = {
                "x-queue-type": self._delayed_type,
                "x-overflow": "reject-publish",
                "x-message-ttl": 1000 << level,
                "x-dead-letter-exchange": below,
            }
            if self._delayed_type == "quorum":
                arguments["x-dead-letter-strategy"] = "at-least-once"
            await self._call(QueueDeclare(queue=name, durable=True, arguments=arguments))
        await self._call(QueueBind(queue=name, exchange=name, routing_key=f"{above}1.#"))
        await self._call(commands.Exchange.Bind(destination=below, source=name, routing_key=f"{above}0.#"))

    async def _has_queue(self, name: str) -> bool:
        return await self._exists(QueueDeclare(queue=name, passive=True))

    async def _exists(self, question: Any) -> bool:
        try:
            await self._call(question)
        except ChannelClosed as error:
            if error.code != NOT_FOUND:
                raise
            return False
        return True

    async def _call(self, method: Any) -> Any:
        if self._channel is None or self._channel.closed is not None:
            self._channel = await self.connection.open_channel()
        return await self._channel.call(method)
