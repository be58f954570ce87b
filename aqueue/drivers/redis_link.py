"""One connection to a Redis server, shared by everything on one event loop.

Commands are pipelined: callers write as they come, replies are handed out in order, and what the server
pushes (pub/sub messages, key invalidations) goes to whoever asked for it. So a caller that is cancelled
can't leave a reply behind for the next one, and a batch of sends costs one round trip.

The link is owned here, not by the driver: any error on it, or a reply that is late, ends it for every
caller at once. The next command opens a new one. Nothing is sent twice.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import contextmanager
from hashlib import sha1
from typing import Any, Final, NoReturn

import hiredis
from redis.exceptions import AuthenticationError, NoScriptError, ReadOnlyError, RedisError, ResponseError

from aqueue.backoff import pause
from aqueue.drivers.redis_address import LoopConnection, LoopParser, RedisAddress
from aqueue.errors import AQueueError

logger = logging.getLogger("aqueue.redis")

_hiredis: Final[Any] = hiredis

Value = str | bytes | int | float
PushHandler = Callable[[list[Any]], None]


class LinkLost(Exception):
    """The link broke or could not be made. ``sent``: the command may have reached the server."""

    def __init__(self, reason: str, *, sent: bool) -> None:
        super().__init__(reason)
        self.sent = sent


@contextmanager
def raising(error: type[AQueueError]) -> Generator[None]:
    """The border to the rest of aqueue: a lost link and redis' own errors become ``error``."""
    try:
        yield
    except (LinkLost, RedisError) as found:
        raise error(str(found)) from None


def look_away(reply: "asyncio.Future[Any]") -> None:
    """For a command whose reply nobody waits for."""
    if not reply.cancelled():
        reply.exception()


class Script:
    """A Lua script, called by its digest and sent whole when the server doesn't know it."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.digest = sha1(source.encode(), usedforsecurity=False).hexdigest()


class _Push(list[Any]):
    """Something the server said without being asked."""


class _Parser(LoopParser):  # type: ignore[misc]
    async def handle_push_response(self, response: list[Any], **kwargs: Any) -> _Push:
        return _Push(response)


class _Pending:
    """A command without its reply. ``sent`` once it was handed to the socket."""

    __slots__ = ("packed", "reply", "sent")

    def __init__(self, packed: bytes, reply: asyncio.Future[Any]) -> None:
        self.packed = packed
        self.reply = reply
        self.sent = False


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
        self._connection: LoopConnection | None = None
        self._opening = asyncio.Lock()
        self._failures = 0
        self._failure = ""
        self._outgoing: list[_Pending] = []
        #: In the order of their commands, as Redis answers in that order. Holds what is outgoing, too.
        self._pending: deque[_Pending] = deque()
        self._wake_writer = asyncio.Event()
        self._push_handlers: dict[bytes, PushHandler] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def on_push(self, kind: str, handler: PushHandler) -> None:
        """Have ``handler`` told what the server pushes of one kind: ``message``, ``invalidate``."""
        self._push_handlers[kind.encode()] = handler

    @property
    def is_up(self) -> bool:
        return self._connection is not None

    async def ready(self) -> None:
        """Return when the link is up. Raises LinkLost."""
        try:
            async with asyncio.timeout(self.timeout):
                await self._open()
        except TimeoutError:
            self._timed_out("CONNECT")

    async def call(self, *command: Value) -> Any:
        """Send a command and return its reply.

        Raises LinkLost when there is no link or no reply in time, redis' ResponseError for an error reply.
        """
        packed = _pack(command)
        try:
            async with asyncio.timeout(self.timeout):
                if self._connection is None:
                    await self._open()
                return await self._submit(packed)
        except TimeoutError:
            self._timed_out(command[0])

    async def call_all(self, commands: Sequence[tuple[Value, ...]]) -> list[Any]:
        """Send commands in one go and return their replies; like `call`."""
        if not commands:
            return []
        packed = [_pack(command) for command in commands]
        try:
            async with asyncio.timeout(self.timeout):
                if self._connection is None:
                    await self._open()
                return await asyncio.gather(*map(self._submit, packed))
        except TimeoutError:
            self._timed_out(commands[0][0])

    async def run(self, script: Script, keys: Sequence[Value], args: Sequence[Value] = ()) -> Any:
        """Run a script; like `call`. Survives ``SCRIPT FLUSH`` and a restart of the server."""
        tail = (len(keys), *keys, *args)
        try:
            return await self.call("EVALSHA", script.digest, *tail)
        except NoScriptError:
            return await self.call("EVAL", script.source, *tail)

    def send(self, *command: Value) -> asyncio.Future[Any]:
        """Send a command on a link that is up, without waiting; its reply is in the future."""
        if self._connection is None:
            raise LinkLost(f"not connected to {self.address.shown}", sent=False)
        return self._submit(_pack(command))

    async def close(self) -> None:
        """End the link. Commands still under way fail with LinkLost. Never raises, never hangs."""
        self._lose("the link was closed")
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)

    # --- opening ---

    async def _open(self) -> None:
        async with self._opening:
            while self._connection is None:
                if self._failures:
                    await asyncio.sleep(pause(self._failures))
                await self._try_to_open()

    async def _try_to_open(self) -> None:
        connection = None
        try:
            connection = await self.address.loop_connection(_Parser)
            await connection.connect()
        except BaseException as error:
            if connection is not None:
                await _disconnect(connection)
            if not isinstance(error, RedisError | OSError):
                raise
            self._failed(error)
        else:
            self._opened(connection)

    def _failed(self, error: Exception) -> None:
        """Try again later, unless the server is there and refuses us."""
        self._failures += 1
        self._failure = str(error)
        if isinstance(error, AuthenticationError | ResponseError):
            raise LinkLost(f"{self.address.shown} refuses the connection: {error}", sent=False) from None
        if self._failures == 1:
            logger.warning("no connection to %s: %s; trying again", self.address.shown, error)

    def _opened(self, connection: LoopConnection) -> None:
        if self._failures:
            logger.info("connected to %s again", self.address.shown)
        self._failures = 0
        self._connection = connection
        self._start(self._read(connection))
        self._start(self._write(connection))
        for callback in self.on_open:
            callback()

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # --- losing ---

    def _timed_out(self, command: Value) -> NoReturn:
        if self._connection is None:
            why = f": {self._failure}" if self._failure else ""
            raise LinkLost(f"no connection to {self.address.shown} within {self.timeout:g} s{why}", sent=False)
        reason = f"{self.address.shown} did not answer {command!s} in time"
        self._lose(reason)
        raise LinkLost(reason, sent=True)

    def _lose(self, reason: str) -> None:
        """End the connection; every command without a reply fails."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        for task in self._tasks:
            task.cancel()
        self._start(_disconnect(connection))
        pending, self._pending, self._outgoing = self._pending, deque(), []
        for one in pending:
            if not one.reply.done():
                one.reply.set_exception(LinkLost(reason, sent=one.sent))
        for callback in self.on_lost:
            callback()

    # --- reading and writing ---

    def _submit(self, packed: bytes) -> asyncio.Future[Any]:
        pending = _Pending(packed, asyncio.get_running_loop().create_future())
        self._pending.append(pending)
        self._outgoing.append(pending)
        self._wake_writer.set()
        return pending.reply

    async def _write(self, connection: LoopConnection) -> None:
        try:
            while True:
                await self._wake_writer.wait()
                self._wake_writer.clear()
                batch, self._outgoing = self._outgoing, []
                for one in batch:
                    one.sent = True
                await connection.send_packed_command([one.packed for one in batch], check_health=False)
        except (RedisError, OSError) as error:
            self._lose_this(connection, error)

    async def _read(self, connection: LoopConnection) -> None:
        try:
            while True:
                try:
                    reply = await connection.read_response(push_request=True)
                except ResponseError as error:
                    reply = error
                self._deliver(reply)
        except (RedisError, OSError, asyncio.IncompleteReadError) as error:
            self._lose_this(connection, error)
        except Exception as error:
            logger.exception("a handler failed on what %s sent; the link is rebuilt", self.address.shown)
            self._lose_this(connection, error)

    def _lose_this(self, connection: LoopConnection, error: Exception) -> None:
        if connection is self._connection:
            reason = f"lost the connection to {self.address.shown}: {error}"
            logger.warning("%s", reason)
            self._lose(reason)

    def _deliver(self, reply: Any) -> None:
        if type(reply) is _Push and reply[0] not in _SUBSCRIPTION_REPLIES:
            handler = self._push_handlers.get(reply[0])
            if handler is not None:
                handler(reply)
            return
        pending = self._pending.popleft()
        if pending.reply.done():
            return  # nobody waits for it any more
        if isinstance(reply, ResponseError):
            pending.reply.set_exception(reply)
            if isinstance(reply, ReadOnlyError):  # a demoted master: ask again who is in charge
                self._lose(f"{self.address.shown} became read-only")
        else:
            pending.reply.set_result(reply)


#: Pushes that answer a command, in its place in the order of replies.
_SUBSCRIPTION_REPLIES: Final = (b"subscribe", b"unsubscribe", b"psubscribe", b"punsubscribe")


_pack: Final[Callable[[tuple[Value, ...]], bytes]] = _hiredis.pack_command


async def _disconnect(connection: LoopConnection) -> None:
    try:
        await connection.disconnect(nowait=True)
    except (RedisError, OSError) as error:
        logger.debug("closing a broken connection: %s", error)
