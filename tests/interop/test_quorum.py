"""Quorum queues, and the ladder of delays that Celery makes for them (celery-protocol 3.6, 3.7)."""

from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from typing import Any, Final

import pytest

from tests.interop.conftest import SOON, Connect, ended, working
from tests.interop.workers import QUICK, Site, WorkerProcess, celery_worker
from tests.kit.waiting import until

#: How late a task may run on a busy machine, in seconds.
LATE: Final = 3.0
QUORUM: Final[dict[str, Any]] = {"exchange_type": "topic", "arguments": {"x-queue-type": "quorum"}}
#: The Celery worker's own queue, and one for both.
THEIRS: Final = "quorum-celery"
SHARED: Final = "quorum-both"
QUEUES: Final = {THEIRS: QUORUM, SHARED: QUORUM}
LEVELS: Final = 28


@pytest.fixture(scope="module")
def standing_worker(rabbit_place: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerProcess]:
    place = rabbit_place
    folder = tmp_path_factory.mktemp("quorum")
    with celery_worker(
        folder, place.broker, place.results, "-c", "2", *QUICK, queues=",".join(QUEUES), settings={"queues": QUEUES}
    ) as worker:
        yield worker


@pytest.fixture
def place(standing_worker: WorkerProcess, rabbit_site: Site) -> Site:
    """Where a Celery worker works on quorum queues."""
    assert standing_worker.is_alive, standing_worker.last_lines
    return rabbit_site


def clock(site: Site) -> float:
    seconds, microseconds = site.traces.time()
    return float(seconds + microseconds / 1e6)


def on_the_ladder(site: Site) -> list[int]:
    """The levels where messages wait."""
    with site.rabbit_channel() as channel:
        counts = [channel.queue_declare(f"celery_delayed_{level}", passive=True) for level in range(LEVELS)]
    return [level for level, declared in enumerate(counts) if declared.message_count]


# --- at once ---------------------------------------------------------------------------------------------------------


async def test_an_aqueue_worker_works_on_a_quorum_queue_of_a_celery_clients(
    rabbit_site: Site, connect: Connect, celery_client: Callable[..., Any], key: str
) -> None:
    """The client made it; the worker takes it as it is."""
    client = celery_client(rabbit_site, queues={key: QUORUM})
    results = [client.send_task("interop.add", [number, 1], queue=key) for number in range(20)]
    async with working(await connect(rabbit_site), key):
        assert [await ended(result) for result in results] == list(range(1, 21))


async def test_a_celery_worker_works_on_a_quorum_queue_for_an_aqueue_client(place: Site, connect: Connect) -> None:
    app = await connect(place)
    results = [await app.send_task("interop.add", [number, 1], queue=THEIRS) for number in range(20)]
    assert [await result.get(SOON) for result in results] == list(range(1, 21))


async def test_both_kinds_of_workers_share_a_quorum_queue(
    place: Site, connect: Connect, celery_client: Callable[..., Any], key: str
) -> None:
    client = celery_client(place, queues=QUEUES)
    app = await connect(place, queues=QUEUES)
    async with working(await connect(place, queues=QUEUES), SHARED, concurrency=4):
        theirs = [
            client.send_task("interop.count_slowly", [place.port, f"{key}-{number}"], queue=SHARED)
            for number in range(100)
        ]
        count = app.tasks["interop.count_slowly"].options(queue=SHARED)
        ours = await app.send_many([count.s(place.port, f"{key}-{number}") for number in range(100, 200)])
        ran_by = {await ended(result) for result in theirs} | {await result.get(SOON) for result in ours}
    assert ran_by == {"celery", "in-process"}
    assert [place.runs(f"{key}-{number}") for number in range(200)] == [1] * 200


# --- at its time -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("countdown", [1, 2.5])
async def test_what_a_celery_client_sends_up_the_ladder_is_run_at_its_time_by_an_aqueue_worker(
    rabbit_site: Site, connect: Connect, celery_client: Callable[..., Any], key: str, countdown: float
) -> None:
    """No Celery worker has ever seen the queue: ours sees to it that the ladder ends there."""
    client = celery_client(rabbit_site, queues={key: QUORUM})
    async with working(await connect(rabbit_site, queues={key: QUORUM}), key):
        assert await ended(client.send_task("interop.add", [2, 3], queue=key)) == 5
        due = clock(rabbit_site) + countdown
        result = client.send_task("interop.stamp", [rabbit_site.port, key], queue=key, countdown=countdown)
        if countdown > 2:
            await until(lambda: on_the_ladder(rabbit_site) == [1], "it waits on the ladder")
        assert due <= await ended(result) < due + LATE
    assert rabbit_site.runs(key) == 1


async def test_an_eta_of_a_celery_client_is_kept_for_a_routing_key_that_is_not_the_queues_name(
    rabbit_site: Site, connect: Connect, celery_client: Callable[..., Any], key: str
) -> None:
    queues = {key: {**QUORUM, "exchange": f"{key}-topic", "routing_key": f"{key}.feed"}}
    client = celery_client(rabbit_site, queues=queues)
    async with working(await connect(rabbit_site, queues=queues), key):
        assert await ended(client.send_task("interop.add", [2, 3], queue=key)) == 5
        due = clock(rabbit_site) + 2.5
        eta = datetime.fromtimestamp(due, timezone.utc)
        result = client.send_task("interop.stamp", [rabbit_site.port, key], queue=key, eta=eta)
        await until(lambda: on_the_ladder(rabbit_site) == [1], "it waits on the ladder")
        assert due <= await ended(result) < due + LATE
    assert rabbit_site.runs(key) == 1


async def test_an_aqueue_clients_countdown_is_kept_for_a_celery_worker_on_a_quorum_queue(
    place: Site, connect: Connect, key: str
) -> None:
    """Two bindings lead from the ladder to the queue, Celery's and ours; it arrives once."""
    app = await connect(place)
    due = clock(place) + 1.5
    result = await app.send_task("interop.stamp", [place.port, key], queue=THEIRS, countdown=1.5)
    await until(lambda: on_the_ladder(place) == [1], "it waits on the ladder")
    assert due <= await result.get(SOON) < due + LATE
    again = await app.send_task("interop.add", [2, 3], queue=THEIRS)
    assert await again.get(SOON) == 5
    assert place.runs(key) == 1


async def test_retries_on_a_quorum_queue_climb_the_ladder_for_both_kinds_of_workers(
    place: Site, connect: Connect, celery_client: Callable[..., Any], key: str
) -> None:
    """An attempt may go to either; each is made once, and the message does not grow on its way."""
    client = celery_client(place, queues=QUEUES)
    app = await connect(place, queues=QUEUES)
    async with working(await connect(place, queues=QUEUES), SHARED):
        theirs = [
            client.send_task("interop.retry_self", [2, 1, place.port, f"{key}-c{number}"], queue=SHARED)
            for number in range(6)
        ]
        ours = [
            await app.send_task("interop.retry_self", [2, 1, place.port, f"{key}-a{number}"], queue=SHARED)
            for number in range(6)
        ]
        values = [await ended(result) for result in theirs] + [await result.get(SOON) for result in ours]
    assert [value[0] for value in values] == [2] * 12
    for number in range(6):
        for who in "ca":
            attempts = place.traces.lrange(f"attempts:{key}-{who}{number}", 0, -1)
            assert [attempt.split()[0] for attempt in attempts] == ["0", "1", "2"]


@pytest.mark.parametrize("countdown", [1, 2])
async def test_a_celery_worker_retries_what_came_to_it_by_the_ladder(
    place: Site, connect: Connect, key: str, countdown: int
) -> None:
    """It sends to where the message came from: the end of the ladder."""
    app = await connect(place)
    result = await app.send_task("interop.retry_self", [2, 1, place.port, key], queue=THEIRS, countdown=countdown)
    assert await result.get(SOON) == [2, "celery"]
    at_once = await app.send_task("interop.retry_self", [2, 0, place.port, key], queue=THEIRS, countdown=countdown)
    assert await at_once.get(SOON) == [2, "celery"]
    attempts = place.traces.lrange(f"attempts:{key}", 0, -1)
    assert attempts == ["0 celery", "1 celery", "2 celery"] * 2
