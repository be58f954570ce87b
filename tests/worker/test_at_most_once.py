"""Tasks that never begin twice: their message is settled, and that confirmed, before they begin."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from aqueue import AQueue, Context, Reject, Retry, TaskFailed
from aqueue import broker as brokers
from aqueue.broker import BrokerOptions, Delivery, QueueDepth
from aqueue.errors import BrokerUnavailable, ConfigurationError
from aqueue.url import Url
from tests.kit.waiting import until
from tests.kit.workers import WorkerProcess
from tests.worker.conftest import MakeApp, running


async def depth(app: AQueue, queue: str) -> QueueDepth:
    found = await app.producer().broker.inspection.queues([queue])
    return next((one for one in found if one.queue == queue), QueueDepth(queue, 0, 0, 0, 0))


async def test_its_message_is_gone_before_it_begins(app: AQueue, queue: str) -> None:
    seen: list[QueueDepth] = []

    @app.task(delivery="at_most_once", queue=queue)
    async def once(x: int) -> int:
        seen.append(await depth(app, queue))
        return x + 1

    @app.task(delivery="at_most_once", queue=queue)
    def in_a_thread(x: int) -> int:
        return x + 2

    async with running(app, queues=[queue]):
        assert await (await once.send(1)).get(10) == 2
        assert await (await in_a_thread.send(1)).get(10) == 3
    assert [(found.ready, found.leased or 0) for found in seen] == [(0, 0)]


async def test_what_it_says_of_itself_counts_all_the_same(app: AQueue, queue: str) -> None:
    attempts: list[int] = []

    @app.task(delivery="at_most_once", queue=queue, retry=Retry(attempts=3, backoff=0.01))
    async def flaky(ctx: Context) -> str:
        attempts.append(ctx.attempt)
        if ctx.attempt < 3:
            raise ValueError("not yet")
        return "done"

    @app.task(delivery="at_most_once", queue=queue)
    async def rejects() -> None:
        raise Reject("nothing for me")

    async with running(app, queues=[queue]):
        assert await (await flaky.send()).get(20) == "done"
        with pytest.raises(TaskFailed, match="nothing for me"):
            await (await rejects.send()).get(10)
    assert attempts == [1, 2, 3]


async def test_a_shutdown_does_not_make_it_begin_again(make_app: MakeApp, queue: str) -> None:
    async with make_app() as app:
        began: list[int] = []

        @app.task(delivery="at_most_once", queue=queue)
        async def long() -> None:
            began.append(1)
            await asyncio.sleep(60)

        async with running(app, queues=[queue], grace=0.1):
            result = await long.send()
            await until(lambda: began, "it runs")
        with pytest.raises(TaskFailed, match="may not begin twice"):
            await result.get(5)
        assert (await depth(app, queue)).ready == 0
        async with running(app, queues=[queue]):
            await asyncio.sleep(1.0)  # longer than a lease and what follows it
        assert began == [1]


async def test_without_an_answer_it_does_not_begin(url: Url, queue: str) -> None:
    """The broker's answer is missing: nobody knows whether the message comes again."""
    factory = brokers.from_url(url)
    silent = True

    def make(options: BrokerOptions) -> Any:
        broker = factory(options)
        let_go = broker.let_go

        async def unheard(delivery: Delivery) -> bool:
            settled = await let_go(delivery)
            if silent:
                raise BrokerUnavailable("no answer")
            return settled

        broker.let_go = unheard  # type: ignore[method-assign]
        return broker

    app = AQueue("unheard", broker=make, backend="memory://")
    began: list[int] = []

    @app.task(delivery="at_most_once", queue=queue)
    async def once(number: int) -> None:
        began.append(number)

    async with app, running(app, queues=[queue]):
        await once.send(1)
        await asyncio.sleep(0.5)
        silent = False
        await (await once.send(2)).get(10)
    assert began == [2]


SHOP = """
import os, signal
from aqueue import AQueue, Settings

app = AQueue("shop", broker=os.environ["BROKER"], settings=Settings(lease=1.0))

@app.task(delivery="at_most_once")
async def die() -> None:
    with open("ran", "a") as file:
        file.write("die\\n")
    os.kill(os.getpid(), signal.SIGKILL)

@app.task
async def next_one() -> str:
    return "fine"
"""


@pytest.mark.parametrize("kind", ["sqlite", "redis", "rabbitmq"], indirect=True)
async def test_a_killed_worker_does_not_make_it_begin_again(url: Url, tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(SHOP)
    worker = WorkerProcess(
        tmp_path, "shop:app", env={"BROKER": url.reveal(), "AQUEUE_RESULT_BACKEND": "sqlite:///r.db"}
    )
    try:
        worker.ready()
        first = worker.worker_pid()
        async with AQueue("client", broker=url.reveal(), backend=f"sqlite:///{tmp_path}/r.db") as client:
            await client.send_task("shop.die")
            await until(lambda: not Path(f"/proc/{first}").exists(), "it dies")
            await asyncio.sleep(2.5)  # longer than the lease and what follows it
            assert await (await client.send_task("shop.next_one")).get(20) == "fine"
        assert (tmp_path / "ran").read_text().split() == ["die"]
    finally:
        worker.process.stop(5)


def test_another_promise_is_refused() -> None:
    app = AQueue("promises", broker="memory://")
    with pytest.raises(ConfigurationError, match="at_least_once or at_most_once"):

        @app.task(delivery="exactly_once")  # type: ignore[call-overload, untyped-decorator]
        async def once() -> None: ...
