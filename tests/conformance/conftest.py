"""One broker or store after the other, all through the same tests."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from uuid import uuid4

import pytest
import pytest_asyncio
from msgspec.structs import replace

from aqueue import broker as brokers
from aqueue import results as stores
from aqueue.broker import Broker, BrokerFactory, BrokerOptions, Queue
from aqueue.results import ResultStore, StoreFactory, StoreOptions
from aqueue.url import Url

#: Seconds; short, for tests in which leases end. In all others they don't, however slow the machine is.
LEASE = 1.0

#: RabbitMQ keeps apart only the priorities that a queue was declared for.
QUEUES = {"*": Queue(max_priority=9)}

MakeBroker = Callable[..., Awaitable[Broker]]
MakeStore = Callable[..., Awaitable[ResultStore]]


@pytest.fixture
def broker_factory(url: Url) -> BrokerFactory:
    return brokers.from_url(url)


@pytest.fixture
def store_factory(url: Url) -> StoreFactory:
    return stores.from_url(url)


@pytest_asyncio.fixture
async def make_broker(broker_factory: BrokerFactory) -> AsyncIterator[MakeBroker]:
    """Connect once more to the same server, like another process."""
    async with AsyncExitStack() as stack:

        async def make(**options: object) -> Broker:
            broker = broker_factory(replace(BrokerOptions(lease=30.0, queues=QUEUES), **options))
            broker.holder = f"holder-{uuid4().hex[:6]}"
            return await stack.enter_async_context(broker)

        yield make


@pytest_asyncio.fixture
async def broker(make_broker: MakeBroker) -> Broker:
    return await make_broker()


@pytest_asyncio.fixture
async def make_store(store_factory: StoreFactory) -> AsyncIterator[MakeStore]:
    async with AsyncExitStack() as stack:

        async def make(**options: object) -> ResultStore:
            return await stack.enter_async_context(store_factory(replace(StoreOptions(), **options)))

        yield make


@pytest_asyncio.fixture
async def store(make_store: MakeStore) -> ResultStore:
    return await make_store()
