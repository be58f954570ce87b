"""Cancelling across the fleets: either kind of client, either kind of worker, on both brokers."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from aqueue import TaskRevoked
from tests.interop.celery_names import TaskRevokedError
from tests.interop.conftest import SOON, TO_CELERY, Connect, Fleet, ended, working
from tests.interop.workers import Site
from tests.kit.waiting import until

CeleryClient = Callable[..., Any]


async def test_what_a_celery_client_revokes_does_not_begin_at_an_aqueue_worker(
    either_site: Site, connect: Connect, celery_client: CeleryClient, key: str
) -> None:
    app, client = await connect(either_site, track_started=True), celery_client(either_site)
    async with working(app, key, f"{key}-2", threads=1):
        busy = client.send_task("interop.wait_for_flag", [either_site.port, key], queue=key)
        await until(lambda: either_site.runs(key), "the worker is busy")
        waiting = client.send_task("interop.count", [either_site.port, f"{key}-waiting"], queue=key)
        parked = client.send_task("interop.count", [either_site.port, f"{key}-parked"], queue=key, countdown=1)
        for result in (waiting, parked):
            await asyncio.to_thread(result.revoke)
        # What runs goes on: it was not to be terminated.
        await asyncio.to_thread(client.control.revoke, busy.id)
        # Broadcasts come in their order: this one has come when all have.
        last = client.send_task("interop.sleep", [60], queue=f"{key}-2")
        await until(lambda: last.state == "STARTED", "the last one runs")
        await asyncio.to_thread(last.revoke, terminate=True)
        with pytest.raises(TaskRevokedError, match="terminated"):
            await ended(last)
        either_site.put_up(key)
        assert await ended(busy)
        for result in (waiting, parked):
            with pytest.raises(TaskRevokedError, match="revoked"):
                await ended(result)
    for name in ("waiting", "parked"):
        assert either_site.runs(f"{key}-{name}") == 0


async def test_a_celery_client_is_told_why_ours_has_cancelled_its_task(
    either_site: Site, connect: Connect, celery_client: CeleryClient, key: str
) -> None:
    app, client = await connect(either_site, track_started=True), celery_client(either_site)
    async with working(app, key):
        result = client.send_task("interop.sleep", [60], queue=key)
        await until(lambda: result.state == "STARTED", "it runs")
        assert await app.cancel(result.id, "the customer has left") == "requested"
        with pytest.raises(TaskRevokedError, match="the customer has left"):
            await ended(result)
        assert result.state == "REVOKED"
        assert await app.cancel(result.id) == "finished"


async def test_what_our_client_cancels_does_not_begin_at_a_celery_worker(
    either_fleet: Fleet, connect: Connect, key: str
) -> None:
    app = await connect(either_fleet.site)
    port = either_fleet.site.port
    busy = [await app.send_task("interop.wait_for_flag", [port, key], queue=TO_CELERY) for _ in range(2)]
    await until(lambda: either_fleet.site.runs(key) == 2, "both of its processes are busy")
    waiting = await app.send_task("interop.count", [port, f"{key}-waiting"], queue=TO_CELERY)
    assert await waiting.cancel("the order was withdrawn", terminate=False) == "requested"
    with pytest.raises(TaskRevoked, match="revoked"):
        await waiting.get(SOON)
    either_fleet.site.put_up(key)
    assert [await result.get(SOON) for result in busy] == ["celery", "celery"]
    after = await app.send_task("interop.add", [2, 3], queue=TO_CELERY)
    assert await after.get(SOON) == 5
    assert either_fleet.site.runs(f"{key}-waiting") == 0


async def test_what_our_client_cancels_is_ended_where_a_celery_worker_runs_it(
    either_fleet: Fleet, connect: Connect, key: str
) -> None:
    app = await connect(either_fleet.site)
    result = await app.send_task("interop.wait_for_flag", [either_fleet.site.port, key], queue=TO_CELERY)

    async def has_started() -> bool:
        return await result.state() == "STARTED"

    await until(has_started, "it runs")
    assert await result.cancel("enough") == "requested"
    with pytest.raises(TaskRevoked, match="terminated"):
        await result.get(SOON)
