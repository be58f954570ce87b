"""Retry, snooze, give up: what a task says of its own future, on every broker, and what is remembered of it."""

import asyncio
from typing import Any

import pytest

from aqueue import AQueue, Context, Dead, Retry, Snooze, SyncTask, TaskFailed
from aqueue.broker import DeadLetter
from aqueue.outcome import Outcome, Snoozed
from aqueue.protocol import Message, Unreadable
from tests.kit.waiting import until
from tests.worker import process_tasks
from tests.worker.conftest import StartWorker


async def test_a_snooze_is_no_attempt_and_no_failure(app: AQueue, start_worker: StartWorker) -> None:
    seen: list[tuple[int, int, int]] = []

    @app.task(retry=Retry(attempts=2, backoff=0))
    async def poll(ctx: Context, times: int) -> str:
        seen.append((ctx.attempt, ctx.snoozes, ctx.deliveries))
        try:
            if ctx.snoozes < times:
                raise Snooze(0.05)
        except Exception:
            return "swallowed"
        return "ready"

    await start_worker(app)
    result = await poll.options(headers={"tenant": "t1"}).send(3)
    assert await result.get(15) == "ready"
    assert seen == [(1, 0, 1), (1, 1, 1), (1, 2, 1), (1, 3, 1)]
    assert await result.attempts() == ()


async def test_a_snoozed_task_keeps_its_attempts_and_its_headers(app: AQueue, start_worker: StartWorker) -> None:
    seen: list[tuple[int, int, dict[str, Any]]] = []

    @app.task(retry=Retry(attempts=3, backoff=0))
    def turns(ctx: Context) -> int:
        seen.append((ctx.attempt, ctx.snoozes, ctx.headers))
        if len(seen) in (1, 3):
            raise ConnectionError("not there")
        if len(seen) == 2:
            raise Snooze(0)
        return ctx.attempt

    await start_worker(app)
    result = await turns.options(headers={"tenant": "t1"}).send()
    assert await result.get(15) == 3
    own = {"tenant": "t1"}
    assert seen == [(1, 0, own), (2, 0, own), (2, 1, own), (3, 1, own)]


async def test_a_snoozed_task_is_told_and_its_place_is_free(app: AQueue, start_worker: StartWorker) -> None:
    told: list[Outcome] = []
    ran: list[str] = []

    @app.add_observer
    def watch(context: Context, outcome: Outcome, seconds: float) -> None:
        told.append(outcome)

    @app.task
    async def later(ctx: Context) -> None:
        ran.append("later")
        if not ctx.snoozes:
            raise Snooze(2)

    @app.task
    async def other() -> None:
        ran.append("other")

    await start_worker(app, concurrency=1)
    result = await later.send()
    await until(lambda: told, "it has put itself off")
    assert told == [Snoozed(2)]
    assert await result.state() == "PENDING"
    await (await other.send()).get(10)
    await result.get(15)
    assert ran == ["later", "other", "later"]


async def test_dead_buries_at_once_whatever_the_policy(app: AQueue, start_worker: StartWorker) -> None:
    runs: list[int] = []

    @app.task(retry=Retry(attempts=5, backoff=0))
    async def hopeless(ctx: Context) -> None:
        runs.append(ctx.attempt)
        if ctx.attempt == 1:
            raise ConnectionError("first")
        try:
            raise Dead("the account is closed") from LookupError("no such account")
        except Exception:
            pass

    await start_worker(app)
    result = await hopeless.send()
    with pytest.raises(TaskFailed, match="the account is closed") as caught:
        await result.get(15)
    assert caught.value.type == "GivenUp"
    assert "LookupError: no such account" in (caught.value.traceback or "")
    assert runs == [1, 2]

    async def letters() -> list[DeadLetter]:
        dead = await app.producer().broker.inspection.dead()
        return [
            one for one in dead if not isinstance(one.message, Unreadable) and one.message.headers["id"] == result.id
        ]

    (letter,) = await until(letters, "it is buried")
    assert (letter.reason, letter.detail) == ("dead_by_task", "the account is closed")
    # What had failed before travels with the message.
    assert isinstance(letter.message, Message)
    assert [error["text"] for error in letter.message.headers["aqueue_errors"]] == ["first"]
    assert [(one.number, one.text) for one in await result.attempts()] == [(1, "first")]


@pytest.mark.parametrize("kind", ["memory"], indirect=True)
async def test_a_task_in_a_process_says_the_same(app: AQueue, start_worker: StartWorker) -> None:
    not_yet: SyncTask[[], list[Any]] = app.task(run="process", retry=Retry(attempts=2, backoff=0))(
        process_tasks.not_yet
    )
    hopeless: SyncTask[..., Any] = app.task(run="process", retry=Retry(attempts=5, backoff=0))(process_tasks.hopeless)
    await start_worker(app)
    assert await (await not_yet.send()).get(60) == [2, 1, ["first"]]
    with pytest.raises(TaskFailed, match="GivenUp: no use"):
        await (await hopeless.send()).get(60)


async def test_the_error_of_each_attempt_is_kept(app: AQueue, start_worker: StartWorker) -> None:
    seen: list[list[tuple[int, str, str]]] = []

    @app.task(retry=Retry(attempts=4, backoff=0))
    async def flaky(ctx: Context, good: int) -> str:
        seen.append([(error.number, error.type, error.text) for error in ctx.errors])
        if ctx.attempt == 2:
            raise Retry.now(after=0)
        if ctx.attempt < good:
            raise ConnectionError(f"try {ctx.attempt}")
        return "done"

    worker = await start_worker(app)
    result = await flaky.send(4)
    assert await result.get(15) == "done"
    tries = [
        (1, "ConnectionError", "try 1"),
        (2, "Retry", "the task asked to be run again"),
        (3, "ConnectionError", "try 3"),
    ]
    assert seen == [[], tries[:1], tries[:2], tries]
    attempts = await result.attempts()
    assert [(one.number, one.type, one.text) for one in attempts] == tries
    assert {one.worker for one in attempts} == {worker.name}
    assert sorted(one.time for one in attempts) == [one.time for one in attempts]

    failing = await flaky.send(9)
    with pytest.raises(TaskFailed, match="try 4"):
        await failing.get(15)
    assert [one.number for one in await failing.attempts()] == [1, 2, 3, 4]


async def test_between_two_attempts_the_state_says_what_has_failed(app: AQueue, start_worker: StartWorker) -> None:
    @app.task(retry=Retry(attempts=2, backoff=60))
    async def slow_to_recover() -> None:
        raise ConnectionError("away")

    await start_worker(app)
    result = await slow_to_recover.send()

    async def is_waiting() -> bool:
        return await result.state() == "RETRY"

    await until(is_waiting, "it waits for its second attempt")
    assert [(one.number, one.text) for one in await result.attempts()] == [(1, "away")]


async def test_what_succeeds_at_first_carries_nothing(app: AQueue, start_worker: StartWorker) -> None:
    headers: list[dict[str, Any]] = []

    @app.task(retry=Retry(attempts=5))
    async def good(ctx: Context) -> int:
        headers.append(ctx.request.message.headers)
        assert ctx.errors == ()
        return 1

    @app.task
    async def bad() -> None:
        raise ValueError("once")

    await start_worker(app)
    result = await good.send()
    assert await result.get(10) == 1
    assert not [name for name in headers[0] if name.startswith("aqueue_")]
    failed = await bad.send()
    with pytest.raises(TaskFailed):
        await failed.get(10)
    for one in (result, failed):
        document = await one.fetch()
        assert document is not None
        assert "attempts" not in document.extra


@pytest.mark.parametrize("kind", ["memory"], indirect=True)
@pytest.mark.parametrize("after", [float("nan"), float("inf"), 1e300])
async def test_a_retry_after_no_number_of_seconds_is_a_failure(
    app: AQueue, start_worker: StartWorker, after: float
) -> None:
    @app.task(bind=True)
    def odd(self: Any) -> None:
        self.retry(countdown=after)

    @app.task
    async def even() -> str:
        return "alive"

    await start_worker(app)
    with pytest.raises(TaskFailed, match="no number of seconds"):
        await (await odd.send()).get(10)
    assert await asyncio.wait_for(await even.send(), 10) == "alive"
