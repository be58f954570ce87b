"""Standing fleets of real workers on Redis and RabbitMQ, clients of both kinds, the workers' logs when a test fails."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol
from uuid import uuid4

import pytest
import pytest_asyncio

from aqueue import AQueue
from aqueue.worker import Worker
from tests.interop import aqueue_app, celery_app
from tests.interop.celery_names import pools
from tests.interop.workers import Site, WorkerProcess, aqueue_worker, celery_worker
from tests.kit.rabbitmq import RabbitServer
from tests.kit.servers import RedisServer

#: Queues of the standing fleets.
TO_CELERY: Final = "to-celery"
TO_AQUEUE: Final = "to-aqueue"
BOTH: Final = "both"
#: Seconds any result may take.
SOON: Final = 15.0


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        for worker in WorkerProcess.running:
            report.sections.append((f"log of {worker.title}, process {worker.pid}", worker.last_lines))
    return report


@pytest.fixture(scope="package")
def celery_pools() -> Iterator[None]:
    """Celery apps share connections; they are closed when the last test of this folder is over."""
    yield
    pools.reset()


class CeleryClients:
    """Celery apps as clients use them; closed at the end."""

    def __init__(self) -> None:
        self._apps: list[Any] = []

    def make(self, broker: str, results: str, **conf: Any) -> Any:
        app = celery_app.make(broker, results, **conf)
        self._apps.append(app)
        return app

    def close(self) -> None:
        for app in self._apps:
            close_backend(app)
            app.close()


def close_backend(app: Any) -> None:
    """Close this thread's connections for results; results that live longer have nothing to unsubscribe from."""
    backend = app.backend
    backend.result_consumer.stop()
    backend.result_consumer.subscribed_to.clear()
    backend.client.close()


@dataclass
class Fleet:
    """A Celery worker and an aqueue worker on one broker: each with a queue of its own, and one for both."""

    site: Site
    celery: WorkerProcess
    aqueue: WorkerProcess
    #: A Celery client.
    client: Any

    def check(self) -> None:
        """Both must have outlived the tests before."""
        for worker in (self.celery, self.aqueue):
            if not worker.is_alive:
                pytest.fail(f"{worker.title} has ended in a test before this one:\n{worker.last_lines}")


def _standing_fleet(
    folder: Path, results_db: int, celery_settings: dict[str, Any], aqueue_settings: dict[str, Any], rabbit: str = ""
) -> Iterator[Fleet]:
    server = RedisServer(folder / "redis")
    site = Site(server, results_db, rabbit)
    clients = CeleryClients()
    try:
        with (
            aqueue_worker(
                folder, site.broker, site.results, queues=f"{TO_AQUEUE},{BOTH}", settings=aqueue_settings
            ) as ours,
            celery_worker(
                folder, site.broker, site.results, "-c", "2", queues=f"{TO_CELERY},{BOTH}", settings=celery_settings
            ) as theirs,
        ):
            client = clients.make(site.broker, site.results, **celery_settings)
            yield Fleet(site, theirs, ours, client)
    finally:
        clients.close()
        site.traces.close()
        server.stop()


@pytest.fixture(scope="package")
def standing_plain_fleet(tmp_path_factory: pytest.TempPathFactory, celery_pools: None) -> Iterator[Fleet]:
    """Broker and results in one database; JSON alone is accepted."""
    folder = tmp_path_factory.mktemp("plain")
    yield from _standing_fleet(folder, 0, {"result_extended": True}, {"track_started": True})


#: Everything that both can read, and results that do not stay long.
_FORMATS: Final = ["json", "msgpack", "yaml", "pickle"]
_RICH: Final = {"accept_content": _FORMATS, "result_expires": 1234}


@pytest.fixture(scope="package")
def standing_rich_fleet(tmp_path_factory: pytest.TempPathFactory, celery_pools: None) -> Iterator[Fleet]:
    """Accepts every format; the results have a database of their own."""
    yield from _standing_fleet(tmp_path_factory.mktemp("rich"), 1, dict(_RICH), {**_RICH, "track_started": True})


@pytest.fixture(scope="package")
def standing_rabbit_fleet(
    tmp_path_factory: pytest.TempPathFactory, celery_pools: None, rabbit_server: RabbitServer
) -> Iterator[Fleet]:
    """As the one that accepts every format, with RabbitMQ between client and worker, in a virtual host of its own."""
    folder = tmp_path_factory.mktemp("rabbit")
    rabbit = rabbit_server.virtual_host("standing")
    yield from _standing_fleet(folder, 1, dict(_RICH), {**_RICH, "track_started": True}, rabbit)


@pytest.fixture
def plain_fleet(standing_plain_fleet: Fleet) -> Fleet:
    standing_plain_fleet.check()
    return standing_plain_fleet


@pytest.fixture
def rich_fleet(standing_rich_fleet: Fleet) -> Fleet:
    standing_rich_fleet.check()
    return standing_rich_fleet


@pytest.fixture
def rabbit_fleet(standing_rabbit_fleet: Fleet) -> Fleet:
    standing_rabbit_fleet.check()
    return standing_rabbit_fleet


@pytest.fixture(params=["plain", "rich", "rabbit"])
def fleet(request: pytest.FixtureRequest) -> Fleet:
    """One standing fleet after the other."""
    return _named(request, request.param)


@pytest.fixture(params=["plain", "rabbit"])
def either_fleet(request: pytest.FixtureRequest) -> Fleet:
    """One for each broker."""
    return _named(request, request.param)


@pytest.fixture(params=["rich", "rabbit"])
def formats_fleet(request: pytest.FixtureRequest) -> Fleet:
    """One for each broker, which accepts every format."""
    return _named(request, request.param)


def _named(request: pytest.FixtureRequest, name: str) -> Fleet:
    found: Fleet = request.getfixturevalue(f"{name}_fleet")
    return found


Connect = Callable[..., Awaitable[AQueue]]


@pytest_asyncio.fixture
async def connect() -> AsyncIterator[Connect]:
    """Make clients of ours; they are closed at the end of the test."""
    apps: list[AQueue] = []

    async def make(site: Site, **settings: Any) -> AQueue:
        app = aqueue_app.make(site.broker, site.results, **settings)
        apps.append(app)
        return app

    yield make
    for app in apps:
        await app.close()


@pytest.fixture
def celery_client(celery_pools: None) -> Iterator[Callable[..., Any]]:
    """Make Celery clients with settings of their own; closed at the end of the test."""
    clients = CeleryClients()

    def make(site: Site, **conf: Any) -> Any:
        return clients.make(site.broker, site.results, **conf)

    yield make
    clients.close()


@pytest.fixture
def site(redis_server: RedisServer, redis_url: str) -> Iterator[Site]:
    """An empty Redis for a test that starts workers of its own."""
    found = Site(redis_server, results_db=1)
    yield found
    found.traces.close()


@pytest.fixture(scope="package")
def rabbit_place(redis_server: RedisServer, rabbit_server: RabbitServer) -> Iterator[Site]:
    """A virtual host of RabbitMQ, with a Redis for results and traces; tests have queues of their own."""
    found = Site(redis_server, results_db=1, rabbit=rabbit_server.virtual_host("interop"))
    yield found
    found.traces.close()


@pytest.fixture
def rabbit_site(rabbit_place: Site, redis_url: str) -> Site:
    """The same, with its Redis empty."""
    return rabbit_place


@pytest.fixture(params=["redis", "rabbit"])
def either_site(request: pytest.FixtureRequest) -> Site:
    """For a test that starts workers of its own, on one broker after the other."""
    found: Site = request.getfixturevalue({"redis": "site", "rabbit": "rabbit_site"}[request.param])
    return found


@pytest.fixture
def key() -> str:
    """A name of the test's own: for flags, traces and queues."""
    return f"k-{uuid4().hex[:8]}"


class Call(Protocol):
    """Have a worker of the other kind run a task, and give its value."""

    async def __call__(self, task: str, /, *args: Any, **kwargs: Any) -> Any: ...


@pytest_asyncio.fixture(params=["celery client to aqueue worker", "aqueue client to celery worker"])
async def call(request: pytest.FixtureRequest, fleet: Fleet, connect: Connect) -> Call:
    """One direction after the other."""
    if request.param.startswith("celery"):

        async def by_celery(task: str, /, *args: Any, **kwargs: Any) -> Any:
            result = fleet.client.send_task(task, args, kwargs, queue=TO_AQUEUE)
            return await ended(result)

        return by_celery
    app = await connect(fleet.site, accept_content=_FORMATS)

    async def by_aqueue(task: str, /, *args: Any, **kwargs: Any) -> Any:
        result = await app.send_task(task, args, kwargs, queue=TO_CELERY)
        return await result.get(SOON)

    return by_aqueue


@asynccontextmanager
async def working(app: AQueue, *queues: str, **options: Any) -> AsyncIterator[Worker]:
    """A worker of ours in this process; what it dies of is raised at the end."""
    worker = Worker(app, queues=queues, **options)
    running = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        worker.stop()
        await running


async def ended(result: Any) -> Any:
    """Celery's ``result.get()``, without holding up this loop."""
    return await asyncio.to_thread(result.get, timeout=SOON)
