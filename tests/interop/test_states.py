"""States on the way: STARTED, progress of the task's own, RETRY, in both directions."""

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aqueue import TaskFailed
from aqueue.results import RemoteError
from tests.interop.celery_names import MaxRetriesExceededError
from tests.interop.conftest import SOON, TO_AQUEUE, TO_CELERY, Connect, Fleet, ended
from tests.interop.workers import Site, aqueue_worker
from tests.kit.waiting import until

# --- while a task runs -----------------------------------------------------------------------------------------------


async def test_a_celery_client_sees_that_an_aqueue_worker_has_started_its_task(fleet: Fleet, key: str) -> None:
    result = fleet.client.send_task("interop.wait_for_flag", [fleet.site.port, key], queue=TO_AQUEUE)
    await until(lambda: result.state == "STARTED", "state STARTED")
    assert not result.ready()
    assert not result.successful()
    assert result.info["hostname"].startswith("aqueue-worker@")
    assert [result.info["pid"]] == fleet.aqueue.worker_pids
    fleet.site.put_up(key)
    assert await ended(result) == "aqueue"
    assert result.state == "SUCCESS"
    assert result.successful()


async def test_an_aqueue_client_sees_that_a_celery_worker_has_started_its_task(
    fleet: Fleet, connect: Connect, key: str
) -> None:
    app = await connect(fleet.site)
    result = await app.send_task("interop.wait_for_flag", [fleet.site.port, key], queue=TO_CELERY)

    async def started() -> bool:
        return await result.state() == "STARTED"

    await until(started, "state STARTED")
    assert not await result.ready()
    info = await result.info()
    assert info["hostname"].startswith("celery-worker@")
    fleet.site.put_up(key)
    assert await result.get(SOON) == "celery"
    assert await result.state() == "SUCCESS"


@pytest.mark.parametrize(
    ("task", "told"),
    [
        ("interop.progress", {"done": 1, "total": 2}),
        ("interop.tell_progress", {"current": 1, "total": 2, "message": "half way"}),
    ],
)
async def test_a_celery_client_sees_the_progress_of_an_aqueue_task(
    fleet: Fleet, key: str, task: str, told: dict[str, Any]
) -> None:
    result = fleet.client.send_task(task, [fleet.site.port, key], queue=TO_AQUEUE)
    await until(lambda: result.state == "PROGRESS", "state PROGRESS")
    assert result.info == told
    assert not result.ready()
    fleet.site.put_up(key)
    assert await ended(result) == "aqueue"


async def test_an_aqueue_client_sees_the_progress_of_a_celery_task(fleet: Fleet, connect: Connect, key: str) -> None:
    app = await connect(fleet.site)
    result = await app.send_task("interop.progress", [fleet.site.port, key], queue=TO_CELERY)

    async def told() -> bool:
        return await result.state() == "PROGRESS"

    await until(told, "state PROGRESS")
    assert await result.info() == {"done": 1, "total": 2}
    assert not await result.ready()
    fleet.site.put_up(key)
    assert await result.get(SOON) == "celery"


async def test_a_coroutine_with_celerys_self_tells_its_progress_without_blocking_its_worker(
    site: Site, celery_client: Callable[..., Any], key: str, tmp_path: Path
) -> None:
    """Or is told how to do it; in no case does the worker stand still."""
    worker = aqueue_worker(tmp_path, site.broker, site.results, queues=key)
    try:
        client = celery_client(site)
        telling = client.send_task("interop.progress_of_coroutine", queue=key)
        after = client.send_task("interop.add", [2, 3], queue=key)
        assert await ended(after) == 5
        await asyncio.to_thread(telling.get, timeout=SOON, propagate=False)
    finally:
        worker.kill()


async def test_waiting_clients_of_both_kinds_are_not_woken_by_progress_alone(
    fleet: Fleet, connect: Connect, key: str
) -> None:
    app = await connect(fleet.site)
    for queue in (TO_AQUEUE, TO_CELERY):
        flag = f"{key}-{queue}"
        theirs = fleet.client.send_task("interop.progress", [fleet.site.port, flag], queue=queue)
        waiting = [
            asyncio.create_task(ended(theirs)),
            asyncio.create_task(app.result(theirs.id, known=True).get(SOON)),
        ]
        await until(partial(fleet.site.runs, flag), "the task runs")
        assert not any(one.done() for one in waiting)
        fleet.site.put_up(flag)
        assert len(set(await asyncio.gather(*waiting))) == 1


# --- retries ---------------------------------------------------------------------------------------------------------


async def test_a_celery_client_sees_the_retry_of_an_aqueue_task_and_then_its_value(fleet: Fleet) -> None:
    result = fleet.client.send_task("interop.retry_self", [1, 0.7], queue=TO_AQUEUE)
    await until(lambda: result.state == "RETRY", "state RETRY")
    assert isinstance(result.info, ConnectionError)
    assert result.info.args == ("try 0",)
    assert "ConnectionError" in result.traceback
    assert not result.ready()
    assert await ended(result) == [1, "aqueue"]
    assert result.state == "SUCCESS"


async def test_an_aqueue_client_sees_the_retry_of_a_celery_task_and_then_its_value(
    fleet: Fleet, connect: Connect
) -> None:
    app = await connect(fleet.site)
    result = await app.send_task("interop.retry_self", [1, 0.7], queue=TO_CELERY)

    async def waits() -> bool:
        return await result.state() == "RETRY"

    await until(waits, "state RETRY")
    error = await result.info()
    assert isinstance(error, RemoteError)
    assert (error.exc_type, error.text) == ("ConnectionError", "try 0")
    assert not await result.ready()
    assert await result.get(SOON) == [1, "celery"]


async def test_a_celery_client_gets_the_value_after_the_retries_of_a_policy(fleet: Fleet) -> None:
    result = fleet.client.send_task("interop.retry_policy", [2], queue=TO_AQUEUE)
    assert await ended(result) == [2, "aqueue"]


async def test_an_aqueue_client_gets_the_value_after_automatic_retries_of_celery(
    fleet: Fleet, connect: Connect
) -> None:
    app = await connect(fleet.site)
    result = await app.send_task("interop.retry_policy", [2], queue=TO_CELERY)
    assert await result.get(SOON) == [2, "celery"]


async def test_a_celery_client_gets_the_value_after_retries_that_the_task_asked_for(fleet: Fleet) -> None:
    result = fleet.client.send_task("interop.retry_now", [3, 0.1], queue=TO_AQUEUE)
    assert await ended(result) == [3, "aqueue"]
    at_once = fleet.client.send_task("interop.retry_now", [3, 0], queue=TO_AQUEUE)
    assert await ended(at_once) == [3, "aqueue"]


async def test_a_celery_client_gets_the_exception_of_the_last_attempt(fleet: Fleet) -> None:
    for task, args in (("interop.retry_policy", [9]), ("interop.retry_now", [9, 0])):
        result = fleet.client.send_task(task, args, queue=TO_AQUEUE)
        with pytest.raises(ConnectionError, match="try 3"):
            await ended(result)
        assert result.state == "FAILURE"


async def test_an_aqueue_client_is_told_the_exception_of_the_last_attempt(fleet: Fleet, connect: Connect) -> None:
    app = await connect(fleet.site)
    result = await app.send_task("interop.retry_policy", [9], queue=TO_CELERY)
    with pytest.raises(TaskFailed, match="ConnectionError: try 3"):
        await result.get(SOON)


async def test_a_celery_client_knows_the_error_of_too_many_retries_by_celerys_name(fleet: Fleet) -> None:
    result = fleet.client.send_task("interop.retry_too_often", queue=TO_AQUEUE)
    with pytest.raises(MaxRetriesExceededError):
        await ended(result)


async def test_an_aqueue_client_is_told_of_too_many_retries(fleet: Fleet, connect: Connect) -> None:
    app = await connect(fleet.site)
    result = await app.send_task("interop.retry_too_often", queue=TO_CELERY)
    with pytest.raises(TaskFailed, match="MaxRetriesExceededError"):
        await result.get(SOON)


async def test_attempts_counted_by_one_kind_of_worker_are_counted_on_by_the_other(fleet: Fleet, key: str) -> None:
    """Each attempt goes to whichever worker takes it; the count travels in the message."""
    results = [
        fleet.client.send_task("interop.retry_self", [4, 0, fleet.site.port, f"{key}-{i}"], queue="both")
        for i in range(20)
    ]
    values = [await ended(result) for result in results]
    assert [value[0] for value in values] == [4] * 20
    workers: set[str] = set()
    for i in range(20):
        attempts = fleet.site.traces.lrange(f"attempts:{key}-{i}", 0, -1)
        assert [attempt.split()[0] for attempt in attempts] == ["0", "1", "2", "3", "4"]
        workers.update(attempt.split()[1] for attempt in attempts)
    assert workers == {"celery", "aqueue"}


async def test_headers_and_family_stay_with_a_task_through_retries(fleet: Fleet) -> None:
    """What is read here came through one retry of each kind of worker, see `tests.interop.tasks.request`."""
    for queue in (TO_AQUEUE, TO_CELERY):
        result = fleet.client.send_task(
            "interop.request_after_retry",
            [1],
            {"two": 2},
            queue=queue,
            headers={"tenant": "acme"},
            expires=300,
            time_limit=30,
            root_id="root",
        )
        found = await ended(result)
        assert found["retries"] == 1
        assert found["id"] == result.id
        assert found["args"] == [1]
        assert found["kwargs"] == {"two": 2}
        assert found["headers"]["tenant"] == "acme"
        assert found["root_id"] == "root"
        assert found["parent_id"] == result.id
        assert found["timelimit"] == [30, None]
        assert found["expires"]
        assert found["routing_key"] == queue
        assert found["correlation_id"] == result.id
        assert found["has_origin"]
