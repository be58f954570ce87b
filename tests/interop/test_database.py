"""Results in Celery's own tables: each kind of worker writes, each kind of client reads."""

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final

import pytest
import sqlalchemy as sa

from aqueue import AQueue
from tests.interop import aqueue_app, celery_app
from tests.interop.conftest import SOON
from tests.interop.read_by_both import ReadByBoth
from tests.interop.workers import Site, WorkerProcess, aqueue_worker, celery_worker
from tests.kit.databases import MariaDbServer, PostgresServer
from tests.kit.servers import RedisServer

QUEUE: Final = "database"


@dataclass
class Pair:
    """Clients of both kinds, and a worker of one, that keep results in one database."""

    site: Site
    queue: str
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
            yield Pair(site, QUEUE, results, worker, theirs)
            assert worker.is_alive
    finally:
        theirs.close()
        site.traces.close()
        server.stop()


class TestDatabase(ReadByBoth):
    pass


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
