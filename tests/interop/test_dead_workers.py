"""Workers that are killed with work in their hands: whoever is left finishes it, of either kind."""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from tests.interop import aqueue_app
from tests.interop.celery_names import Exchange, Queue
from tests.interop.conftest import SOON, Connect, ended, working
from tests.interop.workers import QUICK, Site, WorkerProcess, aqueue_command, aqueue_worker, celery_worker
from tests.kit.waiting import until

#: Seconds; short, so that leases end within a test.
LEASE: Final = 1.0
QUEUE: Final = "jobs"


def hasty_worker(folder: Path, site: Site, queue: str = QUEUE, name: str = "aqueue-worker") -> WorkerProcess:
    """A worker of ours whose leases end soon."""
    return aqueue_worker(folder, site.broker, site.results, queues=queue, name=name, settings={"lease": LEASE})


async def recover(site: Site, *options: str) -> dict[str, int]:
    """What ``aqueue recover`` says that it did."""
    done = await asyncio.to_thread(aqueue_command, "recover", "--broker", site.broker, "--json", *options)
    assert done.returncode == 0, done.stderr
    counts: dict[str, int] = json.loads(done.stdout)
    return counts


def parked(site: Site) -> int:
    with site.broker_keys() as keys:
        return int(keys.zcard("aqueue:parked"))


def held_by_ours(site: Site) -> int:
    with site.broker_keys() as keys:
        return int(keys.zcard("aqueue:leases"))


def held_by_celery(site: Site) -> int:
    with site.broker_keys() as keys:
        return int(keys.hlen("unacked"))


def leases_have_ended(site: Site) -> bool:
    with site.broker_keys() as keys:
        seconds, microseconds = keys.time()
        return all(
            score < seconds * 1000 + microseconds / 1000
            for _, score in keys.zrange("aqueue:leases", 0, -1, withscores=True)
        )


def last_fetch_is_over(site: Site, prefix: str = "") -> bool:
    """Whether the second is over in which a Celery worker fetched something last."""
    with site.broker_keys() as keys:
        ((_, fetched),) = keys.zrange(f"{prefix}unacked_index", -1, -1, withscores=True)
        return bool(keys.time()[0] > fetched)


async def hold(
    site: Site, client: Any, key: str, number: int, task: str = "interop.wait_for_flag", queue: str = QUEUE
) -> list[Any]:
    """Tasks that run until the flag is up; sent by a Celery client."""
    return [client.send_task(task, [site.port, key], queue=queue) for _ in range(number)]


# --- an aqueue worker dies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("heir", ["an aqueue worker", "a Celery worker", "a Celery worker started later"])
async def test_what_a_killed_aqueue_worker_held_is_finished_while_another_aqueue_worker_lives(
    site: Site, celery_client: Callable[..., Any], key: str, tmp_path: Path, heir: str
) -> None:
    """The survivor gives the messages back to their queue, also when it does not work on that queue."""
    victim = hasty_worker(tmp_path, site, name="victim")
    results = await hold(site, celery_client(site), key, 6)
    await until(lambda: site.runs(key) == 6, "the victim runs them")
    survivor = hasty_worker(tmp_path, site, QUEUE if heir == "an aqueue worker" else "other", name="survivor")
    with survivor:
        victim.kill()
        assert held_by_ours(site) == 6
        if heir == "an aqueue worker":
            await finish(site, key, results, "aqueue")
        else:
            if heir.endswith("later"):
                await until(lambda: held_by_ours(site) == 0, "they are given back")
            with celery_worker(tmp_path, site.broker, site.results, "-P", "threads", "-c", "6", *QUICK, queues=QUEUE):
                await finish(site, key, results, "celery")
    assert held_by_ours(site) == 0


async def finish(site: Site, key: str, results: list[Any], who: str) -> None:
    """Each is begun once more, and ends well."""
    await until(lambda: site.runs(key) == 12, "they are begun once more", timeout=20)
    site.put_up(key)
    for result in results:
        assert await ended(result) == who
    assert site.runs(key) == 12


async def test_what_a_killed_aqueue_worker_held_is_handed_over_by_a_command_when_only_celery_is_left(
    site: Site, celery_client: Callable[..., Any], key: str, tmp_path: Path
) -> None:
    victim = hasty_worker(tmp_path, site)
    results = await hold(site, celery_client(site), key, 2)
    await until(lambda: site.runs(key) == 2, "the victim runs them")
    assert await recover(site) == {"leased": 0, "parked": 0, "unacked": 0, "left": 2}
    victim.kill()
    await until(lambda: leases_have_ended(site), "the leases have ended")
    assert await recover(site) == {"leased": 2, "parked": 0, "unacked": 0, "left": 0}
    site.put_up(key)
    with celery_worker(tmp_path, site.broker, site.results, "-c", "2", *QUICK, queues=QUEUE):
        assert [await ended(result) for result in results] == ["celery", "celery"]
    assert site.runs(key) == 4


async def test_what_waits_for_its_time_is_handed_over_by_a_command_when_only_celery_is_left(
    site: Site, connect: Connect, celery_client: Callable[..., Any], key: str, tmp_path: Path
) -> None:
    """Sent by both clients; the Celery worker holds them until their time, as it does with its own."""
    app = await connect(site)
    seconds, microseconds = site.traces.time()
    due = seconds + microseconds / 1e6 + 5
    ours = await app.send_task("interop.stamp", [site.port, f"{key}-ours"], queue=QUEUE, countdown=5)
    theirs = celery_client(site).send_task("interop.stamp", [site.port, f"{key}-theirs"], queue=QUEUE, countdown=5)
    async with working(await connect(site), QUEUE):
        await until(lambda: parked(site) == 2, "both are parked")
    assert await recover(site) == {"leased": 0, "parked": 0, "unacked": 0, "left": 0}
    assert await recover(site, "--parked") == {"leased": 0, "parked": 2, "unacked": 0, "left": 0}
    with celery_worker(tmp_path, site.broker, site.results, "-c", "1", *QUICK, queues=QUEUE):
        await until(lambda: held_by_celery(site) == 2, "the Celery worker holds them")
        assert site.runs(f"{key}-ours") == site.runs(f"{key}-theirs") == 0
        assert due <= await ours.get(SOON) < due + 3
        assert due <= await ended(theirs) < due + 3


# --- a Celery worker dies --------------------------------------------------------------------------------------------


async def test_what_a_killed_celery_worker_held_is_given_back_by_a_command_and_run_by_an_aqueue_worker(
    site: Site, celery_client: Callable[..., Any], key: str, tmp_path: Path
) -> None:
    """Two run, acknowledged late, and more are fetched: none of them is lost."""
    victim = celery_worker(tmp_path, site.broker, site.results, "-c", "2", *QUICK, queues=QUEUE)
    client = celery_client(site)
    results = await hold(site, client, key, 6, task="interop.late")
    await until(lambda: site.runs(key) == 2, "two of them run")
    await until(lambda: held_by_celery(site) == 6, "all are fetched")
    telling = client.send_task("interop.request", queue=QUEUE, priority=6, headers={"tenant": "acme"})
    await until(lambda: held_by_celery(site) == 7, "this one, too")
    victim.kill()
    await until(lambda: last_fetch_is_over(site), "all were fetched in seconds that are over")
    assert await recover(site) == {"leased": 0, "parked": 0, "unacked": 0, "left": 0}
    assert await recover(site, "--celery") == {"leased": 0, "parked": 0, "unacked": 0, "left": 0}
    assert await recover(site, "--celery", "--older-than", "0") == {"leased": 0, "parked": 0, "unacked": 7, "left": 0}
    assert held_by_celery(site) == 0
    with site.broker_keys() as keys:
        assert (keys.llen(QUEUE), keys.llen(f"{QUEUE}\x06\x166"), keys.zcard("unacked_index")) == (6, 1, 0)
    with aqueue_worker(tmp_path, site.broker, site.results, queues=QUEUE):
        await until(lambda: site.runs(key) == 8, "all are begun")
        site.put_up(key)
        assert [await ended(result) for result in results] == ["aqueue"] * 6
        assert (await ended(telling))["headers"] == {"tenant": "acme"}
    assert site.runs(key) == 8


async def test_what_was_fetched_a_moment_ago_is_given_back_when_everything_is_asked_for(
    site: Site, connect: Connect, celery_client: Callable[..., Any]
) -> None:
    """A consumer of Celery's kind takes a message and is gone; ``--older-than 0`` means this one, too."""
    client = celery_client(site)
    client.send_task("interop.add", [2, 3], queue=QUEUE).forget()
    app = await connect(site)
    await until(lambda: 0.3 < time.time() % 1 < 0.7, "the middle of a second")
    with client.connection_for_read() as connection:
        consumer = connection.SimpleQueue(QUEUE)
        consumer.get(timeout=5)
        given = await app.producer().broker.inspection.recover(older_than=0, celery=True, parked=False)
        assert (given.unacked, given.left) == (1, 0)
        consumer.close()


async def test_what_came_through_an_exchange_is_given_back_to_the_queue_that_it_was_taken_from(
    site: Site, connect: Connect, celery_client: Callable[..., Any]
) -> None:
    """The routing key is no queue's name; the exchange's bindings say where it leads."""
    queue = Queue("feeds", Exchange("news", type="topic"), routing_key="feed.#")
    client = celery_client(site, task_queues=[queue])
    result = client.send_task("interop.add", [2, 3], exchange=queue.exchange, routing_key="feed.new", declare=[queue])
    with client.connection_for_read() as connection:
        consumer = connection.SimpleQueue(queue)
        consumer.get(timeout=5)
        await until(lambda: last_fetch_is_over(site), "it was fetched in a second that is over")
        app = await connect(site)
        given = await app.producer().broker.inspection.recover(older_than=0, celery=True, parked=False)
        assert given.unacked == 1
        consumer.close()
    with site.broker_keys() as keys:
        assert keys.llen("feeds") == 1
    async with working(await connect(site), "feeds"):
        assert await ended(result) == 5


async def test_what_a_celery_consumer_held_under_a_key_prefix_is_given_back(
    site: Site, celery_client: Callable[..., Any]
) -> None:
    client = celery_client(site, broker_transport_options={"global_keyprefix": "team:"})
    result = client.send_task("interop.add", [2, 3], queue=QUEUE)
    with client.connection_for_read() as connection:
        consumer = connection.SimpleQueue(QUEUE)
        consumer.get(timeout=5)
        ours = aqueue_app.make(f"{site.broker}?key_prefix=team:", site.results)
        await until(lambda: last_fetch_is_over(site, "team:"), "it was fetched in a second that is over")
        async with ours:
            given = await ours.producer().broker.inspection.recover(older_than=0, celery=True, parked=False)
            assert given.unacked == 1
        consumer.close()
    async with working(ours, QUEUE):
        assert await ended(result) == 5


async def test_what_a_celery_worker_holds_for_later_is_left_to_an_aqueue_worker_when_it_stops(
    site: Site, celery_client: Callable[..., Any], key: str, tmp_path: Path
) -> None:
    seconds, microseconds = site.traces.time()
    due = seconds + microseconds / 1e6 + 4
    with celery_worker(tmp_path, site.broker, site.results, "-P", "solo", *QUICK, queues=QUEUE) as theirs:
        result = celery_client(site).send_task("interop.stamp", [site.port, key], queue=QUEUE, countdown=4)
        await until(lambda: held_by_celery(site) == 1, "the Celery worker holds it")
        theirs.terminate()
        await asyncio.to_thread(theirs.wait)
    assert held_by_celery(site) == 0
    with aqueue_worker(tmp_path, site.broker, site.results, queues=QUEUE):
        assert due <= await ended(result) < due + 3
    assert site.runs(key) == 1


# --- on RabbitMQ, which gives back at once what a worker held that is gone -------------------------------------------


@pytest.mark.parametrize("heir", ["an aqueue worker", "a Celery worker"])
async def test_what_a_killed_aqueue_worker_held_is_given_by_rabbitmq_to_whoever_is_left(
    rabbit_site: Site, celery_client: Callable[..., Any], key: str, tmp_path: Path, heir: str
) -> None:
    site = rabbit_site
    victim = aqueue_worker(tmp_path, site.broker, site.results, queues=key, name="victim")
    results = await hold(site, celery_client(site), key, 6, queue=key)
    await until(lambda: site.runs(key) == 6, "the victim runs them")
    if heir == "an aqueue worker":
        survivor = aqueue_worker(tmp_path, site.broker, site.results, queues=key, name="survivor")
    else:
        survivor = celery_worker(
            tmp_path, site.broker, site.results, "-P", "threads", "-c", "6", *QUICK, queues=key, name="survivor"
        )
    with survivor:
        victim.kill()
        await finish(site, key, results, "aqueue" if heir == "an aqueue worker" else "celery")
        if heir == "a Celery worker":
            survivor.kill()  # to end takes it seconds; it has acknowledged before it ran them
    assert site.waiting_in_rabbit(key) == 0


async def test_what_a_killed_celery_worker_held_is_given_by_rabbitmq_to_an_aqueue_worker(
    rabbit_site: Site, connect: Connect, celery_client: Callable[..., Any], key: str, tmp_path: Path
) -> None:
    """Two run, acknowledged late, and more are fetched, from clients of both kinds: none of them is lost."""
    site = rabbit_site
    victim = celery_worker(tmp_path, site.broker, site.results, "-c", "2", *QUICK, queues=key)
    theirs = await hold(site, celery_client(site), key, 4, task="interop.late", queue=key)
    app = await connect(site)
    ours = [await app.send_task("interop.late", [site.port, key], queue=key) for _ in range(2)]
    await until(lambda: site.runs(key) == 2, "two of them run")
    await until(lambda: site.waiting_in_rabbit(key) == 0, "all are fetched")
    victim.kill()
    with aqueue_worker(tmp_path, site.broker, site.results, queues=key):
        await until(lambda: site.runs(key) == 8, "all are begun")
        site.put_up(key)
        assert [await ended(result) for result in theirs] == ["aqueue"] * 4
        assert [await result.get(SOON) for result in ours] == ["aqueue"] * 2
    assert site.runs(key) == 8
    assert site.waiting_in_rabbit(key) == 0


async def test_what_a_celery_worker_holds_for_later_is_left_by_rabbitmq_to_an_aqueue_worker_when_it_stops(
    rabbit_site: Site, celery_client: Callable[..., Any], key: str, tmp_path: Path
) -> None:
    site = rabbit_site
    with celery_worker(tmp_path, site.broker, site.results, "-P", "solo", *QUICK, queues=key) as theirs:
        seconds, microseconds = site.traces.time()
        due = seconds + microseconds / 1e6 + 5
        result = celery_client(site).send_task("interop.stamp", [site.port, key], queue=key, countdown=5)
        await until(lambda: "received" in theirs.log and not site.waiting_in_rabbit(key), "the Celery worker holds it")
        theirs.terminate()
        await asyncio.to_thread(theirs.wait)
    with aqueue_worker(tmp_path, site.broker, site.results, queues=key):
        assert due <= await ended(result) < due + 3
    assert site.runs(key) == 1
