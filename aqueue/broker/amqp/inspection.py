"""Looking into RabbitMQ over AMQP, for people.

AMQP has no list of queues and says nothing of messages in other hands, so the caller names the queues, and what
nobody can tell is None. Letters are read by taking them all and letting go of them again, in their order.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, NoReturn

from pamqp import commands

from aqueue.broker import DeadLetter, Presence, QueueDepth, Recovered
from aqueue.broker.amqp.dead import original_of, read_letter
from aqueue.broker.amqp.topology import DEAD, NOT_FOUND, Needed
from aqueue.drivers.amqp_codec import Delivered, ack_frame
from aqueue.drivers.amqp_connection import AmqpConnection, Channel, ChannelClosed, ConnectionLost
from aqueue.drivers.amqp_methods import QueueDeclare, QueuePurge
from aqueue.drivers.amqp_publisher import Publisher
from aqueue.errors import BrokerUnavailable, ConfigurationError

#: How many are asked for at once.
_CHUNK: Final = 100
_EVERY: Final = 1 << 31
#: Seconds that a person waits for all of one answer.
_PATIENCE: Final = 60.0


class AmqpInspection:
    """A `aqueue.broker.Inspection` of one virtual host."""

    def __init__(self, publisher: Publisher, declare: Callable[[AmqpConnection, Needed], Awaitable[None]]) -> None:
        self._publisher = publisher
        self._declare = declare

    async def queues(self, known: Sequence[str] = ()) -> Sequence[QueueDepth]:
        dead = Counter(letter.message.queue for letter in await self.dead(limit=_EVERY))
        names = sorted({*known, *dead})
        async with self._asking():
            depths = [QueueDepth(name, await self._ready(name), None, None, dead[name]) for name in names]
        return [depth for depth in depths if depth.ready or depth.dead]

    async def waiting(self, queues: Sequence[str]) -> int:
        """How many messages of these queues are in nobody's hands."""
        async with self._asking():
            return sum([await self._ready(name) for name in queues])

    async def _ready(self, name: str) -> int:
        answer = await self._unless_missing(QueueDeclare(queue=name, passive=True))
        return 0 if answer is None else int(answer.message_count)

    async def workers(self) -> Sequence[Presence]:
        return ()

    async def peek(self, queue: str, limit: int) -> NoReturn:
        raise ConfigurationError(
            "RabbitMQ shows a message only by delivering it, which marks it as delivered once; look at it in "
            "RabbitMQ's management pages"
        )

    async def purge(self, queue: str) -> int:
        async with self._asking():
            answer = await self._unless_missing(QueuePurge(queue=queue))
        return 0 if answer is None else int(answer.message_count)

    async def dead(self, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        async with self._asking(), self._letters() as (_, found):
            letters = [read_letter(delivered) for delivered in reversed(found)]
        return [letter for letter in letters if queue in (None, letter.message.queue)][:limit]

    async def find_dead(self, id: str) -> DeadLetter | None:
        return next((letter for letter in await self.dead(limit=_EVERY) if letter.id == id), None)

    async def retry_dead(self, ids: Sequence[str]) -> int:
        async with self._asking(), self._letters() as (channel, found):
            chosen = [(one, letter) for one in found if (letter := read_letter(one)).id in ids]
            if chosen:
                needed = Needed(queues={letter.message.queue for _, letter in chosen})
                originals = [original_of(letter, one) for one, letter in chosen]
                await self._publisher.publish(originals, lambda connection: self._declare(connection, needed))
            await _acknowledge(channel, [one for one, _ in chosen])
        return len(chosen)

    async def drop_dead(self, ids: Sequence[str]) -> int:
        async with self._asking(), self._letters() as (channel, found):
            chosen = [one for one in found if read_letter(one).id in ids]
            await _acknowledge(channel, chosen)
        return len(chosen)

    async def recover(self, *, older_than: float, celery: bool, parked: bool) -> Recovered:
        """Nothing to do: the server itself gives back what a consumer that is gone has left."""
        return Recovered()

    @asynccontextmanager
    async def _asking(self) -> "AsyncGenerator[None]":
        try:
            async with asyncio.timeout(_PATIENCE):
                yield
        except (ConnectionLost, ChannelClosed, TimeoutError) as error:
            raise BrokerUnavailable(str(error) or "RabbitMQ did not answer in time") from None

    async def _unless_missing(self, method: Any) -> Any:
        """The answer to a method, or None when its queue doesn't exist."""
        async with self._channel() as channel:
            try:
                return await channel.call(method)
            except ChannelClosed as error:
                if error.code != NOT_FOUND:
                    raise
                return None

    @asynccontextmanager
    async def _channel(self) -> "AsyncGenerator[Channel]":
        connection = await self._publisher.connection()
        channel = await connection.open_channel()
        try:
            yield channel
        finally:
            channel.close()

    @asynccontextmanager
    async def _letters(self) -> "AsyncGenerator[tuple[Channel, list[Delivered]]]":
        """Every dead letter, the oldest first; those that are not acknowledged stay where they are."""
        async with self._channel() as channel:
            found: list[Delivered] = []
            while True:
                try:
                    asked = [channel.request(commands.Basic.Get(queue=DEAD)) for _ in range(_CHUNK)]
                    answers = await asyncio.gather(*asked)
                except ChannelClosed as error:
                    if error.code != NOT_FOUND:  # nothing has died here yet
                        raise
                    break
                found += [answer for answer in answers if isinstance(answer, Delivered)]
                if len(found) % _CHUNK or not isinstance(answers[-1], Delivered):
                    break
            yield channel, found


async def _acknowledge(channel: Channel, letters: Sequence[Delivered]) -> None:
    if letters:
        channel.connection.write_all([ack_frame(channel.number, one.tag, False) for one in letters])
        await channel.catch_up()
