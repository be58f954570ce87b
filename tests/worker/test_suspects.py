"""Messages whose workers were lost twice run alone; what ran beside a message that kills its workers is acquitted."""

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from aqueue import AQueue, Context, Settings
from aqueue.broker import Release
from aqueue.protocol import Message
from aqueue.url import Url
from tests.kit.waiting import until
from tests.kit.workers import WorkerProcess
from tests.worker.conftest import MakeApp, StartWorker, running

#: Where suspects come from, so that a test can lose them before its worker sees them.
THEIRS = "theirs"


@pytest.fixture
def app_of_short_leases(make_app: MakeApp) -> AQueue:
    return make_app(lease=0.3, max_deliveries=3)


@pytest_asyncio.fixture
async def app(app_of_short_leases: AQueue) -> AsyncIterator[AQueue]:
    async with app_of_short_leases as made:
        yield made


async def lose(app: AQueue, count: int, times: int = 2) -> None:
    """Claim ``count`` messages and let the leases end, until each was lost so often."""
    broker = app.producer().broker
    losses: dict[str, int] = {}
    while len(losses) < count or min(losses.values()) < times:
        for delivery in await broker.fetch([THEIRS], count, 10):
            assert isinstance(delivery.message, Message)
            if delivery.deliveries > times:  # it waits for the others
                await broker.settle([(delivery, Release(last=True))])
            else:
                losses[delivery.message.headers["id"]] = delivery.deliveries


def waits(caplog: pytest.LogCaptureFixture) -> bool:
    return "is to run alone" in caplog.text


async def test_a_suspect_runs_when_nothing_else_does(
    app: AQueue, start_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aqueue.worker")
    ran: list[str] = []
    others_may_end, suspect_may_end = asyncio.Event(), asyncio.Event()

    @app.task(queue=THEIRS)
    async def suspect(ctx: Context) -> int:
        ran.append("suspect begins")
        await suspect_may_end.wait()
        ran.append("suspect ends")
        return ctx.deliveries

    @app.task
    async def other(number: int) -> None:
        ran.append(f"{number} begins")
        await others_may_end.wait()
        ran.append(f"{number} ends")

    result = await suspect.send()
    await lose(app, 1)
    await app.send_many([other.s(1), other.s(2)])
    await start_worker(app, queues=["celery", THEIRS])
    await until(lambda: waits(caplog), "the suspect waits")
    last = await other.send(3)
    assert sorted(ran) == ["1 begins", "2 begins"]
    others_may_end.set()
    await until(lambda: "suspect begins" in ran, "the suspect runs")
    assert sorted(ran[2:4]) == ["1 ends", "2 ends"]
    await asyncio.sleep(0.2)  # in which the third could begin
    suspect_may_end.set()
    assert await result.get(5) == 3
    await last.get(10)
    assert ran[4:] == ["suspect begins", "suspect ends", "3 begins", "3 ends"]


async def test_suspects_run_one_by_one_and_are_counted_no_further(app: AQueue, start_worker: StartWorker) -> None:
    under_way = most = 0

    @app.task(queue=THEIRS)
    async def suspect(ctx: Context) -> int:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.02)
        under_way -= 1
        return ctx.deliveries

    results = [await suspect.send() for _ in range(5)]
    await lose(app, 5)
    await start_worker(app, queues=["celery", THEIRS])
    assert [await result.get(20) for result in results] == [3] * 5
    assert most == 1


async def test_a_message_that_was_lost_once_is_no_suspect(app: AQueue, start_worker: StartWorker) -> None:
    together = asyncio.Barrier(3)

    @app.task(queue=THEIRS)
    async def lost_once(ctx: Context) -> int:
        await together.wait()
        return ctx.deliveries

    results = [await lost_once.send() for _ in range(3)]
    await lose(app, 3, times=1)
    await start_worker(app, queues=["celery", THEIRS])
    assert [await result.get(10) for result in results] == [2] * 3


@pytest.mark.parametrize("kind", ["memory", "redis"], indirect=True)
async def test_who_was_never_lost_is_no_suspect_even_if_one_loss_is_too_many(
    make_app: MakeApp, start_worker: StartWorker
) -> None:
    together = asyncio.Barrier(3)
    async with make_app(max_deliveries=1) as app:

        @app.task
        async def first() -> None:
            await together.wait()

        results = [await first.send() for _ in range(3)]
        await start_worker(app)
        for result in results:
            await result.get(10)


@pytest.mark.parametrize("kind", ["rabbitmq"], indirect=True)
async def test_where_a_lost_link_counts_two_losses_are_not_suspicious(
    make_app: MakeApp, start_worker: StartWorker
) -> None:
    """A link that breaks twice does not make the fleet run everything one by one."""
    together = asyncio.Barrier(3)
    async with make_app(lease=0.3, max_deliveries=5) as app:

        @app.task(queue=THEIRS)
        async def lost_twice(ctx: Context) -> int:
            await together.wait()
            return ctx.deliveries

        results = [await lost_twice.send() for _ in range(3)]
        await lose(app, 3)
        await start_worker(app, queues=["celery", THEIRS])
        assert [await result.get(10) for result in results] == [3] * 3


async def test_a_suspect_does_not_wait_for_ever(
    app: AQueue, start_worker: StartWorker, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aqueue.suspects.PATIENCE", 0.3)
    begun, may_end = asyncio.Event(), asyncio.Event()

    @app.task(queue=THEIRS)
    async def suspect() -> str:
        return "ran"

    @app.task
    async def other() -> None:
        begun.set()
        await may_end.wait()

    result = await suspect.send()
    await lose(app, 1)
    endless = await other.send()
    await start_worker(app, queues=["celery", THEIRS])
    await begun.wait()
    assert await result.get(10) == "ran"
    assert "runs beside others" in caplog.text
    may_end.set()
    await endless.get(5)


async def test_the_time_of_a_suspect_begins_when_it_is_alone(app: AQueue, start_worker: StartWorker) -> None:
    @app.task(queue=THEIRS, timeout=0.4)
    async def suspect(long: float) -> str:
        await asyncio.sleep(long)
        return "in time"

    @app.task
    async def other() -> None:
        await asyncio.sleep(1.0)

    in_time, too_long = await suspect.send(0.0), await suspect.send(60.0)
    await lose(app, 2)
    await other.send()
    await start_worker(app, queues=["celery", THEIRS])
    assert await in_time.get(10) == "in time"
    await until(lambda: failed(app, too_long.id), "the other one ran out of time")


async def failed(app: AQueue, id: str) -> bool:
    return await app.result(id).state() == "FAILURE"


async def test_a_suspect_that_waits_is_given_back_when_its_worker_stops(
    app: AQueue, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aqueue.worker")
    ran: list[str] = []

    @app.task(queue=THEIRS)
    async def suspect() -> None:
        ran.append("suspect")

    @app.task
    async def other() -> None:
        while not stopping:
            await asyncio.sleep(0.01)
        ran.append("other")

    stopping = False
    await suspect.send()
    await lose(app, 1)
    await other.send()
    async with running(app, queues=["celery", THEIRS]) as worker:
        await until(lambda: waits(caplog), "the suspect waits")
        worker.stop()
        await until(lambda: "waiting up to" in caplog.text, "the worker stops")
        stopping = True
        await until(lambda: ran, "the other task ends")
    assert ran == ["other"]
    (delivery,) = await app.producer().broker.fetch([THEIRS], 1, 10)
    assert delivery.deliveries == 3


# --- real deaths ----------------------------------------------------------------------------------------

SHOP = """
import asyncio, os
from aqueue import AQueue, Context, Settings

app = AQueue("shop", broker=os.environ["BROKER"], settings=Settings(lease=0.5, max_deliveries=3))

def note(text):
    with open("ran", "a") as file:
        file.write(text + "\\n")

@app.task
async def poison(ctx: Context) -> None:
    note(f"poison {ctx.deliveries}")
    while True:  # dies with everybody that has begun beside it
        await asyncio.sleep(0.2)
        os._exit(7)

@app.task
async def bystander(ctx: Context, n: int) -> int:
    note(f"bystander {n} {ctx.deliveries}")
    await asyncio.sleep(0.3)
    return ctx.deliveries
"""


@pytest.mark.parametrize("kind", ["redis", "rabbitmq"], indirect=True)
async def test_a_task_that_kills_its_process_is_buried_and_its_bystanders_are_not(
    kind: str, url: Url, tmp_path: Path
) -> None:
    (tmp_path / "shop.py").write_text(SHOP)
    names = ["shop.bystander", "shop.bystander", "shop.poison", "shop.bystander", "shop.bystander"]
    calls = [(n,) if name == "shop.bystander" else () for n, name in enumerate(names)]
    async with AQueue("client", broker=url.reveal(), settings=Settings(lease=0.5)) as client:
        results = [await client.send_task(name, call) for name, call in zip(names, calls, strict=True)]
        worker = WorkerProcess(tmp_path, "shop:app", env={"BROKER": url.reveal()}).ready()
        try:
            inspection = client.producer().broker.inspection
            await until(inspection.dead, "the poison is buried", 60)
            bystanders = [result for result, name in zip(results, names, strict=True) if name == "shop.bystander"]
            assert max([await result.get(20) for result in bystanders]) <= 3
        finally:
            worker.process.stop()
        (letter,) = await inspection.dead()
    assert (letter.reason, letter.deliveries) == ("delivery_limit", 4)
    assert len(letter.history.losses) == 3
    if kind == "redis":  # RabbitMQ doesn't tell who held it
        assert {loss.worker.partition("@")[0] for loss in letter.history.losses} == {"worker-0"}
        assert "lost 3 times" in letter.detail
        assert "the last time worker-0@" in letter.detail
    ran = (tmp_path / "ran").read_text().splitlines()
    assert [line for line in ran if "poison" in line] == [f"poison {number}" for number in range(1, 4)]
