"""Servers, and checks that no test leaves anything behind."""

import asyncio
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from uuid import uuid4

import pytest
import pytest_asyncio

from aqueue.url import Url
from tests.kit.databases import MariaDbServer, PostgresServer
from tests.kit.proxy import Proxy
from tests.kit.rabbitmq import RabbitServer
from tests.kit.servers import MemcachedServer, RedisServer, S3Server

# A shell starts what runs in its background with Ctrl-C ignored, and every process of a test would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

#: Every broker and store that keeps the whole contract.
KINDS = ("memory", "sqlite", "redis", "rabbitmq")


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """One Redis for the whole run; `redis_url` empties it for each test."""
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    yield server
    server.stop()


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    with redis_server.client() as client:
        client.flushall()
        client.script_flush()
    return redis_server.url


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """A Redis that a test may kill and freeze."""
    server = RedisServer(tmp_path / "redis")
    yield server
    server.stop()


@pytest.fixture
def redis_proxy(redis_server: RedisServer, redis_url: str) -> Iterator[Proxy]:
    proxy = Proxy(redis_server.port)
    yield proxy
    proxy.close()


@pytest.fixture(scope="session")
def rabbit_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """One RabbitMQ for the whole run; tests have queues of their own."""
    server = RabbitServer(tmp_path_factory.mktemp("rabbitmq"))
    yield server
    server.stop()


@pytest.fixture
def rabbit_url(rabbit_server: RabbitServer) -> str:
    rabbit_server.forget_the_dead()
    return rabbit_server.url


@pytest.fixture
def own_rabbit(tmp_path: Path) -> Iterator[RabbitServer]:
    """A RabbitMQ that a test may kill and freeze."""
    server = RabbitServer(tmp_path / "rabbitmq")
    yield server
    server.stop()


@pytest.fixture
def rabbit_proxy(rabbit_server: RabbitServer, rabbit_url: str) -> Iterator[Proxy]:
    proxy = Proxy(rabbit_server.port)
    yield proxy
    proxy.close()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One PostgreSQL for the whole run; `postgresql_url` empties it for each test."""
    server = PostgresServer()
    yield server
    server.stop()


@pytest.fixture
def postgresql_url(postgres_server: PostgresServer) -> str:
    postgres_server.empty()
    return postgres_server.url


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[MariaDbServer]:
    """One MariaDB for the whole run; `mariadb_url` empties it for each test."""
    server = MariaDbServer()
    yield server
    server.stop()


@pytest.fixture
def mariadb_url(mariadb_server: MariaDbServer) -> str:
    mariadb_server.empty()
    return mariadb_server.url


@pytest.fixture(scope="session")
def memcached_server() -> Iterator[MemcachedServer]:
    """One memcached for the whole run; `memcached_url` empties it for each test."""
    server = MemcachedServer()
    yield server
    server.stop()


@pytest.fixture
def memcached_url(memcached_server: MemcachedServer) -> str:
    with closing(memcached_server.client()) as client:
        client.flush_all(noreply=False)
    return memcached_server.url


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """One emulator of S3 for the whole run; `s3_url` makes a bucket for each test."""
    server = S3Server(tmp_path_factory.mktemp("s3"))
    yield server
    server.stop()


@pytest.fixture
def s3_url(s3_server: S3Server) -> str:
    bucket = f"results-{uuid4().hex[:8]}"
    s3_server.make_bucket(bucket)
    return s3_server.url(bucket, "kept/")


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def url(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Url:
    if kind in ("redis", "rabbitmq"):
        return Url(request.getfixturevalue({"redis": "redis_url", "rabbitmq": "rabbit_url"}[kind]))
    return Url({"memory": "memory://", "sqlite": f"sqlite:///{tmp_path / 'queue.db'}"}[kind])


@pytest.fixture
def queue() -> str:
    """A queue of the test's own."""
    return f"q-{uuid4().hex[:8]}"


@pytest_asyncio.fixture(autouse=True)
async def nothing_is_left_running() -> AsyncIterator[None]:
    """A test may leave no asyncio task and no thread of aqueue's behind."""
    tasks = asyncio.all_tasks()
    threads = set(threading.enumerate())
    yield
    for _ in range(100):
        left = [task for task in asyncio.all_tasks() - tasks if not task.done()]
        running = [thread for thread in set(threading.enumerate()) - threads if _ends_with_its_test(thread)]
        left = [task for task in left if task is not asyncio.current_task()]
        if not left and not running:
            return
        await asyncio.sleep(0.01)
    pytest.fail(f"left running: {left} {running}")


def _ends_with_its_test(thread: threading.Thread) -> bool:
    """Ours, and those of aiosqlite: one that could not open its file answers later, and not to a closed loop."""
    return thread.name.startswith("aqueue-") or "_connection_worker_thread" in thread.name
