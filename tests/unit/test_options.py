"""Options of a call: what makes no sense is refused by name, before anything is sent."""

import math
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any

import pytest

from aqueue import AQueue, InvalidArguments
from aqueue.options import Options, check, check_queue
from aqueue.protocol import KNOWN_HEADERS
from tests.unit.elements import error_of

NOW = datetime(2030, 1, 2, tzinfo=timezone.utc)


def refused(**options: Any) -> str:
    with pytest.raises(InvalidArguments) as caught:
        check(options)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 1000
    return str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"queue": "celery"},
        {"queue": "x" * 255},
        {"queue": "a.b-c_d:e/f"},
        {"priority": 0},
        {"priority": 9},
        {"countdown": 0},
        {"countdown": 0.5},
        {"countdown": 366 * 86400},
        {"eta": NOW},
        {"eta": NOW.replace(tzinfo=None)},
        {"expires": NOW},
        {"expires": 60},
        {"expires": -1},
        {"timeout": 1.5, "soft_timeout": 1},
        {"task_id": "a"},
        {"task_id": "x" * 255},
        {"headers": {"x-trace": [1]}},
        {"headers": {}},
        {"ignore_result": True, "serializer": "json", "compression": "gzip", "shadow": "s"},
        {"exchange": "media", "routing_key": "media.news"},
        {"argsrepr": "(***)", "kwargsrepr": ""},
    ],
    ids=str,
)
def test_options_that_make_sense_are_given_back(options: Any) -> None:
    assert check(options) is options


def test_an_unknown_option_is_named_beside_those_that_are_known() -> None:
    told = refused(count_down=5)
    assert "'count_down'" in told
    assert "countdown" in told


@pytest.mark.parametrize("priority", [-1, 10, 255, 1.0, "5", "high", True, None, [5]])
def test_a_priority_is_a_whole_number_from_0_to_9(priority: Any) -> None:
    told = refused(priority=priority)
    assert "priority" in told
    assert "0 to 9" in told


BAD_SECONDS = [
    -1,
    -0.001,
    math.nan,
    math.inf,
    -math.inf,
    1e308,
    10**30,
    10**400,
    True,
    False,
    "5",
    None,
    NOW,
    timedelta(1),
    1j,
]


@pytest.mark.parametrize("name", ["countdown", "timeout", "soft_timeout"])
@pytest.mark.parametrize("seconds", BAD_SECONDS, ids=lambda value: str(value)[:20])
def test_a_time_in_seconds_is_a_number_that_a_clock_can_say(name: str, seconds: Any) -> None:
    assert name in refused(**{name: seconds})


@pytest.mark.parametrize(
    "expires",
    [math.nan, math.inf, 1e308, -1e308, 10**400, True, "5", date(2030, 1, 2), timedelta(1)],
    ids=lambda value: str(value)[:20],
)
def test_an_expiry_is_a_time_or_seconds(expires: Any) -> None:
    assert "expires" in refused(expires=expires)


@pytest.mark.parametrize("eta", [5, 1.5, "2030-01-01", date(2030, 1, 2), timedelta(1), True], ids=str)
def test_an_eta_is_a_time(eta: Any) -> None:
    assert "eta" in refused(eta=eta)


def test_countdown_and_eta_exclude_each_other() -> None:
    assert "one of them" in refused(countdown=5, eta=NOW)


@pytest.mark.parametrize(
    "task_id", ["", "x" * 256, "a\nb", "\0", "\ud800", 5, b"a", True], ids=lambda value: repr(value)[:20]
)
def test_a_task_id_is_a_short_printable_text(task_id: Any) -> None:
    assert "task_id" in refused(task_id=task_id)


@pytest.mark.parametrize("header", sorted(KNOWN_HEADERS))
def test_headers_may_not_replace_those_of_the_message(header: str) -> None:
    assert header in refused(headers={header: "x", "mine": 1})


@pytest.mark.parametrize(
    "queue",
    [
        "", " ",
        "two words", "tab\tbed", "line\n", "a\x06\x163", "\0", "x" * 256, "x" * 10_000, "\ud800", 5, None, b"q", ["q"],
        "unacked", "unacked_index", "unacked_mutex", "_kombu.binding.celery", "aqueue:leases", "aqueue:",
    ],
    ids=lambda value: repr(value)[:20],
)  # fmt: skip
def test_a_name_that_no_queue_may_have_is_refused(queue: Any) -> None:
    with pytest.raises(InvalidArguments, match="queue"):
        check_queue(queue)
    assert "queue" in refused(queue=queue)


@pytest.mark.parametrize("queue", ["celery", "unacked_mail", "aqueue", "kombu", "имя", "a:b"])
def test_a_name_like_those_is_a_name(queue: str) -> None:
    assert check_queue(queue) == queue


@pytest.mark.parametrize("text", ["%s", "{}", "Decimal('1')"])
def test_a_refusal_shows_what_was_given_as_it_is(text: str) -> None:
    assert repr(text) in refused(countdown=text)
    assert "Decimal('5')" in refused(countdown=Decimal(5))


# --- everywhere that options are given ---------------------------------------------------------------------------


def app_with_a_task() -> tuple[AQueue, Any]:
    app = AQueue("shop", broker="memory://")

    @app.task(name="t", priority=3)
    def work() -> None: ...

    return app, work


def test_options_of_a_task_are_checked_when_it_is_declared() -> None:
    app = AQueue("shop", broker="memory://")
    with pytest.raises(InvalidArguments, match="priority"):
        app.task(priority=10)
    with pytest.raises(InvalidArguments, match="'speed'"):
        app.task(speed=10)  # type: ignore[call-overload]


def test_options_of_a_call_are_checked_when_they_are_given() -> None:
    _, work = app_with_a_task()
    with pytest.raises(InvalidArguments, match="countdown"):
        work.options(countdown=-1)


async def test_options_of_celerys_ways_to_send_are_checked_too() -> None:
    app, work = app_with_a_task()
    with pytest.raises(InvalidArguments, match="countdown"):
        await work.apply_async(countdown=-1)
    with pytest.raises(InvalidArguments, match="countdown"):
        await app.send_task("t", countdown=-1)


def test_options_of_a_call_lie_over_those_of_the_task() -> None:
    _, work = app_with_a_task()
    assert work.s().options == {"priority": 3}
    assert work.options(countdown=5).s().options == {"priority": 3, "countdown": 5}
    assert work.options(priority=9).s().options == {"priority": 9}
    assert work.s().options == {"priority": 3}


@pytest.mark.parametrize("name", sorted(Options.__annotations__))
def test_an_option_given_something_senseless_is_refused_by_its_name_or_taken_as_it_is(name: str) -> None:
    given: Any = {name: object()}
    error = error_of(InvalidArguments, lambda: check(given))
    assert error is None or name in str(error)
