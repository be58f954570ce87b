"""One broker or store after the other, all through the same tests."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import uuid4

import pytest
import pytest_asyncio
from msgspec.structs import replace

from aqueue import broker as brokers
from aqueue import results as stores
from aqueue.broker import Broker, BrokerFactory, BrokerOptions
from aqueue.results import ResultStore, StoreFactory, StoreOptions
from aqueue.url import Url

#: Seconds; short, for tests in which leases end. In all others they don't, however slow the machine is.
LEASE = 1.0


@dataclass(frozen=True)
class Traits:
    """A kind of result store, and where it differs from what the contract asks for."""

    #: ``{folder}`` is a folder of the test's own. None: the fixture ``<kind>_url`` knows its server.
    url: str | None = None
    #: The shortest life of a result, in seconds, that the store can keep.
    shortest_life: float = 0.3
    #: Whether it keeps group_id and parent_id.
    keeps_family: bool = True


#: Every result store, also those that are no brokers. A new one is added here, and its fixture to `tests.conftest`.
STORES: Final = {
    "memory": Traits("memory://"),
    "sqlite": Traits("sqlite:///{folder}/queue.db"),
    "redis": Traits(),
    "sqlite_database": Traits("db+sqlite:///{folder}/results.db", keeps_family=False),
    "postgresql": Traits(keeps_family=False),
    "mariadb": Traits(keeps_family=False, shortest_life=2.0),  # its times are whole seconds
    "memcached": Traits(shortest_life=2.0),  # its clock ticks in seconds
    "file": Traits("file://{folder}/results"),
    "s3": Traits(shortest_life=2.0),  # it tells the second of a write
}

MakeBroker = Callable[..., Awaitable[Broker]]
MakeStore = Callable[..., Awaitable[ResultStore]]


@pytest.fixture
def broker_factory(url: Url) -> BrokerFactory:
    return brokers.from_url(url)


@pytest.fixture(params=STORES)
def store_kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def traits(store_kind: str) -> Traits:
    return STORES[store_kind]


@pytest.fixture
def store_url(store_kind: str, traits: Traits, request: pytest.FixtureRequest, tmp_path: Path) -> Url:
    if traits.url is None:
        return Url(request.getfixturevalue(f"{store_kind}_url"))
    return Url(traits.url.format(folder=tmp_path))


@pytest.fixture
def store_factory(store_url: Url) -> StoreFactory:
    return stores.from_url(store_url)


@pytest_asyncio.fixture
async def make_broker(broker_factory: BrokerFactory) -> AsyncIterator[MakeBroker]:
    """Connect once more to the same server, like another process."""
    async with AsyncExitStack() as stack:

        async def make(**options: object) -> Broker:
            broker = broker_factory(replace(BrokerOptions(lease=30.0), **options))
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
