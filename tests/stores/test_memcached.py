"""What is particular to memcached: keys, flags and lives, several servers, its limits, and a server that goes away."""

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, closing
from pathlib import Path

import pytest
import pytest_asyncio
from pymemcache.client.hash import HashClient

from aqueue.drivers.memcached_servers import Server, choose, parse_servers
from aqueue.errors import ConfigurationError, EncodeError, MessageTooLarge, StoreUnavailable
from aqueue.results import FAILURE, STARTED, SUCCESS, RemoteError, Result, ResultStore, StoreOptions, from_url
from aqueue.results.memcached import MemcachedResults
from aqueue.serialization import Limits
from aqueue.url import Url
from tests.kit.servers import MemcachedServer, Process, require, wait_for
from tests.kit.waiting import until

Open = Callable[..., Awaitable[ResultStore]]


@pytest_asyncio.fixture
async def open_store() -> AsyncIterator[Open]:
    async with AsyncExitStack() as stack:

        async def make(url: str, timeout: float = 5.0, expires: float | None = 86400.0) -> ResultStore:
            options = StoreOptions(timeout=timeout, expires=expires, limits=Limits(message=4_000_000))
            return await stack.enter_async_context(from_url(Url(url))(options))

        yield make


@pytest.fixture
def own_memcached() -> Iterator[MemcachedServer]:
    """One that a test may kill and freeze."""
    server = MemcachedServer()
    yield server
    server.stop()


def success(task_id: str, value: object = 5) -> Result:
    return Result(task_id=task_id, state=SUCCESS, value=value)


def kept(server: MemcachedServer, key: str) -> dict[str, int]:
    """Seconds to live (t), flags (f) and size (s) of what is stored."""
    with closing(server.client()) as client:
        answer: bytes = client.raw_command(f"mg {key} t f s")
    return {field[:1]: int(field[1:]) for field in answer.decode().split()[1:]}


async def put(store: ResultStore, *results: Result) -> None:
    await store.put([store.record(result) for result in results])


# --- what is stored --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expires", "at_least", "at_most"),
    [
        (86400.0, 86390, 86400),
        (None, -1, -1),
        (0.2, 1, 2),
        # Over 30 days a life is written as a time, and memcached's own clock is behind, on a busy machine by seconds.
        (90 * 86400.0, 90 * 86400 - 10, 90 * 86400 + 10),
    ],
)
async def test_a_result_has_flags_0_and_its_life(
    memcached_server: MemcachedServer, memcached_url: str, open_store: Open,
    expires: float | None, at_least: int, at_most: int,
) -> None:  # fmt: skip
    store = await open_store(memcached_url, expires=expires)
    await put(store, Result(task_id="a", state=STARTED), success("a"))
    found = kept(memcached_server, "celery-task-meta-a")
    assert found["f"] == 0
    assert at_least <= found["t"] <= at_most


async def test_a_prefix_is_before_the_key(
    memcached_server: MemcachedServer, memcached_url: str, open_store: Open
) -> None:
    await put(await open_store(f"{memcached_url}?key_prefix=mine"), success("a"))
    assert kept(memcached_server, "mine_celery-task-meta-a")["s"] > 0


async def test_hundreds_of_results_are_read_with_few_requests(memcached_url: str, open_store: Open) -> None:
    writer, reader = await open_store(memcached_url), await open_store(memcached_url)
    waiting = [asyncio.create_task(reader.get(f"{i}", wait=10)) for i in range(350)]
    await put(writer, *[success(f"{i}", i) for i in range(350)])
    assert [result and result.value for result in await asyncio.gather(*waiting)] == list(range(350))


async def test_of_many_writers_none_overwrites_a_success(memcached_url: str, open_store: Open) -> None:
    stores = [await open_store(memcached_url) for _ in range(4)]
    ids = [f"{i}" for i in range(30)]
    told: dict[str, Result] = {}

    async def succeed(store: ResultStore) -> None:
        for task_id in ids:
            await put(store, success(task_id))
            found = await store.get(task_id)
            assert found is not None
            told[task_id] = found

    async def fail(store: ResultStore) -> None:
        for task_id in ids * 3:
            await put(store, Result(task_id=task_id, state=FAILURE, value=RemoteError("E", [], "m")))

    await asyncio.gather(succeed(stores[0]), *[fail(store) for store in stores[1:]])
    assert {found.state for found in told.values()} == {SUCCESS}
    for task_id in ids:
        assert await stores[0].get(task_id) == success(task_id)


@pytest.mark.parametrize("state", [None, STARTED])
async def test_what_was_read_before_a_success_came_does_not_overwrite_it(
    memcached_url: str, open_store: Open, state: str | None
) -> None:
    """The steps of two writers, one between the other's."""
    one, other = await open_store(memcached_url), await open_store(memcached_url)
    assert isinstance(one, MemcachedResults)
    failure = one.record(Result(task_id="a", state=FAILURE, value=RemoteError("E", [], "m")))
    if state is not None:
        await put(other, Result(task_id="a", state=state))
    read = await one._items([failure.key])
    await put(other, success("a"))
    assert await one._write([(failure, read.get(failure.key))]) == [failure.key]
    assert await one.get("a") == success("a")


# --- limits ----------------------------------------------------------------------------------------------------------


async def test_what_is_too_large_is_told_before_it_is_sent(memcached_url: str, open_store: Open) -> None:
    store = await open_store(memcached_url)
    largest = 1024 * 1024 - 512 - len(store.record(success("a", "")).value)
    await put(store, success("a", "x" * largest))
    assert await store.get("a") == success("a", "x" * largest)
    with pytest.raises(MessageTooLarge, match="item_size"):
        store.record(success("b", "x" * (largest + 1)))


async def test_a_server_that_takes_more_gets_more(open_store: Open) -> None:
    server = MemcachedServer("-I", "4m")
    try:
        store = await open_store(f"{server.url}?item_size={4 * 1024 * 1024}")
        await put(store, success("a", "x" * 3_000_000))
        assert await store.get("a") == success("a", "x" * 3_000_000)
    finally:
        server.stop()


async def test_a_refusal_of_the_server_is_told(memcached_url: str, open_store: Open) -> None:
    store = await open_store(f"{memcached_url}?item_size={4 * 1024 * 1024}")
    with pytest.raises(StoreUnavailable, match="too large"):
        await put(store, success("a", "x" * 3_000_000))
    await put(store, success("b"))
    assert await store.get("b") == success("b")


@pytest.mark.parametrize("task_id", ["with space", "line\r\nset x 0 0 1", "é", "x" * 240, "\x00"])
async def test_an_id_that_makes_no_key_is_refused(memcached_url: str, open_store: Open, task_id: str) -> None:
    store = await open_store(memcached_url)
    with pytest.raises(EncodeError, match="key of memcached"):
        store.record(success(task_id))
    assert await store.get(task_id) is None
    assert await store.get(task_id, wait=0.05) is None
    await store.forget(task_id)


# --- several servers -------------------------------------------------------------------------------------------------


async def test_several_servers_share_the_keys_as_celerys_client_shares_them(open_store: Open) -> None:
    servers = [MemcachedServer() for _ in range(3)]
    try:
        store = await open_store(f"cache+memcached://{';'.join(server.host for server in servers)}/")
        await put(store, *[success(f"{i}", i) for i in range(60)])
        with closing(HashClient([server.host for server in servers])) as client:
            for i in range(60):
                assert client.get(f"celery-task-meta-{i}") == store.record(success(f"{i}", i)).value
                client.set(f"celery-task-meta-t{i}", store.record(success(f"t{i}", i)).value, noreply=False)
        for i in range(60):
            assert await store.get(f"t{i}") == success(f"t{i}", i)
    finally:
        for server in servers:
            server.stop()


async def test_one_of_several_servers_is_away_and_the_others_work(open_store: Open) -> None:
    servers = [MemcachedServer() for _ in range(2)]
    names = [server.host for server in servers]
    try:
        store = await open_store(f"cache+memcached://{';'.join(names)}/")
        here = next(f"{i}" for i in range(100) if choose(names, f"celery-task-meta-{i}") == names[0])
        there = next(f"{i}" for i in range(100) if choose(names, f"celery-task-meta-{i}") == names[1])
        servers[1].kill()
        await put(store, success(here))
        assert await store.get(here) == success(here)
        with pytest.raises(StoreUnavailable, match=names[1]):
            await store.get(there)
    finally:
        for server in servers:
            server.stop()


# --- a server that goes away -----------------------------------------------------------------------------------------


async def test_a_server_that_is_lost_is_used_again_when_it_is_back(
    own_memcached: MemcachedServer, open_store: Open
) -> None:
    store = await open_store(own_memcached.url, timeout=1.0)
    await put(store, success("a"))
    own_memcached.kill()
    start = time.monotonic()
    for _ in range(3):
        with pytest.raises(StoreUnavailable, match=own_memcached.host):
            await put(store, success("b"))
        with pytest.raises(StoreUnavailable):
            await store.get("a")
        with pytest.raises(StoreUnavailable):
            await store.get("a", wait=5)
        with pytest.raises(StoreUnavailable):
            await store.announce([store.record(success("c"))])
        with pytest.raises(StoreUnavailable):
            await store.forget("a")
    assert time.monotonic() - start < 5, "a refused connection needs no deadline"
    own_memcached.start()
    await put(store, success("b"))
    assert await store.get("b", wait=5) == success("b")


async def test_who_waits_is_told_when_the_server_is_lost(own_memcached: MemcachedServer, open_store: Open) -> None:
    store = await open_store(own_memcached.url, timeout=1.0)
    waiting = asyncio.create_task(store.get("a", wait=30))
    await asyncio.sleep(0.1)
    own_memcached.kill()
    with pytest.raises(StoreUnavailable):
        await asyncio.wait_for(waiting, 10)


async def test_a_frozen_server_costs_the_time_of_one_command_and_no_answer_is_mixed_up(
    own_memcached: MemcachedServer, open_store: Open
) -> None:
    store = await open_store(own_memcached.url, timeout=0.5)
    await put(store, success("a", "a"), success("b", "b"))
    own_memcached.pause()
    start = time.monotonic()
    with pytest.raises(StoreUnavailable, match=r"no answer within 0\.5 s"):
        await store.get("a")
    assert time.monotonic() - start < 3
    own_memcached.go_on()
    wait_for(lambda: kept(own_memcached, "celery-task-meta-a"), "the server answers")
    assert await store.get("b") == success("b", "b")
    assert await store.get("a") == success("a", "a")


async def test_a_wait_that_is_given_up_leaves_the_connection_in_order(memcached_url: str, open_store: Open) -> None:
    store = await open_store(memcached_url)
    await put(store, *[success(f"{i}", i) for i in range(50)])
    for _ in range(20):
        waiting = [asyncio.create_task(store.get(f"{i}")) for i in range(50)]
        await asyncio.sleep(0)
        for task in waiting[::2]:
            task.cancel()
        for i, task in enumerate(waiting):
            await asyncio.wait([task])
            if not task.cancelled():
                assert task.result() == success(f"{i}", i)


async def test_what_is_evicted_is_written_anew(memcached_url: str, memcached_server: MemcachedServer) -> None:
    async with from_url(Url(memcached_url))(StoreOptions()) as store:
        await put(store, Result(task_id="a", state=STARTED))
        with closing(memcached_server.client()) as client:
            client.flush_all(noreply=False)
        await put(store, success("a"))

        async def is_there() -> bool:
            return await store.get("a") == success("a")

        await until(is_there, "the result")


# --- URLs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "servers"),
    [
        ("cache+memcached://127.0.0.1:11211/", [Server("127.0.0.1", 11211)]),
        ("cache+memcached://cache", [Server("cache", 11211)]),
        ("cache+memcached://a:1;b:2;/", [Server("a", 1), Server("b", 2)]),
        ("cache+memcached://a:1;a:1", [Server("a", 1)]),
        ("cache+pymemcache://[::1]:7;[::1]/", [Server("::1", 7), Server("::1", 11211)]),
        ("cache+memcached:///run/m.sock", [Server("/run/m.sock", 0)]),
        ("cache+memcached://unix:/run/m.sock", [Server("/run/m.sock", 0)]),
    ],
)
def test_servers_are_named_as_celery_names_them(url: str, servers: list[Server]) -> None:
    assert parse_servers(Url(url), ()) == servers


@pytest.mark.parametrize(
    "url",
    [
        "cache+memcached://",
        "cache+memcached://;/",
        "cache+memcached://host:port/",
        "cache+memcached://host:99999/",
        "cache+memcached://me:s3cr3t@host/",
        "cache+memcached://host/?other=1",
        "cache+memcached://host/?item_size=big",
    ],
)
def test_a_url_that_can_not_work_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        from_url(Url(url))
    assert "s3cr3t" not in str(caught.value)


async def test_a_socket_is_used_like_a_port(open_store: Open) -> None:
    folder = Path(tempfile.mkdtemp(prefix="aq"))  # short enough for a socket's name, and open to memcached's user
    folder.chmod(0o777)
    path = folder / "m.sock"
    user = ["-u", "nobody"] if os.getuid() == 0 else []
    server = Process([require("memcached", "memcached"), "-s", str(path), "-a", "777", *user])
    try:
        await until(path.exists, "the socket")
        store = await open_store(f"cache+memcached://{path}")
        await put(store, success("a"))
        assert await store.get("a") == success("a")
    finally:
        server.stop()
        shutil.rmtree(folder)
