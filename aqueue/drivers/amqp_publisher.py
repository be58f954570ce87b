"""Sending to RabbitMQ: mandatory, confirmed, and a batch costs one wait.

The connection is made by the first use and made again after it broke. Nothing is sent twice: what was on its way
when it broke is reported as stored or not, nobody knows. No heartbeat is asked for, as a busy event loop would miss
it; a server that has gone silent is found out by the next send, whose answer is due in time.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import msgspec
from pamqp import commands

from aqueue.backoff import pause
from aqueue.drivers.amqp_address import AmqpAddress
from aqueue.drivers.amqp_codec import Confirmed, Malformed, Returned, decode_properties, publication
from aqueue.drivers.amqp_connection import AmqpConnection, Channel, ChannelClosed, ConnectionLost
from aqueue.errors import EnqueueFailed, EnqueueUnknown

logger = logging.getLogger("aqueue.broker")

#: Seconds between tries to connect.
_LONGEST_PAUSE: Final = 2.0

#: Declares, on the connection that will be used, what must be there before something is sent.
Prepare = Callable[[AmqpConnection], Awaitable[None]]


class Publication(msgspec.Struct, frozen=True):
    """A message on its way: where to, and the encoded rest. ``id`` is its correlation id, and names it in errors."""

    exchange: str
    routing_key: str
    properties: bytes
    body: bytes
    id: str
    #: It is an error when no queue takes it.
    mandatory: bool = True


async def nothing_to_prepare(connection: AmqpConnection) -> None:
    """For what goes to a queue that others have declared, or haven't."""


class _Batch:
    """Publications that are waited for together."""

    __slots__ = ("alone", "done", "left", "refused")

    def __init__(self, size: int) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.left = size
        #: Nothing else had been without its confirm when the server refused this.
        self.alone = False
        #: Position -> why it was not stored.
        self.refused: dict[int, str] = {}


class _Sent:
    """One publication without its confirm."""

    __slots__ = ("batch", "position", "publication", "returned")

    def __init__(self, batch: _Batch, position: int, publication: Publication) -> None:
        self.batch = batch
        self.position = position
        self.publication = publication
        self.returned = ""


class Publisher:
    """See the module's text. Made and used on one event loop; ``timeout`` (seconds) bounds each `publish`."""

    def __init__(self, address: AmqpAddress, timeout: float) -> None:
        self.address = address
        self._timeout = timeout
        self._connection: AmqpConnection | None = None
        self._channel: Channel | None = None
        self._opening = asyncio.Lock()
        self._failures = 0
        self._failure = ""
        self._tag = 0
        #: By delivery tag, in the order of sending.
        self._unconfirmed: dict[int, _Sent] = {}

    async def publish(self, publications: Sequence[Publication], prepare: Prepare) -> None:
        """Send, and return when the server has confirmed everything.

        ``prepare`` declares what is needed. Raises EnqueueFailed, whose ``refused`` names those that the server
        did not take, or EnqueueUnknown.
        """
        batch = _Batch(len(publications))
        written = False
        try:
            async with asyncio.timeout(self._timeout):
                channel = self._channel
                if channel is None or channel.closed is not None:
                    channel = await self._open()
                await self._await_unblocked(channel.connection)  # which would not even hear what is declared
                await prepare(channel.connection)
                await self._await_unblocked(channel.connection)
                channel.check()
                written = True
                self._write(channel, publications, batch)
                if batch.left:
                    await batch.done
        except TimeoutError:
            raise self._late(written, publications) from None
        except ChannelClosed as error:
            if written and not batch.alone:
                raise EnqueueUnknown(f"{error}; stored or not", [one.id for one in publications]) from None
            raise EnqueueFailed(f"{self.address.shown} refuses: {error}") from None
        except ConnectionLost as error:
            if written:
                raise EnqueueUnknown(f"{error}; stored or not", [one.id for one in publications]) from None
            raise EnqueueFailed(str(error)) from None
        if batch.refused:
            reasons = "; ".join(sorted(set(batch.refused.values())))
            everything = len(batch.refused) == len(publications)
            raise EnqueueFailed(f"not stored: {reasons}", refused=None if everything else batch.refused)

    async def _open(self) -> Channel:
        """The channel for sending, made when there is none.

        Raises ConnectionLost when the server refuses us; goes on trying when it can't be reached.
        """
        async with self._opening:
            while self._channel is None or self._channel.closed is not None:
                if self._failures:
                    # Less than any caller waits, or nobody would live to see the next try.
                    await asyncio.sleep(pause(self._failures, longest=min(_LONGEST_PAUSE, self._timeout / 2)))
                try:
                    await self._connect()
                except ConnectionLost as error:
                    self._failures += 1
                    self._failure = str(error)
                    if error.refused:
                        raise
            return self._channel

    async def close(self) -> None:
        connection, self._connection, self._channel = self._connection, None, None
        if connection is not None:
            await connection.close()

    async def connection(self) -> AmqpConnection:
        """The connection itself, for looking around. Raises ConnectionLost, TimeoutError."""
        async with asyncio.timeout(self._timeout):
            return (await self._open()).connection

    async def _connect(self) -> None:
        if self._connection is None or self._connection.lost is not None:
            self._connection = await AmqpConnection.connect(self.address, 0.0, self._failures)
        channel = await self._connection.open_channel()
        channel.on_confirm = self._confirmed
        channel.on_return = self._returned
        channel.on_close = self._closed
        await channel.call(commands.Confirm.Select())
        self._tag = 0
        self._failures = 0
        self._failure = ""
        self._channel = channel

    async def _await_unblocked(self, connection: AmqpConnection) -> None:
        """While the server takes nothing, nothing is sent: so it is certain that nothing was stored."""
        if not connection.unblocked.is_set():
            self._failure = f"the server takes no messages now ({connection.block_reason})"
            await connection.unblocked.wait()
            if connection.lost is not None:
                raise connection.lost

    def _write(self, channel: Channel, publications: Sequence[Publication], batch: _Batch) -> None:
        frames: list[bytes] = []
        frame_max = channel.connection.frame_max
        for position, one in enumerate(publications):
            try:
                frame = publication(
                    channel.number,
                    one.exchange,
                    one.routing_key,
                    one.properties,
                    one.body,
                    frame_max,
                    mandatory=one.mandatory,
                )
            except Malformed as error:
                batch.refused[position] = str(error)
                batch.left -= 1
                continue
            self._tag += 1
            self._unconfirmed[self._tag] = _Sent(batch, position, one)
            frames.append(frame)
        if frames:
            channel.connection.write_all(frames)

    def _late(self, written: bool, publications: Sequence[Publication]) -> EnqueueFailed | EnqueueUnknown:
        if not written:
            why = f": {self._failure}" if self._failure else ""
            return EnqueueFailed(f"not sent to {self.address.shown} within {self._timeout:g} s{why}")
        reason = f"{self.address.shown} did not confirm within {self._timeout:g} s"
        connection = self._connection
        if connection is not None and not connection.unblocked.is_set():
            # It stays: a server in need stops a connection only after its first message, so a new one would get the
            # next message just as uncertain.
            reason = f"{reason}: it takes no messages now ({connection.block_reason})"
        elif connection is not None:  # what comes late would answer nobody
            connection.end(ConnectionLost(reason))
        return EnqueueUnknown(f"{reason}; stored or not", [one.id for one in publications])

    # --- told by the server ---

    def _confirmed(self, confirmed: Confirmed) -> None:
        if confirmed.multiple:
            for tag in list(self._unconfirmed):
                if tag > confirmed.tag:
                    break
                self._settle(self._unconfirmed.pop(tag), confirmed.stored)
        else:
            sent = self._unconfirmed.pop(confirmed.tag, None)
            if sent is not None:
                self._settle(sent, confirmed.stored)

    def _settle(self, sent: _Sent, stored: bool) -> None:
        batch = sent.batch
        if sent.returned:
            batch.refused[sent.position] = sent.returned
        elif not stored:
            where = sent.publication.routing_key
            batch.refused[sent.position] = f"the server refused it: queue {where!r} is full or down"
        batch.left -= 1
        if not batch.left and not batch.done.done():
            batch.done.set_result(None)

    def _returned(self, returned: Returned) -> None:
        """Its confirm is still to come, and says nothing of this."""
        try:
            found = decode_properties(returned.properties).get("correlation_id", "")
        except Malformed:
            found = ""
        for sent in self._unconfirmed.values():
            one = sent.publication
            same = (one.exchange, one.routing_key, one.id) == (returned.exchange, returned.routing_key, found)
            if same and not sent.returned:
                where = f"exchange {one.exchange!r} has" if one.exchange else "there is"
                sent.returned = f"unroutable: {where} no queue for {one.routing_key!r} ({returned.reason})"
                return

    def _closed(self, error: Exception) -> None:
        unconfirmed, self._unconfirmed = self._unconfirmed, {}
        for sent in unconfirmed.values():
            sent.batch.alone = len(unconfirmed) == 1
            if not sent.batch.done.done():
                sent.batch.done.set_exception(error)
                sent.batch.done.exception()
