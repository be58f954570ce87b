"""Results in memcached, files and S3 under Celery's names: each kind of worker writes, each kind of client reads."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from aqueue import AQueue
from tests.interop import aqueue_app, celery_app
from tests.interop.conftest import SOON, ended
from tests.interop.read_by_both import ReadByBoth
from tests.interop.workers import QUICK, Site, aqueue_worker, celery_worker
from tests.kit.servers import MemcachedServer, RedisServer, S3Server

QUEUE: Final = "kept-elsewhere"


@dataclass(frozen=True)
class Place:
    """Where results are kept, by either side's words, and a look at the bytes."""

    ours: str
    theirs: str
    read: Callable[[str], bytes | None]
    #: Celery's settings for it.
    settings: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class Pair:
    """Clients of both kinds, and a worker of one, that keep results in one place."""

    site: Site
    queue: str
    place: Place
    theirs: Any

    def ours(self) -> AQueue:
        return aqueue_app.make(self.site.broker, self.place.ours)

    def stored(self, task_id: str) -> bytes | None:
        return self.place.read(f"celery-task-meta-{task_id}")


def in_memcached(servers: list[MemcachedServer]) -> Place:
    def read(key: str) -> bytes | None:
        for server in servers:
            with closing(server.client()) as client:
                if (found := client.get(key)) is not None:
                    value: bytes = found
                    return value
        return None

    url = f"cache+memcached://{';'.join(server.host for server in servers)}/"
    return Place(url, url, read)


def in_files(folder: Path) -> Place:
    folder.mkdir()

    def read(key: str) -> bytes | None:
        path = folder / key
        return path.read_bytes() if path.exists() else None

    return Place(f"file://{folder}", f"file://{folder}", read)


def in_s3(server: S3Server) -> Place:
    server.make_bucket("interop")
    client = server.client()

    def read(key: str) -> bytes | None:
        try:
            data: bytes = client.get_object(Bucket="interop", Key=f"kept/{key}")["Body"].read()
        except client.exceptions.NoSuchKey:
            return None
        return data

    settings = {
        "s3_access_key_id": server.ACCESS_KEY,
        "s3_base_path": "kept/",
        "s3_bucket": "interop",
        "s3_endpoint_url": server.endpoint,
        "s3_region": server.REGION,
        "s3_secret_access_key": server.SECRET_KEY,
    }
    return Place(server.url("interop", "kept/"), "s3://", read, settings)


@pytest.fixture(scope="module", params=["memcached", "three memcached", "files", "S3"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    if request.param == "files":
        yield in_files(tmp_path_factory.mktemp("files") / "results")
    elif request.param == "S3":
        server = S3Server(tmp_path_factory.mktemp("s3"))
        yield in_s3(server)
        server.stop()
    else:
        servers = [MemcachedServer() for _ in range(3 if request.param.startswith("three") else 1)]
        yield in_memcached(servers)
        for one in servers:
            one.stop()


@pytest.fixture(scope="module", params=["celery", "aqueue"])
def pair(
    request: pytest.FixtureRequest, place: Place, tmp_path_factory: pytest.TempPathFactory, celery_pools: None
) -> Iterator[Pair]:
    folder = tmp_path_factory.mktemp("pair")
    server = RedisServer(folder / "redis")
    site = Site(server)
    told = {"result_extended": True, **place.settings}
    theirs = celery_app.make(site.broker, place.theirs, **told)
    if request.param == "aqueue":
        settings = {"result_extended": True, "track_started": True}
        worker = aqueue_worker(folder, site.broker, place.ours, queues=QUEUE, settings=settings)
    else:
        worker = celery_worker(folder, site.broker, place.theirs, *QUICK, queues=QUEUE, settings=told)
    try:
        with worker:
            yield Pair(site, QUEUE, place, theirs)
            assert worker.is_alive
    finally:
        close(theirs)
        site.traces.close()
        server.stop()


def close(app: Any) -> None:
    backend = app.backend
    if hasattr(backend, "client"):
        backend.client.close()
    if hasattr(backend, "_s3_resource"):
        backend._s3_resource.meta.client.close()
    app.close()


class TestKeyValueStore(ReadByBoth):
    pass


async def test_many_results_are_found_where_the_other_kind_has_put_them(pair: Pair) -> None:
    async with pair.ours() as app:
        theirs = [pair.theirs.send_task("interop.give", [i], queue=QUEUE) for i in range(30)]
        ours = await asyncio.gather(*[app.send_task("interop.give", [i], queue=QUEUE) for i in range(30)])
        assert await asyncio.gather(*[app.result(one.id, known=True).get(SOON) for one in theirs]) == list(range(30))
        assert [await ended(pair.theirs.AsyncResult(one.id)) for one in ours] == list(range(30))


async def test_the_bytes_lie_under_celerys_name(pair: Pair) -> None:
    async with pair.ours() as app:
        ours = await app.send_task("interop.give", [5], queue=QUEUE)
        assert await ours.get(SOON) == 5
        stored = await asyncio.to_thread(pair.stored, ours.id)
        assert stored is not None
        assert stored.replace(b" ", b"").startswith(b'{"status":"SUCCESS","result":5,')


async def test_who_did_what_is_read_by_both(pair: Pair) -> None:
    async with pair.ours() as app:
        ours = await app.send_task("interop.echo", [1, "é"], {"k": None}, queue=QUEUE)
        await ours.get(SOON)
        found = pair.theirs.AsyncResult(ours.id)
        assert (found.name, found.args, found.kwargs) == ("interop.echo", [1, "é"], {"k": None})
        assert (found.retries, found.queue) == (0, QUEUE)
        assert found.date_done is not None
        result = await ours.fetch()
        assert result is not None
        assert result.extra["name"] == "interop.echo"
        assert result.extra["worker"] == found.worker
