"""Admission: a delivery becomes a task to run, or the outcome that says why not."""

from datetime import datetime, timezone
from typing import Any

import pytest

from aqueue import AQueue, Settings
from aqueue.admission import UNKNOWN_SINCE, admit, killed_by_reading, task_id_of, understand
from aqueue.broker import Delivery
from aqueue.broker.history import OUT_OF_MEMORY, History, Loss
from aqueue.errors import BadMessage, WorkerLostError
from aqueue.failures import NotRegistered, remote_error
from aqueue.outcome import Dead, GiveBack, Outcome, PutOff, Revoked
from aqueue.protocol import Request, Unreadable
from aqueue.serialization import Serializer
from aqueue.task import Task
from tests.unit.elements import ABSENT, element, message_of
from tests.unit.vectors import task_messages

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
APP = AQueue("shop", broker="memory://")


@APP.task(name="proj.tasks.add")
def add(x: int, y: int) -> int:
    return x + y


def delivery_of(deliveries: int = 1, body: Any = None, **headers: Any) -> Delivery:
    return Delivery(message_of(element(body, headers=headers)), "receipt", deliveries)


def admitted(
    deliveries: int = 1, body: Any = None, settings: Settings | None = None, **headers: Any
) -> Task[..., Any] | Outcome:
    delivery = delivery_of(deliveries, body, **headers)
    request = understand(delivery, Serializer())
    assert isinstance(request, Request), request
    return admit(delivery, request, APP.tasks, settings or Settings(), NOW.timestamp())


# --- understanding ---------------------------------------------------------------------------------------------


def test_a_message_that_can_be_read_is_understood() -> None:
    request = understand(delivery_of(), Serializer())
    assert isinstance(request, Request)
    assert request.args == [2, 3]


def test_bytes_that_are_no_message_are_dead_for_their_reason_and_leave_no_result() -> None:
    unreadable = Unreadable("celery", b"not json", BadMessage("undecodable", "not readable"))
    dead = understand(Delivery(unreadable, "receipt"), Serializer())
    assert dead == Dead("undecodable", "not readable", unreadable.error)


def test_a_message_that_cannot_be_read_is_dead_for_its_reason() -> None:
    dead = understand(delivery_of(eta="soon"), Serializer())
    assert isinstance(dead, Dead)
    assert dead.reason == "bad_eta"
    assert isinstance(dead.error, BadMessage)
    assert dead.detail == dead.error.detail


@pytest.mark.parametrize(
    ("id", "found"),
    [
        ("1", "1"),
        ("x" * 255, "x" * 255),
        ("", None),
        ("x" * 256, None),
        ("a\nb", None),
        (5, None),
        (None, None),
        (ABSENT, None),
    ],
    ids=lambda value: str(value)[:20],
)
def test_the_id_of_a_message_that_cannot_be_read_is_used_when_it_is_fit_for_a_key(id: Any, found: str | None) -> None:
    assert task_id_of(message_of(element(headers={"id": id}))) == found


def test_bytes_that_are_no_message_have_no_id() -> None:
    assert task_id_of(Unreadable("celery", b"x", BadMessage("undecodable", "x"))) is None


# --- to be run or not ------------------------------------------------------------------------------------------


def test_a_task_that_is_known_is_run() -> None:
    assert admitted() is add


@pytest.mark.parametrize("deliveries", [1, 4, 5])
def test_a_message_may_be_delivered_as_often_as_is_allowed(deliveries: int) -> None:
    assert admitted(deliveries, settings=Settings(max_deliveries=5)) is add


def test_a_message_whose_workers_were_lost_too_often_is_dead() -> None:
    dead = admitted(6, settings=Settings(max_deliveries=5))
    assert isinstance(dead, Dead)
    assert dead.reason == "delivery_limit"
    assert "lost 5 times" in dead.detail
    assert isinstance(dead.error, WorkerLostError)


def test_a_message_that_outlives_its_burial_is_not_even_read() -> None:
    settings = Settings(max_deliveries=5)
    assert [killed_by_reading(delivery_of(number), settings) for number in (1, 5, 6)] == [None] * 3
    dead = killed_by_reading(delivery_of(7), settings)
    assert dead is not None
    assert dead.reason == "delivery_limit"
    assert "lost 6 times" in dead.detail


def lost_too_often(*losses: Loss) -> Dead:
    delivery = Delivery(message_of(element()), "receipt", 6, History(losses))
    request = understand(delivery, Serializer())
    assert isinstance(request, Request)
    dead = admit(delivery, request, APP.tasks, Settings(), NOW.timestamp())
    assert isinstance(dead, Dead)
    return dead


def test_the_last_holder_and_the_last_known_cause_are_told() -> None:
    dead = lost_too_often(Loss("one@host", 1.0, 2.0, "exit code 9"), Loss("two@host", 3.0, 4.0))
    assert dead.reason == "delivery_limit"
    assert dead.detail.endswith("the last time two@host (exit code 9)")
    assert str(dead.error) == dead.detail


def test_a_message_for_which_memory_ran_out_is_buried_for_that() -> None:
    killed = Loss("one@host", 1.0, 2.0, "signal 9 (SIGKILL)")
    starved = Loss("two@host", 3.0, 4.0, OUT_OF_MEMORY)
    assert lost_too_often(killed, starved).reason == "oom"
    assert lost_too_often(starved, killed).reason == "delivery_limit"
    assert lost_too_often(starved, Loss("three@host", 5.0, 6.0)).reason == "oom"
    assert lost_too_often(Loss("", None, 6.0)).detail.endswith("while it held the task")


@pytest.mark.parametrize(
    "expires", ["2030-01-02T03:04:05+00:00", "2030-01-02T03:04:04.999Z", "2020-01-01", "2030-01-02T04:04:05+01:00"]
)
def test_a_message_that_has_expired_is_revoked(expires: str) -> None:
    assert admitted(expires=expires) == Revoked("expired")


@pytest.mark.parametrize("expires", ["2030-01-02T03:04:05.001+00:00", "9999-12-31T23:59:59+00:00"])
def test_a_message_that_will_expire_is_run(expires: str) -> None:
    assert admitted(expires=expires) is add


@pytest.mark.parametrize(
    ("eta", "delay"),
    [("2030-01-02T03:04:06+00:00", 1), ("2030-01-02T03:04:05.5Z", 0.5), ("2030-01-03T03:04:05", 86400)],
)
def test_a_message_for_later_is_given_back_until_then(eta: str, delay: float) -> None:
    found = admitted(eta=eta)
    assert isinstance(found, GiveBack)
    assert found.delay == pytest.approx(delay)
    assert not found.last


def test_a_message_for_the_end_of_times_is_given_back() -> None:
    found = admitted(eta="9999-12-31T23:59:59+00:00")
    assert isinstance(found, GiveBack)
    assert found.delay > 86400 * 365 * 7000


@pytest.mark.parametrize("eta", ["2030-01-02T03:04:05+00:00", "2020-01-01T00:00:00", "0001-01-01T00:00:00+00:00"])
def test_a_message_whose_time_has_come_is_run(eta: str) -> None:
    assert admitted(eta=eta) is add


def test_a_message_that_expires_before_its_time_is_revoked_only_then() -> None:
    assert isinstance(admitted(eta="2030-01-02T04:00:00Z", expires="2030-01-02T03:30:00Z"), GiveBack)
    assert admitted(eta="2030-01-02T04:00:00Z", expires="2030-01-02T03:00:00Z") == Revoked("expired")


SIGNATURE: dict[str, Any] = {
    "task": "t",
    "args": [],
    "kwargs": {},
    "options": {},
    "subtask_type": None,
    "immutable": False,
}


@pytest.mark.parametrize(
    "embed", [{"callbacks": [SIGNATURE]}, {"errbacks": [SIGNATURE]}, {"chain": [SIGNATURE]}, {"chord": SIGNATURE}]
)
def test_what_this_version_cannot_carry_out_is_not_begun(embed: Any) -> None:
    dead = admitted(body=[[2, 3], {}, embed])
    assert isinstance(dead, Dead)
    assert dead.reason == "unsupported_canvas"


def test_empty_callbacks_are_none() -> None:
    assert admitted(body=[[2, 3], {}, {"callbacks": [], "chain": [], "errbacks": None, "chord": None}]) is add


# --- tasks that nobody here knows --------------------------------------------------------------------------------


def unknown(waited: float | None = None, grace: float = 3600) -> Outcome | Task[..., Any]:
    headers: dict[str, Any] = {} if waited is None else {UNKNOWN_SINCE: NOW.timestamp() - waited}
    return admitted(settings=Settings(unknown_grace=grace), task="nobody.knows", **headers)


def test_an_unknown_task_waits_for_a_worker_that_knows_it() -> None:
    assert unknown() == PutOff(5.0, {UNKNOWN_SINCE: NOW.timestamp()})


@pytest.mark.parametrize(
    ("waited", "delay"), [(1, 5), (5, 5), (20, 5), (60, 15), (200, 50), (1000, 60), (3560, 40), (3599, 1)]
)
def test_an_unknown_task_is_looked_at_less_and_less_often_but_at_the_end_of_its_grace(
    waited: float, delay: float
) -> None:
    found = unknown(waited)
    assert isinstance(found, PutOff)
    assert found.delay == pytest.approx(delay)
    assert found.headers == {UNKNOWN_SINCE: NOW.timestamp() - waited}


@pytest.mark.parametrize("waited", [3600, 3601, 10**6])
def test_a_task_that_stays_unknown_is_dead(waited: float) -> None:
    dead = unknown(waited)
    assert isinstance(dead, Dead)
    assert dead.reason == "unknown_task"
    assert "'nobody.knows'" in dead.detail
    assert isinstance(dead.error, NotRegistered)
    assert remote_error(dead.error).exc_message == ["nobody.knows"]


def test_without_any_grace_an_unknown_task_is_dead_at_once() -> None:
    assert isinstance(unknown(grace=0), Dead)


@pytest.mark.parametrize("since", ["yesterday", None, [], {}, float("nan"), 10**12, float("inf")], ids=str)
def test_a_mark_that_makes_no_sense_is_set_anew(since: Any) -> None:
    assert admitted(task="nobody.knows", **{UNKNOWN_SINCE: since}) == PutOff(5.0, {UNKNOWN_SINCE: NOW.timestamp()})


@pytest.mark.parametrize(
    "since", [True, float("-inf"), -(10**400)], ids=["true", "minus infinity", "a very small number"]
)
def test_a_mark_of_long_ago_ends_the_wait_or_is_set_anew(since: Any) -> None:
    assert isinstance(admitted(task="nobody.knows", **{UNKNOWN_SINCE: since}), Dead | PutOff)


def test_every_captured_message_is_admitted_or_has_an_outcome() -> None:
    for captured in task_messages():
        delivery = Delivery(message_of(captured.raw), "receipt")
        request = understand(delivery, Serializer(["json", "yaml", "msgpack", "pickle"]))
        if isinstance(request, Request):
            assert admit(delivery, request, APP.tasks, Settings(), NOW.timestamp()) is not None
        else:
            assert captured.name.startswith("auth")
