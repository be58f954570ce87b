"""Sends and claims that are cancelled at random moments, beside others that are not."""

import asyncio
import random
from collections import Counter

from aqueue import broker as brokers
from aqueue.broker import Ack, Broker, BrokerOptions
from aqueue.errors import AQueueError
from aqueue.protocol import Message
from aqueue.url import Url

_ROUNDS = 150


async def cancelling(url: str) -> list[str]:
    """What was wrong: answers of another's, messages lost or handed out twice, errors of a kind that nobody expects."""
    return await _Cancelling(url).run()


class _Cancelling:
    def __init__(self, url: str) -> None:
        self._factory = brokers.from_url(Url(url))
        self._dice = random.Random(65)
        self._queue = "cancelling"
        self._confirmed: set[str] = set()
        self._found: Counter[str] = Counter()
        self._wrong: list[str] = []

    async def run(self) -> list[str]:
        options = BrokerOptions(lease=60.0, timeout=3.0)
        async with self._factory(options) as sender, self._factory(options) as worker:
            await self._send(sender, "first")
            async with asyncio.timeout(30):
                await asyncio.gather(self._sends(sender), self._claims(worker))
                await self._collect(worker)
        lost = self._confirmed - self._found.keys()
        twice = [id for id, times in self._found.items() if times > 1]
        return self._wrong + [f"lost: {id}" for id in sorted(lost)] + [f"twice: {id}" for id in sorted(twice)]

    async def _sends(self, broker: Broker) -> None:
        for number in range(_ROUNDS):
            doomed = asyncio.create_task(self._send(broker, f"doomed-{number}"))
            kept = asyncio.create_task(self._send(broker, f"kept-{number}"))
            await asyncio.sleep(self._dice.uniform(0, 0.001))
            doomed.cancel()
            await asyncio.wait([doomed, kept])

    async def _claims(self, broker: Broker) -> None:
        for _ in range(_ROUNDS // 3):
            claiming = asyncio.create_task(self._claim(broker, 0.1))
            await asyncio.sleep(self._dice.uniform(0, 0.004))
            claiming.cancel()
            await asyncio.wait([claiming])

    async def _collect(self, broker: Broker) -> None:
        """What is still there; a claim that brings nothing, twice, was the last."""
        nothing = 0
        while nothing < 2 and len(self._wrong) < 10:
            nothing = 0 if await self._claim(broker, 0.3) else nothing + 1

    async def _send(self, broker: Broker, id: str) -> None:
        headers = {"task": "t", "id": id, "lang": "py"}
        try:
            await broker.publish([Message(queue=self._queue, headers=headers, body=b"[[], {}, {}]")])
            self._confirmed.add(id)
        except Exception as error:  # no fault of a server is in here
            self._wrong.append(f"send: {error!r}")

    async def _claim(self, broker: Broker, wait: float) -> int:
        try:
            found = await broker.fetch([self._queue], 20, wait)
            for one in found:
                assert isinstance(one.message, Message), one
                self._found[str(one.message.headers["id"])] += 1
            refused = await broker.settle([(one, Ack()) for one in found]) if found else ()
        except (AQueueError, TypeError, ValueError, LookupError, AttributeError, AssertionError) as error:
            self._wrong.append(f"claim: {error!r}")
            return 0
        self._wrong += [f"refused: {one.receipt}" for one in refused]
        return len(found)
