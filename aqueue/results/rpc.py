"""Results sent back to whoever sent the task, over RabbitMQ (celery-protocol 4.9).

Each client (an app on an event loop) has a queue, named in the ``reply_to`` of its messages; workers send each state
there and declare nothing. So only the sender can know a result, it knows none but those of its own tasks, and what
comes while its connection is down is lost with the queue: for results that must not be lost there are other stores.
"""

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import asynccontextmanager, suppress
from types import TracebackType
from typing import Any, Final, Self
from uuid import uuid4

import msgspec
from pamqp import commands

from aqueue.backoff import pause
from aqueue.drivers.amqp_address import AmqpAddress
from aqueue.drivers.amqp_codec import Delivered, Malformed, decode_properties, encode_properties
from aqueue.drivers.amqp_connection import AmqpConnection, Channel, ChannelClosed, ConnectionLost
from aqueue.drivers.amqp_publisher import Publication, Publisher, nothing_to_prepare
from aqueue.errors import BrokerUnavailable, StoreUnavailable
from aqueue.protocol import Record
from aqueue.results import Documents, Result, StoreFactory, StoreOptions
from aqueue.url import Url

logger = logging.getLogger("aqueue.results")

#: Whose queue a worker sends results to: names that clients make for this, never that of a queue with tasks in it.
_REPLY_QUEUE: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
#: Results kept for a client that does not ask for them.
_MOST_KEPT: Final = 100_000
#: Looks for what is still on its way to us; seconds between them.
_LOOKS: Final = 20
_LOOK_AGAIN: Final = 0.005


class _Kept:
    """The latest state of a task, as it came."""

    __slots__ = ("content_type", "document", "ends")

    def __init__(self, document: bytes, content_type: str, ends: float) -> None:
        self.document = document
        self.content_type = content_type
        #: By the monotonic clock.
        self.ends = ends


class RpcResults:
    """A `aqueue.results.ResultStore` between one client and its workers."""

    def __init__(self, address: AmqpAddress, options: StoreOptions) -> None:
        #: Our queue.
        self.reply_to = str(uuid4())
        self._address = address
        self._options = options
        self._documents = Documents(msgspec.structs.replace(options, compression=None))
        self._publisher = Publisher(address, options.timeout)
        self._channel: Channel | None = None
        self._listening: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()
        self._failure = ""
        #: In the order of their first news.
        self._kept: dict[str, _Kept] = {}
        self._waiters: dict[str, set[asyncio.Event]] = {}
        self._refused_names: set[str] = set()

    @classmethod
    def factory(cls, url: Url) -> StoreFactory:
        address = AmqpAddress.parse(url)
        return lambda options: cls(address, options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.wait([self._listening])
            self._listening = None
        await self._publisher.close()

    @property
    def place(self) -> None:
        return None

    # --- the worker's side ---

    def record(self, result: Result) -> Record:
        return Record(f"{result.reply_to}/{result.task_id}", self._documents.encode(result), self._options.expires)

    async def put(self, records: Sequence[Record]) -> None:
        publications = [publication for record in records if (publication := self._publication(record)) is not None]
        if not publications:
            return
        try:
            await self._publisher.publish(publications, nothing_to_prepare)
        except BrokerUnavailable as error:
            raise StoreUnavailable(f"results not sent: {error}") from None

    def _publication(self, record: Record) -> Publication | None:
        """A state on its way; None when nobody waits for it. A client that is gone is no error."""
        reply_to, _, task_id = record.key.partition("/")
        if not _REPLY_QUEUE.fullmatch(reply_to):
            if reply_to and reply_to not in self._refused_names and len(self._refused_names) < 100:
                self._refused_names.add(reply_to)
                logger.warning("no results are sent to %r: that is no client's queue", reply_to[:60])
            return None
        properties: dict[str, Any] = {
            "content_type": self._documents.content_type,
            "content_encoding": self._documents.content_encoding,
            "headers": {},
            "delivery_mode": 1,
            "priority": 0,
            "correlation_id": task_id,
        }
        encoded = encode_properties(properties)
        return Publication("", reply_to, encoded, record.value, task_id, mandatory=False)

    # --- the client's side ---

    async def announce(self, records: Sequence[Record]) -> None:
        """Have our queue, and expect news of these tasks."""
        await self._listen()
        for record in records:
            task_id = record.key.partition("/")[2]
            if self._latest(task_id) is None:
                self._keep(task_id, record.value, self._documents.content_type, record.ttl)

    async def get(self, task_id: str, wait: float = 0.0) -> Result | None:
        if wait <= 0:
            await self._catch_up()
            return self._latest(task_id)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait
        async with self._told_of(task_id) as news:
            while True:
                news.clear()
                result = self._latest(task_id)
                left = deadline - loop.time()
                if left <= 0 or (result is not None and result.is_final):
                    return result
                with suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await news.wait()

    @asynccontextmanager
    async def _told_of(self, task_id: str) -> "AsyncGenerator[asyncio.Event]":
        news = asyncio.Event()
        waiters = self._waiters.setdefault(task_id, set())
        waiters.add(news)
        try:
            yield news
        finally:
            waiters.discard(news)
            if not waiters:
                self._waiters.pop(task_id, None)

    async def forget(self, task_id: str) -> None:
        await self._catch_up()
        self._kept.pop(task_id, None)

    def _latest(self, task_id: str) -> Result | None:
        kept = self._kept.get(task_id)
        if kept is None or kept.ends <= time.monotonic():
            return None
        return self._documents.decode(task_id, kept.document, kept.content_type)

    def _keep(self, task_id: str, document: bytes, content_type: str, ttl: float | None) -> None:
        now = time.monotonic()
        self._kept[task_id] = _Kept(document, content_type, float("inf") if ttl is None else now + ttl)
        oldest = next(iter(self._kept))
        if len(self._kept) > _MOST_KEPT or self._kept[oldest].ends <= now:
            del self._kept[oldest]
        for news in self._waiters.get(task_id, ()):
            news.set()

    def _arrived(self, delivered: Delivered) -> None:
        try:
            properties = decode_properties(delivered.properties)
        except Malformed as error:
            logger.warning("a result can't be read: %s", error)
            return
        task_id = properties.get("correlation_id", "")
        content_type = properties.get("content_type") or self._documents.content_type
        before = self._kept.get(task_id)
        if before is None or not self._documents.says_success(before.document):
            self._keep(task_id, delivered.body, content_type, self._options.expires)

    # --- our queue ---

    async def _listen(self) -> None:
        """Have our queue. Raises StoreUnavailable."""
        if self._listening is None:
            self._listening = asyncio.create_task(self._keep_listening())
        try:
            async with asyncio.timeout(self._options.timeout):
                await self._ready.wait()
        except TimeoutError:
            why = f": {self._failure}" if self._failure else ""
            raise StoreUnavailable(f"no queue for results on {self._address.shown}{why}") from None

    async def _keep_listening(self) -> None:
        """Until cancelled, have the queue and a consumer of it."""
        failures = 0
        while True:
            try:
                async with self._consuming() as gone:
                    if failures:
                        logger.info("results come again; those that came meanwhile are lost")
                    failures = 0
                    self._ready.set()
                    self._failure = str(await gone)
                    logger.warning("results don't come: %s", self._failure)
            except (ConnectionLost, ChannelClosed, TimeoutError) as error:
                self._failure = str(error)
            self._ready.clear()
            failures += 1
            await asyncio.sleep(pause(failures))

    @asynccontextmanager
    async def _consuming(self) -> "AsyncGenerator[asyncio.Future[Exception]]":
        """A connection that consumes our queue; the future tells why it ended."""
        gone: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()

        def ended(reason: Any) -> None:
            if not gone.done():
                gone.set_result(reason if isinstance(reason, Exception) else ConnectionLost("the queue was deleted"))

        connection = await AmqpConnection.connect(self._address, 0.0)
        try:
            async with asyncio.timeout(self._options.timeout):
                channel = await connection.open_channel()
                channel.on_delivery = self._arrived
                channel.on_cancel = channel.on_close = ended
                await channel.call(self._declaration())
                await channel.call(commands.Basic.Consume(queue=self.reply_to, no_ack=True))
            self._channel = channel
            yield gone
        finally:
            self._channel = None
            await connection.close()  # and with its last consumer goes the queue

    def _declaration(self) -> Any:
        """As Celery declares it (section 3.2)."""
        expires = self._options.expires
        arguments: dict[str, Any] = {} if expires is None else {"x-expires": max(1, round(expires * 1000))}
        return commands.Queue.Declare(queue=self.reply_to, durable=True, auto_delete=True, arguments=arguments)

    async def _catch_up(self) -> None:
        """Wait for what is already on its way to us."""
        channel = self._channel
        if channel is None:
            return
        try:
            async with asyncio.timeout(self._options.timeout):
                for _ in range(_LOOKS):
                    there = await channel.call(commands.Queue.Declare(queue=self.reply_to, passive=True))
                    await channel.catch_up()
                    if not there.message_count:
                        return
                    await asyncio.sleep(_LOOK_AGAIN)
        except (ConnectionLost, ChannelClosed, TimeoutError) as error:
            raise StoreUnavailable(str(error) or f"no answer from {self._address.shown}") from None
