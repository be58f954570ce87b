"""Which queue a task goes to, and who takes it from there."""

import asyncio
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from amqp import NotFound

from aqueue import AQueue, EnqueueFailed
from tests.interop import aqueue_app, celery_app
from tests.interop.celery_names import Exchange, NotRegistered, Queue
from tests.interop.conftest import BOTH, SOON, TO_AQUEUE, TO_CELERY, Connect, Fleet, ended, working
from tests.interop.workers import QUICK, Site, aqueue_command, celery_worker
from tests.kit.waiting import until

#: Tasks by their routes; the names fit both sides' ways to write them.
ROUTES = {"interop.routed": {"queue": "by-table"}, "interop.g*": {"queue": "by-pattern"}}


def waiting(site: Site, queue: str) -> int:
    """How many messages wait in a queue."""
    if site.rabbit:
        return site.waiting_in_rabbit(queue)
    with site.broker_keys() as keys:
        return sum(keys.llen(f"{queue}{step}") for step in ("", "\x06\x163", "\x06\x166", "\x06\x169"))


async def arrived(site: Site, queue: str, number: int) -> None:
    """Wait until so many messages are in a queue: a Celery client doesn't wait for that on RabbitMQ."""
    await until(lambda: waiting(site, queue) == number, f"{number} messages in {queue}")


async def test_tasks_go_to_the_default_queue_of_celery(either_site: Site, connect: Connect, celery_client: Any) -> None:
    app = await connect(either_site)
    ours = await app.send_task("interop.add", [2, 3])
    theirs = celery_client(either_site).send_task("interop.add", [20, 30])
    await arrived(either_site, "celery", 2)
    async with working(await connect(either_site)):
        assert await ours.get(SOON) == 5
        assert await ended(theirs) == 50


async def test_a_default_queue_of_another_name_is_shared(
    either_site: Site, connect: Connect, celery_client: Any
) -> None:
    app = await connect(either_site, default_queue="jobs")
    ours = await app.send_task("interop.add", [2, 3])
    theirs = celery_client(either_site, task_default_queue="jobs").send_task("interop.add", [20, 30])
    await arrived(either_site, "jobs", 2)
    async with working(await connect(either_site, default_queue="jobs")):
        assert await ours.get(SOON) == 5
        assert await ended(theirs) == 50


async def test_one_route_table_sends_tasks_of_both_clients_to_the_same_queues(
    either_site: Site, connect: Connect, celery_client: Any
) -> None:
    app = await connect(either_site, routes=ROUTES)
    client = celery_client(either_site, task_routes=ROUTES)
    for task, queue in (("interop.routed", "by-table"), ("interop.give", "by-pattern"), ("interop.add", "celery")):
        theirs = client.send_task(task, [1, 2] if queue == "celery" else [1])
        await arrived(either_site, queue, 1)
        ours = await app.send_task(task, [1, 2] if queue == "celery" else [1])
        await arrived(either_site, queue, 2)
        async with working(await connect(either_site), queue):
            assert await ours.get(SOON) == await ended(theirs)


async def test_a_queue_named_by_the_call_wins_over_the_tables_of_both_clients(
    site: Site, connect: Connect, celery_client: Any
) -> None:
    app = await connect(site, routes=ROUTES)
    await app.send_task("interop.routed", [1], queue="elsewhere")
    celery_client(site, task_routes=ROUTES).send_task("interop.routed", [1], queue="elsewhere").forget()
    assert waiting(site, "elsewhere") == 2
    assert waiting(site, "by-table") == 0


async def test_a_queue_named_by_the_task_is_where_our_worker_looks_by_itself(
    either_site: Site, connect: Connect, celery_client: Any
) -> None:
    app = await connect(either_site)
    ours = await app.tasks["interop.routed"].send("ours")
    theirs = celery_client(either_site).send_task("interop.routed", ["theirs"], queue="by-task")
    await arrived(either_site, "by-task", 2)
    async with working(await connect(either_site)):
        assert await ours.get(SOON) == "ours"
        assert await ended(theirs) == "theirs"


async def test_a_celery_worker_takes_custom_queues_of_an_aqueue_client(
    site: Site, connect: Connect, tmp_path: Path
) -> None:
    """One queue has waited for the worker, the other gets its task later."""
    app = await connect(site, routes=ROUTES)
    before = await app.send_task("interop.routed", ["before"])
    with celery_worker(
        tmp_path, site.broker, site.results, "-P", "solo", *QUICK, queues="by-table,by-pattern", name="custom"
    ):
        after = await app.send_task("interop.give", ["after"])
        assert await before.get(SOON) == "before"
        assert await after.get(SOON) == "after"


async def test_a_celery_worker_that_is_told_to_take_one_more_queue_does(
    either_fleet: Fleet, connect: Connect, key: str
) -> None:
    app = await connect(either_fleet.site)
    result = await app.send_task("interop.add", [2, 3], queue=key)
    either_fleet.client.control.add_consumer(key, reply=True, timeout=SOON, limit=1)
    assert await result.get(SOON) == 5
    either_fleet.client.control.cancel_consumer(key, reply=True, timeout=SOON, limit=1)


async def test_an_aqueue_client_routes_by_exchange_and_key_of_a_celery_topic(
    either_fleet: Fleet, connect: Connect, celery_client: Callable[..., Any], key: str
) -> None:
    """The bindings of a topic exchange, written by Celery, are followed."""
    exchange = Exchange(f"{key}-topic", type="topic")
    queues = [Queue(f"{key}-{name}", exchange, routing_key=f"{name}.#") for name in ("feed", "mail")]
    client = celery_client(either_fleet.site, task_queues=queues)
    app = await connect(either_fleet.site)
    with pytest.raises(EnqueueFailed, match="unroutable"):
        await app.send_task("interop.add", [2, 3], exchange=f"{key}-topic", routing_key="feed.new")
    with client.connection_for_write() as connection:
        for queue in queues:
            queue(connection.default_channel).declare()
    ours = await app.send_task("interop.add", [2, 3], exchange=f"{key}-topic", routing_key="feed.new")
    theirs = client.send_task("interop.add", [20, 30], exchange=exchange, routing_key="feed.old", declare=queues)
    await arrived(either_fleet.site, f"{key}-feed", 2)
    await arrived(either_fleet.site, f"{key}-mail", 0)
    async with working(await connect(either_fleet.site), f"{key}-feed"):
        assert await ours.get(SOON) == 5
        assert await ended(theirs) == 50


async def test_a_retry_of_a_task_that_came_through_an_exchange_finds_its_queue_again(
    either_fleet: Fleet, connect: Connect, celery_client: Callable[..., Any], key: str
) -> None:
    exchange = Exchange(f"{key}-direct", type="direct")
    queue = Queue(f"{key}-queue", exchange, routing_key="k")
    client = celery_client(either_fleet.site, task_queues=[queue])
    result = client.send_task("interop.retry_self", [2, 0.1], exchange=exchange, routing_key="k", declare=[queue])
    async with working(await connect(either_fleet.site), f"{key}-queue"):
        assert await ended(result) == [2, "in-process"]


# --- key prefixes ----------------------------------------------------------------------------------------------------


class Prefixed:
    """A Redis that is shared with others: every key has a prefix, those of results another one."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.celery: dict[str, Any] = {
            "broker_transport_options": {"global_keyprefix": "team:"},
            "result_backend_transport_options": {"global_keyprefix": "results"},
        }

    def app(self) -> AQueue:
        return aqueue_app.make(f"{self.site.broker}?key_prefix=team:", f"{self.site.results}?key_prefix=results")

    def foreign_keys(self) -> list[bytes]:
        """Keys without a prefix."""
        with self.site.broker_keys() as keys, self.site.result_keys() as results:
            return [key for key in keys.scan_iter() if not key.startswith(b"team:")] + [
                key for key in results.scan_iter() if not key.startswith(b"results_")
            ]


@pytest.fixture
def prefixed(site: Site) -> Prefixed:
    return Prefixed(site)


async def test_a_key_prefix_is_shared_with_a_celery_client(prefixed: Prefixed, celery_client: Any, key: str) -> None:
    client = celery_client(prefixed.site, **prefixed.celery)
    async with working(prefixed.app(), "celery"):
        assert await ended(client.send_task("interop.add", [2, 3])) == 5
        assert await ended(client.send_task("interop.retry_self", [1, 0.2])) == [1, "in-process"]
        assert await ended(client.send_task("interop.echo", [1], countdown=0.2)) == [[1], {}]
    assert prefixed.foreign_keys() == []


async def test_a_key_prefix_is_shared_with_a_celery_worker(prefixed: Prefixed, tmp_path: Path) -> None:
    site = prefixed.site
    async with prefixed.app() as app:
        with celery_worker(
            tmp_path, site.broker, site.results, "-P", "solo", *QUICK, queues="celery", settings=prefixed.celery
        ):
            result = await app.send_task("interop.add", [2, 3])
            assert await result.get(SOON) == 5
            late = await app.send_task("interop.retry_self", [1, 0.2])
            assert await late.get(SOON) == [1, "celery"]
    assert prefixed.foreign_keys() == []


async def test_a_key_prefix_given_to_a_command_leads_to_the_same_queues(prefixed: Prefixed) -> None:
    async with prefixed.app() as app:
        await app.send_task("interop.add", [2, 3])
    listed = await listed_queues(f"{prefixed.site.broker}?key_prefix=team:")
    assert [(row["queue"], row["ready"]) for row in listed] == [("celery", 1)]


async def listed_queues(broker: str) -> list[dict[str, Any]]:
    listed = await asyncio.to_thread(aqueue_command, "queues", "--broker", broker, "--json")
    assert listed.returncode == 0, listed.stderr
    rows: list[dict[str, Any]] = json.loads(listed.stdout)
    return rows


async def test_a_queue_that_was_filled_after_its_bindings_were_lost_is_listed_all_the_same(
    site: Site, celery_client: Callable[..., Any]
) -> None:
    """Redis came back empty; a Celery client that lives long declares its queues only once."""
    client = celery_client(site)
    client.send_task("interop.add", [2, 3], queue="jobs").forget()
    with site.broker_keys() as keys:
        keys.flushdb()
    client.send_task("interop.add", [2, 3], queue="jobs").forget()
    assert waiting(site, "jobs") == 1
    assert [(row["queue"], row["ready"]) for row in await listed_queues(site.broker)] == [("jobs", 1)]


# --- names that one side does not know -------------------------------------------------------------------------------


async def test_both_clients_send_tasks_that_they_know_by_name_only(either_fleet: Fleet, connect: Connect) -> None:
    assert "interop.order" not in either_fleet.client.tasks
    order = {"number": 1, "wanted": "2024-01-01", "lines": []}
    theirs = either_fleet.client.send_task("interop.order", kwargs={"order": order}, queue=TO_AQUEUE)
    assert await ended(theirs) == "1 until 01.01.2024: "
    app = await connect(either_fleet.site)
    assert "interop.known_to_celery" not in app.tasks
    ours = await app.send_task("interop.known_to_celery", kwargs={"value": 7}, queue=TO_CELERY)
    assert await ours.get(SOON) == 7


async def test_tasks_that_an_aqueue_worker_does_not_know_wait_for_a_celery_worker_that_does(
    plain_fleet: Fleet, connect: Connect, key: str
) -> None:
    """The worker that can't run them parks them; the one that joins the queue later finds them as they were sent."""
    app = await connect(plain_fleet.site)
    client = plain_fleet.client
    theirs = client.send_task("interop.known_to_celery", ["theirs"], queue=key)
    ours = await app.send_task("interop.known_to_celery", ["ours"], queue=key)
    telling = client.send_task(
        "interop.request", [1], {"two": 2}, queue=key, headers={"tenant": "acme"}, time_limit=30, priority=6
    )
    ignorant = await connect(plain_fleet.site)
    del ignorant.tasks["interop.request"]
    async with working(ignorant, key):
        with plain_fleet.site.broker_keys() as keys:
            await until(lambda: keys.zcard("aqueue:parked") == 3, "all are parked")
            places = {member.partition(b":")[2].decode() for member in keys.zrange("aqueue:parked", 0, -1)}
            assert places == {key, f"{key}\x06\x166", f"{key}\x06\x169"}
        assert [theirs.state, await ours.state(), telling.state] == ["PENDING"] * 3
    client.control.add_consumer(key, reply=True, timeout=SOON, limit=1)
    assert await ended(theirs) == "theirs"
    assert await ours.get(SOON) == "ours"
    found = await ended(telling)
    assert found["id"] == telling.id
    assert found["by"] == "celery"
    assert found["retries"] == 0
    assert found["args"] == [1]
    assert found["kwargs"] == {"two": 2}
    assert found["headers"]["tenant"] == "acme"
    assert found["timelimit"] == [30, None]
    assert found["parent_id"] is None
    assert found["priority"] == 6


async def test_a_task_that_nobody_knows_in_time_is_buried_and_its_client_is_told(
    plain_fleet: Fleet, connect: Connect, key: str
) -> None:
    result = plain_fleet.client.send_task("interop.known_to_celery", [1], queue=key)
    async with working(await connect(plain_fleet.site, unknown_grace=0), key):
        with pytest.raises(NotRegistered, match=r"interop\.known_to_celery"):
            await ended(result)
    with plain_fleet.site.broker_keys() as keys:
        assert keys.zcard("aqueue:dead") >= 1


async def test_both_sides_run_their_part_of_one_queue(either_fleet: Fleet, connect: Connect) -> None:
    """Tasks that both know go to either; nothing is lost on a queue that both work on."""
    app = await connect(either_fleet.site)
    results = [either_fleet.client.send_task("interop.add", [number, 0], queue=BOTH) for number in range(30)]
    ours = await app.send_many([app.tasks["interop.add"].options(queue=BOTH).s(number, 100) for number in range(30)])
    assert [await ended(result) for result in results] == list(range(30))
    assert [await result.get(SOON) for result in ours] == list(range(100, 130))


def test_the_two_apps_of_these_tests_know_the_same_names() -> None:
    ours = {name for name in aqueue_app.app.tasks if name.startswith("interop.")}
    theirs = {name for name in celery_app.app.tasks if name.startswith("interop.")}
    only_ours = {
        "interop.order",
        "interop.retry_now",
        "interop.tell_progress",
        "interop.retry_with_nan",
        "interop.progress_of_coroutine",
    }
    assert ours - only_ours == theirs - {"interop.known_to_celery"}


# --- on RabbitMQ -----------------------------------------------------------------------------------------------------


async def test_what_is_sent_to_a_fanout_exchange_is_run_once_for_each_queue_by_its_kind_of_worker(
    rabbit_fleet: Fleet, connect: Connect, celery_client: Callable[..., Any], key: str
) -> None:
    site = rabbit_fleet.site
    name = f"{key}-fanout"
    ours = {f"{key}-ours": {"exchange": name, "exchange_type": "fanout"}}
    async with working(await connect(site, queues=ours), f"{key}-ours"):
        await until(lambda: has_queue(site, f"{key}-ours"), "our worker has declared its queue")
        rabbit_fleet.client.control.add_consumer(
            f"{key}-theirs", exchange=name, exchange_type="fanout", routing_key="", reply=True, timeout=SOON, limit=1
        )
        client = celery_client(site)
        client.send_task("interop.count", [site.port, f"{key}-c"], exchange=name, exchange_type="fanout").forget()
        app = await connect(site)
        await app.send_task("interop.count", [site.port, f"{key}-a"], exchange=name, routing_key="any")
        for one in ("c", "a"):
            await until(partial(ran, site, f"{key}-{one}", 2), "both have run it")
            assert sorted(site.traces.lrange(f"who:{key}-{one}", 0, -1)) == ["celery", "in-process"]
    rabbit_fleet.client.control.cancel_consumer(f"{key}-theirs", reply=True, timeout=SOON, limit=1)
    assert waiting(site, f"{key}-ours") == waiting(site, f"{key}-theirs") == 0


def ran(site: Site, key: str, times: int) -> bool:
    return site.runs(key) == times


def has_queue(site: Site, queue: str) -> bool:
    try:
        site.waiting_in_rabbit(queue)
    except NotFound:
        return False
    return True


async def test_a_celery_worker_takes_what_an_aqueue_client_sends_to_a_topic(
    rabbit_fleet: Fleet, connect: Connect, key: str
) -> None:
    control = rabbit_fleet.client.control
    control.add_consumer(
        key, exchange=f"{key}-topic", exchange_type="topic", routing_key="feed.*", reply=True, timeout=SOON, limit=1
    )
    await until(lambda: f"consuming from {key}" in rabbit_fleet.celery.log, "it consumes, which its answer precedes")
    app = await connect(rabbit_fleet.site)
    result = await app.send_task("interop.retry_self", [1, 0.1], exchange=f"{key}-topic", routing_key="feed.new")
    assert await result.get(SOON) == [1, "celery"]
    with pytest.raises(EnqueueFailed, match="unroutable"):
        await app.send_task("interop.add", [2, 3], exchange=f"{key}-topic", routing_key="mail.new")
    control.cancel_consumer(key, reply=True, timeout=SOON, limit=1)


async def test_tasks_that_an_aqueue_worker_does_not_know_reach_a_celery_worker_on_the_same_queue_of_rabbitmq(
    rabbit_fleet: Fleet, connect: Connect, key: str
) -> None:
    site = rabbit_fleet.site
    app = await connect(site)
    client = rabbit_fleet.client
    async with working(await connect(site), key):
        theirs = client.send_task("interop.known_to_celery", ["theirs"], queue=key, headers={"tenant": "acme"})
        ours = await app.send_task("interop.known_to_celery", ["ours"], queue=key)
        known = client.send_task("interop.add", [2, 3], queue=key)
        assert await ended(known) == 5
        assert [theirs.state, await ours.state()] == ["PENDING"] * 2
    client.control.add_consumer(key, reply=True, timeout=SOON, limit=1)
    assert await ended(theirs) == "theirs"
    assert await ours.get(SOON) == "ours"
    client.control.cancel_consumer(key, reply=True, timeout=SOON, limit=1)
