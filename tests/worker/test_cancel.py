"""Cancelling: queued, parked, running, before a worker starts; and what comes of it."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from aqueue import AQueue, BrokerUnavailable, Context, InvalidArguments, Reject, Retry, Snooze, SyncTask, TaskRevoked
from aqueue.admission import task_id_of
from aqueue.broker import BrokerOptions, Delivery
from aqueue.broker.memory import MemoryBroker, MemoryServer
from aqueue.broker.memory_control import MemoryControl, MemoryRevocations
from aqueue.outcome import Outcome, Revoked
from aqueue.pidbox import Revocation
from aqueue.pidbox import Revoked as RevokedIds
from aqueue.results import RemoteError
from tests.kit.proxy import Proxy
from tests.kit.waiting import until
from tests.worker import process_tasks
from tests.worker.conftest import QUICK, MakeApp, StartWorker, running

#: Where a revocation is kept for workers that start later.
KEPT = pytest.mark.parametrize("kind", ["memory", "sqlite", "redis"], indirect=True)
ONE_IS_ENOUGH = pytest.mark.parametrize("kind", ["memory"], indirect=True)


class Stage:
    """Tasks that tell when they have begun, and how they ended."""

    def __init__(self, app: AQueue) -> None:
        self.begun: list[str] = []
        self.ended: list[str] = []
        self.go_on = threading.Event()

        @app.task(retry=Retry(attempts=5, backoff=0))
        async def wait(name: str) -> str:
            self.begun.append(name)
            try:
                while not self.go_on.is_set():
                    await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                self.ended.append(f"{name} cancelled")
                raise
            self.ended.append(name)
            return name

        @app.task(retry=Retry(attempts=5, backoff=0))
        def wait_in_thread(ctx: Context, name: str) -> str:
            self.begun.append(name)
            while not self.go_on.is_set() and not ctx.cancelled:
                time.sleep(0.01)
            self.ended.append(f"{name} {ctx.cancel_reason}")
            return name

        @app.task
        async def note(name: str) -> str:
            self.begun.append(name)
            return name

        self.wait, self.wait_in_thread, self.note = wait, wait_in_thread, note

    def has_begun(self, *names: str) -> Callable[[], bool]:
        return lambda: set(names) <= set(self.begun)


@pytest.fixture
def stage(app: AQueue) -> Stage:
    return Stage(app)


async def assert_revoked(result: Any, reason: str) -> None:
    with pytest.raises(TaskRevoked) as caught:
        await result.get(15)
    assert caught.value.reason == reason
    assert await result.state() == "REVOKED"
    assert await result.info() == RemoteError("TaskRevokedError", [reason], "celery.exceptions")


async def test_a_queued_task_does_not_begin(app: AQueue, stage: Stage, start_worker: StartWorker) -> None:
    await start_worker(app, concurrency=1)
    first = await stage.wait.send("first")
    await until(stage.has_begun("first"), "the worker is busy")
    second, third = await stage.note.send("second"), await stage.note.send("third")
    assert await second.cancel("the order was withdrawn") == "requested"
    stage.go_on.set()
    assert await first.get(15) == "first"
    await assert_revoked(second, "the order was withdrawn")
    assert await third.get(15) == "third"
    assert stage.begun == ["first", "third"]
    assert await second.cancel() == "finished"


async def test_a_parked_task_does_not_begin(make_app: MakeApp) -> None:
    async with make_app(send_timeout=30.0) as app:  # the first delay on RabbitMQ makes 28 queues
        stage = Stage(app)
        async with running(app):
            await (await stage.note.send("first")).get(15)
            later = await stage.note.options(countdown=1).send("later")
            assert await later.cancel(terminate=False) == "requested"
            await assert_revoked(later, "cancelled")
        assert stage.begun == ["first"]


@KEPT
async def test_a_worker_that_starts_later_obeys(make_app: MakeApp) -> None:
    app = make_app()
    stage = Stage(app)
    async with app:
        results = [await stage.note.send(f"{number}") for number in range(3)]
        assert await results[1].cancel("before there was a worker", terminate=False) == "requested"
        async with running(app):
            assert await results[0].get(15) == "0"
            await assert_revoked(results[1], "before there was a worker")
            assert await results[2].get(15) == "2"
    assert stage.begun == ["0", "2"]


async def test_with_redis_as_store_rabbitmq_has_it_kept_as_well(rabbit_url: str, redis_url: str, queue: str) -> None:
    settings = replace(QUICK, default_queue=queue)
    app = AQueue("test", broker=rabbit_url, backend=redis_url, settings=settings)
    stage = Stage(app)
    async with app:
        first, second, third = await app.send_many([stage.note.s(name) for name in ("first", "second", "third")])
        assert await second.cancel("before there was a worker", terminate=False) == "requested"
        async with running(app):
            assert await first.get(15) == "first"
            await assert_revoked(second, "before there was a worker")
            assert await third.get(15) == "third"
            long = await stage.wait.send("long")
            await until(stage.has_begun("long"), "it runs")
            await long.cancel("told at once")
            await assert_revoked(long, "told at once")
    assert stage.begun == ["first", "third", "long"]


async def test_a_running_coroutine_is_ended_and_not_tried_again(
    app: AQueue, stage: Stage, start_worker: StartWorker
) -> None:
    told: list[Outcome] = []
    app.add_observer(lambda context, outcome, seconds: told.append(outcome))
    await start_worker(app, concurrency=1)
    result = await stage.wait.send("long")
    await until(stage.has_begun("long"), "it runs")
    assert await result.cancel("enough") == "requested"
    await assert_revoked(result, "enough")
    assert stage.ended == ["long cancelled"]
    assert told == [Revoked("enough")]
    assert await (await stage.note.send("next")).get(15) == "next"  # its slot is free
    assert stage.begun == ["long", "next"]


async def test_a_running_thread_is_told_and_its_value_does_not_count(
    app: AQueue, stage: Stage, start_worker: StartWorker
) -> None:
    await start_worker(app, threads=1)
    result = await stage.wait_in_thread.send("long")
    await until(stage.has_begun("long"), "it runs")
    assert await app.cancel(result.id, "enough") == "requested"
    await assert_revoked(result, "enough")
    assert stage.ended == ["long cancelled"]
    assert stage.begun == ["long"]


@ONE_IS_ENOUGH
@pytest.mark.parametrize("gently", [True, False])
async def test_a_process_is_told_and_if_it_does_not_hear_killed(
    make_app: MakeApp, start_worker: StartWorker, tmp_path: Path, gently: bool
) -> None:
    note = tmp_path / "note"
    async with make_app(kill_after=30.0 if gently else 0.2) as app:
        function = process_tasks.nap if gently else process_tasks.deaf
        task: SyncTask[..., Any] = app.task(run="process", retry=Retry(attempts=5, backoff=0))(function)
        async with running(app):
            result = await task.send(str(note))
            await until(note.exists, "it runs", 30)
            assert await result.cancel("enough") == "requested"
            await assert_revoked(result, "enough")
            if gently:
                assert note.read_text() == "cleaned up"


@ONE_IS_ENOUGH
async def test_what_was_cancelled_and_never_ends_is_revoked_when_its_worker_ends(make_app: MakeApp) -> None:
    app = make_app(kill_after=0.1)
    ends = threading.Event()
    began = threading.Event()

    @app.task
    def deaf_thread() -> None:
        began.set()
        ends.wait(30)

    async with app:
        async with running(app, grace=20.0) as worker:
            result = await deaf_thread.send()
            await until(began.is_set, "it runs")
            await result.cancel("enough")
            await until(lambda: worker.stuck == 1, "it is stuck")
        await assert_revoked(result, "enough")
        ends.set()


async def test_without_terminate_what_runs_goes_on(app: AQueue, stage: Stage, start_worker: StartWorker) -> None:
    await start_worker(app, concurrency=1)
    result = await stage.wait.send("long")
    await until(stage.has_begun("long"), "it runs")
    waiting = await stage.note.send("waiting")
    assert await app.cancel_many([result.id, waiting.id], terminate=False) == {
        result.id: "requested",
        waiting.id: "requested",
    }
    stage.go_on.set()
    assert await result.get(15) == "long"
    await assert_revoked(waiting, "cancelled")
    assert stage.begun == ["long"]


async def test_what_has_succeeded_stays_so(app: AQueue, stage: Stage, start_worker: StartWorker) -> None:
    await start_worker(app)
    result = await stage.note.send("quick")
    assert await result.get(15) == "quick"
    assert await result.cancel("too late") == "finished"
    assert await app.cancel_many([result.id, "nobody-knows-it"]) == {
        result.id: "finished",
        "nobody-knows-it": "requested",
    }
    assert await result.get(1) == "quick"


async def test_a_task_that_waits_for_its_next_attempt_has_none(app: AQueue, start_worker: StartWorker) -> None:
    runs: list[int] = []

    @app.task(retry=Retry(attempts=5, backoff=1, jitter=False))
    async def flaky(ctx: Context) -> None:
        runs.append(ctx.attempt)
        raise ConnectionError("again")

    await start_worker(app)
    result = await flaky.send()

    async def is_waiting() -> bool:
        return await result.state() == "RETRY"

    await until(is_waiting, "it waits")
    await result.cancel("no more")
    await assert_revoked(result, "no more")
    assert [one.text for one in await result.attempts()] == ["again"]
    assert runs == [1]


@ONE_IS_ENOUGH
@pytest.mark.parametrize(
    "raised", [ValueError("in a hurry"), Retry.now(after=0), Snooze(0), Reject(requeue=True), SystemExit(1)]
)
async def test_whatever_a_cancelled_task_raises_it_is_revoked(
    app: AQueue, start_worker: StartWorker, raised: BaseException
) -> None:
    runs: list[int] = []

    @app.task(retry=Retry(attempts=5, backoff=0))
    async def stubborn(ctx: Context) -> None:
        runs.append(ctx.attempt)
        try:
            await asyncio.sleep(60)
        finally:
            assert ctx.cancelled
            raise raised

    await start_worker(app)
    result = await stubborn.send()
    await until(lambda: runs, "it runs")
    await result.cancel("stop")
    await assert_revoked(result, "stop")
    assert runs == [1]


@ONE_IS_ENOUGH
async def test_a_coroutine_that_ends_its_work_all_the_same_has_succeeded(
    app: AQueue, start_worker: StartWorker
) -> None:
    began = asyncio.Event()

    @app.task
    async def thorough() -> str:
        began.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            return "done"
        return "slept"

    await start_worker(app)
    result = await thorough.send()
    await asyncio.wait_for(began.wait(), 10)
    await result.cancel()
    assert await result.get(10) == "done"
    assert await result.state() == "SUCCESS"


@ONE_IS_ENOUGH
@pytest.mark.parametrize("terminate", [True, False])
async def test_what_waits_in_a_gate_has_not_begun(app: AQueue, start_worker: StartWorker, terminate: bool) -> None:
    at_the_gate, opened = asyncio.Event(), asyncio.Event()
    runs: list[str] = []

    @app.add_gate
    async def gate(context: Context) -> Outcome | None:
        at_the_gate.set()
        await opened.wait()
        return None

    @app.task
    async def work() -> None:
        runs.append("ran")

    worker = await start_worker(app)
    result = await work.send()
    await asyncio.wait_for(at_the_gate.wait(), 10)
    await result.cancel("meanwhile", terminate=terminate)
    await asyncio.sleep(0.05)  # on one loop: what was told before the timer is heard before it
    opened.set()
    await assert_revoked(result, "meanwhile")
    assert runs == []
    assert worker.slots


class Broker(MemoryBroker):
    """One whose word of what is cancelled comes when a test wants it."""

    def __init__(self, options: BrokerOptions, claimed: Callable[["Control", Sequence[Delivery]], None]) -> None:
        server = MemoryServer()
        super().__init__(server, options)
        self._heard = Control(server.revocations)
        self.control = self._heard
        self._claimed = claimed

    async def fetch(self, queues: Sequence[str], limit: int, wait: float) -> Sequence[Delivery]:
        found = await super().fetch(queues, limit, wait)
        self._claimed(self._heard, found)
        return found


class Control(MemoryControl):
    def __init__(self, revocations: MemoryRevocations) -> None:
        super().__init__(revocations)
        self.fails = 0
        self.answers = asyncio.Event()
        self.answers.set()

    def hear(self, *ids: str) -> None:
        self._inbox.put(dict.fromkeys(ids, Revocation("just now", True, 60.0)))

    async def revoked(self) -> RevokedIds:
        if self.fails:
            self.fails -= 1
            raise BrokerUnavailable("not now")
        await self.answers.wait()
        return await super().revoked()


def ids_of(deliveries: Sequence[Delivery]) -> list[str]:
    return [str(task_id_of(delivery.message)) for delivery in deliveries]


async def test_a_run_that_is_ended_before_its_first_step_is_settled(start_worker: StartWorker) -> None:
    """The word comes between the claim and the first step of its run."""

    def claimed(control: Control, found: Sequence[Delivery]) -> None:
        control.hear(*ids_of(found))

    async with AQueue("test", broker=lambda options: Broker(options, claimed), settings=QUICK) as app:
        stage = Stage(app)
        await start_worker(app)
        for result in await app.send_many([stage.wait.s("one"), stage.wait.s("two")]):
            await assert_revoked(result, "just now")
        assert stage.begun == []


async def test_nothing_is_claimed_before_it_is_known_what_is_cancelled(start_worker: StartWorker) -> None:
    claims: list[str] = []
    app = AQueue(
        "test", broker=lambda options: Broker(options, lambda _, found: claims.extend(ids_of(found))), settings=QUICK
    )
    async with app:
        control = app.producer().broker.control
        assert isinstance(control, Control)
        control.fails = 3
        control.answers.clear()
        stage = Stage(app)
        result, other = await app.send_many([stage.note.s("cancelled"), stage.note.s("runs")])
        await result.cancel("early", terminate=False)
        await start_worker(app)
        await until(lambda: control.fails == 0, "it is asked for again and again")
        await asyncio.sleep(0.1)
        assert claims == []
        control.answers.set()
        assert await other.get(15) == "runs"
        await assert_revoked(result, "early")


@pytest.mark.parametrize("how", ["refused", "silent"])
async def test_a_worker_works_though_it_hears_nothing(
    how: str, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("aqueue.control._PATIENCE", 0.3)
    async with AQueue("test", broker=lambda options: Broker(options, lambda *_: None), settings=QUICK) as app:
        control = app.producer().broker.control
        assert isinstance(control, Control)
        if how == "refused":
            control.fails = 1_000_000
        else:
            control.answers.clear()
        stage = Stage(app)
        await start_worker(app)
        assert await (await stage.note.send("runs")).get(15) == "runs"
        assert "working without word of cancelled tasks" in caplog.text
        waiting = await stage.note.options(countdown=1.5).send("waiting")
        await waiting.cancel("later")
        control.fails = 0
        control.answers.set()
        await assert_revoked(waiting, "later")


@ONE_IS_ENOUGH
async def test_a_task_that_no_worker_knows_is_cancelled_at_once(app: AQueue, start_worker: StartWorker) -> None:
    await start_worker(app)
    await app.cancel("at-once", "never mind")
    await assert_revoked(await app.send_task("nobody.knows.it", task_id="at-once"), "never mind")


async def test_a_word_that_was_missed_is_made_up_for(
    redis_proxy: Proxy, redis_url: str, start_worker: StartWorker
) -> None:
    """The link is down when the task is cancelled, and up again before its lease ends."""
    settings = replace(QUICK, lease=30.0)
    client = AQueue("test", broker=redis_url, settings=settings)
    app = AQueue("test", broker=f"redis://127.0.0.1:{redis_proxy.port}", settings=settings)
    stage = Stage(app)
    async with app, client:
        await start_worker(app)
        result = await client.send_task(stage.wait.name, ["long"])
        await until(stage.has_begun("long"), "it runs")
        redis_proxy.refuse()
        assert await client.cancel(result.id, "while nobody heard") == "requested"
        await asyncio.sleep(0.1)
        assert stage.ended == []
        redis_proxy.heal()
        await assert_revoked(result, "while nobody heard")


@ONE_IS_ENOUGH
async def test_a_task_without_a_result_is_cancelled_as_well(app: AQueue, start_worker: StartWorker) -> None:
    began, ended = asyncio.Event(), asyncio.Event()

    @app.task(ignore_result=True)
    async def silent() -> None:
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()

    await start_worker(app)
    result = await silent.send()
    await asyncio.wait_for(began.wait(), 10)
    assert await result.cancel() == "requested"
    await asyncio.wait_for(ended.wait(), 10)


@ONE_IS_ENOUGH
async def test_it_is_forgotten_in_its_time(app: AQueue, stage: Stage, start_worker: StartWorker) -> None:
    waiting = await stage.note.options(countdown=1).send("waiting")
    await waiting.cancel(keep=0.2)
    await start_worker(app)
    assert await waiting.get(15) == "waiting"


@ONE_IS_ENOUGH
async def test_what_can_not_be_cancelled_is_said(app: AQueue) -> None:
    for arguments in (("",), ("x" * 256,), ("a\nb",)):
        with pytest.raises(InvalidArguments, match="id is 1 to 255"):
            await app.cancel(*arguments)
    with pytest.raises(InvalidArguments, match="reason is a text"):
        await app.cancel("id", "")
    for keep in (0, -1, float("nan"), 1e12):
        with pytest.raises(InvalidArguments, match="keep is a number"):
            await app.cancel("id", keep=keep)
