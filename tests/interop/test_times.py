"""Countdown, eta and expires, in both directions."""

import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Any, Final

import pytest

from aqueue import TaskRevoked
from tests.interop.celery_names import TaskRevokedError
from tests.interop.conftest import SOON, TO_AQUEUE, TO_CELERY, Connect, Fleet, ended
from tests.interop.workers import Site
from tests.kit.waiting import until

#: Seconds to wait in these tests, and how late a task may run on a busy machine.
LATER: Final = 0.7
LATE: Final = 2.5


def clock(site: Site) -> float:
    seconds, microseconds = site.traces.time()
    return float(seconds + microseconds / 1e6)


def assert_in_time(ran: float, due: float) -> None:
    assert due <= ran < due + LATE


def utc(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, timezone.utc)


# --- not before ------------------------------------------------------------------------------------------------------


async def test_a_celery_clients_countdown_is_kept_by_an_aqueue_worker(either_fleet: Fleet, key: str) -> None:
    due = clock(either_fleet.site) + LATER
    result = either_fleet.client.send_task(
        "interop.stamp", [either_fleet.site.port, key], queue=TO_AQUEUE, countdown=LATER
    )
    assert_in_time(await ended(result), due)
    assert either_fleet.site.runs(key) == 1


async def test_a_celery_clients_eta_in_any_zone_is_kept_by_an_aqueue_worker(either_fleet: Fleet, key: str) -> None:
    due = clock(either_fleet.site) + LATER
    zones: list[timezone | None] = [*(timezone(timedelta(hours=hours)) for hours in (0, 5.5, -8)), None]
    results = [
        either_fleet.client.send_task(
            "interop.stamp",
            [either_fleet.site.port, key],
            queue=TO_AQUEUE,
            eta=utc(due).astimezone(zone) if zone else utc(due).replace(tzinfo=None),  # without a zone it is UTC
        )
        for zone in zones
    ]
    for result in results:
        assert_in_time(await ended(result), due)


async def test_the_countdown_of_a_celery_client_that_lives_in_another_zone_is_kept(
    either_fleet: Fleet, celery_client: Callable[..., Any], key: str
) -> None:
    client = celery_client(either_fleet.site, timezone="Asia/Kolkata", enable_utc=False)
    due = clock(either_fleet.site) + LATER
    result = client.send_task("interop.stamp", [either_fleet.site.port, key], queue=TO_AQUEUE, countdown=LATER)
    assert_in_time(await ended(result), due)


async def test_an_eta_in_the_past_runs_at_once(either_fleet: Fleet, connect: Connect, key: str) -> None:
    app = await connect(either_fleet.site)
    now = clock(either_fleet.site)
    theirs = either_fleet.client.send_task(
        "interop.stamp", [either_fleet.site.port, key], queue=TO_AQUEUE, eta=utc(now - 3600)
    )
    ours = await app.send_task("interop.stamp", [either_fleet.site.port, key], queue=TO_CELERY, eta=utc(now - 3600))
    assert_in_time(await ended(theirs), now)
    assert_in_time(await ours.get(SOON), now)


async def test_what_waits_for_its_time_is_with_the_server_and_not_with_an_aqueue_worker(
    plain_fleet: Fleet, key: str
) -> None:
    result = plain_fleet.client.send_task("interop.stamp", [plain_fleet.site.port, key], queue=TO_AQUEUE, countdown=2)
    with plain_fleet.site.broker_keys() as keys:

        def lies_in(table: str) -> bool:
            return any(result.id.encode() in element for element in keys.hvals(table))

        await until(lambda: lies_in("aqueue:parked:messages"), "the message is parked")
        assert not lies_in("aqueue:leased")
        assert not lies_in("unacked")
    assert plain_fleet.site.runs(key) == 0
    await ended(result)


async def test_an_aqueue_clients_countdown_is_kept_for_a_celery_worker_beside_an_aqueue_worker(
    either_fleet: Fleet, connect: Connect, key: str
) -> None:
    """It is parked, and the fleet's aqueue worker moves it, though it does not work on that queue."""
    app = await connect(either_fleet.site)
    due = clock(either_fleet.site) + LATER
    result = await app.send_task("interop.stamp", [either_fleet.site.port, key], queue=TO_CELERY, countdown=LATER)
    assert_in_time(await result.get(SOON), due)
    assert either_fleet.site.runs(key) == 1


async def test_an_aqueue_clients_eta_is_kept_for_a_celery_worker_beside_an_aqueue_worker(
    either_fleet: Fleet, connect: Connect, key: str
) -> None:
    app = await connect(either_fleet.site)
    due = clock(either_fleet.site) + LATER
    eta = utc(due).astimezone(timezone(timedelta(hours=5.5)))
    result = await app.send_task("interop.stamp", [either_fleet.site.port, key], queue=TO_CELERY, eta=eta)
    assert_in_time(await result.get(SOON), due)


async def test_with_eta_queues_a_celery_worker_holds_an_aqueue_clients_countdown_itself(
    plain_fleet: Fleet, connect: Connect, key: str
) -> None:
    app = await connect(plain_fleet.site, eta_queues=("to-*",))
    due = clock(plain_fleet.site) + LATER
    result = await app.send_task("interop.stamp", [plain_fleet.site.port, key], queue=TO_CELERY, countdown=LATER)
    with plain_fleet.site.broker_keys() as keys:
        assert keys.zcard("aqueue:parked") == 0
        await until(lambda: keys.hlen("unacked"), "the Celery worker holds it")
    assert_in_time(await result.get(SOON), due)


async def test_messages_with_shorter_waits_overtake_those_with_longer(either_fleet: Fleet, key: str) -> None:
    for label, countdown in (("last", 2.1), ("middle", 1.1), ("first", 0.1), ("at once", 0)):
        either_fleet.client.send_task(
            "interop.note", [either_fleet.site.port, key, label], queue=TO_AQUEUE, countdown=countdown
        ).forget()
    await until(lambda: either_fleet.site.traces.llen(f"notes:{key}") == 4, "all have run")
    assert either_fleet.site.traces.lrange(f"notes:{key}", 0, -1) == ["at once", "first", "middle", "last"]


# --- not after -------------------------------------------------------------------------------------------------------


async def test_a_celery_client_is_told_that_its_task_has_expired_at_an_aqueue_worker(
    either_fleet: Fleet, key: str
) -> None:
    """The task may start after one second and must not start after a half."""
    result = either_fleet.client.send_task(
        "interop.stamp", [either_fleet.site.port, key], queue=TO_AQUEUE, countdown=LATER, expires=LATER / 2
    )
    with pytest.raises(TaskRevokedError, match="expired"):
        await ended(result)
    assert result.state == "REVOKED"
    assert either_fleet.site.runs(key) == 0


async def test_an_aqueue_client_is_told_that_its_task_has_expired_at_a_celery_worker(
    either_fleet: Fleet, connect: Connect, key: str
) -> None:
    app = await connect(either_fleet.site, eta_queues=(TO_CELERY,))
    result = await app.send_task(
        "interop.stamp", [either_fleet.site.port, key], queue=TO_CELERY, countdown=LATER, expires=LATER / 2
    )
    with pytest.raises(TaskRevoked, match="expired") as caught:
        await result.get(SOON)
    assert caught.value.reason == "expired"
    assert await result.state() == "REVOKED"
    assert either_fleet.site.runs(key) == 0


async def test_a_time_that_is_over_when_a_task_is_sent_is_expired_for_both(
    either_fleet: Fleet, connect: Connect, key: str
) -> None:
    app = await connect(either_fleet.site)
    past = utc(clock(either_fleet.site) - 10)
    ours = await app.send_task("interop.stamp", [either_fleet.site.port, key], queue=TO_CELERY, expires=past)
    with pytest.raises(TaskRevoked, match="expired"):
        await ours.get(SOON)
    theirs = either_fleet.client.send_task(
        "interop.stamp", [either_fleet.site.port, key], queue=TO_AQUEUE, expires=past
    )
    with pytest.raises(TaskRevokedError, match="expired"):
        await ended(theirs)
    assert either_fleet.site.runs(key) == 0


async def test_a_task_that_is_in_time_runs_though_it_would_expire_later(
    either_fleet: Fleet, connect: Connect, key: str
) -> None:
    app = await connect(either_fleet.site)
    options: dict[str, Any] = {"expires": 60}
    assert await ended(either_fleet.client.send_task("interop.add", [2, 3], queue=TO_AQUEUE, **options)) == 5
    assert await (await app.send_task("interop.add", [2, 3], queue=TO_CELERY, expires=60)).get(SOON) == 5
    later = utc(time.time() + 60)
    assert await ended(either_fleet.client.send_task("interop.add", [2, 3], queue=TO_AQUEUE, expires=later)) == 5
    assert await (await app.send_task("interop.add", [2, 3], queue=TO_CELERY, expires=later)).get(SOON) == 5


async def test_a_task_that_expires_between_its_retries_is_not_run_again(either_fleet: Fleet, key: str) -> None:
    result = either_fleet.client.send_task(
        "interop.retry_self", [1, LATER, either_fleet.site.port, key], queue=TO_AQUEUE, expires=LATER / 2
    )
    with pytest.raises(TaskRevokedError, match="expired"):
        await ended(result)
    assert either_fleet.site.traces.lrange(f"attempts:{key}", 0, -1) == ["0 aqueue"]
