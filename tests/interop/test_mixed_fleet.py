"""One queue, both kinds of clients and workers, a backlog: everything is run exactly once."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from aqueue import AQueue
from aqueue.protocol import is_success
from tests.interop.conftest import Connect, close_backend
from tests.interop.workers import QUICK, Site, aqueue_worker, celery_worker
from tests.kit.waiting import until

HALF: Final = 1000


class Backlog:
    """Tasks sent by both clients, half by each, that count their runs."""

    def __init__(self, site: Site, queue: str, app: AQueue, client: Any) -> None:
        self.site = site
        self.queue = queue
        self._app = app
        self._client = client
        self.ids: list[str] = []

    async def send(self) -> None:
        """Both clients send at the same time."""
        ours, theirs = await asyncio.gather(self._send_ours(), asyncio.to_thread(self._send_theirs))
        self.ids = [*ours, *theirs]

    async def _send_ours(self) -> list[str]:
        task = self._app.tasks["interop.count_slowly"].options(queue=self.queue)
        sent: list[str] = []
        for start in range(0, HALF, 100):
            calls = [task.s(self.site.port, f"aqueue-{number}") for number in range(start, start + 100)]
            sent += [result.id for result in await self._app.send_many(calls)]
        return sent

    def _send_theirs(self) -> list[str]:
        """As a Celery client that waits for nothing; the results are stored all the same."""
        with self._client.producer_pool.acquire() as producer:
            sent = [
                self._client.send_task(
                    "interop.count_slowly",
                    [self.site.port, f"celery-{number}"],
                    queue=self.queue,
                    producer=producer,
                    ignore_result=False,
                ).id
                for number in range(HALF)
            ]
        close_backend(self._client)
        return sent

    def runs(self) -> list[int]:
        """How often each task was run."""
        keys = [f"runs:{who}-{number}" for who in ("aqueue", "celery") for number in range(HALF)]
        return [int(found or 0) for found in self.site.traces.mget(keys)]

    def repeated(self) -> dict[str, list[str]]:
        """Who ran those tasks that were run more than once."""
        keys = [f"{who}-{number}" for who in ("aqueue", "celery") for number in range(HALF)]
        return {
            key: self.site.traces.lrange(f"who:{key}", 0, -1)
            for key, runs in zip(keys, self.runs(), strict=True)
            if runs > 1
        }

    def run_by(self, who: str) -> int:
        return int(self.site.traces.get(f"by:{who}") or 0)

    def has_run(self, enough: int) -> bool:
        """Whether our workers have run more than so many."""
        return self.run_by("aqueue") > enough

    async def is_run(self) -> None:
        await until(lambda: self.run_by("celery") + self.run_by("aqueue") >= 2 * HALF, "all have run", timeout=60)

    async def assert_each_ran_once(self, given_back_while_running: int = 0) -> None:
        """Also that each has its result, that nothing is left, and that nothing comes later.

        A Celery worker that is told to stop gives back what its processes have just begun, and so has it run
        once more; ``given_back_while_running`` says how often that may be.
        """
        await until(lambda: self.unsettled() == 0, "everything is settled", timeout=30)
        repeated = self.repeated()
        assert len(repeated) <= given_back_while_running, repeated
        assert all(ran == ["celery", "aqueue"] for ran in repeated.values()), repeated
        assert min(self.runs()) == 1
        with self.site.result_keys() as keys:
            stored = keys.mget([f"celery-task-meta-{id}" for id in self.ids])
        assert len(stored) == 2 * HALF
        assert all(document is not None and is_success(document) for document in stored)

    def unsettled(self) -> int:
        """On RabbitMQ also what came back from those who had it and are gone."""
        return self.site.waiting_in_rabbit(self.queue) if self.site.rabbit else self._unsettled_in_redis()

    def _unsettled_in_redis(self) -> int:
        with self.site.broker_keys() as keys:
            waiting = sum(keys.llen(f"{self.queue}{step}") for step in ("", "\x06\x163", "\x06\x166", "\x06\x169"))
            held = keys.zcard("aqueue:leases") + keys.zcard("aqueue:parked") + keys.hlen("unacked")
            return int(waiting + held + keys.zcard("aqueue:dead"))


@pytest.fixture
async def backlog(
    either_site: Site, connect: Connect, celery_client: Callable[..., Any], key: str
) -> AsyncIterator[Backlog]:
    """At the end all workers are gone: what one of them had not settled would be back."""
    found = Backlog(either_site, key, await connect(either_site), celery_client(either_site))
    yield found
    assert found.unsettled() == 0


async def test_two_thousand_tasks_of_both_clients_are_each_run_once_by_one_of_both_workers(
    backlog: Backlog, tmp_path: Path
) -> None:
    site = backlog.site
    with (
        celery_worker(tmp_path, site.broker, site.results, "-c", "2", *QUICK, queues=backlog.queue) as theirs,
        aqueue_worker(tmp_path, site.broker, site.results, queues=backlog.queue),
    ):
        await backlog.send()
        await backlog.is_run()
        await backlog.assert_each_ran_once()
        theirs.kill()  # to end takes it seconds
    assert backlog.run_by("celery") + backlog.run_by("aqueue") == 2 * HALF
    assert backlog.run_by("celery") > 20
    assert backlog.run_by("aqueue") > 20


async def test_an_aqueue_worker_that_is_told_to_stop_amid_a_mixed_backlog_loses_nothing_and_repeats_nothing(
    backlog: Backlog, tmp_path: Path
) -> None:
    site = backlog.site
    await backlog.send()
    with (
        celery_worker(tmp_path, site.broker, site.results, "-c", "2", *QUICK, queues=backlog.queue) as theirs,
        aqueue_worker(tmp_path, site.broker, site.results, queues=backlog.queue, name="first") as first,
    ):
        await until(lambda: backlog.run_by("aqueue") > 100, "the first worker is at it")
        first.terminate()
        assert await asyncio.to_thread(first.wait) == 0
        done = sum(backlog.runs())
        assert 100 < done < 2 * HALF
        if not site.rabbit:
            with site.broker_keys() as keys:
                assert keys.zcard("aqueue:leases") == 0
        with aqueue_worker(tmp_path, site.broker, site.results, queues=backlog.queue, name="second"):
            await backlog.is_run()
            await backlog.assert_each_ran_once()
        theirs.kill()  # to end takes it seconds


@pytest.mark.parametrize("either_site", ["redis"], indirect=True)  # on RabbitMQ Celery may need over 30 s to end
@pytest.mark.parametrize("pool", [("-c", "2"), ("-P", "solo")], ids=["prefork", "solo"])
async def test_a_celery_worker_that_is_told_to_stop_amid_a_mixed_backlog_leaves_the_rest_to_an_aqueue_worker(
    backlog: Backlog, tmp_path: Path, pool: tuple[str, ...]
) -> None:
    site = backlog.site
    await backlog.send()
    with celery_worker(tmp_path, site.broker, site.results, *pool, *QUICK, queues=backlog.queue) as theirs:
        await until(lambda: backlog.run_by("celery") > 30, "the Celery worker is at it")
        theirs.terminate()
        await asyncio.to_thread(theirs.wait, 60)  # a warm shutdown of Celery's
    with aqueue_worker(tmp_path, site.broker, site.results, queues=backlog.queue):
        await backlog.is_run()
        await backlog.assert_each_ran_once(given_back_while_running=2)
    assert backlog.run_by("aqueue") > 1000


@pytest.mark.parametrize("either_site", ["redis"], indirect=True)
async def test_aqueue_workers_that_come_and_go_under_load_lose_nothing(backlog: Backlog, tmp_path: Path) -> None:
    """Three workers, each stopped after some tasks, while both clients still send."""
    site = backlog.site
    sending = asyncio.create_task(backlog.send())
    for number, enough in enumerate((200, 600, 1000)):
        name = f"worker-{number}"
        with aqueue_worker(tmp_path, site.broker, site.results, queues=backlog.queue, name=name) as worker:
            await until(partial(backlog.has_run, enough), f"{name} is at it", timeout=30)
            worker.terminate()
            assert await asyncio.to_thread(worker.wait) == 0
    await sending
    with aqueue_worker(tmp_path, site.broker, site.results, queues=backlog.queue, name="last"):
        await backlog.is_run()
        await backlog.assert_each_ran_once()
