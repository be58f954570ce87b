"""Results: whether and how long they are kept, what they tell, and that either side reads and forgets them."""

import asyncio
import math
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from typing import Any

import pytest

from aqueue import AQueue, ResultIgnored, ResultUnknown, TaskFailed
from aqueue.async_result import UNKNOWN
from tests.interop.celery_names import ResultSet, group
from tests.interop.conftest import SOON, TO_AQUEUE, TO_CELERY, Connect, Fleet, ended, working
from tests.interop.workers import Site
from tests.kit.waiting import until


def stored(site: Site, task_id: str) -> bytes | None:
    with site.result_keys() as keys:
        found: bytes | None = keys.get(f"celery-task-meta-{task_id}")
        return found


def time_to_live(site: Site, task_id: str) -> int:
    with site.result_keys() as keys:
        return int(keys.ttl(f"celery-task-meta-{task_id}"))


# --- whether ---------------------------------------------------------------------------------------------------------


async def test_an_aqueue_worker_keeps_no_result_when_the_celery_client_wants_none(fleet: Fleet, key: str) -> None:
    result = fleet.client.send_task("interop.count", [fleet.site.port, key], queue=TO_AQUEUE, ignore_result=True)
    await until(lambda: fleet.site.runs(key), "the task has run")
    await ended(fleet.client.send_task("interop.add", [2, 3], queue=TO_AQUEUE))  # settled after it
    assert stored(fleet.site, result.id) is None


async def test_an_aqueue_worker_keeps_no_failure_when_the_celery_client_wants_none(fleet: Fleet, key: str) -> None:
    result = fleet.client.send_task("interop.fail", ["boom"], queue=TO_AQUEUE, ignore_result=True)
    await ended(fleet.client.send_task("interop.add", [2, 3], queue=TO_AQUEUE))
    assert stored(fleet.site, result.id) is None


async def test_an_aqueue_worker_keeps_no_result_of_a_task_that_is_declared_so(fleet: Fleet, key: str) -> None:
    result = fleet.client.send_task("interop.ignored", [fleet.site.port, key], queue=TO_AQUEUE)
    await until(lambda: fleet.site.runs(key), "the task has run")
    await ended(fleet.client.send_task("interop.add", [2, 3], queue=TO_AQUEUE))
    assert stored(fleet.site, result.id) is None


async def test_a_celery_worker_keeps_no_result_when_the_aqueue_client_wants_none(
    fleet: Fleet, connect: Connect, key: str
) -> None:
    app = await connect(fleet.site)
    result = await app.send_task("interop.count", [fleet.site.port, key], queue=TO_CELERY, ignore_result=True)
    with pytest.raises(ResultIgnored):
        await result.get(SOON)
    await until(lambda: fleet.site.runs(key), "the task has run")
    await ended(fleet.client.send_task("interop.add", [2, 3], queue=TO_CELERY))
    assert stored(fleet.site, result.id) is None


async def test_a_result_that_is_asked_for_by_name_comes_though_the_celery_task_is_declared_to_keep_none(
    fleet: Fleet, connect: Connect, key: str
) -> None:
    """By name alone it is the task that decides, as for a Celery client; who wants the result says so."""
    app = await connect(fleet.site)
    result = await app.send_task("interop.ignored", [fleet.site.port, key], queue=TO_CELERY, ignore_result=False)
    assert await result.get(SOON) == "celery"


async def test_a_result_that_can_not_be_stored_is_a_failure_for_both(fleet: Fleet, connect: Connect) -> None:
    theirs = fleet.client.send_task("interop.give_what_can_not_be_stored", queue=TO_AQUEUE)
    with pytest.raises(Exception, match="can't be stored"):
        await ended(theirs)
    assert theirs.state == "FAILURE"
    app = await connect(fleet.site)
    ours = await app.send_task("interop.give_what_can_not_be_stored", queue=TO_CELERY)
    with pytest.raises(TaskFailed, match="EncodeError"):
        await ours.get(SOON)


# --- how long --------------------------------------------------------------------------------------------------------


async def test_results_live_for_a_day_on_both_sides(plain_fleet: Fleet, connect: Connect) -> None:
    app = await connect(plain_fleet.site)
    for queue in (TO_AQUEUE, TO_CELERY):
        for task, args in (("interop.add", [2, 3]), ("interop.fail", ["boom"])):
            theirs = plain_fleet.client.send_task(task, args, queue=queue)
            ours = await app.send_task(task, args, queue=queue)
            for result in (theirs, ours):
                await until(partial(is_done, plain_fleet, result.id), "the task has ended")
                assert 86_000 < time_to_live(plain_fleet.site, result.id) <= 86_400


def is_done(fleet: Fleet, task_id: str) -> bool:
    done: bool = fleet.client.AsyncResult(task_id).ready()
    return done


async def test_results_live_as_long_as_the_settings_say_on_both_sides(rich_fleet: Fleet) -> None:
    for queue in (TO_AQUEUE, TO_CELERY):
        result = rich_fleet.client.send_task("interop.add", [2, 3], queue=queue)
        assert await ended(result) == 5
        assert 1200 < time_to_live(rich_fleet.site, result.id) <= 1234


async def test_states_on_the_way_do_not_live_for_ever(fleet: Fleet, connect: Connect, key: str) -> None:
    app = await connect(fleet.site)
    for queue in (TO_AQUEUE, TO_CELERY):
        flag = f"{key}-{queue}"
        result = await app.send_task("interop.progress", [fleet.site.port, flag], queue=queue)
        assert time_to_live(fleet.site, result.id) > 0
        await until(partial(fleet.site.runs, flag), "the task runs")
        assert time_to_live(fleet.site, result.id) > 0
        fleet.site.put_up(flag)
        await result.get(SOON)


async def test_a_result_without_an_end_has_none(plain_fleet: Fleet, connect: Connect, key: str) -> None:
    async with working(await connect(plain_fleet.site, result_expires=None), key):
        result = plain_fleet.client.send_task("interop.add", [2, 3], queue=key)
        assert await ended(result) == 5
    assert time_to_live(plain_fleet.site, result.id) == -1
    result.forget()


# --- what ------------------------------------------------------------------------------------------------------------


async def test_a_celery_client_reads_everything_that_an_aqueue_worker_tells_of_a_task(
    fleet: Fleet, connect: Connect, key: str
) -> None:
    async with working(await connect(fleet.site, result_extended=True), key, name="teller") as worker:
        result = fleet.client.send_task("interop.echo", [1, "two"], {"three": 3}, queue=key)
        await ended(result)
        failed = fleet.client.send_task("interop.fail", ["boom"], queue=key)
        with pytest.raises(ValueError, match="boom"):
            await ended(failed)
    for found, task, args, kwargs in (
        (result, "interop.echo", [1, "two"], {"three": 3}),
        (failed, "interop.fail", ["boom"], {}),
    ):
        again = fleet.client.AsyncResult(found.id)
        assert again.name == task
        assert again.args == args
        assert again.kwargs == kwargs
        assert again.worker == worker.name
        assert again.retries == 0
        assert again.queue == key


async def test_an_aqueue_client_reads_everything_that_a_celery_worker_tells_of_a_task(
    plain_fleet: Fleet, connect: Connect
) -> None:
    app = await connect(plain_fleet.site)
    result = await app.send_task("interop.echo", [1, "two"], {"three": 3}, queue=TO_CELERY)
    await result.get(SOON)
    found = await result.fetch()
    assert found is not None
    assert found.extra["name"] == "interop.echo"
    assert found.extra["args"] == [1, "two"]
    assert found.extra["kwargs"] == {"three": 3}
    assert found.extra["worker"].startswith("celery-worker@")
    assert found.extra["retries"] == 0
    assert found.extra["queue"] == TO_CELERY


async def test_the_time_of_the_end_is_read_by_both(fleet: Fleet, connect: Connect) -> None:
    before = datetime.now(timezone.utc)
    app = await connect(fleet.site)
    theirs = fleet.client.send_task("interop.add", [2, 3], queue=TO_AQUEUE)
    await ended(theirs)
    assert before <= fleet.client.AsyncResult(theirs.id).date_done <= datetime.now(timezone.utc)
    ours = await app.send_task("interop.add", [2, 3], queue=TO_CELERY)
    await ours.get(SOON)
    found = await ours.fetch()
    assert found is not None
    assert found.date_done is not None
    assert before <= datetime.fromisoformat(found.date_done) <= datetime.now(timezone.utc)


async def test_a_task_knows_who_sent_it_across_the_border(fleet: Fleet, connect: Connect) -> None:
    """A task sends another one to the other side; the child tells of its family."""
    app = await connect(fleet.site)
    for here, there in ((TO_AQUEUE, TO_CELERY), (TO_CELERY, TO_AQUEUE)):
        parent = fleet.client.send_task("interop.send_child", [there], queue=here)
        child = await app.result(await ended(parent), known=True).get(SOON)
        assert child["parent_id"] == parent.id
        assert child["root_id"] == parent.id


async def test_a_set_of_results_is_joined_by_celery_whoever_ran_the_tasks(fleet: Fleet, connect: Connect) -> None:
    results = [fleet.client.send_task("interop.add", [number, 1], queue=TO_CELERY) for number in range(20)]
    joined = ResultSet(results, app=fleet.client)
    assert joined.join_native(timeout=SOON) == list(range(1, 21))
    assert joined.join(timeout=SOON) == list(range(1, 21))
    assert joined.successful()


async def test_a_group_of_celerys_is_joined_whoever_ran_its_parts(fleet: Fleet) -> None:
    add = fleet.client.tasks["interop.add"]
    parts = [add.s(number, 1).set(queue=(TO_AQUEUE, TO_CELERY)[number % 2]) for number in range(10)]
    result = group(parts, app=fleet.client).apply_async()
    assert result.get(timeout=SOON) == list(range(1, 11))
    assert result.successful()


async def test_a_result_has_no_children_for_celery(fleet: Fleet) -> None:
    result = fleet.client.send_task("interop.add", [2, 3], queue=TO_AQUEUE)
    await ended(result)
    assert not result.children
    assert list(result.collect()) == [(result, 5)]


# --- by either side --------------------------------------------------------------------------------------------------


async def test_a_result_is_read_late_twice_and_by_others(
    fleet: Fleet, connect: Connect, celery_client: Callable[..., Any]
) -> None:
    for queue in (TO_AQUEUE, TO_CELERY):
        result = fleet.client.send_task("interop.add", [2, 3], queue=queue)
        assert await ended(result) == 5
        stranger = celery_client(fleet.site).AsyncResult(result.id)
        assert await asyncio.to_thread(stranger.get, timeout=SOON) == 5
        app = await connect(fleet.site)
        assert await app.result(result.id).get(SOON) == 5
        assert await app.result(result.id).get(SOON) == 5
        assert await app.result(result.id) == 5


async def test_celery_sees_a_task_of_an_aqueue_client_as_pending_until_it_runs(
    fleet: Fleet, connect: Connect, key: str
) -> None:
    app = await connect(fleet.site)
    result = await app.send_task("interop.add", [2, 3], queue=key)
    seen = fleet.client.AsyncResult(result.id)
    assert seen.state == "PENDING"
    assert not seen.ready()
    assert seen.result is None
    async with working(await connect(fleet.site), key):
        assert await asyncio.to_thread(seen.get, timeout=SOON) == 5


async def test_what_one_side_forgets_the_other_does_not_know(fleet: Fleet, connect: Connect) -> None:
    app = await connect(fleet.site)
    for queue in (TO_AQUEUE, TO_CELERY):
        theirs = fleet.client.send_task("interop.add", [2, 3], queue=queue)
        assert await ended(theirs) == 5
        theirs.forget()
        assert await app.result(theirs.id).state() == UNKNOWN
        with pytest.raises(ResultUnknown):
            await app.result(theirs.id).get(0.1)
        ours = await app.send_task("interop.add", [2, 3], queue=queue)
        assert await ours.get(SOON) == 5
        await ours.forget()
        assert fleet.client.AsyncResult(ours.id).state == "PENDING"
        assert stored(fleet.site, ours.id) is None


# --- results that tell all, of arguments that can not be told --------------------------------------------------------


@pytest.fixture
async def telling(plain_fleet: Fleet, connect: Connect) -> AQueue:
    """An app for a worker that stores arguments with each result."""
    return await connect(plain_fleet.site, result_extended=True, accept_content=("json", "pickle"))


async def test_an_argument_that_was_built_by_its_annotation_is_told_as_it_came(
    plain_fleet: Fleet, telling: AQueue, key: str
) -> None:
    order = {"number": 7, "wanted": "2024-02-29", "lines": ["tea"]}
    async with working(telling, key):
        result = plain_fleet.client.send_task("interop.order", [order], queue=key)
        assert await ended(result) == "7 until 29.02.2024: tea"
    assert plain_fleet.client.AsyncResult(result.id).args == [order]


async def test_arguments_that_results_can_not_hold_do_not_end_the_worker(
    plain_fleet: Fleet, telling: AQueue, key: str
) -> None:
    """A set came in by pickle, and not-a-number by Celery's JSON; results are written in strict JSON."""
    async with working(telling, key):
        for value, serializer in (({1, 2}, "pickle"), (math.nan, "json")):
            result = plain_fleet.client.send_task("interop.kinds", [value], queue=key, serializer=serializer)
            assert await ended(result) == [type(value).__name__]


async def test_arguments_that_are_too_large_to_be_told_do_not_end_the_worker(
    plain_fleet: Fleet, telling: AQueue, key: str
) -> None:
    """Compressed they were well within the limit for messages, with the result they are over it."""
    async with working(telling, key):
        text = "x" * (1024 * 1024)
        result = plain_fleet.client.send_task("interop.measure", [text], queue=key, compression="gzip")
        assert await ended(result) == len(text)


async def test_an_exception_that_can_not_be_told_is_retried_all_the_same(
    plain_fleet: Fleet, connect: Connect, key: str
) -> None:
    async with working(await connect(plain_fleet.site), key):
        result = plain_fleet.client.send_task("interop.retry_with_nan", queue=key)
        assert await ended(result) == 1
