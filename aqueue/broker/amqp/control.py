"""Remote control on RabbitMQ: Celery's fanout exchange ``celery.pidbox`` (celery-protocol section 8).

The server keeps nothing of it: what is revoked lives in the memory of the workers that run. Each listens with a queue
of its own, on a connection of its own in the I/O thread, so that nothing is missed while a task keeps the main loop
busy; and what is broadcast while that connection is made again waits in the queue, for a minute.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, Final

import msgspec

from aqueue.broker import BrokerOptions
from aqueue.broker.amqp.messages import pack, unpack
from aqueue.broker.control import Inbox
from aqueue.drivers.amqp_address import AmqpAddress
from aqueue.drivers.amqp_codec import Delivered, Malformed
from aqueue.drivers.amqp_connection import AmqpConnection, Channel, ChannelClosed, ConnectionLost
from aqueue.drivers.amqp_methods import Consume, ExchangeDeclare, QueueBind, QueueDeclare, QueueDelete
from aqueue.drivers.amqp_publisher import Publisher
from aqueue.drivers.io_thread import IoThread
from aqueue.errors import Border, BrokerUnavailable, ControlRefused
from aqueue.identifiers import new_id
from aqueue.pidbox import EXCHANGE, Revocation, Revoked

#: Milliseconds that the queue of a worker that is gone is kept, and that a message waits in it.
_EXPIRES: Final = 60_000
#: AMQP's codes for a channel that was closed.
_ACCESS_REFUSED: Final = 403
_NOT_FOUND: Final = 404


class AmqpControl:
    """A `aqueue.broker.control.Control` on RabbitMQ. ``node`` names the worker that listens."""

    durable = False

    def __init__(
        self,
        address: AmqpAddress,
        options: BrokerOptions,
        publisher: Publisher,
        io: IoThread,
        node: Callable[[], str],
    ) -> None:
        self._address = address
        self._options = options
        self._publisher = publisher
        self._io = io
        self._node = node
        self._inbox = Inbox()
        self._ear: _Ear | None = None
        self._listening = False
        #: On which the exchange is declared.
        self._declared: AmqpConnection | None = None

    async def revoke(self, ids: Sequence[str], revocation: Revocation) -> None:
        messages = self._options.pidbox.revoke(ids, revocation)
        publications = [msgspec.structs.replace(pack(one, exchange=EXCHANGE), mandatory=False) for one in messages]
        await self._publisher.publish(publications, self._declare)

    async def _declare(self, connection: AmqpConnection) -> None:
        if connection is not self._declared:
            (await _channel_with_exchange(connection)).close()
            self._declared = connection

    async def revoked(self) -> Revoked:
        return {}

    async def news(self, wait: float) -> Revoked:
        if not self._listening:
            self._inbox.check()
            if self._ear is None:
                self._ear = _Ear(self._address, self._options.lease, self)
            await self._open(self._ear)
            self._listening = True
        return await self._inbox.take(wait)

    async def _open(self, ear: "_Ear") -> None:
        with _BORDER:
            try:
                async with asyncio.timeout(self._options.timeout):
                    await self._io.run(ear.open())
            except TimeoutError:
                raise BrokerUnavailable(f"{self._address.shown} did not answer in time") from None
            except ChannelClosed as error:
                if error.code == _ACCESS_REFUSED:
                    raise ControlRefused(str(error)) from None
                raise

    async def close(self) -> None:
        ear, self._ear = self._ear, None
        self._listening = False
        if ear is not None:
            await self._io.run(ear.close())

    def hear(self, delivered: Delivered) -> None:
        """A control message has come."""
        message = unpack(delivered, EXCHANGE).message
        self._inbox.put(self._options.pidbox.read(message, self._node()))

    def lose(self, error: ConnectionLost) -> None:
        """The connection on which they come is lost."""
        if self._listening:
            self._listening = False
            self._inbox.miss(str(error))


class _Ear:
    """Listens, on the loop of the I/O thread, and tells ``control`` on the loop where this was made."""

    def __init__(self, address: AmqpAddress, lease: float, control: AmqpControl) -> None:
        self._address = address
        self._heartbeat = max(1.0, lease / 3) if address.heartbeat is None else address.heartbeat
        self._control = control
        self._here = asyncio.get_running_loop()
        self._queue = f"aqueue-{new_id()}.{EXCHANGE}"
        self._turn = 0
        self._connection: AmqpConnection | None = None

    async def open(self) -> None:
        """Raises ConnectionLost, ChannelClosed."""
        self._turn += 1
        await self._end()
        connection = self._connection = await AmqpConnection.connect(self._address, self._heartbeat, self._turn - 1)
        channel = await _channel_with_exchange(connection)
        channel.on_delivery = self._delivered
        channel.on_cancel = lambda _: connection.end(ConnectionLost("the queue of control messages was deleted"))
        channel.on_close = lambda error: connection.end(ConnectionLost(f"{self._address.shown}: {error}"))
        arguments: dict[str, Any] = {"x-expires": _EXPIRES, "x-message-ttl": _EXPIRES}
        await channel.call(QueueDeclare(queue=self._queue, durable=True, arguments=arguments))
        await channel.call(QueueBind(queue=self._queue, exchange=EXCHANGE, routing_key=""))
        await channel.call(Consume(queue=self._queue, no_ack=True))
        connection.on_lost = self._lost

    async def close(self) -> None:
        """Never raises."""
        connection = self._connection
        if connection is not None and connection.lost is None:
            connection.on_lost = lambda _: None
            with suppress(TimeoutError, ConnectionLost, ChannelClosed):
                async with asyncio.timeout(1.0):
                    channel = await connection.open_channel()
                    await channel.call(QueueDelete(queue=self._queue))
        await self._end()

    async def _end(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.close()

    def _delivered(self, delivered: Delivered) -> None:
        with suppress(RuntimeError):  # the loop is closed: nobody listens
            self._here.call_soon_threadsafe(self._control.hear, delivered)

    def _lost(self, error: ConnectionLost) -> None:
        with suppress(RuntimeError):
            self._here.call_soon_threadsafe(self._control.lose, error)


async def _channel_with_exchange(connection: AmqpConnection) -> Channel:
    """A channel on a server that has the exchange, as Celery declares it. Raises ConnectionLost, ChannelClosed."""
    channel = await connection.open_channel()
    try:
        await channel.call(ExchangeDeclare(exchange=EXCHANGE, passive=True))
    except ChannelClosed as error:
        if error.code != _NOT_FOUND:
            raise
        channel = await connection.open_channel()
        await channel.call(ExchangeDeclare(exchange=EXCHANGE, exchange_type="fanout", durable=False))
    return channel


_BORDER: Final = Border(BrokerUnavailable, ConnectionLost, ChannelClosed, Malformed)
