"""Looking into RabbitMQ over AMQP, for people.

AMQP has no list of queues and says nothing of messages in other hands, so the caller names the queues, and what
nobody can tell is None. Letters are read by taking one after the other, and letting go of them at the end.
"""

import asyncio
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, NoReturn

from pamqp import commands

from aqueue.broker import DeadLetter, Presence, QueueDepth, Recovered, Sifted, Visit
from aqueue.broker.amqp.dead import original_of, read_letter
from aqueue.broker.amqp.topology import DEAD, NOT_FOUND, Needed
from aqueue.drivers.amqp_codec import Delivered, ack_frame, requeue_frame
from aqueue.drivers.amqp_connection import AmqpConnection, Channel, ChannelClosed, ConnectionLost
from aqueue.drivers.amqp_methods import QueueDeclare, QueuePurge
from aqueue.drivers.amqp_publisher import Publisher
from aqueue.errors import BrokerUnavailable, ConfigurationError

#: How many are asked for at once.
_CHUNK: Final = 100
#: Seconds that a person waits for all of one answer.
_PATIENCE: Final = 60.0


class AmqpInspection:
    """A `aqueue.broker.Inspection` of one virtual host."""

    def __init__(self, publisher: Publisher, declare: Callable[[AmqpConnection, Needed], Awaitable[None]]) -> None:
        self._publisher = publisher
        self._declare = declare

    async def queues(self, known: Sequence[str] = ()) -> Sequence[QueueDepth]:
        dead: Counter[str] = Counter()

        async def count(page: Sequence[DeadLetter]) -> Sifted:
            dead.update(letter.message.queue for letter in page)
            return Sifted()

        await self.sift_dead(count)
        names = sorted({*known, *dead})
        async with self._asking(None):
            depths = [QueueDepth(name, await self._ready(name), None, None, dead[name]) for name in names]
        return [depth for depth in depths if depth.ready or depth.dead]

    async def waiting(self, queues: Sequence[str]) -> bool:
        """Whether messages of these queues are in nobody's hands."""
        async with self._asking():
            return any([await self._ready(name) for name in queues])

    async def _ready(self, name: str) -> int:
        async with self._asking():
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

    async def dead(
        self, queue: str | None = None, limit: int = 100, where: Callable[[DeadLetter], bool] | None = None
    ) -> Sequence[DeadLetter]:
        newest: deque[DeadLetter] = deque(maxlen=limit)

        async def keep(page: Sequence[DeadLetter]) -> Sifted:
            mine = [letter for letter in page if queue in (None, letter.message.queue)]
            newest.extend(letter for letter in mine if where is None or where(letter))
            return Sifted()

        await self.sift_dead(keep)
        return list(reversed(newest))

    async def find_dead(self, id: str) -> DeadLetter | None:
        found = await self.dead(limit=1, where=lambda letter: letter.id == id)
        return found[0] if found else None

    async def retry_dead(self, ids: Sequence[str]) -> int:
        chosen = set(ids)

        async def choose(page: Sequence[DeadLetter]) -> Sifted:
            return Sifted(retry=[letter.id for letter in page if letter.id in chosen])

        return (await self.sift_dead(choose))[0]

    async def drop_dead(self, ids: Sequence[str]) -> int:
        chosen = set(ids)

        async def choose(page: Sequence[DeadLetter]) -> Sifted:
            return Sifted(drop=[letter.id for letter in page if letter.id in chosen])

        return (await self.sift_dead(choose))[1]

    async def sift_dead(self, visit: Visit, page: int = 500) -> tuple[int, int]:
        """Those that stay are not acknowledged, so at the end they are where they were."""
        retried = dropped = 0
        left = await self._ready(DEAD)
        async with self._asking(None), self._channel() as channel:
            try:
                while left > 0:
                    async with self._asking():
                        found = await _get(channel, min(left, page))
                    if not found:
                        break
                    left -= len(found)
                    letters = [(one, read_letter(one)) for one in found]
                    sifted = await visit([letter for _, letter in letters])
                    async with self._asking():
                        retried += await self._replay(channel, [pair for pair in letters if pair[1].id in sifted.retry])
                        dropped += await _acknowledge(channel, [one for one, it in letters if it.id in sifted.drop])
            finally:
                await _let_go(channel)
        return retried, dropped

    async def _replay(self, channel: Channel, letters: Sequence[tuple[Delivered, DeadLetter]]) -> int:
        if letters:
            needed = Needed(queues={letter.message.queue for _, letter in letters})
            originals = [original_of(letter, one) for one, letter in letters]
            await self._publisher.publish(originals, lambda connection: self._declare(connection, needed))
        return await _acknowledge(channel, [one for one, _ in letters])

    async def recover(self, *, older_than: float, celery: bool, parked: bool) -> Recovered:
        """Nothing to do: the server itself gives back what a consumer that is gone has left."""
        return Recovered()

    @asynccontextmanager
    async def _asking(self, patience: float | None = _PATIENCE) -> "AsyncGenerator[None]":
        """What goes wrong meanwhile is raised as BrokerUnavailable; also when it takes longer than ``patience`` (s)."""
        try:
            async with asyncio.timeout(patience):
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


async def _get(channel: Channel, count: int) -> list[Delivered]:
    """The next dead letters, fewer only when there are no more."""
    found: list[Delivered] = []
    while len(found) < count:
        wanted = min(_CHUNK, count - len(found))
        asked = [channel.request(commands.Basic.Get(queue=DEAD)) for _ in range(wanted)]
        answers = [answer for answer in await asyncio.gather(*asked) if isinstance(answer, Delivered)]
        found += answers
        if len(answers) < wanted:
            break
    return found


async def _acknowledge(channel: Channel, letters: Sequence[Delivered]) -> int:
    """Delete letters; returns how many."""
    if letters:
        channel.connection.write_all([ack_frame(channel.number, one.tag, False) for one in letters])
        await channel.catch_up()
    return len(letters)


async def _let_go(channel: Channel) -> None:
    """Of what is left, so that whoever looks next finds it. Never raises: the end of the channel does the same."""
    if channel.closed is None:
        with suppress(ConnectionLost, ChannelClosed, TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                channel.connection.write(requeue_frame(channel.number, 0))
                await channel.catch_up()
