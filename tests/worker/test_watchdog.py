"""A consumer that hears nothing is made anew; a worker that can't be helped ends."""

import asyncio
from collections.abc import Sequence

import pytest

from aqueue import broker as brokers
from aqueue.broker import Broker, BrokerOptions, Delivery
from aqueue.protocol import Message
from aqueue.url import Url
from aqueue.watchdog import Watchdog, WorkerStuck
from tests.kit.waiting import until

PATIENCE = 0.6


class Claiming:
    """Claims from one queue, until it is told to be deaf: then it waits as if nothing were there."""

    def __init__(self, broker: Broker, queue: str) -> None:
        self.broker = broker
        self.asking: Sequence[str] = [queue]
        self.claimed = asyncio.get_running_loop().time()
        self.found: list[Delivery] = []
        self.deaf = False
        self.hears = True

    async def go_deaf(self) -> None:
        self.deaf = True
        await until(lambda: not self.hears, "no fetch is under way")

    async def run(self) -> None:
        while True:
            self.hears = not self.deaf
            if self.deaf:
                await asyncio.sleep(0.01)
                continue
            found = await self.broker.fetch(self.asking, 10, 0.05)
            if found:
                self.found += found
                self.claimed = asyncio.get_running_loop().time()


@pytest.fixture(params=["memory", "sqlite", "redis", "rabbitmq"])
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


async def test_the_consumer_is_made_anew_and_then_the_worker_ends(
    url: Url, queue: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with brokers.from_url(url)(BrokerOptions()) as broker:
        claiming = Claiming(broker, queue)
        watchdog = Watchdog(broker, claiming, patience=PATIENCE)
        working = asyncio.create_task(claiming.run())
        watching = asyncio.create_task(watchdog.run())
        await broker.publish([Message(queue=queue, headers={}, body=b"1")])
        await until(lambda: len(claiming.found) == 1, "it is claimed")
        await asyncio.sleep(3 * PATIENCE)
        assert watchdog.rebuilds == 0  # nothing waits: it may be idle

        await claiming.go_deaf()
        await broker.publish([Message(queue=queue, headers={}, body=b"2")])
        await until(lambda: watchdog.rebuilds == 1, "it is made anew")
        claiming.deaf = False
        await until(lambda: len(claiming.found) >= 2, "it is claimed")
        assert "nothing was claimed" in caplog.text

        await claiming.go_deaf()
        await broker.publish([Message(queue=queue, headers={}, body=b"3")])
        with pytest.raises(WorkerStuck, match=queue):
            await asyncio.wait_for(watching, 20 * PATIENCE)
        assert watchdog.rebuilds == 4
        working.cancel()
        await asyncio.wait([working])
        claiming.deaf = False
        await broker.settle([(delivery, brokers.Ack()) for delivery in claiming.found])
