"""What is broadcast on RabbitMQ: every worker that consumes it gets every message once, into a queue of its own."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any

import amqp
import pytest
import pytest_asyncio

from aqueue import AQueue, ConfigurationError, Settings
from aqueue.broker import Ack, Bury, Queue, Release
from aqueue.broker.amqp import AmqpBroker
from aqueue.errors import BrokerUnavailable, EnqueueFailed
from tests.brokers.test_rabbitmq import open_broker
from tests.conformance.test_broker import message, names
from tests.kit.proxy import Proxy
from tests.kit.rabbitmq import RabbitServer
from tests.kit.waiting import until

BROADCAST = Queue(broadcast=True)


@pytest_asyncio.fixture
async def sender(rabbit_url: str, queue: str) -> AsyncIterator[AmqpBroker]:
    async with await open_broker(rabbit_url, queues={queue: BROADCAST}) as made:
        yield made


@pytest_asyncio.fixture
async def workers(rabbit_url: str, queue: str) -> AsyncIterator[list[AmqpBroker]]:
    """Three, that have asked for the queue once."""
    async with AsyncExitStack() as stack:
        made = [
            await stack.enter_async_context(await open_broker(rabbit_url, queues={queue: BROADCAST})) for _ in range(3)
        ]
        assert [await worker.fetch([queue], 5, 0) for worker in made] == [[], [], []]
        yield made


@pytest.fixture
def channel(rabbit_server: RabbitServer) -> Iterator[amqp.Channel]:
    with amqp.Connection(f"127.0.0.1:{rabbit_server.port}") as connection:
        yield connection.channel()


def own_queue(worker: AmqpBroker) -> str:
    (found,) = worker._broadcasts.ours()
    return found


async def all_of(worker: AmqpBroker, queue: str) -> list[str]:
    """Everything a worker gets, acknowledged."""
    found: list[str] = []
    while claimed := await worker.fetch([queue], 10, 0.3):
        found += names(claimed)
        await worker.settle([(delivery, Ack()) for delivery in claimed])
    return found


async def test_every_worker_gets_every_message(sender: AmqpBroker, workers: list[AmqpBroker], queue: str) -> None:
    await sender.publish([message(queue, f"{number}") for number in range(20)])
    found = await asyncio.gather(*(all_of(worker, queue) for worker in workers))
    assert found == [[f"{number}" for number in range(20)]] * 3


async def test_other_queues_of_the_same_workers_give_each_message_to_one(
    sender: AmqpBroker, workers: list[AmqpBroker], queue: str
) -> None:
    await sender.publish([message(f"{queue}-plain", f"{number}") for number in range(20)])
    found = await asyncio.gather(*(all_of(worker, f"{queue}-plain") for worker in workers))
    assert sorted(name for some in found for name in some) == sorted(f"{number}" for number in range(20))


async def test_a_broadcast_that_nobody_hears_is_refused(sender: AmqpBroker, queue: str) -> None:
    with pytest.raises(EnqueueFailed, match=f"exchange '{queue}' has no queue"):
        await sender.publish([message(queue, "a")])


async def test_a_broadcast_with_an_eta_comes_at_once_for_each_worker_to_keep(
    sender: AmqpBroker, workers: list[AmqpBroker], queue: str
) -> None:
    await sender.publish([message(queue, "later", delay=60.0)])
    for worker in workers:
        assert names(await worker.fetch([queue], 5, 2)) == ["later"]


@pytest.mark.parametrize("back", [Release(), Release(last=True), Release(delay=1.0)])
async def test_what_one_worker_gives_back_comes_to_it_alone(
    sender: AmqpBroker, workers: list[AmqpBroker], queue: str, back: Release
) -> None:
    await sender.publish([message(queue, "a")])
    first, *others = workers
    (delivery,) = await first.fetch([queue], 5, 2)
    assert [await all_of(other, queue) for other in others] == [["a"], ["a"]]
    await first.settle([(delivery, back)])
    assert names(await first.fetch([queue], 5, 5)) == ["a"]
    assert [await all_of(other, queue) for other in others] == [[], []]


async def test_a_worker_that_ends_leaves_nothing(
    rabbit_url: str, sender: AmqpBroker, workers: list[AmqpBroker], channel: amqp.Channel, queue: str
) -> None:
    async with await open_broker(rabbit_url, queues={queue: BROADCAST}) as stopped:
        await stopped.fetch([queue], 5, 0)
        gone = own_queue(stopped)
        assert channel.queue_declare(gone, passive=True).message_count == 0
    with pytest.raises(amqp.NotFound):
        channel.queue_declare(gone, passive=True)
    await sender.publish([message(queue, "a")])
    assert names(await workers[0].fetch([queue], 5, 2)) == ["a"]


async def test_only_the_broadcast_has_an_exchange(
    rabbit_server: RabbitServer, workers: list[AmqpBroker], queue: str
) -> None:
    listed = rabbit_server.ctl("list_exchanges", "--no-table-headers", "name", "type")
    mine = [line.split() for line in listed.splitlines() if line.startswith((queue, "bcast."))]
    assert mine == [[queue, "fanout"]]
    bound = rabbit_server.ctl("list_bindings", "--no-table-headers", "source_name", "destination_name")
    assert sorted(line.split()[1] for line in bound.splitlines() if line.startswith(queue)) == sorted(
        own_queue(worker) for worker in workers
    )


async def test_what_is_broadcast_while_a_worker_is_cut_off_waits_for_it(
    rabbit_proxy: Proxy, sender: AmqpBroker, queue: str
) -> None:
    url = f"amqp://guest:guest@127.0.0.1:{rabbit_proxy.port}//"
    async with await open_broker(url, queues={queue: BROADCAST}) as worker:
        await worker.fetch([queue], 5, 0)
        rabbit_proxy.refuse()
        await sender.publish([message(queue, "meanwhile")])
        rabbit_proxy.heal()
        found: list[str] = []

        async def has_come() -> bool:
            try:
                found.extend(names(await worker.fetch([queue], 5, 1)))
            except BrokerUnavailable:
                return False
            return bool(found)

        await until(has_come, "it has come", timeout=15)
        assert found == ["meanwhile"]


async def test_a_letter_whose_worker_is_gone_is_not_sent_where_nobody_looks(
    rabbit_url: str, sender: AmqpBroker, queue: str
) -> None:
    async with await open_broker(rabbit_url, queues={queue: BROADCAST}) as worker:
        await worker.fetch([queue], 5, 0)
        own = own_queue(worker)
        await sender.publish([message(queue, "dies")])
        (delivery,) = await worker.fetch([queue], 5, 2)
        await worker.settle([(delivery, Bury("x"))])
        (letter,) = await sender.inspection.dead(own)
        assert await sender.inspection.retry_dead([letter.id]) == 1
        (delivery,) = await worker.fetch([queue], 5, 2)
        await worker.settle([(delivery, Bury("x"))])
    (letter,) = await sender.inspection.dead(own)
    async with await open_broker(rabbit_url) as operator:
        with pytest.raises(EnqueueFailed, match="worker's own"):
            await operator.inspection.retry_dead([letter.id])
    with pytest.raises(EnqueueFailed, match="no queue for 'bcast"):  # it knew the queue
        await sender.inspection.retry_dead([letter.id])
    assert [one.id for one in await sender.inspection.dead(own)] == [letter.id]
    await sender.inspection.drop_dead([letter.id])


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("broker", ["redis://localhost", "sqlite:///never.db"])
async def test_a_broker_that_has_no_broadcasts_says_so(broker: str) -> None:
    app = AQueue("app", broker=broker, settings=Settings(queues={"all": BROADCAST}))
    with pytest.raises(ConfigurationError, match="'all' is a broadcast, which only RabbitMQ can carry"):
        await app.send_task("x")


@pytest.mark.parametrize(
    "options", [{"exchange_type": "topic"}, {"routing_key": "x"}, {"arguments": {"x-queue-type": "quorum"}}]
)
def test_a_broadcast_of_another_kind_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="fanout"):
        Queue(broadcast=True, **options)
