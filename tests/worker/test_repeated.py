"""A task whose result was stored, and whose message was not settled: it is not run a second time."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from aqueue import AQueue, Context, Settings
from aqueue.outcome import Done, Outcome, Repeated
from aqueue.results import Result
from aqueue.url import Url
from tests.kit.proxy import Proxy
from tests.kit.servers import RedisServer
from tests.kit.waiting import until
from tests.kit.workers import WorkerProcess
from tests.worker.conftest import QUICK, StartWorker

#: The first worker process dies behind its result, and the first behind its commit, so that nothing is settled. Its
#: supervisor starts another one.
SHOP = """
import os
import signal
import sqlite3

from aqueue import AQueue, Context, Settings
from aqueue.results.sqlite import SqliteResults
from aqueue.url import Url


def die_once():
    try:
        open("died", "x").close()
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


class Dying(SqliteResults):
    async def put(self, records):
        await super().put(records)
        die_once()


app = AQueue(
    "shop",
    broker=os.environ["BROKER"],
    backend=Dying.factory(Url("sqlite:///results.db")),
    settings=Settings(lease=1.0),
)


@app.task
async def charge(ctx: Context, order: int) -> str:
    with open("ran", "a") as file:
        file.write(f"{order} {ctx.deliveries}\\n")
    return f"paid {order} by delivery {ctx.deliveries}"


@app.task
async def pay(ctx: Context, order: int) -> bool:
    database = sqlite3.connect("shop.db")
    with ctx.effect(database, "pay") as first:
        if first:
            database.execute("INSERT INTO payments VALUES (?)", (order,))
    database.close()
    die_once()
    return first
"""


@pytest.fixture(params=["redis", "rabbitmq"])
def kind(request: pytest.FixtureRequest) -> str:
    """Brokers that are not the result store."""
    found: str = request.param
    return found


@pytest.fixture
def worker(tmp_path: Path, url: Url) -> Iterator[WorkerProcess]:
    (tmp_path / "shop.py").write_text(SHOP)
    started = WorkerProcess(tmp_path, "shop:app", env={"BROKER": url.reveal()})
    yield started
    started.process.stop()


def client(tmp_path: Path, url: Url) -> AQueue:
    store = f"sqlite:///{tmp_path / 'results.db'}"
    return AQueue("client", broker=url.reveal(), backend=store, settings=Settings(lease=1.0))


async def test_what_succeeded_before_its_worker_was_killed_is_settled_and_not_run(
    tmp_path: Path, url: Url, worker: WorkerProcess
) -> None:
    async with client(tmp_path, url) as app:
        result = await app.send_task("shop.charge", (7,))
        assert await result.get(20) == "paid 7 by delivery 1"
        await until(lambda: "came back after it had succeeded; it is not run again" in worker.log, "it comes back", 20)
        later = await app.send_task("shop.charge", (8,))
        assert await later.get(10) == "paid 8 by delivery 1"
        assert await result.get(1) == "paid 7 by delivery 1"
        assert (tmp_path / "ran").read_text() == "7 1\n8 1\n"
        worker.terminate()
        assert worker.wait() == 0
        assert "has died" in worker.log
        assert await app.producer().broker.fetch(["celery"], 1, 0.1) == []


async def test_an_effect_is_there_once_when_its_worker_was_killed_behind_the_commit(
    tmp_path: Path, url: Url, worker: WorkerProcess
) -> None:
    with closing(sqlite3.connect(tmp_path / "shop.db")) as database:
        database.execute("CREATE TABLE payments (orders)")
        async with client(tmp_path, url) as app:
            result = await app.send_task("shop.pay", (7,))
            assert await result.get(30) is False
        assert "has died" in worker.log
        assert database.execute("SELECT orders FROM payments").fetchall() == [(7,)]
        assert database.execute("SELECT task_id, step FROM aqueue_effects").fetchall() == [(result.id, "pay")]


async def lose(broker: str) -> None:
    """Claim a message for a worker that is never heard of again."""
    async with AQueue("lost", broker=broker, settings=QUICK) as other:
        assert len(await other.producer().broker.fetch(["celery"], 1, 5)) == 1


@pytest.mark.parametrize("state", ["SUCCESS", "FAILURE", "RETRY", "STARTED"])
@pytest.mark.parametrize("ignored", [False, True])
async def test_only_a_stored_success_keeps_a_task_from_running_again(
    redis_url: str, tmp_path: Path, start_worker: StartWorker, state: str, ignored: bool
) -> None:
    app = AQueue("shop", broker=redis_url, backend=f"sqlite:///{tmp_path / 'results.db'}", settings=QUICK)
    ended: list[Outcome] = []
    ran: list[int] = []

    @app.task(ignore_result=ignored)
    async def work(ctx: Context) -> int:
        ran.append(ctx.deliveries)
        return 2

    @app.add_observer
    def watch(context: Context, outcome: Outcome, seconds: float) -> None:
        ended.append(outcome)

    async with app:
        sent = await work.send()
        await lose(redis_url)
        store = app.producer().store
        await store.put([store.record(Result(task_id=sent.id, state=state, value=1))])
        await start_worker(app)
        await until(lambda: ended, "the message comes back")
    assert ended == ([Repeated()] if state == "SUCCESS" and not ignored else [Done(2)])
    assert ran == ([] if isinstance(ended[0], Repeated) else [2])


async def test_while_nobody_can_say_whether_it_succeeded_it_waits(
    redis_server: RedisServer, tmp_path: Path, start_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    proxy = Proxy(redis_server.port)
    broker, store = f"sqlite:///{tmp_path / 'queue.db'}", f"redis://127.0.0.1:{proxy.port}/0"
    app = AQueue("shop", broker=broker, backend=store, settings=QUICK)
    ran: list[int] = []

    @app.task
    async def work(ctx: Context) -> int:
        ran.append(ctx.deliveries)
        return ctx.deliveries

    async with app:
        await work.send()
        await lose(broker)
        proxy.close()
        await start_worker(app)
        await until(lambda: "came back, and waits for the result store" in caplog.text, "it comes back", 20)
        assert ran == []
        (depth,) = await app.producer().broker.inspection.queues()
        assert (depth.parked or 0) + (depth.leased or 0) == 1
