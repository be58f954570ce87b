"""One connection to a Redis server, shared by everything on one event loop.

Commands are pipelined: callers write as they come, replies are handed out in order, and what the server
pushes (pub/sub messages, key invalidations) goes to whoever asked for it. So a caller that is cancelled
can't leave a reply behind for the next one, and a batch of sends costs one round trip.

The driver connects and logs in; from then on the link is ours, and its bytes go straight to hiredis. Any error on
it, or a reply that is late, ends it for every caller at once. The next command opens a new one. Nothing is sent
twice.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from hashlib import sha1
from typing import Any, Final

import hiredis
from redis.exceptions import (
    AuthenticationError,
    InvalidResponse,
    NoScriptError,
    ReadOnlyError,
    RedisError,
    ResponseError,
)

from aqueue.backoff import pause
from aqueue.drivers.redis_address import LoopConnection, RedisAddress, error_of_reply
from aqueue.errors import AQueueError, Border

logger = logging.getLogger("aqueue.redis")

_hiredis: Final[Any] = hiredis

Value = str | bytes | int | float
PushHandler = Callable[[list[Any]], None]

#: Seconds between tries to connect.
_LONGEST_PAUSE: Final = 2.0
#: Seconds for a late reply that is here already, on a loop that was too busy to read it.
_GRACE: Final = 0.05
_INCOMPLETE: Final = object()


class LinkLost(Exception):
    """The link broke or could not be made. ``sent``: the command may have reached the server."""

    def __init__(self, reason: str, *, sent: bool) -> None:
        super().__init__(reason)
        self.sent = sent


def raising(error: type[AQueueError]) -> Border:
    """The border to the rest of aqueue: a lost link and redis' own errors become ``error``."""
    return Border(error, LinkLost, RedisError)


def look_away(replies: "Sequence[asyncio.Future[Any]]") -> None:
    """For commands whose replies nobody waits for."""
    for reply in replies:
        reply.add_done_callback(_look_at)


def _look_at(reply: "asyncio.Future[Any]") -> None:
    if not reply.cancelled():
        reply.exception()


class Script:
    """A Lua script, called by its digest and sent whole when the server doesn't know it."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.digest = sha1(source.encode(), usedforsecurity=False).hexdigest()


class _Pending:
    """A command that the server has not answered."""

    __slots__ = ("due", "name", "reply")

    def __init__(self, name: Value, reply: asyncio.Future[Any], due: float) -> None:
        self.name = name
        self.reply = reply
        #: By the loop's clock.
        self.due = due


class RedisLink:
    """See the module's text. Made and used on one event loop.

    ``timeout`` (seconds) bounds every command, connecting included.
    """

    def __init__(self, address: RedisAddress, timeout: float = 5.0) -> None:
        self.address = address
        self.timeout = timeout
        #: Called in order each time the link is up, before any waiting command is sent.
        self.on_open: list[Callable[[], None]] = []
        #: Called when the link is lost, so that whoever waits for news can ask again.
        self.on_lost: list[Callable[[], None]] = []
        self._session: _Session | None = None
        self._opening = asyncio.Lock()
        self._failures = 0
        self._failure = ""
        #: In the order of their commands, as Redis answers in that order.
        self._pending: deque[_Pending] = deque()
        #: Looks after the first of them.
        self._watching: asyncio.TimerHandle | None = None
        self._push_handlers: dict[bytes, PushHandler] = {}
        #: Connections that are being closed.
        self._closing: set[asyncio.Task[None]] = set()

    def on_push(self, kind: str, handler: PushHandler) -> None:
        """Have ``handler`` told what the server pushes of one kind: ``message``, ``invalidate``."""
        self._push_handlers[kind.encode()] = handler

    @property
    def is_up(self) -> bool:
        return self._session is not None

    async def ready(self) -> None:
        """Return when the link is up. Raises LinkLost."""
        if self._session is not None:
            return
        try:
            async with asyncio.timeout(self.timeout):
                await self._open()
        except TimeoutError:
            why = f": {self._failure}" if self._failure else ""
            text = f"no connection to {self.address.shown} within {self.timeout:g} s{why}"
            raise LinkLost(text, sent=False) from None

    async def call(self, *command: Value) -> Any:
        """Send a command and return its reply.

        Raises LinkLost when there is no link or no reply in time, redis' ResponseError for an error reply.
        """
        due = asyncio.get_running_loop().time() + self.timeout
        if self._session is None:
            await self.ready()
        (reply,) = self._submit((command,), due)
        return await reply

    async def call_all(self, commands: Sequence[tuple[Value, ...]]) -> list[Any]:
        """Send commands in one go and return their replies; like `call`."""
        if not commands:
            return []
        due = asyncio.get_running_loop().time() + self.timeout
        if self._session is None:
            await self.ready()
        replies = self._submit(commands, due)
        return [await replies[0]] if len(replies) == 1 else await asyncio.gather(*replies)

    async def run(self, script: Script, keys: Sequence[Value], args: Sequence[Value] = ()) -> Any:
        """Run a script; like `call`. Survives ``SCRIPT FLUSH`` and a restart of the server."""
        tail = (len(keys), *keys, *args)
        try:
            return await self.call("EVALSHA", script.digest, *tail)
        except NoScriptError:
            return await self.call("EVAL", script.source, *tail)

    def send(self, *commands: tuple[Value, ...]) -> list[asyncio.Future[Any]]:
        """Send commands on a link that is up, without waiting; their replies are in the futures."""
        if self._session is None:
            raise LinkLost(f"not connected to {self.address.shown}", sent=False)
        return self._submit(commands, asyncio.get_running_loop().time() + self.timeout)

    async def close(self) -> None:
        """End the link. Commands still under way fail with LinkLost. Never raises, never hangs."""
        self.lose("the link was closed")
        if self._closing:
            await asyncio.wait(self._closing, timeout=1.0)

    # --- opening ---

    async def _open(self) -> None:
        async with self._opening:
            while self._session is None:
                if self._failures:
                    # Less than any caller waits, or nobody would live to see the next try.
                    await asyncio.sleep(pause(self._failures, longest=min(_LONGEST_PAUSE, self.timeout / 2)))
                await self._try_to_open()

    async def _try_to_open(self) -> None:
        connection = None
        try:
            connection = await self.address.loop_connection()
            await connection.connect()
            session = _Session(connection, self._received, self._ended)
        except BaseException as error:
            if connection is not None:
                await _disconnect(connection)
            if not isinstance(error, RedisError | OSError):
                raise
            self._failed(error)
        else:
            self._opened(session)

    def _failed(self, error: Exception) -> None:
        """Try again later, unless the server is there and refuses us."""
        self._failures += 1
        self._failure = str(error)
        if isinstance(error, AuthenticationError | ResponseError):
            raise LinkLost(f"{self.address.shown} refuses the connection: {error}", sent=False) from None
        if self._failures == 1:
            logger.warning("no connection to %s: %s; trying again", self.address.shown, error)

    def _opened(self, session: "_Session") -> None:
        if self._failures:
            logger.info("connected to %s again", self.address.shown)
        self._failures = 0
        self._session = session
        for callback in self.on_open:
            callback()

    # --- losing ---

    def _watch(self, late: _Pending | None = None) -> None:
        """End the link when a reply is late, and was so a moment ago."""
        self._watching = None
        if not self._pending:
            return
        loop = asyncio.get_running_loop()
        first = self._pending[0]
        if first is late:
            self.lose(f"{self.address.shown} did not answer {first.name!s} in time")
        elif first.due <= loop.time():
            self._watching = loop.call_later(_GRACE, self._watch, first)
        else:
            self._watching = loop.call_at(first.due, self._watch)

    def _ended(self, session: "_Session", reason: str) -> None:
        """A connection broke; ours, unless we gave it up before."""
        if session is self._session:
            reason = f"lost the connection to {self.address.shown}: {reason}"
            logger.warning("%s", reason)
            self.lose(reason)

    def lose(self, reason: str) -> None:
        """End the connection; every command without a reply fails."""
        session, self._session = self._session, None
        if session is None:
            return
        session.over = True
        if self._watching is not None:
            self._watching.cancel()
            self._watching = None
        closing = asyncio.create_task(_disconnect(session.connection))
        self._closing.add(closing)
        closing.add_done_callback(self._closing.discard)
        pending, self._pending = self._pending, deque()
        for one in pending:
            if not one.reply.done():
                one.reply.set_exception(LinkLost(reason, sent=True))
        for callback in self.on_lost:
            callback()

    # --- commands and replies ---

    def _submit(self, commands: Sequence[tuple[Value, ...]], due: float) -> list[asyncio.Future[Any]]:
        assert self._session is not None, "looked after by the caller"
        loop = asyncio.get_running_loop()
        packed = [_pack(command) for command in commands]
        replies: list[asyncio.Future[Any]] = [loop.create_future() for _ in commands]
        self._pending += [_Pending(command[0], reply, due) for command, reply in zip(commands, replies, strict=True)]
        if self._watching is None:
            self._watching = loop.call_at(due, self._watch)
        self._session.transport.write(packed[0] if len(packed) == 1 else b"".join(packed))
        return replies

    def _received(self, reply: Any) -> None:
        """What the server said next: an answer to the first of the pending commands, or a push."""
        if type(reply) is _PushNotification and reply[0] not in _SUBSCRIPTION_REPLIES:
            handler = self._push_handlers.get(reply[0])
            if handler is not None:
                handler(reply)
            return
        pending = self._pending.popleft()
        if pending.reply.done():
            return  # nobody waits for it any more
        if not isinstance(reply, RedisError):
            pending.reply.set_result(reply)
            return
        pending.reply.set_exception(reply)
        if isinstance(reply, ReadOnlyError):  # a demoted master: ask again who is in charge
            self.lose(f"{self.address.shown} became read-only")
        elif not isinstance(reply, ResponseError):  # of the connection, not of the command
            raise reply


class _Session(asyncio.Protocol):
    """The life of one connection that the driver has made: what comes over it goes to ``received``, its end to
    ``ended``.
    """

    def __init__(
        self,
        connection: LoopConnection,
        received: Callable[[Any], None],
        ended: Callable[["_Session", str], None],
    ) -> None:
        self.connection = connection
        #: It was given up: what still comes is for nobody.
        self.over = False
        self.transport = connection.transport()
        self._received = received
        self._ended = ended
        self._reader = _Reader(protocolError=InvalidResponse, replyError=error_of_reply, notEnoughData=_INCOMPLETE)
        self.transport.set_protocol(self)

    def data_received(self, data: bytes) -> None:
        try:
            self._reader.feed(data)
            while not self.over and (reply := self._reader.gets()) is not _INCOMPLETE:
                self._received(reply)
        except RedisError as error:
            self._ended(self, str(error))
        except Exception:
            logger.exception("a handler failed on what Redis sent; the link is rebuilt")
            self._ended(self, "an error in the handling of what it sent")

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended(self, str(exc or "the server closed it"))


#: Pushes that answer a command, in its place in the order of replies.
_SUBSCRIPTION_REPLIES: Final = (b"subscribe", b"unsubscribe", b"psubscribe", b"punsubscribe")


_pack: Final[Callable[[tuple[Value, ...]], bytes]] = _hiredis.pack_command
_Reader: Final[Any] = _hiredis.Reader
_PushNotification: Final[Any] = _hiredis.PushNotification


async def _disconnect(connection: LoopConnection) -> None:
    try:
        await connection.disconnect()
    except (RedisError, OSError) as error:
        logger.debug("closing a broken connection: %s", error)
