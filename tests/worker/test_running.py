"""From `send` to a result, on every broker."""

import asyncio
import contextvars
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from functools import partial
from typing import Any
from uuid import UUID

import pytest

from aqueue import (
    AQueue,
    Context,
    Ignore,
    InvalidArguments,
    Reject,
    ResultIgnored,
    ResultTimeout,
    ResultUnknown,
    Retry,
    TaskFailed,
    TaskRevoked,
    current,
)
from aqueue.outcome import Done, Failed, Outcome, Skipped
from aqueue.task import Signature
from tests.kit.waiting import until
from tests.worker.conftest import MakeApp, StartWorker, running


async def test_a_coroutine_and_a_plain_function_give_the_same(app: AQueue, start_worker: StartWorker) -> None:
    where: list[bool] = []

    @app.task
    async def on_the_loop(x: int, *, y: int = 1) -> int:
        where.append(threading.current_thread() is threading.main_thread())
        return x + y

    @app.task
    def in_a_thread(x: int, *, y: int = 1) -> int:
        where.append(threading.current_thread() is threading.main_thread())
        return x + y

    await start_worker(app)
    for task in (on_the_loop, in_a_thread):
        assert await (await task.send(2, y=3)).get(timeout=5) == 5
        assert await (await task.send(2)) == 3
        assert await (await task.delay(4)) == 5
        assert await (await task.apply_async((4,), {"y": 4})) == 8
    assert where == [True] * 4 + [False] * 4


async def test_many_tasks_each_run_once(app: AQueue, start_worker: StartWorker) -> None:
    seen: list[int] = []

    @app.task
    async def note(n: int) -> int:
        seen.append(n)
        return n * 2

    await start_worker(app, concurrency=20)
    results = await app.send_many([note.s(n) for n in range(500)])
    assert await asyncio.gather(*[result.get(10) for result in results]) == [n * 2 for n in range(500)]
    assert sorted(seen) == list(range(500))


async def test_concurrency_is_kept_for_each_kind(app: AQueue, start_worker: StartWorker) -> None:
    """Each kind has slots of its own, and with queues of their own neither holds up the other."""
    now = {"coroutine": 0, "thread": 0}
    most = dict(now)
    lock = threading.Lock()

    def enter(kind: str, step: int) -> None:
        with lock:
            now[kind] += step
            most[kind] = max(most[kind], now[kind])

    @app.task(queue="loop")
    async def coroutine() -> None:
        enter("coroutine", 1)
        await asyncio.sleep(0.02)
        enter("coroutine", -1)

    @app.task(queue="threads")
    def thread() -> None:
        enter("thread", 1)
        time.sleep(0.02)
        enter("thread", -1)

    await start_worker(app, concurrency=5, threads=3)
    mixed = [coroutine.s() if n % 2 else thread.s() for n in range(60)]
    await asyncio.gather(*[result.get(20) for result in await app.send_many(mixed)])
    assert most == {"coroutine": 5, "thread": 3}


async def test_a_failure_is_told_and_not_rebuilt(app: AQueue, start_worker: StartWorker) -> None:
    class Odd(Exception):
        pass

    @app.task
    async def fail(text: str) -> None:
        raise Odd(text, 7)

    @app.task
    def fail_in_thread() -> None:
        raise ValueError("in thread")

    await start_worker(app)
    result = await fail.send("boom")
    with pytest.raises(TaskFailed) as caught:
        await result.get(5)
    error = caught.value
    assert error.type.endswith("Odd")
    assert error.message == "('boom', 7)"
    assert error.module == __name__
    assert error.traceback is not None
    assert "raise Odd(text, 7)" in error.traceback
    assert "aqueue/" not in error.traceback
    assert await result.state() == "FAILURE"
    assert not await result.successful()
    with pytest.raises(TaskFailed, match="ValueError: in thread"):
        await (await fail_in_thread.send()).get(5)


@pytest.mark.parametrize("how", [SystemExit, KeyboardInterrupt, GeneratorExit, asyncio.CancelledError, StopIteration])
@pytest.mark.parametrize("kind", ["memory"], indirect=True)
async def test_whatever_a_task_raises_the_worker_lives(
    app: AQueue, start_worker: StartWorker, how: type[BaseException]
) -> None:
    @app.task
    async def wild() -> None:
        raise how("wild")

    @app.task
    def wild_thread() -> None:
        raise how("wild")

    @app.task
    async def tame() -> str:
        return "alive"

    await start_worker(app)
    for task in (wild, wild_thread):
        with pytest.raises(TaskFailed):
            await (await task.send()).get(5)
    assert await (await tame.send()).get(5) == "alive"


async def test_retry_policy(app: AQueue, start_worker: StartWorker) -> None:
    attempts: list[int] = []

    @app.task(retry=Retry(attempts=3, backoff=0.05))
    async def flaky(ctx: Context, until_attempt: int) -> int:
        attempts.append(ctx.attempt)
        assert ctx.max_attempts == 3
        if ctx.attempt < until_attempt:
            raise ConnectionError("not yet")
        return ctx.attempt

    await start_worker(app)
    assert await (await flaky.send(3)).get(10) == 3
    assert attempts == [1, 2, 3]
    attempts.clear()
    with pytest.raises(TaskFailed, match="not yet"):
        await (await flaky.send(9)).get(10)
    assert attempts == [1, 2, 3]


async def test_retry_depends_on_the_error(app: AQueue, start_worker: StartWorker) -> None:
    runs: list[str] = []

    @app.task(retry=Retry(attempts=5, backoff=0, on=(ConnectionError, ValueError), never=ValueError))
    async def picky(kind: str) -> None:
        runs.append(kind)
        raise {"connection": ConnectionError, "value": ValueError, "key": KeyError}[kind]("x")

    @app.task(retry=Retry(attempts=2, backoff=0, on=lambda error: "again" in str(error)))
    async def by_text(text: str) -> None:
        runs.append(text)
        raise RuntimeError(text)

    await start_worker(app)
    for kind in ("connection", "value", "key"):
        with pytest.raises(TaskFailed):
            await (await picky.send(kind)).get(10)
    for text in ("again", "enough"):
        with pytest.raises(TaskFailed):
            await (await by_text.send(text)).get(10)
    assert runs == ["connection"] * 5 + ["value", "key"] + ["again"] * 2 + ["enough"]


async def test_retry_now_is_not_swallowed_and_shows_as_retry(app: AQueue, start_worker: StartWorker) -> None:
    @app.task
    async def later(ctx: Context) -> int:
        try:
            if ctx.attempt == 1:
                raise Retry.now(after=0.5, error=KeyError("why"))
        except Exception:
            return -1
        return ctx.attempt

    @app.task
    def never_enough() -> None:
        raise Retry.now(after=0, error=KeyError("why"))

    await start_worker(app)
    result = await later.send()
    await until(lambda: _is(result, "RETRY"), "the state says RETRY")
    info = await result.info()
    assert (info.exc_type, info.exc_message) == ("KeyError", ["why"])
    assert await result.get(5) == 2
    with pytest.raises(TaskFailed, match="KeyError: why"):
        await (await never_enough.send()).get(5)


async def _is(result: Any, state: str) -> bool:
    return bool(await result.state() == state)


async def test_ignore_and_ignore_result_leave_nothing(app: AQueue, start_worker: StartWorker) -> None:
    ran: list[str] = []

    @app.task
    async def ignored() -> None:
        ran.append("ignored")
        raise Ignore

    @app.task(ignore_result=True)
    async def silent() -> int:
        ran.append("silent")
        return 1

    await start_worker(app)
    await ignored.send()
    result = await silent.send()
    with pytest.raises(ResultIgnored):
        await result.get(1)
    once = await silent.options(ignore_result=False).send()
    assert await once.get(5) == 1
    await until(lambda: len(ran) == 3, "all ran")
    assert await app.result(result.id).fetch() is None


async def test_reject_buries_or_gives_back(app: AQueue, start_worker: StartWorker) -> None:
    runs: list[str] = []

    @app.task
    async def refuse() -> None:
        raise Reject("no thanks")

    @app.task
    async def once_more() -> str:
        runs.append("x")
        if len(runs) == 1:
            raise Reject(requeue=True)
        return "done"

    await start_worker(app)
    with pytest.raises(TaskFailed, match="no thanks"):
        await (await refuse.send()).get(5)
    assert await (await once_more.send()).get(5) == "done"
    (letter,) = await app.producer().broker.inspection.dead()
    assert (letter.reason, letter.detail) == ("rejected", "no thanks")


async def test_timeouts_end_a_run_and_free_the_slot(app: AQueue, start_worker: StartWorker) -> None:
    cleaned: list[str] = []

    @app.task(timeout=0.2)
    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cleaned.append("slow")

    @app.task(timeout=0.2)
    def slow_thread(ctx: Context) -> None:
        while not ctx.cancelled:
            time.sleep(0.01)
        cleaned.append(str(ctx.cancel_reason))

    await start_worker(app, concurrency=1, threads=1)
    for task in (slow, slow_thread):
        start = time.monotonic()
        with pytest.raises(TaskFailed, match=r"TimeLimitExceeded: 0\.2"):
            await (await task.send()).get(5)
        assert 0.15 < time.monotonic() - start < 2
    with pytest.raises(TaskFailed, match=r"SoftTimeLimitExceeded: 0\.1"):
        await (await slow.options(timeout=9, soft_timeout=0.1).send()).get(5)
    assert cleaned == ["slow", "timeout", "slow"]


async def test_a_message_of_its_own_limit_overrides_the_tasks(app: AQueue, start_worker: StartWorker) -> None:
    @app.task(timeout=0.1)
    async def nap(seconds: float) -> str:
        await asyncio.sleep(seconds)
        return "rested"

    await start_worker(app)
    assert await (await nap.options(timeout=5).send(0.3)).get(5) == "rested"


async def test_countdown_eta_and_expires(app: AQueue, start_worker: StartWorker) -> None:
    @app.task
    async def when() -> float:
        return time.time()

    await start_worker(app)
    start = time.time()
    in_a_while = await when.options(countdown=1.5).send()
    at_a_time = await when.options(eta=datetime.now(timezone.utc) + timedelta(seconds=1.5)).send()
    past = await when.options(eta=datetime(2020, 1, 1)).send()  # noqa: DTZ001 - naive is UTC
    too_late = await when.options(countdown=0.3, expires=0.1).send()
    in_time = await when.options(expires=30.0).send()
    assert await past.get(5) - start < 1.4
    assert await in_time.get(5) - start < 1.4
    for result in (in_a_while, at_a_time):
        assert 1.45 < await result.get(10) - start < 4.0
    with pytest.raises(TaskRevoked, match="expired"):
        await too_late.get(5)
    assert await too_late.state() == "REVOKED"


async def test_priorities_decide_the_order(app: AQueue, start_worker: StartWorker) -> None:
    order: list[int] = []

    @app.task
    async def note(priority: int) -> None:
        order.append(priority)

    for priority in (0, 9, 5, 0, 9):
        await note.options(priority=priority).send(priority)
    await start_worker(app, concurrency=1)
    await until(lambda: len(order) == 5, "all ran")
    assert order == [9, 9, 5, 0, 0]


async def test_routes_by_option_by_task_and_by_table(make_app: MakeApp, start_worker: StartWorker) -> None:
    app = make_app(routes={"test.feed_*": "feeds", "*.urgent": {"queue": "fast", "priority": 7}})
    names = ("feed_one", "urgent", "plain", "own")
    made = {}
    for name in names:

        async def where(ctx: Context) -> tuple[str, int]:
            return ctx.queue, ctx.request.message.priority

        options: dict[str, Any] = {"queue": "mine"} if name == "own" else {}
        made[name] = app.task(name=f"test.{name}", **options)(where)
    worker = await start_worker(app, queues=[*app.queues(), "elsewhere"])
    assert set(worker.queues) == {"celery", "feeds", "fast", "mine", "elsewhere"}
    found = {name: (await (await made[name].send()).get(5))[0] for name in names}
    assert found == {"feed_one": "feeds", "urgent": "fast", "plain": "celery", "own": "mine"}
    assert (await (await made["own"].options(queue="elsewhere").send()).get(5))[0] == "elsewhere"


class Colour(Enum):
    RED = "red"


@dataclass
class Order:
    id: int
    amount: Decimal
    colour: Colour
    placed: datetime
    items: list[UUID]


async def test_rich_arguments_and_results(app: AQueue, start_worker: StartWorker) -> None:
    @app.task
    async def double(order: Order, *, when: datetime, raw: bytes) -> Order:
        assert isinstance(order, Order)
        assert isinstance(order.colour, Colour)
        assert when.tzinfo is not None
        assert raw == b"\x00\xff"
        return Order(order.id * 2, order.amount * 2, order.colour, order.placed, order.items * 2)

    await start_worker(app)
    placed = datetime(2026, 1, 2, tzinfo=timezone.utc)
    order = Order(1, Decimal("1.10"), Colour.RED, placed, [UUID(int=5)])
    result = await double.send(order, when=placed, raw=b"\x00\xff")
    assert await result.get(5) == Order(2, Decimal("2.20"), Colour.RED, placed, [UUID(int=5)] * 2)
    # Another process that knows the task sees the same type; one that doesn't sees plain values.
    assert isinstance(await double.result(result.id).get(5), Order)
    assert isinstance(await app.result(result.id).get(5), dict)


async def test_bad_arguments_fail_in_the_caller(app: AQueue) -> None:
    @app.task
    async def add(x: int, y: int = 0) -> int:
        return x + y

    for args, kwargs, named in (
        ((), {}, "x"),
        (("1",), {}, "'x'"),
        ((1, 2, 3), {}, "too many"),
        ((1,), {"z": 2}, "z"),
        ((1,), {"x": 2}, "x"),
        ((1.5,), {}, "'x'"),
    ):
        with pytest.raises(InvalidArguments, match=named):
            await add.send(*args, **kwargs)
    assert await app.producer().broker.inspection.queues() == []


async def test_bad_arguments_from_elsewhere_fail_without_retry(app: AQueue, start_worker: StartWorker) -> None:
    runs: list[int] = []

    @app.task(retry=Retry(attempts=5, backoff=0))
    async def add(x: int, y: int) -> int:
        runs.append(1)
        return x + y

    await start_worker(app)
    for args in ([], ["a", 1], [1, 2, 3]):
        with pytest.raises(TaskFailed, match="InvalidArguments"):
            await (await app.send(Signature(add.name, args))).get(5)
    assert runs == []
    assert await (await app.send(Signature(add.name, ["1", 2]))).get(5) == 3  # an untyped sender's text


async def test_a_result_that_can_not_be_stored_is_a_failure(app: AQueue, start_worker: StartWorker) -> None:
    runs: list[str] = []

    @app.task(retry=Retry(attempts=5, backoff=0))
    async def odd(what: str) -> Any:
        runs.append(what)
        return {"object": object(), "nan": float("nan"), "large": "x" * 2_000_000}[what]

    await start_worker(app)
    for what in ("object", "nan", "large"):
        with pytest.raises(TaskFailed):
            await (await odd.send(what)).get(5)
    assert runs == ["object", "nan", "large"]


async def test_the_context_and_what_is_sent_from_inside(app: AQueue, start_worker: StartWorker) -> None:
    @app.task
    async def child(ctx: Context) -> tuple[str, str | None]:
        return ctx.root_id, ctx.parent_id

    @app.task
    async def parent(ctx: Context) -> tuple[str, tuple[str, str | None]]:
        assert current() is ctx
        return ctx.id, await (await child.send()).get(5)

    @app.task
    def thread_parent(ctx: Context) -> tuple[str, str]:
        assert current() is ctx
        return ctx.id, child.send_sync().id

    await start_worker(app)
    result = await parent.options(headers={"tenant": "t1"}).send()
    own, (root, by) = await result.get(5)
    assert own == root == by == result.id
    own, child_id = await (await thread_parent.send()).get(5)
    assert await app.result(child_id, known=True).get(5) == [own, own]
    assert current() is None


async def test_progress_is_seen_while_the_task_runs(app: AQueue, start_worker: StartWorker) -> None:
    go_on = threading.Event()

    @app.task
    async def work(ctx: Context) -> str:
        await ctx.progress(1, 4, "a quarter")
        while not go_on.is_set():
            await asyncio.sleep(0.01)
        return "done"

    @app.task
    def work_in_thread(ctx: Context) -> str:
        ctx.progress_sync(1, 4, "a quarter")
        go_on.wait(5)
        return "done"

    await start_worker(app)
    for task in (work, work_in_thread):
        go_on.clear()
        result = await task.send()
        await until(partial(_is, result, "PROGRESS"), "the state says PROGRESS")
        assert await result.info() == {"current": 1, "total": 4, "message": "a quarter"}
        go_on.set()
        assert await result.get(5) == "done"


async def test_bind_gives_celerys_self(app: AQueue, start_worker: StartWorker) -> None:
    @app.task(bind=True)
    def bound(self: Any, x: int) -> list[Any]:
        if self.request.retries == 0:
            raise self.retry(exc=ValueError("x"), countdown=0)
        return [self.request.id, self.request.retries, x, self.request.delivery_info["routing_key"], self.name]

    await start_worker(app)
    result = await bound.send(5)
    assert await result.get(5) == [result.id, 1, 5, "celery", bound.name]


async def test_middleware_gates_and_observers(app: AQueue, start_worker: StartWorker) -> None:
    trail: list[str] = []
    tenant: contextvars.ContextVar[str] = contextvars.ContextVar("tenant", default="")

    @app.add_middleware
    async def outer(context: Context, call_next: Any) -> Any:
        trail.append("outer in")
        tenant.set(str(context.headers.get("tenant")))
        value = await call_next(context)
        trail.append("outer out")
        return value

    @app.add_middleware
    async def inner(context: Context, call_next: Any) -> Any:
        trail.append("inner")
        return await call_next(context) * 2

    @app.add_gate
    async def gate(context: Context) -> Outcome | None:
        return Skipped() if context.headers.get("tenant") == "blocked" else None

    @app.add_observer
    def watch(context: Context, outcome: Outcome, seconds: float) -> None:
        trail.append(type(outcome).__name__)
        raise RuntimeError("an observer that fails changes nothing")

    @app.task
    def task() -> int:
        trail.append(tenant.get())
        return 21

    await start_worker(app)
    assert await (await task.options(headers={"tenant": "t1"}).send()).get(5) == 42
    await until(lambda: "Done" in trail, "the observer was told")
    assert trail == ["outer in", "inner", "t1", "outer out", "Done"]
    trail.clear()
    await task.options(headers={"tenant": "blocked"}).send()
    await until(lambda: trail == ["Skipped"], "the gate refused")


async def test_lifespans_are_entered_once_and_left_in_reverse(app: AQueue) -> None:
    trail: list[str] = []

    @app.lifespan
    @asynccontextmanager
    async def first(app: AQueue) -> AsyncIterator[dict[str, str]]:
        trail.append("first in")
        yield {"pool": "the pool"}
        trail.append("first out")

    @app.lifespan
    @asynccontextmanager
    async def second(app: AQueue) -> AsyncIterator[None]:
        trail.append("second in")
        yield
        trail.append("second out")

    @app.task
    async def use(ctx: Context) -> str:
        return str(ctx.state["pool"])

    async with running(app):
        assert await (await use.send()).get(5) == "the pool"
    assert trail == ["first in", "second in", "second out", "first out"]


async def test_unknown_ids_and_timeouts(app: AQueue, start_worker: StartWorker) -> None:
    @app.task
    async def slow() -> str:
        await asyncio.sleep(0.5)
        return "late"

    with pytest.raises(ResultUnknown, match="nobody"):
        await app.result("nobody").get(5)
    assert await app.result("nobody").state() == "UNKNOWN"
    with pytest.raises(ResultTimeout):
        await app.result("nobody", known=True).get(0.1)
    await start_worker(app)
    result = await slow.send()
    assert await app.result(result.id).state() == "PENDING"
    with pytest.raises(ResultTimeout):
        await result.get(0.1)
    assert await app.result(result.id).get(5) == "late"
    assert await app.result(result.id).get(5) == "late"
    assert await result.ready()
    await result.forget()
    with pytest.raises(ResultUnknown):
        await result.get(5)


@pytest.mark.parametrize("kind", ["sqlite", "redis"], indirect=True)  # where one server keeps both
async def test_the_same_id_is_the_same_task(app: AQueue, start_worker: StartWorker) -> None:
    runs: list[int] = []

    @app.task
    async def count() -> int:
        runs.append(1)
        return len(runs)

    first = await count.options(task_id="order-7").send()
    again = await count.options(task_id="order-7").send()
    assert first == again
    await start_worker(app)
    assert await again.get(5) == 1
    assert await (await count.options(task_id="order-7").send()).get(5) == 1
    assert runs == [1]


async def test_send_sync_outside_and_not_inside_of_a_loop(app: AQueue, kind: str, start_worker: StartWorker) -> None:
    sums: list[int] = []

    @app.task
    async def add(x: int, y: int) -> int:
        sums.append(x + y)
        return x + y

    with pytest.raises(RuntimeError, match=r"await task\.send"):
        add.send_sync(1, 2)
    await start_worker(app)
    result = await asyncio.to_thread(add.send_sync, 1, 2)
    await until(lambda: sums == [3], "it ran")
    if kind == "rabbitmq":  # over rpc a result comes to the loop that sent the task, and to no other
        with pytest.raises(ResultUnknown):
            await app.result(result.id).get(5)
    else:
        assert await app.result(result.id).get(5) == 3


async def test_two_apps_in_one_process(make_app: MakeApp, start_worker: StartWorker) -> None:
    one, two = make_app(default_queue="one"), make_app(default_queue="two")

    @one.task(name="same")
    async def first() -> str:
        return "one"

    @two.task(name="same")
    async def second() -> str:
        return "two"

    await start_worker(one)
    await start_worker(two)
    assert await (await first.send()).get(5) == "one"
    assert await (await second.send()).get(5) == "two"


async def test_no_reference_to_an_exception_outlives_the_task(app: AQueue, start_worker: StartWorker) -> None:
    class Heavy:
        pass

    alive: list[weakref.ref[Heavy]] = []

    @app.task
    async def fail() -> None:
        heavy = Heavy()
        alive.append(weakref.ref(heavy))
        raise ValueError(heavy)

    await start_worker(app)
    with pytest.raises(TaskFailed):
        await (await fail.send()).get(5)

    def gone() -> bool:
        gc.collect()
        return alive[0]() is None

    await until(gone, "the exception's frames are gone")


def test_outcomes_are_plain_values() -> None:
    assert Done(1) == Done(1)
    assert Failed(error := ValueError()) == Failed(error)


async def test_a_worker_beside_other_code(app: AQueue, queue: str) -> None:
    @app.task(name="add")
    async def add(a: int, b: int) -> int:
        return a + b

    async with app.worker(queues=[queue], concurrency=3, name="beside") as worker:
        assert worker.queues == [queue]
        result = await add.options(queue=queue).send(1, 2)
        assert await result.get(10) == 3
    later = await add.options(queue=queue).send(3, 4)
    with pytest.raises(ResultTimeout):
        await later.get(0.2)


async def test_what_breaks_a_worker_beside_other_code_is_raised_there(app: AQueue, queue: str) -> None:
    @app.lifespan
    @asynccontextmanager
    async def breaks(app: AQueue) -> AsyncIterator[None]:
        yield
        raise RuntimeError("the lifespan can't end")

    with pytest.raises(RuntimeError, match="the lifespan"):
        async with app.worker(queues=[queue]):
            pass


async def test_what_blocks_the_loop_is_named(app: AQueue, queue: str, caplog: pytest.LogCaptureFixture) -> None:
    @app.task(name="crunch")
    async def crunch() -> None:
        time.sleep(1.6)

    async with app.worker(queues=[queue]):
        result = await crunch.options(queue=queue).send()
        await result.get(20)
        await until(lambda: "turns again" in caplog.text, "the end of the stall is told")
    (line,) = [record.getMessage() for record in caplog.records if "is blocked since" in record.getMessage()]
    assert f"crunch[{result.id}]" in line
    assert f"{__file__}:{crunch.function.__code__.co_firstlineno + 2} in crunch" in line
