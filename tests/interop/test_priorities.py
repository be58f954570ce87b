"""Priorities: on Redis Celery's 0 and our 9 are the most urgent, on RabbitMQ both sides' 9; who sent a task makes no
difference."""

from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from aqueue import AQueue
from tests.interop.conftest import Connect, ended, working
from tests.interop.workers import QUICK, Site, celery_worker
from tests.kit.waiting import until

#: Priorities in the order of sending, as they are on the wire: Celery's own, and 9 less ours.
_SENT = (9, 0, 5, 3, 8, 2, 6, 1, 7, 4)


async def fill(site: Site, app: AQueue, client: Any, key: str) -> list[str]:
    """Send a mixed backlog, each priority once by each client; returns the labels in the order to be run."""
    labels: list[tuple[int, str]] = []
    for wire in _SENT:
        for who in ("celery", "aqueue"):
            label = f"{who} {wire}"
            if who == "celery":
                client.send_task("interop.note", [site.port, key, label], queue=key, priority=wire, ignore_result=True)
            else:
                await app.send_task(
                    "interop.note", [site.port, key, label], queue=key, priority=9 - wire, ignore_result=True
                )
            labels.append((wire // 3, label))
    labels.sort(key=lambda pair: pair[0])  # stable: who came first is first among equals
    return [label for _, label in labels]


def notes(site: Site, key: str) -> list[str]:
    found: list[str] = site.traces.lrange(f"notes:{key}", 0, -1)
    return found


def has_notes(site: Site, key: str, number: int) -> bool:
    return len(notes(site, key)) == number


async def test_an_aqueue_worker_runs_a_mixed_backlog_by_priority_and_then_in_the_order_sent(
    site: Site, connect: Connect, celery_client: Any, key: str
) -> None:
    expected = await fill(site, await connect(site), celery_client(site), key)
    async with working(await connect(site), key, concurrency=1, threads=1):
        await until(lambda: len(notes(site, key)) == len(expected), "all have run")
    assert notes(site, key) == expected


async def test_a_celery_worker_runs_a_mixed_backlog_by_priority_and_then_in_the_order_sent(
    site: Site, connect: Connect, celery_client: Any, key: str, tmp_path: Path
) -> None:
    expected = await fill(site, await connect(site), celery_client(site), key)
    with celery_worker(tmp_path, site.broker, site.results, "-P", "prefork", "-c", "1", *QUICK, queues=key):
        await until(lambda: len(notes(site, key)) == len(expected), "all have run")
    assert notes(site, key) == expected


async def test_the_most_urgent_of_all_queues_comes_first(
    site: Site, connect: Connect, celery_client: Any, key: str
) -> None:
    """In several rounds, as what goes wrong here goes wrong at the start of a worker, and now and then."""
    client = celery_client(site)
    app = await connect(site)
    for round_ in range(20):
        name = f"{key}-{round_}"
        queues = [f"{name}-{number}" for number in range(10)]
        for queue in queues:
            for wire in (9, 4):
                arguments = [site.port, name, str(wire)]
                client.send_task("interop.note", arguments, queue=queue, priority=wire, ignore_result=True)
            await app.send_task("interop.note", [site.port, name, "0"], queue=queue, priority=9, ignore_result=True)
        async with working(await connect(site), *queues, concurrency=1, threads=1):
            await until(partial(has_notes, site, name, 30), "all have run")
        assert notes(site, name) == ["0"] * 10 + ["4"] * 10 + ["9"] * 10


async def test_what_a_celery_client_sends_without_a_priority_is_not_held_up_by_our_default(
    site: Site, connect: Connect, celery_client: Any, key: str
) -> None:
    """Celery's default is the most urgent on Redis, ours the least; ``default_priority=9`` makes equals of them."""
    client = celery_client(site)
    app = await connect(site)
    equal = await connect(site, default_priority=9)
    await app.send_task("interop.note", [site.port, key, "ours"], queue=key)
    client.send_task("interop.note", [site.port, key, "theirs"], queue=key).forget()
    await equal.send_task("interop.note", [site.port, key, "ours, equal"], queue=key)
    client.send_task("interop.note", [site.port, key, "theirs again"], queue=key).forget()
    async with working(await connect(site), key, concurrency=1, threads=1):
        await until(lambda: len(notes(site, key)) == 4, "all have run")
    assert notes(site, key) == ["theirs", "ours, equal", "theirs again", "ours"]


@pytest.mark.parametrize("wire", [0, 4, 8, 9])
async def test_a_task_keeps_its_priority_when_an_aqueue_worker_retries_it(
    site: Site, connect: Connect, celery_client: Any, key: str, wire: int
) -> None:
    """Parked for its next attempt, it is on its way back to the list that it came from."""
    result = celery_client(site).send_task("interop.retry_self", [1, 0.3], queue=key, priority=wire)
    step = wire // 3 * 3
    place = f":{key}\x06\x16{step}" if step else f":{key}"
    with site.broker_keys() as keys:
        async with working(await connect(site), key):
            await until(lambda: keys.zcard("aqueue:parked"), "it is parked")
            (parked,) = keys.zrange("aqueue:parked", 0, -1)
            assert parked.decode().endswith(place)
            assert await ended(result) == [1, "in-process"]


async def test_a_task_keeps_its_priority_while_it_waits_for_its_time(
    site: Site, connect: Connect, celery_client: Any, key: str
) -> None:
    """All are due at once when the worker comes: the most urgent is run first, whoever sent it."""
    client = celery_client(site)
    app = await connect(site)
    for wire in (9, 3, 6, 0):
        client.send_task(
            "interop.note", [site.port, key, f"celery {wire}"], queue=key, priority=wire, countdown=0.2
        ).forget()
        await app.send_task(
            "interop.note", [site.port, key, f"aqueue {wire}"], queue=key, priority=9 - wire, countdown=0.2
        )
    ends = site.traces.time()[0] + 2
    await until(lambda: site.traces.time()[0] >= ends, "all are due")
    async with working(await connect(site), key, concurrency=1, threads=1):
        await until(lambda: len(notes(site, key)) == 8, "all have run")
    ran = [note.split()[1] for note in notes(site, key)]
    theirs = [note.split()[1] for note in notes(site, key) if note.startswith("celery")]
    ours = [note.split()[1] for note in notes(site, key) if note.startswith("aqueue")]
    assert theirs == ours == ["0", "3", "6", "9"], ran


# --- on RabbitMQ, in a queue that was declared for them --------------------------------------------------------------

#: How both sides declare it.
URGENT: Final[dict[str, Any]] = {"max_priority": 9}


async def fill_in_rabbit(site: Site, connect: Connect, client: Any, key: str) -> None:
    """Each priority once by each client."""
    app = await connect(site, queues={key: URGENT})
    for priority in _SENT:
        arguments = [site.port, key, f"celery {priority}"]
        client.send_task("interop.note", arguments, queue=key, priority=priority, ignore_result=True)
        arguments = [site.port, key, f"aqueue {priority}"]
        await app.send_task("interop.note", arguments, queue=key, priority=priority, ignore_result=True)
    await until(lambda: site.waiting_in_rabbit(key) == 2 * len(_SENT), "all are there")


def assert_by_priority(site: Site, key: str) -> None:
    ran = [note.split() for note in notes(site, key)]
    assert [int(priority) for _, priority in ran] == sorted([*_SENT, *_SENT], reverse=True)
    assert {who for who, _ in ran} == {"celery", "aqueue"}


async def test_an_aqueue_worker_runs_a_mixed_backlog_of_rabbitmq_by_priority(
    rabbit_site: Site, connect: Connect, celery_client: Any, key: str
) -> None:
    await fill_in_rabbit(rabbit_site, connect, celery_client(rabbit_site, queues={key: URGENT}), key)
    async with working(await connect(rabbit_site, queues={key: URGENT}), key, concurrency=1, threads=1):
        await until(lambda: has_notes(rabbit_site, key, 20), "all have run")
    assert_by_priority(rabbit_site, key)


async def test_a_celery_worker_runs_a_mixed_backlog_of_rabbitmq_by_priority(
    rabbit_site: Site, connect: Connect, celery_client: Any, key: str, tmp_path: Path
) -> None:
    site = rabbit_site
    await fill_in_rabbit(site, connect, celery_client(site, queues={key: URGENT}), key)
    with celery_worker(
        tmp_path, site.broker, site.results, "-P", "solo", *QUICK, queues=key, settings={"queues": {key: URGENT}}
    ) as worker:
        await until(lambda: has_notes(site, key, 20), "all have run")
        worker.kill()  # to end takes it seconds
    assert_by_priority(site, key)


async def test_a_task_keeps_its_priority_on_rabbitmq_through_retries_and_waits(
    rabbit_site: Site, connect: Connect, celery_client: Any, key: str
) -> None:
    client = celery_client(rabbit_site, queues={key: URGENT})
    app = await connect(rabbit_site, queues={key: URGENT})
    async with working(await connect(rabbit_site, queues={key: URGENT}), key):
        retried = client.send_task("interop.request_after_retry", queue=key, priority=6)
        late = client.send_task("interop.request", queue=key, priority=7, countdown=0.5)
        later = await app.send_task("interop.request", queue=key, priority=8, countdown=0.5)
        assert (await ended(retried))["priority"] == 6
        assert (await ended(late))["priority"] == 7
        assert (await later.get(15))["priority"] == 8
