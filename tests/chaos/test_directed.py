"""Directed schedules: one fault each, at a known stage, with a lease of half a second; the checker judges each run.

Held elsewhere: a task that kills its process (`worker/test_process.py`, `worker/test_suspects.py`), all workers killed
on SQLite (`worker/test_process.py`), signals, a grace that ends, a signal during the start, a supervisor that is killed
(`worker/test_process.py`, `worker/test_supervisor.py`), a link that is silent or refused, a server that is killed or
frozen (`brokers/test_redis.py`, `worker/test_rabbitmq_faults.py`), a cancelled command (`brokers/test_redis.py`).
"""

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from functools import partial
from typing import Any

import pytest

from aqueue import AQueue, Settings
from aqueue.errors import BrokerUnavailable, EnqueueFailed
from tests.chaos.cancelling import cancelling
from tests.chaos.checker import hygiene
from tests.chaos.conftest import MakeRun, passed
from tests.chaos.ground import CANARY, Ground, RabbitGround, RedisGround
from tests.chaos.history import Event, read
from tests.chaos.run import Run
from tests.kit.servers import wait_for

#: Seconds, for what takes a start of a process, or a lease and half of it.
PATIENCE = 20.0


class Directed:
    """A run whose schedule is the test's: it sends, waits for what happens, and has it judged at the end."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._numbers = iter(range(1000))

    def workers(self, *places: str) -> "Directed":
        for place in places:
            self.run.crew.spawn_worker(place)
        return self

    def send(self, task: str, count: int = 1) -> list[str]:
        """Send, and write down what became of it; the ids."""
        return asyncio.run(self._send([f"{task}-p0-{next(self._numbers)}" for _ in range(count)]))

    async def _send(self, ids: list[str]) -> list[str]:
        ground = self.run.ground
        settings = Settings(default_queue=ground.queue, lease=self.run.plan.lease)
        async with AQueue("sender", broker=ground.url, backend=ground.results_url or None, settings=settings) as app:
            for id in ids:
                self.run.record("ENQ", id=id)
                await app.send_task(id.partition("-")[0], (1,), task_id=id)
                self.run.record("ENQ_OK", id=id)
        return ids

    def events(self, *names: str) -> list[Event]:
        return [event for event in read(self.run.folder) if event.e in names]

    def until(self, condition: Callable[[], object], what: str) -> None:
        wait_for(condition, what, PATIENCE)

    def has(self, name: str, id: str, process: str = "") -> bool:
        return any(event.id == id and event.p.startswith(process) for event in self.events(name))

    def has_started(self, count: int) -> bool:
        return len(self.events("START")) >= count

    def judged(self) -> list[Event]:
        """Drained, and passed; the whole history."""
        passed(self.run.finish())
        return read(self.run.folder)


@pytest.fixture
def directed(make_run: MakeRun) -> Callable[..., Directed]:
    return lambda **options: Directed(make_run(**options))


MakeDirected = Callable[..., Directed]


def count(events: list[Event], name: str) -> Counter[tuple[str, int]]:
    return Counter(event.copy for event in events if event.e == name)


def killed(events: list[Event]) -> list[str]:
    return [event.target for event in events if event.e == "EXIT" and event.n == -9 and event.p == "nemesis"]


# --- a worker is killed -------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["claim_sent", "claimed", "started", "body_done", "settle"])
def test_a_worker_killed_before_it_has_settled(directed: MakeDirected, stage: str) -> None:
    """Its tasks are run by another, and nothing is lost.

    On RabbitMQ the result is stored before the message is settled: what has succeeded is not run again.
    """
    schedule = directed(failpoints=[[f"{stage}:kill9@1"]])
    (id,) = schedule.send("quick")
    events = schedule.workers("w0").judged()
    assert killed(events) == ["w0.0"]
    has_result = stage == "settle" and schedule.run.plan.broker == "rabbitmq"
    begun = 2 if stage in ("started", "body_done", "settle") and not has_result else 1
    assert count(events, "START") == {(id, 1): begun}
    assert [event.p for event in events if event.e == "SETTLE" and event.ok] == ["w0.1"]


@pytest.mark.parametrize("kind", ["rabbitmq"], indirect=True)
def test_a_worker_killed_between_result_and_settle(directed: MakeDirected) -> None:
    """Where that is two steps: what has succeeded is settled by another, and not run again."""
    schedule = directed(failpoints=[["result_done:kill9@1"]])
    (id,) = schedule.send("quick")
    events = schedule.workers("w0").judged()
    assert killed(events) == ["w0.0"]
    assert count(events, "START") == {(id, 1): 1}
    assert [event.p for event in events if event.e == "SETTLE" and event.ok] == ["w0.1"]


def test_a_worker_killed_when_it_has_settled(directed: MakeDirected) -> None:
    """It is done, though nobody has read the answer."""
    schedule = directed(failpoints=[["settle_sent:kill9@1"]])
    (id,) = schedule.send("quick")
    schedule.workers("w0").until(schedule.run.crew.reap, "the worker is killed")
    schedule.workers("w0").send("quick")
    events = schedule.judged()
    assert killed(events) == ["w0.0"]
    assert count(events, "START")[id, 1] == 1


def test_a_worker_killed_when_it_has_sent_a_retry(directed: MakeDirected) -> None:
    """One copy; on RabbitMQ, where sending and settling are two steps, a second one of the same id at most."""
    schedule = directed(failpoints=[["retry:kill9@1"]])
    (id,) = schedule.send("flaky")
    events = schedule.workers("w0").judged()
    assert killed(events) == ["w0.0"]
    begun = count(events, "START")
    if schedule.run.plan.broker == "rabbitmq":
        assert begun == {(id, 1): 2, (id, 2): 2}
    else:
        assert begun == {(id, 1): 1, (id, 2): 1}


@pytest.mark.parametrize("kind", ["sqlite", "redis"], indirect=True)
def test_a_worker_killed_while_it_takes_back_what_another_lost(directed: MakeDirected) -> None:
    """Taking back is one step; what it was about to run is run by the next."""
    schedule = directed(failpoints=[["started:kill9@1"], ["reap:kill9@1"]], concurrency=1)
    schedule.workers("w0")
    (id,) = schedule.send("quick")
    schedule.until(schedule.run.crew.reap, "the first is killed")
    schedule.workers("w1").until(schedule.run.crew.reap, "the second is killed when it takes back")
    events = schedule.workers("w2").judged()
    assert killed(events) == ["w0.0", "w1.0"]
    assert count(events, "END") == {(id, 1): 1}


@pytest.mark.parametrize("kind", ["redis", "rabbitmq"], indirect=True)
def test_all_workers_killed_at_once_and_again(directed: MakeDirected) -> None:
    """On SQLite `worker/test_process.py::test_kill_after_kill_leaves_the_file_whole` does it."""
    schedule = directed(concurrency=4)
    ids = schedule.send("nap", 8)
    for _ in range(3):
        wanted = len(schedule.events("START")) + 2
        schedule.workers("w0", "w1").until(partial(schedule.has_started, wanted), "both are at work")
        for place in ("w0", "w1"):
            schedule.run.crew.kill(place)
        schedule.run.crew.reap()
    events = schedule.workers("w0", "w1").judged()
    assert len(killed(events)) == 6
    assert {id for id, _ in count(events, "END")} == set(ids)


def test_a_producer_killed_before_it_knows_that_it_is_stored(make_run: MakeRun) -> None:
    """It is stored or not, never half."""
    run = make_run(producer_failpoints=["publish_sent:kill9@3"], seconds=0.4, rate=20.0)
    passed(run.go({"quick": 1.0}))
    events = read(run.folder)
    assert killed(events) == ["p0.0"]
    answered = {event.id for event in events if event.e == "ENQ_OK"}
    unanswered = {event.id for event in events if event.e == "ENQ"} - answered
    assert unanswered
    assert unanswered <= {event.id for event in events if event.e == "END"}


# --- a worker is frozen -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sqlite", "redis"], indirect=True)
def test_a_worker_that_stood_still_is_told_and_its_settle_refused(directed: MakeDirected) -> None:
    """Another has run its task meanwhile; its own run is ended as soon as it can hear."""
    schedule = directed(failpoints=[["started:stop=1.6@1"]])
    schedule.workers("w0")
    (id,) = schedule.send("nap")
    schedule.until(lambda: schedule.has("FAULT", "") and schedule.has("START", id), "it stands still")
    schedule.workers("w1").until(lambda: schedule.has("START", id, "w1"), "another has begun the task")
    schedule.until(lambda: schedule.has("LEASE_LOST", id, "w0"), "it is told")
    events = schedule.judged()
    assert [event.p for event in events if event.e == "END"] == ["w1.0"]
    assert [event.why for event in events if event.e == "CANCEL" and event.p == "w0.0"] == ["lease lost"]


def test_a_worker_frozen_while_it_waits_takes_nothing_along(directed: MakeDirected) -> None:
    """What is sent meanwhile is not handed to it, or comes back when it is killed."""
    schedule = directed()
    (first,) = schedule.workers("w0").send("quick")
    schedule.until(lambda: schedule.has("SETTLE", first), "it waits for more")
    schedule.run.crew.freeze("w0")
    ids = schedule.send("quick", 3)
    schedule.run.crew.kill("w0")
    schedule.run.crew.reap()
    events = schedule.workers("w1").judged()
    assert {id for id, _ in count(events, "END")} == {first, *ids}


# --- the server and the link --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["redis"], indirect=True)
@pytest.mark.parametrize("fault", ["client_kill", "script_flush"])
def test_connections_and_scripts_that_redis_drops(directed: MakeDirected, fault: str) -> None:
    """Under load, three times."""
    schedule = directed(concurrency=4)
    schedule.workers("w0")
    ids: list[str] = []
    for _ in range(3):
        ids += schedule.send("quick", 10)
        schedule.run.record("FAULT", kind=fault, target="")
        schedule.run.ground.begin(fault, "", 0.0)
    events = schedule.judged()
    assert count(events, "START") == {(id, 1): 1 for id in ids}


@pytest.mark.parametrize("kind", ["redis"], indirect=True)
def test_a_redis_that_becomes_read_only_for_a_while(directed: MakeDirected) -> None:
    """Sends are refused and not stored, the worker waits; nothing is lost."""
    schedule = directed(lease=1.0)
    ground = schedule.run.ground
    assert isinstance(ground, RedisGround)
    ids = schedule.workers("w0").send("nap", 3)
    schedule.until(lambda: all(schedule.has("START", id) for id in ids), "they run")
    client: Any = ground.server.client()
    with closing(client):
        client.execute_command("REPLICAOF", "127.0.0.1", "1")
        with pytest.raises((EnqueueFailed, BrokerUnavailable)):
            schedule.send("quick")
        client.execute_command("REPLICAOF", "NO", "ONE")
    (later,) = schedule.send("quick")
    events = schedule.judged()
    assert {id for id, _ in count(events, "END")} >= {*ids, later}


@pytest.mark.parametrize("kind", ["redis", "rabbitmq"], indirect=True)
@pytest.mark.parametrize("towards", ["server", "client"])
def test_a_link_that_ends_in_the_middle_of_a_frame(directed: MakeDirected, towards: str) -> None:
    """For whatever the worker says or hears next: a claim, a settle, a heartbeat."""
    schedule = directed(concurrency=4)
    ground = schedule.run.ground
    assert isinstance(ground, RedisGround | RabbitGround)
    schedule.workers("w0")
    ids: list[str] = []
    for _ in range(3):
        ids += schedule.send("quick", 5)
        schedule.run.record("FAULT", kind="cut", target="workers")
        ground.proxies["workers"].cut_mid_frame(towards)
    ground.end("cut", "workers")
    events = schedule.judged()
    assert {id for id, _ in count(events, "END")} == set(ids)


async def test_sends_and_claims_that_are_cancelled(ground: Ground, caplog: pytest.LogCaptureFixture) -> None:
    """What was answered is stored, no answer is given to another, nothing is handed out twice."""
    assert await cancelling(ground.url) + list(hygiene({"log": caplog.text}, ())) == []


def test_no_secret_is_written_by_anybody(make_run: MakeRun) -> None:
    """The canary is in every URL of a server; see `tests.chaos.checker.hygiene`."""
    assert CANARY not in os.environ.values()
    run = make_run(seconds=0.2, rate=10.0)
    passed(run.go({"fail": 0.5, "quick": 0.5}))
