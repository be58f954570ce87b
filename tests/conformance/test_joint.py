"""What a broker and a result store do together when they share a server."""

import asyncio

import pytest

from aqueue.broker import Ack, Bury, Release
from aqueue.results import FAILURE, PENDING, Result
from aqueue.url import Url
from tests.conformance.conftest import MakeBroker, MakeStore
from tests.conformance.test_broker import message
from tests.conformance.test_results import success


@pytest.fixture
def store_url(url: Url) -> Url:
    """The broker's own."""
    return url


async def test_a_broker_on_the_same_server_takes_records_along(
    kind: str, make_broker: MakeBroker, make_store: MakeStore, queue: str
) -> None:
    broker, store = await make_broker(), await make_store()
    assert broker.keeps(store.place) is (kind in ("sqlite", "redis"))
    if kind in ("memory", "rabbitmq"):
        return
    announced = message(queue, "a")
    announced.announce = store.record(Result(task_id="a", state=PENDING))
    await broker.publish([announced])
    await broker.publish([announced])  # sent before: left out
    pending = await store.get("a")
    assert pending is not None
    assert pending.state == PENDING
    (delivery,) = await broker.fetch([queue], 10, 1)
    waiting = asyncio.create_task(store.get("a", wait=5))
    await asyncio.sleep(0.05)
    await broker.settle([(delivery, Ack(record=store.record(success("a"))))])
    assert await waiting == success("a")

    await broker.publish([message(queue, "b"), message(queue, "c")])
    b, c = await broker.fetch([queue], 10, 1)
    await broker.settle([(b, Bury("x", record=store.record(Result(task_id="b", state=FAILURE)))), (c, Release())])
    buried = await store.get("b")
    assert buried is not None
    assert buried.state == FAILURE
    # The claim of c is over: what an older holder says of it is not stored.
    assert await broker.settle([(c, Ack(record=store.record(success("c"))))]) == [c]
    assert await store.get("c") is None
