"""One connection to RabbitMQ, from login to its end; and its channels.

It is never repaired: any error ends it, with a reason, and whoever needs one makes another. Requests are
pipelined, as AMQP answers them in order on each channel.
"""

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from typing import Any, Final, cast

from pamqp import commands

from aqueue.drivers.amqp_address import AmqpAddress
from aqueue.drivers.amqp_codec import (
    HEARTBEAT,
    PROTOCOL_HEADER,
    Confirmed,
    Delivered,
    FrameReader,
    Heartbeat,
    Malformed,
    Method,
    Returned,
    method_frame,
)

logger = logging.getLogger("aqueue.rabbitmq")

_CAPABILITIES: Final = {
    "authentication_failure_close": True,
    "basic.nack": True,
    "connection.blocked": True,
    "consumer_cancel_notify": True,
    "publisher_confirms": True,
}
#: Before the server has said what it likes.
_FIRST_FRAME_MAX: Final = 1 << 20
_MOST_FRAME_MAX: Final = 131072
#: Seconds of silence, seconds between probes, and how many of those may stay without an answer.
_KEEP_ALIVE: Final = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}
#: What RabbitMQ allows by default.
_MOST_CHANNELS: Final = 2047


class ConnectionLost(Exception):
    """There is no connection, or no longer. ``refused``: the server is there, and will not have us."""

    def __init__(self, reason: str, *, refused: bool = False) -> None:
        super().__init__(reason)
        self.refused = refused


class ChannelClosed(Exception):
    """The server closed a channel: a request on it was refused. ``code`` is AMQP's: 403, 404, 405, 406."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Channel:
    """One channel; ``on_*`` are set by its owner before what they are told of can happen."""

    def __init__(self, connection: "AmqpConnection", number: int) -> None:
        self.connection = connection
        self.number = number
        self.on_delivery: Callable[[Delivered], None] = _unexpected
        self.on_return: Callable[[Returned], None] = _unexpected
        self.on_confirm: Callable[[Confirmed], None] = _unexpected
        #: Told the consumer tag that the server has cancelled, when its queue went.
        self.on_cancel: Callable[[str], None] = _unexpected
        self.on_close: Callable[[Exception], None] = _unexpected
        #: Why it is closed; None while it is open.
        self.closed: Exception | None = None
        self._replies: deque[asyncio.Future[Any]] = deque()

    async def call(self, method: Any) -> Any:
        """Send a method and return the server's answer. Raises ChannelClosed, ConnectionLost, Malformed."""
        return await self.request(method)

    def request(self, method: Any) -> asyncio.Future[Any]:
        """Send a method without waiting; its answer is in the future."""
        self.check()
        frame = method_frame(method, self.number)
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._replies.append(reply)
        self.connection.write(frame)
        return reply

    async def catch_up(self) -> None:
        """Wait until the server has read what we wrote, and what it had delivered by then is here.

        Its answer stands behind those deliveries. Consumers that come later have no prefetch by it.
        """
        await self.call(commands.Basic.Qos(prefetch_count=0))

    def check(self) -> None:
        """Raises what closed the channel."""
        if self.closed is not None:
            raise self.closed

    def told(self, incoming: Any) -> None:
        """What the server sent on this channel."""
        match incoming:
            case Delivered(consumer_tag=""):
                self._answer(incoming)
            case Delivered():
                self.on_delivery(incoming)
            case Confirmed():
                self.on_confirm(incoming)
            case Returned():
                self.on_return(incoming)
            case _:
                self._told_method(incoming.method)

    def _told_method(self, method: Any) -> None:
        match method:
            case commands.Channel.Close():
                self.connection.write(method_frame(commands.Channel.CloseOk(), self.number))
                self.end(ChannelClosed(method.reply_code or 0, method.reply_text or ""))
            case commands.Channel.Flow():
                self.connection.write(method_frame(commands.Channel.FlowOk(active=method.active), self.number))
            case commands.Basic.Cancel():
                self.on_cancel(method.consumer_tag or "")
            case _:
                self._answer(method)

    def _answer(self, answer: Any) -> None:
        if not self._replies:
            raise Malformed(f"{answer!r}, which nobody asked for")
        reply = self._replies.popleft()
        if not reply.done():
            reply.set_result(answer)

    def close(self) -> None:
        """Give it up: what it has delivered and was not acknowledged goes back."""
        if self.closed is None and self.connection.lost is None:
            self.connection.write(method_frame(commands.Channel.Close(200, "done", 0, 0), self.number))
        self.end(ChannelClosed(200, "done"))

    def end(self, error: Exception) -> None:
        """Nothing more comes on this channel."""
        if self.closed is not None:
            return
        self.closed = error
        self.connection.forget(self)
        for reply in self._replies:
            if not reply.done():
                reply.set_exception(error)
                reply.exception()  # whoever asked may be gone
        self._replies.clear()
        if self.on_close is not _unexpected:
            self.on_close(error)


def _unexpected(what: Any) -> None:
    raise Malformed(f"{type(what).__name__}, which nobody asked for")


class AmqpConnection(asyncio.Protocol):
    """See the module's text. Made by `connect`, on the running loop."""

    def __init__(self, shown: str, loop: asyncio.AbstractEventLoop) -> None:
        self._shown = shown
        self._loop = loop
        self._transport: asyncio.Transport | None = None
        self._reader = FrameReader(_FIRST_FRAME_MAX)
        self._control: deque[asyncio.Future[Any]] = deque()
        self._channels: dict[int, Channel] = {}
        self._numbers = cycle(range(1, _MOST_CHANNELS + 1))
        self._beat: asyncio.TimerHandle | None = None
        self._heartbeat = 0.0
        #: Seconds after which silence is looked into; after twice as many the link counts as broken.
        self._patience = 0.0
        #: When `_keep_beating` is due, by the loop's clock.
        self._beat_due = 0.0
        self._heard = self._said = loop.time()
        self._gone: asyncio.Future[None] = loop.create_future()
        #: Why the connection ended; None while it lives.
        self.lost: ConnectionLost | None = None
        #: Called once, when the connection ends.
        self.on_lost: Callable[[ConnectionLost], None] = lambda _: None
        #: Called while nothing is heard, to make the server say something.
        self.on_silence: Callable[[], None] = lambda: None
        #: Set while the server takes publications: not during a memory or disk alarm.
        self.unblocked = asyncio.Event()
        self.unblocked.set()
        #: What the server said when it stopped taking publications.
        self.block_reason = ""
        self.frame_max = _MOST_FRAME_MAX
        #: What the server says of itself: ``product``, ``version``...
        self.server: Mapping[str, Any] = {}

    # --- opening and closing ---

    @classmethod
    async def connect(
        cls, address: AmqpAddress, heartbeat: float, turn: int = 0, *, patience: float = 0.0
    ) -> "AmqpConnection":
        """Connect and log in, to another of the address' hosts at each ``turn``.

        ``heartbeat`` (seconds) is how often either side says that it lives; 0: never. With a ``patience`` that is
        shorter (seconds), silence is looked into earlier, see `on_silence`. Raises ConnectionLost, within the address'
        own time to connect.
        """
        host, port = address.hosts[turn % len(address.hosts)]
        loop = asyncio.get_running_loop()
        connection = cls(address.shown, loop)
        try:
            async with asyncio.timeout(address.connect_timeout):
                context = address.ssl_context()
                name = None if context is None else (address.tls or {}).get("server_hostname", host)
                await loop.create_connection(lambda: connection, host, port, ssl=context, server_hostname=name)
                await connection._log_in(address, heartbeat)
                connection._watch(patience)
        except TimeoutError:
            connection.end(ConnectionLost(f"{host}:{port} did not answer within {address.connect_timeout:g} s"))
        except OSError as error:
            # asyncio's own text has the address once more, and not what happened.
            happened = (
                os.strerror(error.errno) if isinstance(error, ConnectionError) and error.errno else error.strerror
            )
            connection.end(ConnectionLost(f"no connection to {host}:{port}: {happened or error}"))
        except ConnectionLost:
            pass
        except BaseException:
            connection.end(ConnectionLost("given up"))
            raise
        if connection.lost is not None:
            raise connection.lost
        return connection

    async def _log_in(self, address: AmqpAddress, heartbeat: float) -> None:
        start = self._await_control()
        self._send(PROTOCOL_HEADER)
        self.server = _expect(await start, commands.Connection.Start).server_properties or {}
        secret = f"\0{address.username}\0{address.password}" if address.mechanism == "PLAIN" else ""
        properties: dict[str, Any] = {"product": "aqueue", "capabilities": _CAPABILITIES}
        if address.name:
            properties["connection_name"] = address.name
        ok = commands.Connection.StartOk(properties, address.mechanism, secret, "en_US")
        tune = _expect(await self._ask(ok), commands.Connection.Tune)
        self.frame_max = min(tune.frame_max or _MOST_FRAME_MAX, _MOST_FRAME_MAX)
        self._reader.frame_max = self.frame_max
        self._heartbeat = min(heartbeat, tune.heartbeat or heartbeat)
        agreed = max(1, round(self._heartbeat)) if self._heartbeat else 0
        self._send(method_frame(commands.Connection.TuneOk(tune.channel_max, self.frame_max, agreed), 0))
        _expect(await self._ask(commands.Connection.Open(address.virtual_host)), commands.Connection.OpenOk)

    def _watch(self, patience: float) -> None:
        self._patience = min(patience or self._heartbeat, self._heartbeat)
        if self._heartbeat:
            self._heard = self._loop.time()
            self._beat_later()

    def _beat_later(self) -> None:
        self._beat_due = self._loop.time() + self._patience / 2
        self._beat = self._loop.call_at(self._beat_due, self._keep_beating)

    async def open_channel(self) -> Channel:
        """Open a channel. Raises ConnectionLost."""
        if self.lost is not None:
            raise self.lost
        number = next(number for number in self._numbers if number not in self._channels)
        channel = self._channels[number] = Channel(self, number)
        try:
            await channel.call(commands.Channel.Open())
        except asyncio.CancelledError:
            channel.close()
            raise
        return channel

    async def close(self) -> None:
        """Say goodbye, for a second at most. Never raises."""
        if self.lost is None:
            try:
                async with asyncio.timeout(1.0):
                    await self._ask(commands.Connection.Close(200, "bye", 0, 0))
            except (TimeoutError, ConnectionLost):
                pass
        self.end(ConnectionLost("the connection was closed"))
        try:
            async with asyncio.timeout(1.0):
                await self._gone
        except TimeoutError:
            pass

    def end(self, reason: ConnectionLost) -> None:
        """End it now; everybody who waits for an answer is told why."""
        if self.lost is not None:
            return
        self.lost = reason
        if self._beat is not None:
            self._beat.cancel()
        if self._transport is not None:
            self._transport.abort()
        elif not self._gone.done():
            self._gone.set_result(None)
        for reply in self._control:
            if not reply.done():
                reply.set_exception(reason)
                reply.exception()
        for channel in tuple(self._channels.values()):
            channel.end(reason)
        self.unblocked.set()
        self.on_lost(reason)

    def forget(self, channel: Channel) -> None:
        """A channel has ended; its number is free."""
        if self._channels.get(channel.number) is channel:
            del self._channels[channel.number]

    # --- out ---

    def write(self, data: bytes) -> None:
        """Frames; several may be joined. Raises ConnectionLost."""
        if self.lost is not None:
            raise self.lost
        self._send(data)

    def write_all(self, frames: Sequence[bytes]) -> None:
        """Like `write`, in one go."""
        self.write(b"".join(frames))

    def _send(self, data: bytes) -> None:
        assert self._transport is not None, "connected before anything is written"
        self._said = self._loop.time()
        self._transport.write(data)

    def _ask(self, method: Any) -> asyncio.Future[Any]:
        reply = self._await_control()
        self._send(method_frame(method, 0))
        return reply

    def _await_control(self) -> asyncio.Future[Any]:
        reply: asyncio.Future[Any] = self._loop.create_future()
        if self.lost is not None:
            reply.set_exception(self.lost)
        self._control.append(reply)
        return reply

    def _keep_beating(self) -> None:
        """Say that we live where nothing else has said so; end a connection on which nothing is heard."""
        now = self._loop.time()
        if now - self._beat_due > self._patience / 2:  # it was us who stood still: what was said is not read yet
            self._heard = max(self._heard, now - self._patience)
        if now - self._heard > 2 * self._patience:
            self.end(ConnectionLost(f"nothing heard from {self._shown} for {now - self._heard:.0f} s"))
            return
        if now - self._heard >= self._patience:
            self.on_silence()
        if now - self._said > self._heartbeat / 3:
            self._send(HEARTBEAT)
        self._beat_later()

    # --- in: called by the event loop ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none of asyncio's
        _keep_alive(transport)
        if self.lost is not None:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.end(ConnectionLost(f"lost the connection to {self._shown}: {exc or 'the server closed it'}"))
        if not self._gone.done():
            self._gone.set_result(None)

    def data_received(self, data: bytes) -> None:
        self._heard = self._loop.time()
        try:
            for incoming in self._reader.feed(data):
                if isinstance(incoming, Heartbeat):
                    continue
                if incoming.channel:
                    channel = self._channels.get(incoming.channel)
                    if channel is not None:  # else it was closed meanwhile
                        channel.told(incoming)
                elif isinstance(incoming, Method):
                    self._told(incoming.method)
        except Malformed as error:
            self.end(ConnectionLost(f"{self._shown} sent what can't be understood: {error}"))
        except Exception:
            logger.exception("a handler failed on what %s sent; the connection is given up", self._shown)
            self.end(ConnectionLost(f"an error in the handling of what {self._shown} sent"))

    def _told(self, method: Any) -> None:
        match method:
            case commands.Connection.Close():
                self._send(method_frame(commands.Connection.CloseOk(), 0))
                refused = method.reply_code in (403, 530) or "access" in method.reply_text.lower()
                self.end(ConnectionLost(f"{self._shown} ended the connection: {method.reply_text}", refused=refused))
            case commands.Connection.Blocked():
                self.block_reason = method.reason
                self.unblocked.clear()
                logger.warning("%s takes no messages now: %s", self._shown, method.reason)
            case commands.Connection.Unblocked():
                self.unblocked.set()
                logger.info("%s takes messages again", self._shown)
            case _:
                if self._control:
                    reply = self._control.popleft()
                    if not reply.done():
                        reply.set_result(method)


def _keep_alive(transport: asyncio.BaseTransport) -> None:
    """The kernel finds out about half-open links, too: there may be no heartbeat, and nothing to send."""
    found = transport.get_extra_info("socket")
    if found is not None:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEP_ALIVE.items():
            if hasattr(socket, name):
                found.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _expect(method: Any, kind: type[Any]) -> Any:
    if not isinstance(method, kind):
        raise ConnectionLost(f"the server answered {method!r} to the login")
    return method
