"""Verdicts: what an error means, and what broker and result store are told of each outcome."""

import asyncio
import json
import math
from datetime import datetime, timezone
from typing import Any

import pytest

from aqueue import AQueue, Context, Ignore, InvalidArguments, Reject, Retry, Settings, Snooze, errors
from aqueue.admission import understand
from aqueue.broker import Ack, Bury, Delivery, Release
from aqueue.errors import (
    BadMessage,
    ConfigurationError,
    ControlFlow,
    EncodeError,
    MessageTooLarge,
    RetryTask,
    TimeLimitExceeded,
)
from aqueue.failures import GivenUp, MaxRetriesExceeded, NotRegistered, Rejected
from aqueue.outcome import Again, Dead, Done, Failed, GiveBack, Outcome, PutOff, Revoked, Skipped, Snoozed
from aqueue.protocol import Message, Record, Request, Unreadable
from aqueue.results import Documents, RemoteError, Result, StoreOptions
from aqueue.results.memory import MemoryResults
from aqueue.serialization import Limits, Serializer
from aqueue.task import Task
from aqueue.url import Url
from aqueue.verdicts import Clock, Verdicts, outcome_of
from tests.unit.elements import element, message_of, quickly, read
from tests.unit.vectors import instant, load

NOW = datetime(2030, 1, 2, 3, 4, 5, tzinfo=timezone.utc).timestamp()
APP = AQueue("shop", broker="memory://")


@APP.task(name="proj.tasks.add")
def add(x: int, y: int) -> int:
    return x + y


def task_with(retry: Retry | None = None, **options: Any) -> Task[..., Any]:
    app = AQueue("shop", broker="memory://")

    def work() -> None: ...

    made: Task[..., Any] = app.task(name="t", retry=retry, **options)(work)
    return made


def request_of(**headers: Any) -> Request:
    return read(element(headers=headers))


def verdicts(settings: Settings | None = None) -> Verdicts:
    settings = settings or Settings()
    store = MemoryResults.factory(Url("memory://"))(
        StoreOptions(serializer=settings.result_serializer, limits=settings.limits, accept=settings.accept_content)
    )
    return Verdicts(settings, store, "worker@host")


def of(
    outcome: Outcome,
    raw: bytes | None = None,
    *,
    settings: Settings | None = None,
    task: Task[..., Any] | None = add,
    serializer: Serializer | None = None,
) -> Any:
    """The verdict on an outcome of the task in an element."""
    delivery = Delivery(message_of(raw or element()), "receipt")
    request = understand(delivery, serializer or Serializer())
    assert isinstance(request, Request), request
    with quickly(1.0):
        return verdicts(settings).of(delivery, request, task, outcome, NOW)


def stored(record: Record | None, serializer: str = "json") -> Result:
    """What a record says, once it is read again."""
    assert record is not None
    return Documents(StoreOptions(serializer=serializer)).decode(record.key, record.value)


# --- what an error means -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError("boom"), OSError(), ExceptionGroup("all", [ValueError()])])
def test_without_a_policy_an_error_is_a_failure(error: Exception) -> None:
    assert outcome_of(error, request_of(), task_with()) == Failed(error)


def test_with_a_policy_an_error_is_another_attempt_while_one_is_left() -> None:
    task, error = task_with(Retry(attempts=3, backoff=2, jitter=False)), ValueError("boom")
    assert outcome_of(error, request_of(retries=0), task) == Again(2, error)
    assert outcome_of(error, request_of(retries=1), task) == Again(4, error)
    assert outcome_of(error, request_of(retries=2), task) == Failed(error)
    assert outcome_of(error, request_of(retries=99), task) == Failed(error)


def test_an_error_that_the_policy_does_not_want_is_a_failure() -> None:
    error = ValueError("boom")
    assert outcome_of(error, request_of(), task_with(Retry(attempts=3, on=OSError))) == Failed(error)


@pytest.mark.parametrize(
    "error",
    [
        asyncio.CancelledError(),
        SystemExit(1),
        KeyboardInterrupt(),
        GeneratorExit(),
        BaseExceptionGroup("all", [SystemExit()]),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_task_raises_is_a_failure_and_no_more(error: BaseException) -> None:
    assert outcome_of(error, request_of(), task_with()) == Failed(error)
    if not isinstance(error, Exception):
        assert outcome_of(error, request_of(), task_with(Retry(attempts=9))) == Failed(error)


def test_arguments_that_do_not_fit_are_not_tried_again() -> None:
    error = InvalidArguments("no")
    assert outcome_of(error, request_of(), task_with(Retry(attempts=9))) == Failed(error)


def test_running_out_of_time_is_an_error_like_another() -> None:
    error = TimeLimitExceeded(5)
    assert outcome_of(error, request_of(), task_with(Retry(attempts=2, backoff=0))) == Again(0, error)
    assert outcome_of(error, request_of(), task_with()) == Failed(error)


def test_a_task_may_ask_for_no_result() -> None:
    assert outcome_of(Ignore(), request_of(), task_with()) == Skipped()


def test_a_task_may_refuse_its_message() -> None:
    assert outcome_of(Reject(requeue=True), request_of(), task_with()) == GiveBack(last=True)
    dead = outcome_of(Reject("not mine"), request_of(), task_with())
    assert isinstance(dead, Dead)
    assert (dead.reason, dead.detail) == ("rejected", "not mine")
    assert isinstance(dead.error, Rejected)


def test_a_task_may_give_itself_up_whatever_its_policy() -> None:
    dead = outcome_of(errors.Dead("no use"), request_of(), task_with(Retry(attempts=9, on=BaseException)))
    assert isinstance(dead, Dead)
    assert (dead.reason, dead.detail) == ("dead_by_task", "no use")
    assert isinstance(dead.error, GivenUp)


def test_a_task_may_say_that_it_is_too_early() -> None:
    assert outcome_of(Snooze(7), request_of(retries=99), task_with(Retry(attempts=1))) == Snoozed(7)


class Steering(ControlFlow):
    """One that nobody knows."""


def test_a_steering_error_that_nobody_knows_is_a_failure() -> None:
    error = Steering()
    assert outcome_of(error, request_of(), task_with(Retry(attempts=9, on=BaseException))) == Failed(error)


def test_a_task_may_ask_to_be_run_again_after_its_own_time() -> None:
    error = ValueError("busy")
    assert outcome_of(Retry.now(after=30, error=error), request_of(), task_with()) == Again(30, error)
    assert outcome_of(Retry.now(after=0), request_of(), task_with()) == Again(0, None)


def test_a_task_that_names_no_time_is_run_again_after_its_policys() -> None:
    task = task_with(Retry(attempts=9, backoff=3, jitter=False))
    assert outcome_of(Retry.now(), request_of(retries=1), task) == Again(6, None)


def test_without_a_policy_a_task_may_ask_three_times_as_under_celery() -> None:
    for retries in (0, 1, 2):
        assert isinstance(outcome_of(Retry.now(after=1), request_of(retries=retries), task_with()), Again)
    failed = outcome_of(Retry.now(after=1), request_of(retries=3), task_with())
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, MaxRetriesExceeded)
    assert "proj.tasks.add[1] was retried 3 times" in str(failed.error)


def test_a_task_that_asks_too_often_fails_with_the_error_it_gave() -> None:
    error = ValueError("busy")
    assert outcome_of(Retry.now(error=error), request_of(retries=2), task_with(Retry(attempts=3))) == Failed(error)


def test_a_request_for_more_attempts_wins_over_the_policy() -> None:
    asked = RetryTask(1, None, attempts=10)
    assert isinstance(outcome_of(asked, request_of(retries=8), task_with(Retry(attempts=2))), Again)
    assert isinstance(outcome_of(asked, request_of(retries=9), task_with(Retry(attempts=99))), Failed)


def test_a_policy_does_not_decide_on_a_request_by_its_error() -> None:
    task = task_with(Retry(attempts=3, on=OSError))
    assert isinstance(outcome_of(Retry.now(after=1, error=ValueError()), request_of(), task), Again)


# --- verdicts ------------------------------------------------------------------------------------------------


def test_a_value_is_acknowledged_and_stored() -> None:
    verdict = of(Done(5))
    assert isinstance(verdict, Ack)
    assert not verdict.publish
    result = stored(verdict.record)
    assert (result.task_id, result.state, result.value, result.traceback) == ("1", "SUCCESS", 5, None)
    done = instant(result.date_done)
    assert done is not None
    assert abs((done - datetime.now(timezone.utc)).total_seconds()) < 60


def test_a_failure_is_acknowledged_and_stored_with_its_traceback() -> None:
    try:
        raise ValueError("boom")
    except ValueError as error:
        verdict = of(Failed(error))
    assert isinstance(verdict, Ack)
    result = stored(verdict.record)
    assert (result.state, result.value) == ("FAILURE", RemoteError("ValueError", ["boom"], "builtins"))
    assert result.traceback is not None
    assert result.traceback.endswith("ValueError: boom\n")
    assert result.date_done is not None


def test_a_failure_that_was_never_raised_has_no_traceback() -> None:
    assert stored(of(Failed(TimeLimitExceeded(5))).record).traceback is None


def test_another_attempt_leaves_with_the_acknowledgement() -> None:
    verdict = of(Again(30, ValueError("busy")), element(headers={"retries": 1}))
    assert isinstance(verdict, Ack)
    (again,) = verdict.publish
    assert (again.headers["retries"], again.delay) == (2, 30)
    assert instant(again.headers["eta"]) == datetime.fromtimestamp(NOW + 30, timezone.utc)
    result = stored(verdict.record)
    assert (result.state, result.value) == ("RETRY", RemoteError("ValueError", ["busy"], "builtins"))
    assert result.date_done is None


def test_another_attempt_without_an_error_stores_none() -> None:
    result = stored(of(Again(0)).record)
    assert (result.state, result.value, result.traceback) == ("RETRY", None, None)


@pytest.mark.parametrize(
    ("outcome", "verdict"),
    [
        (GiveBack(), Release()),
        (GiveBack(delay=5), Release(delay=5)),
        (GiveBack(last=True), Release(last=True)),
        (Skipped(), Ack()),
    ],
    ids=str,
)
def test_some_outcomes_store_nothing(outcome: Outcome, verdict: Any) -> None:
    assert of(outcome) == verdict


def test_what_is_put_off_is_sent_again_as_it_came_with_a_mark() -> None:
    raw = element(headers={"x": 1, "retries": 1})
    verdict = of(PutOff(60, {"mark": 5}), raw)
    assert isinstance(verdict, Ack)
    assert verdict.record is None
    (again,) = verdict.publish
    before = message_of(raw)
    assert (again.headers, again.delay) == ({**before.headers, "mark": 5}, 60)
    assert (again.body, again.queue, again.priority) == (before.body, before.queue, before.priority)


def test_what_was_revoked_is_told_as_a_celery_worker_tells_it() -> None:
    (entry,) = load("redis_result_expired")["keys"].values()
    expected = json.loads(entry["value"])
    verdict = of(Revoked("expired"))
    assert isinstance(verdict, Ack)
    assert verdict.record is not None
    ours = json.loads(verdict.record.value)
    assert (ours["status"], ours["result"], ours["traceback"]) == ("REVOKED", expected["result"], None)
    assert ours["date_done"] is not None


def test_what_is_dead_is_buried_with_its_reason() -> None:
    verdict = of(Dead("unknown_task", "nobody knew it", NotRegistered("t")))
    assert isinstance(verdict, Bury)
    assert (verdict.reason, verdict.detail) == ("unknown_task", "nobody knew it")
    result = stored(verdict.record)
    assert (result.state, result.value) == ("FAILURE", RemoteError("NotRegistered", ["t"], "celery.exceptions"))


def test_what_is_dead_without_an_error_leaves_no_result() -> None:
    assert of(Dead("undecodable", "not readable")) == Bury("undecodable", "not readable")


def test_a_message_that_could_not_be_read_leaves_a_failure_under_its_id() -> None:
    delivery = Delivery(message_of(element(headers={"eta": "soon", "id": "claimed"})), "receipt")
    verdict = verdicts().of(delivery, None, None, Dead("bad_eta", "soon", BadMessage("bad_eta", "soon")), NOW)
    assert isinstance(verdict, Bury)
    assert verdict.record is not None
    assert verdict.record.key == "claimed"


@pytest.mark.parametrize("id", ["a\nb", 5, None])
def test_a_message_without_a_fit_id_leaves_no_result(id: Any) -> None:
    delivery = Delivery(message_of(element(headers={"id": id})), "receipt")
    verdict = verdicts().of(delivery, None, None, Dead("bad_id", "x", BadMessage("bad_id", "x")), NOW)
    assert isinstance(verdict, Bury)
    assert verdict.record is None


def test_bytes_that_are_no_message_are_buried_without_a_result() -> None:
    unreadable = Unreadable("celery", b"x", BadMessage("undecodable", "x"))
    verdict = verdicts().of(Delivery(unreadable, "receipt"), None, None, Dead("undecodable", "x"), NOW)
    assert verdict == Bury("undecodable", "x")


# --- who wants to know ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "task", "app", "kept"),
    [
        (None, None, False, True),
        (None, None, True, False),
        (None, True, False, False),
        (None, False, True, True),
        (True, False, False, False),
        (False, True, True, True),
    ],
)
def test_the_message_decides_whether_a_result_is_kept_then_the_task_then_the_app(
    message: bool | None, task: bool | None, app: bool, kept: bool
) -> None:
    work = task_with() if task is None else task_with(ignore_result=task)
    settings = Settings(ignore_result=app)
    raw = element(headers={"ignore_result": message})
    for outcome in (Done(5), Failed(ValueError()), Again(0, ValueError()), Revoked("expired")):
        assert (of(outcome, raw, settings=settings, task=work).record is not None) is kept


def test_for_a_task_that_nobody_knows_the_app_decides() -> None:
    assert of(Revoked("expired"), task=None).record is not None
    assert of(Revoked("expired"), task=None, settings=Settings(ignore_result=True)).record is None


# --- what is stored beside ------------------------------------------------------------------------------------


def test_group_and_parent_are_stored_with_a_result() -> None:
    raw = element(headers={"group": "g", "parent_id": "p"})
    assert stored(of(Done(5), raw).record).extra == {"group_id": "g", "parent_id": "p"}
    assert stored(of(Done(5)).record).extra == {}


def test_an_extended_result_has_the_keys_of_celerys() -> None:
    step = load("redis_result_extended")["steps"][0]
    (entry,) = step["backend_keys"].values()
    theirs = json.loads(entry["value"])
    verdict = of(Done(5), element([[2], {"y": 3}, {}]), settings=Settings(result_extended=True))
    assert verdict.record is not None
    ours = json.loads(verdict.record.value)
    assert list(ours) == list(theirs)
    for name in ("status", "result", "traceback", "children", "name", "args", "kwargs", "worker", "retries", "queue"):
        assert ours[name] == theirs[name], name


def test_a_task_that_begins_is_recorded_with_its_worker() -> None:
    result = stored(verdicts().started(request_of()))
    assert (result.task_id, result.state) == ("1", "STARTED")
    assert result.value["hostname"] == "worker@host"
    assert set(result.value) == {"pid", "hostname"}


def test_a_task_may_tell_a_state_of_its_own() -> None:
    result = stored(verdicts().own_state(request_of(), "PROGRESS", {"done": 1}))
    assert (result.state, result.value, result.date_done) == ("PROGRESS", {"done": 1}, None)
    with pytest.raises(EncodeError):
        verdicts().own_state(request_of(), "PROGRESS", object())
    with pytest.raises(MessageTooLarge):
        verdicts(Settings(limits=Limits(message=1000))).own_state(request_of(), "PROGRESS", "x" * 2000)


# --- what can't be stored: the work is done all the same --------------------------------------------------------


async def never_awaited() -> None: ...


def unstorable() -> dict[str, Any]:
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    return {
        "an object": object(),
        "a generator": (number for number in (1, 2)),
        "an ellipsis": ...,
        "a lambda": lambda: None,
        "not a number": float("nan"),
        "a number of 5,000 digits": 10**5000,
        "such a number in a list": [10**5000],
        "a cycle": cyclic,
        "too long": "x" * 2_000_000,
        "too long a list": ["x" * 2_000_000],
    }


@pytest.mark.parametrize("what", unstorable())
def test_a_value_that_cannot_be_stored_is_a_failure_that_says_so_and_is_not_run_again(
    what: str, caplog: pytest.LogCaptureFixture
) -> None:
    verdict = of(Done(unstorable()[what]), task=task_with(Retry(attempts=9)))
    assert isinstance(verdict, Ack)
    assert not verdict.publish
    result = stored(verdict.record)
    assert result.state == "FAILURE"
    assert result.value.exc_type in ("EncodeError", "MessageTooLarge")
    assert "proj.tasks.add[1] ended well, but its result can't be stored" in caplog.text


def test_a_coroutine_that_a_task_returns_is_a_failure_that_says_so() -> None:
    forgotten = never_awaited()
    try:
        result = stored(of(Done(forgotten)).record)
    finally:
        forgotten.close()
    assert "coroutine" in result.value.text


def test_a_value_that_nobody_wants_is_not_even_looked_at() -> None:
    verdict = of(Done(object()), element(headers={"ignore_result": True}))
    assert verdict == Ack()


HARD_TO_STORE: dict[str, BaseException] = {
    "not a number": ValueError(float("nan")),
    "infinity": ValueError(float("inf")),
    "a number of 5,000 digits": ValueError(10**5000),
    "half a surrogate pair": ValueError("\ud800"),
    "a long text": ValueError("x" * 5_000_000),
    "many long texts": ValueError(*["x" * 50_000] * 50),
    "an object": ValueError(object()),
}


@pytest.mark.parametrize("what", HARD_TO_STORE)
@pytest.mark.parametrize(
    "make",
    [Failed, lambda error: Again(1, error), lambda error: Dead("rejected", "no", error)],
    ids=["failed", "again", "dead"],
)
def test_an_error_that_is_hard_to_store_is_told_as_well_as_it_can_be(what: str, make: Any) -> None:
    result = stored(of(make(HARD_TO_STORE[what])).record)
    assert result.state in ("FAILURE", "RETRY")
    assert result.value.exc_type == "ValueError"


EXTENDED = Settings(result_extended=True)


@pytest.mark.parametrize(
    "outcome",
    [
        Done(5),
        Failed(ValueError("boom")),
        Again(1, ValueError("boom")),
        Revoked("expired"),
        Dead("rejected", "no", Rejected("no")),
    ],
    ids=str,
)
@pytest.mark.parametrize("body", [b"[[NaN, 3], {}, {}]", b'[[], {"k": Infinity}, {}]'], ids=repr)
def test_arguments_that_cannot_be_stored_do_not_stop_the_verdict(outcome: Outcome, body: bytes) -> None:
    """Celery's senders write NaN into JSON, and we read it; a result that repeats the arguments must cope."""
    assert of(outcome, element(body), settings=EXTENDED).record is not None


@pytest.mark.parametrize(
    "outcome", [Done(5), Failed(ValueError("boom")), Again(1, ValueError("boom")), Revoked("expired")], ids=str
)
def test_arguments_too_long_to_be_stored_do_not_stop_the_verdict(outcome: Outcome) -> None:
    settings = Settings(result_extended=True, limits=Limits(message=1000))
    raw = element([["x" * 900], {}, {}])
    assert of(outcome, raw, settings=settings).record is not None


def test_arguments_of_another_format_do_not_stop_the_verdict() -> None:
    raw = element(b"- [!!set {a, b}]\n- {}\n- {}", content_type="application/x-yaml")
    assert of(Done(5), raw, settings=EXTENDED, serializer=Serializer(["yaml"])).record is not None


@pytest.mark.parametrize("after", [0, -1, math.nan, math.inf, 1e12, 1e300], ids=str)
def test_a_request_for_any_time_is_refused_where_it_is_made_or_carried_out(after: float) -> None:
    try:
        asked = Retry.now(after=after)
    except (ConfigurationError, InvalidArguments, ValueError):
        return
    verdict = of(outcome_of(asked, request_of(), task_with()))
    assert isinstance(verdict, Ack)


def test_a_policy_that_waits_longer_than_a_clock_can_say_is_refused_or_carried_out() -> None:
    try:
        policy = Retry(attempts=99, backoff=1e300, max_backoff=1e300)
    except ConfigurationError:
        return
    assert isinstance(of(outcome_of(ValueError(), request_of(), task_with(policy))), Ack)


# --- the time ------------------------------------------------------------------------------------------------------


def test_the_time_of_an_end_is_written_as_celery_writes_it() -> None:
    clock = Clock()
    first = clock()
    assert len(first) == len("2026-11-22T08:58:24.959481+00:00")
    parsed = datetime.fromisoformat(first)
    assert parsed.utcoffset() is not None
    assert abs((datetime.now(timezone.utc) - parsed).total_seconds()) < 5


def test_the_clock_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now = NOW
    monkeypatch.setattr("aqueue.verdicts.time.time", lambda: now)
    clock = Clock()
    assert clock() == "2030-01-02T03:04:05.000000+00:00"
    now += 0.0004
    assert clock() == "2030-01-02T03:04:05.000000+00:00", "within a millisecond the text is kept"
    now += 5
    assert clock() == "2030-01-02T03:04:10.000400+00:00"
    now -= 3600
    assert clock() == "2030-01-02T02:04:10.000400+00:00", "a clock that was set back is followed"


def test_a_running_task_knows_what_its_message_says() -> None:
    context = Context(request_of(retries=2, **{"x-trace": "abc"}), deliveries=3)
    assert (context.id, context.task, context.attempt, context.headers) == (
        "1",
        "proj.tasks.add",
        3,
        {"x-trace": "abc"},
    )
    assert isinstance(context.request.message, Message)


# --- attempts ------------------------------------------------------------------------------------------------


def test_a_snooze_sends_the_same_attempt_again_and_stores_nothing() -> None:
    verdict = of(Snoozed(60), element(headers={"retries": 2, "own": 1}))
    assert isinstance(verdict, Ack)
    assert verdict.record is None
    (again,) = verdict.publish
    assert (again.headers["retries"], again.headers["aqueue_snoozes"], again.headers["own"]) == (2, 1, 1)
    assert again.headers["eta"] == "2030-01-02T03:05:05+00:00"
    assert again.delay == 60
    (later,) = of(Snoozed(0), element(headers={"aqueue_snoozes": 99})).publish
    assert (later.headers["aqueue_snoozes"], later.headers["eta"], later.delay) == (100, None, 0)


@pytest.mark.parametrize(("before", "warned"), [(98, False), (99, True), (100, False), (199, False), (999, True)])
def test_a_task_does_not_snooze_for_ever_unnoticed(before: int, warned: bool, caplog: pytest.LogCaptureFixture) -> None:
    of(Snoozed(1), element(headers={"aqueue_snoozes": before}))
    assert ("has put itself off" in caplog.text) is warned


def test_a_retry_remembers_the_error_in_message_and_result() -> None:
    first = of(Again(0, ValueError("one")), element(headers={"retries": 0}))
    (message,) = first.publish
    assert [(error["number"], error["type"], error["text"]) for error in message.headers["aqueue_errors"]] == [
        (1, "ValueError", "one")
    ]
    assert message.headers["aqueue_errors"][0]["worker"] == "worker@host"
    told = message.headers["aqueue_errors"]
    last = of(Failed(LookupError("two")), element(headers={"retries": 1, "aqueue_errors": told}))
    assert [(one.number, one.type, one.text) for one in stored(last.record).attempts] == [
        (1, "ValueError", "one"),
        (2, "LookupError", "two"),
    ]
    good = of(Done(1), element(headers={"retries": 1, "aqueue_errors": told}))
    assert [one.number for one in stored(good.record).attempts] == [1]


def test_what_ends_with_its_first_attempt_has_no_history() -> None:
    for outcome in (Done(1), Failed(ValueError("x")), Revoked("cancelled")):
        assert "attempts" not in stored(of(outcome).record).extra


@pytest.mark.parametrize("told", ["text", 7, [1], [{"number": "x"}], {}])
def test_a_history_of_somebody_elses_is_no_obstacle(told: Any) -> None:
    raw = element(headers={"aqueue_errors": told})
    assert "attempts" not in stored(of(Done(1), raw).record).extra
    (again,) = of(Again(0, ValueError("x")), raw).publish
    assert [error["text"] for error in again.headers["aqueue_errors"]] == ["x"]
