"""Results in Celery's own tables: each kind of worker writes, each kind of client reads."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final

import pytest
import sqlalchemy as sa

from aqueue import AQueue, TaskFailed
from aqueue.results import FAILURE, RemoteError, Result
from tests.interop import aqueue_app, celery_app
from tests.interop.conftest import SOON, ended
from tests.interop.workers import Site, WorkerProcess, aqueue_worker, celery_worker
from tests.kit.databases import MariaDbServer, PostgresServer
from tests.kit.servers import RedisServer
from tests.kit.waiting import until

QUEUE: Final = "database"
VALUES: Final = [5, None, 2**70, "", {"a": [1, "é\x00"]}, "x" * 50_000]


@dataclass
class Pair:
    """Clients of both kinds, and a worker of one, that keep results in one database."""

    site: Site
    results: str
    worker: WorkerProcess
    theirs: Any

    def ours(self) -> AQueue:
        return aqueue_app.make(self.site.broker, self.results)

    def row(self, task_id: str) -> dict[str, Any]:
        engine = sa.create_engine(self.results.removeprefix("db+"), poolclass=sa.NullPool)
        with closing(engine.connect()) as connection:
            rows = connection.execute(sa.text("SELECT * FROM celery_taskmeta WHERE task_id = :id"), {"id": task_id})
            return dict(rows.mappings().one())


@pytest.fixture(scope="module", params=["sqlite", "postgresql", "mariadb"])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A URL as Celery's users write it, with a blocking driver."""
    if request.param == "sqlite":
        return f"db+sqlite:///{tmp_path_factory.mktemp('results')}/db.sqlite3"
    if request.param == "postgresql":
        postgres: PostgresServer = request.getfixturevalue("postgres_server")
        postgres.empty()
        return postgres.url.replace("postgresql:", "postgresql+psycopg2:")
    mariadb: MariaDbServer = request.getfixturevalue("mariadb_server")
    mariadb.empty()
    return mariadb.url.replace("mysql:", "mysql+pymysql:")


@pytest.fixture(scope="module", params=["celery", "aqueue"])
def pair(
    request: pytest.FixtureRequest, results: str, tmp_path_factory: pytest.TempPathFactory, celery_pools: None
) -> Iterator[Pair]:
    """The tables are made by whichever worker comes first; the other finds them."""
    start: Callable[..., WorkerProcess] = {"aqueue": aqueue_worker, "celery": celery_worker}[request.param]
    folder = tmp_path_factory.mktemp("pair")
    server = RedisServer(folder / "redis")
    site = Site(server)
    settings: dict[str, Any] = {"result_extended": True}
    ours = {**settings, "track_started": True} if request.param == "aqueue" else settings
    theirs = celery_app.make(site.broker, results, **settings)
    try:
        with start(folder, site.broker, results, queues=QUEUE, settings=ours) as worker:
            yield Pair(site, results, worker, theirs)
            assert worker.is_alive
    finally:
        theirs.close()
        site.traces.close()
        server.stop()


async def test_values_are_read_by_both(pair: Pair) -> None:
    async with pair.ours() as app:
        for value in VALUES:
            theirs = pair.theirs.send_task("interop.give", [value], queue=QUEUE)
            ours = await app.send_task("interop.give", [value], queue=QUEUE)
            assert await ended(theirs) == value
            assert await ours.get(SOON) == value
            assert await app.result(theirs.id, known=True).get(SOON) == value
            assert await ended(pair.theirs.AsyncResult(ours.id)) == value


async def test_failures_are_read_by_both(pair: Pair) -> None:
    async with pair.ours() as app:
        theirs = pair.theirs.send_task("interop.fail", ["bööm"], queue=QUEUE)
        ours = await app.send_task("interop.fail", ["bööm"], queue=QUEUE)
        for task_id in (theirs.id, ours.id):
            found = pair.theirs.AsyncResult(task_id)
            with pytest.raises(ValueError, match="bööm"):
                await ended(found)
            assert (found.state, found.children) == ("FAILURE", None)
            assert "bööm" in found.traceback
            with pytest.raises(TaskFailed, match="bööm") as caught:
                await app.result(task_id, known=True).get(SOON)
            assert caught.value.type == "ValueError"
            assert "bööm" in (caught.value.traceback or "")


async def test_states_on_the_way_are_read_by_both(pair: Pair, key: str) -> None:
    async with pair.ours() as app:
        ours = await app.send_task("interop.wait_for_flag", [pair.site.port, key], queue=QUEUE)
        theirs = pair.theirs.AsyncResult(ours.id)

        async def started() -> bool:
            return await ours.state() == "STARTED"

        await until(started, "state STARTED", SOON)
        assert theirs.state == "STARTED"
        assert not theirs.ready()
        assert theirs.info == await ours.info()
        pair.site.put_up(key)
        assert await ours.get(SOON) == await ended(theirs)

        retried = await app.send_task("interop.retry_self", [1, 0.05], queue=QUEUE)
        assert (await retried.get(SOON))[0] == 1


async def test_who_did_what_is_read_by_both(pair: Pair) -> None:
    async with pair.ours() as app:
        ours = await app.send_task("interop.echo", [1, "é"], {"k": None}, queue=QUEUE)
        await ours.get(SOON)
        found = pair.theirs.AsyncResult(ours.id)
        assert (found.name, found.args, found.kwargs) == ("interop.echo", [1, "é"], {"k": None})
        assert (found.retries, found.queue) == (0, QUEUE)
        assert "worker" in found.worker
        assert found.date_done is not None
        result = await ours.fetch()
        assert result is not None
        assert result.extra == {
            "name": "interop.echo",
            "args": [1, "é"],
            "kwargs": {"k": None},
            "worker": found.worker,
            "retries": 0,
            "queue": QUEUE,
        }
        row = pair.row(ours.id)
        assert (row["status"], row["traceback"], row["children"], row["stamps"]) == ("SUCCESS", None, None, None)
        assert bytes(row["result"]) in (b'[[1,"\xc3\xa9"],{"k":null}]', b'[[1, "\\u00e9"], {"k": null}]')


async def test_the_children_are_read_by_both(pair: Pair) -> None:
    async with pair.ours() as app:
        ours = await app.send_task("interop.send_child", [QUEUE], queue=QUEUE)
        child = await ours.get(SOON)
        result = await ours.fetch()
        assert result is not None
        found = pair.theirs.AsyncResult(ours.id).children
        assert [task.id for task in found or []] == [document[0][0] for document in result.children or []]
        await app.result(child, known=True).get(SOON)


async def test_a_success_is_kept_by_both(pair: Pair) -> None:
    async with pair.ours() as app:
        ours = await app.send_task("interop.give", [5], queue=QUEUE)
        assert await ours.get(SOON) == 5
        store = app.producer().store
        failure = Result(task_id=ours.id, state=FAILURE, value=RemoteError("ValueError", ["late"], "builtins"))
        await store.put([store.record(failure)])
        await asyncio.to_thread(pair.theirs.backend.store_result, ours.id, ValueError("late"), "FAILURE")
        assert await ours.get(SOON) == await ended(pair.theirs.AsyncResult(ours.id)) == 5


async def test_a_result_is_forgotten_by_both(pair: Pair) -> None:
    async with pair.ours() as app:
        one, other = [await app.send_task("interop.give", [5], queue=QUEUE) for _ in range(2)]
        assert [await one.get(SOON), await other.get(SOON)] == [5, 5]
        await one.forget()
        pair.theirs.AsyncResult(other.id).forget()
        assert pair.theirs.AsyncResult(one.id).state == "PENDING"
        assert await app.result(other.id).state() == "UNKNOWN"
