"""Time limits: soft and hard, for every kind of task; and what doesn't end when it should."""

import asyncio
import threading
import time

import pytest

from aqueue import AQueue, Context, Retry, SoftTimeLimitExceeded, TaskFailed, TimeLimitExceeded
from aqueue.process_pool import ProcessPool
from aqueue.runners import Runners, ThreadPool
from aqueue.runs import Runs
from aqueue.slots import Slots
from aqueue.worker import Worker
from tests.kit.waiting import until
from tests.worker.conftest import MakeApp, StartWorker


@pytest.fixture(params=["memory"])
def kind(request: pytest.FixtureRequest) -> str:
    """Nothing here is a broker's."""
    found: str = request.param
    return found


async def test_a_coroutine_is_warned_where_it_waits_and_may_go_on(app: AQueue, start_worker: StartWorker) -> None:
    seen: list[object] = []

    @app.task(soft_timeout=0.1, timeout=9)
    async def clean_up() -> str:
        try:
            await asyncio.sleep(60)
        except SoftTimeLimitExceeded as error:
            seen.append(error.args)
        await asyncio.sleep(0.01)
        task = asyncio.current_task()
        seen.append(task is not None and task.cancelling())
        return "cleaned"

    await start_worker(app)
    assert await (await clean_up.send()).get(5) == "cleaned"
    assert seen == [(0.1,), 0]


async def test_a_warned_coroutine_that_goes_on_is_ended_by_its_hard_limit(
    app: AQueue, start_worker: StartWorker
) -> None:
    seen: list[str] = []

    @app.task
    async def stubborn() -> None:
        try:
            await asyncio.sleep(60)
        except SoftTimeLimitExceeded:
            seen.append("soft")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError as error:
            seen.append(type(error).__name__)
            raise

    await start_worker(app)
    result = await stubborn.options(soft_timeout=0.1, timeout=0.3).send()
    with pytest.raises(TaskFailed, match=r"TimeLimitExceeded: 0\.3"):
        await result.get(5)
    assert seen == ["soft", "CancelledError"]


async def test_a_warning_that_is_not_caught_is_a_failure_and_retried(app: AQueue, start_worker: StartWorker) -> None:
    attempts: list[int] = []

    @app.task(soft_timeout=0.1, retry=Retry(attempts=2, backoff=0.0, on=SoftTimeLimitExceeded))
    async def slow(ctx: Context) -> None:
        attempts.append(ctx.attempt)
        await asyncio.sleep(60)

    await start_worker(app)
    with pytest.raises(TaskFailed, match=r"SoftTimeLimitExceeded: 0\.1") as caught:
        await (await slow.send()).get(5)
    assert "await asyncio.sleep(60)" in (caught.value.traceback or "")
    assert attempts == [1, 2]


async def test_what_a_warned_coroutine_had_started_is_ended(app: AQueue, start_worker: StartWorker) -> None:
    ended: list[str] = []

    async def part(name: str) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            ended.append(name)

    @app.task(soft_timeout=0.1)
    async def in_a_group() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(part("group"))

    @app.task(soft_timeout=0.1)
    async def gathered() -> None:
        await asyncio.gather(part("gather"), part("gather"))

    @app.task(soft_timeout=0.1)
    async def waited_for() -> None:
        await asyncio.wait_for(part("wait_for"), 50)

    await start_worker(app)
    for task in (in_a_group, gathered, waited_for):
        with pytest.raises(TaskFailed, match="SoftTimeLimitExceeded"):
            await (await task.send()).get(5)
    assert sorted(ended) == ["gather", "gather", "group", "wait_for"]


async def test_a_limit_of_its_own_changes_nothing_for_a_quick_task(app: AQueue, start_worker: StartWorker) -> None:
    @app.task(soft_timeout=30, timeout=60)
    async def quick(x: int) -> int:
        await asyncio.sleep(0)
        if x < 0:
            raise ValueError(x)
        return x

    await start_worker(app)
    assert await (await quick.send(3)).get(5) == 3
    with pytest.raises(TaskFailed, match="ValueError: -1"):
        await (await quick.send(-1)).get(5)


async def test_a_thread_sees_its_limits_when_it_looks(app: AQueue, start_worker: StartWorker) -> None:
    seen: list[str] = []

    @app.task(soft_timeout=0.1, timeout=0.3)
    def look(ctx: Context) -> None:
        for _ in range(2):
            try:
                while True:
                    ctx.check()
                    time.sleep(0.005)
            except SoftTimeLimitExceeded as error:
                seen.append(f"soft {error}")
            except asyncio.CancelledError as error:
                seen.append(f"hard {error}")

    @app.task(soft_timeout=0.1)
    def give_up(ctx: Context) -> str:
        while not ctx.cancelled:
            time.sleep(0.005)
        return "given up in time"

    @app.task(soft_timeout=0.1)
    def unwary(ctx: Context) -> None:
        while True:
            ctx.check()
            time.sleep(0.005)

    await start_worker(app)
    with pytest.raises(TaskFailed, match=r"TimeLimitExceeded: 0\.3"):
        await (await look.send()).get(5)
    assert seen == ["soft 0.1", "hard timeout"]
    assert await (await give_up.send()).get(5) == "given up in time"
    with pytest.raises(TaskFailed, match=r"SoftTimeLimitExceeded: 0\.1"):
        await (await unwary.send()).get(5)


@pytest.mark.parametrize("value", ["returned", "raised"])
async def test_past_its_hard_limit_a_run_is_timed_out_however_it_ends(
    app: AQueue, start_worker: StartWorker, value: str
) -> None:
    @app.task(timeout=0.1)
    async def too_late() -> str:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if value == "raised":
                raise ValueError("clean-up failed") from None
        return "too late"

    await start_worker(app)
    with pytest.raises(TaskFailed, match=r"TimeLimitExceeded: 0\.1") as caught:
        await (await too_late.send()).get(5)
    assert ("clean-up failed" in str(caught.value)) == (value == "raised")


def stuck_logs(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if "still runs after" in record.getMessage()]


async def test_a_stuck_thread_is_told_of_once_and_its_retry_waits_for_it(
    make_app: MakeApp, start_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(kill_after=0.1)
    go_on = threading.Event()
    attempts: list[tuple[int, bool]] = []

    @app.task(timeout=0.1, retry=Retry(attempts=2, backoff=0.0, on=TimeLimitExceeded))
    def stick(ctx: Context) -> str:
        attempts.append((ctx.attempt, go_on.is_set()))
        if ctx.attempt == 1:
            go_on.wait(20)  # deaf
        return "second"

    async with app:
        worker = await start_worker(app, threads=2)
        result = await stick.send()
        try:
            await until(lambda: worker.stuck == 1, "it is stuck")
            await asyncio.sleep(0.3)  # neither told of again nor run again meanwhile
            (told,) = stuck_logs(caplog)
            assert "test_limits.stick[" in told
            assert "test_limits.py" in told
            assert "in stick" in told
            assert "1 of 2 thread slots" in told
            assert attempts == [(1, False)]
        finally:
            go_on.set()
        assert await result.get(5) == "second"
        assert attempts == [(1, False), (2, True)]
        assert worker.stuck == 0


async def test_a_stuck_coroutine_keeps_its_slot_and_its_message(
    make_app: MakeApp, start_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    app = make_app(kill_after=0.1)
    ends = asyncio.Event()

    @app.task(timeout=0.1)
    async def deaf() -> None:
        while not ends.is_set():
            try:
                await ends.wait()
            except asyncio.CancelledError:
                continue

    @app.task
    async def quick() -> str:
        return "quick"

    async with app:
        worker = await start_worker(app, concurrency=1)
        result = await deaf.send()
        await until(lambda: worker.stuck == 1, "it is stuck")
        waiting = await quick.send()
        await asyncio.sleep(1.0)  # longer than a lease
        (depth,) = await app.producer().broker.inspection.queues()
        assert (depth.ready, depth.leased) == (1, 1)
        (told,) = stuck_logs(caplog)
        assert "test_limits.py" in told
        assert "in deaf" in told
        ends.set()
        with pytest.raises(TaskFailed, match=r"TimeLimitExceeded: 0\.1"):
            await result.get(5)
        assert await waiting.get(5) == "quick"


async def test_a_worker_ends_without_its_stuck_runs_which_are_timed_out(make_app: MakeApp) -> None:
    app = make_app(kill_after=0.1)
    ends = asyncio.Event()
    go_on = threading.Event()

    @app.task(timeout=0.1)
    async def deaf() -> None:
        while not ends.is_set():
            try:
                await ends.wait()
            except asyncio.CancelledError:
                continue

    @app.task(timeout=0.1)
    def deaf_thread() -> None:
        go_on.wait(20)

    async with app:
        for task, left in ((deaf, 1), (deaf_thread, 0)):
            worker = Worker(app, grace=20.0)
            working = asyncio.create_task(worker.run())
            result = await task.send()
            await until(lambda worker=worker: worker.stuck == 1, "it is stuck")  # type: ignore[misc]
            began = time.monotonic()
            worker.stop()
            await working
            assert time.monotonic() - began < 3
            with pytest.raises(TaskFailed, match=r"TimeLimitExceeded: 0\.1"):
                await result.get(5)
            assert worker.stuck == left
        ends.set()
        go_on.set()


async def test_a_run_that_is_ended_before_it_began_does_nothing_and_frees_its_slot(
    app: AQueue, start_worker: StartWorker
) -> None:
    ran: list[str] = []

    @app.task
    async def never() -> None:
        ran.append("never")

    async with app:
        broker, store = app.producer().broker, app.producer().store
        slots = Slots({"coroutine": 1, "thread": 1})
        runners = Runners(ThreadPool(1, asyncio.get_running_loop()), ProcessPool(app.tasks, app.settings), app.tasks)
        runs = Runs(app, "w", {}, broker, store, slots, runners)
        await never.send()
        runs.accept(await broker.fetch(["celery"], 1, 1))
        (run,) = runs.active.values()
        run.end("lease lost")
        await until(lambda: not runs.active, "the run has ended")
        assert slots.take("coroutine")
        assert not ran


async def test_a_thread_whose_message_is_lost_keeps_its_slot_until_it_ends(
    make_app: MakeApp, start_worker: StartWorker
) -> None:
    app = make_app()
    go_on = threading.Event()
    begun: list[str] = []

    @app.task
    def hold() -> None:
        begun.append("hold")
        go_on.wait(20)

    async with app:
        slots = Slots({"coroutine": 1, "thread": 1})
        threads = ThreadPool(1, asyncio.get_running_loop())
        runners = Runners(threads, ProcessPool(app.tasks, app.settings), app.tasks)
        producer = app.producer()
        runs = Runs(app, "w", {}, producer.broker, producer.store, slots, runners)
        await hold.send()
        runs.accept(await producer.broker.fetch(["celery"], 1, 1))
        await until(lambda: begun, "it runs")
        for run in runs.active.values():
            run.end("lease lost")
        await asyncio.sleep(0.1)
        assert not slots.take("thread")
        go_on.set()
        await until(lambda: slots.take("thread"), "the slot is free")
        threads.close()


async def test_the_tasks_own_limits_stay_with_the_worker(app: AQueue) -> None:
    @app.task(timeout=5, soft_timeout=3)
    async def limited() -> None: ...

    await limited.send()
    await limited.options(timeout=7, soft_timeout=6).send()
    found = await app.producer().broker.fetch(["celery"], 2, 1)
    assert [delivery.message.headers["timelimit"] for delivery in found] == [[None, None], [7, 6]]  # type: ignore[union-attr]
