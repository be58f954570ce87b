"""Failures as text: told as Celery tells them, short enough to be stored, and never failing themselves."""

import asyncio
import json
import traceback
from typing import Any

import pytest

from aqueue.errors import SoftTimeLimitExceeded, TimeLimitExceeded, WorkerLostError
from aqueue.failures import NotRegistered, Rejected, remote_error, traceback_text
from aqueue.results import FAILURE, Documents, RemoteError, Result, StoreOptions
from aqueue.retry import Retry
from tests.unit.elements import error_of, quickly
from tests.unit.vectors import load


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """The error, once it has been raised and caught."""
    try:
        if cause is None:
            raise error
        raise error from cause
    except BaseException as caught:
        return caught


def captured(name: str) -> dict[str, Any]:
    (entry,) = load(f"redis_result_{name}")["keys"].values()
    found: dict[str, Any] = json.loads(entry["value"])["result"]
    return found


def storable(error: RemoteError) -> bytes:
    return Documents(StoreOptions()).encode(Result(task_id="1", state=FAILURE, value=error))


def from_further_down(error: BaseException | None, frames: int) -> BaseException:
    """An error as if it had been caught so many frames further down."""
    assert error is not None
    trace = error.__traceback__
    for _ in range(frames):
        assert trace is not None
        trace = trace.tb_next
    return error.with_traceback(trace)


class Outer:
    class Inner(Exception):
        pass


# --- name, arguments, module -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("failure", ValueError("boom")),
        ("hard_timeout", TimeLimitExceeded(1)),
        ("unregistered", NotRegistered("no.such.task")),
    ],
)
def test_an_error_is_told_as_a_celery_worker_tells_it(name: str, error: Exception) -> None:
    told, expected = remote_error(error), captured(name)
    assert (told.exc_type, told.exc_message, told.exc_module) == (
        expected["exc_type"],
        expected["exc_message"],
        expected["exc_module"],
    )


@pytest.mark.parametrize(
    ("name", "error"),
    [("soft_timeout", SoftTimeLimitExceeded(1)), ("reject", Rejected("reason", False))],
)
def test_our_own_errors_have_the_names_that_celery_clients_know(name: str, error: Exception) -> None:
    told, expected = remote_error(error), captured(name)
    assert (told.exc_type, told.exc_module) == (expected["exc_type"], expected["exc_module"])


def test_a_lost_worker_has_the_name_that_celery_clients_know() -> None:
    assert remote_error(WorkerLostError("lost")) == RemoteError("WorkerLostError", ["lost"], "billiard.exceptions")


def test_a_class_inside_another_is_named_with_it() -> None:
    assert remote_error(Outer.Inner(1)) == RemoteError("Outer.Inner", [1], __name__)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ((), []),
        (("a", 1, None, True, 1.5), ["a", 1, None, True, 1.5]),
        ((["a"], {"k": 1}), [["a"], {"k": 1}]),
        (({"a"},), ["{'a'}"]),
        ((ValueError("in"),), ["ValueError('in')"]),
        ((b"x",), [b"x"]),
        ((Outer,), [repr(Outer)]),
    ],
    ids=str,
)
def test_arguments_are_kept_when_json_has_them_and_shown_otherwise(arguments: tuple[Any, ...], told: list[Any]) -> None:
    assert remote_error(Exception(*arguments)).exc_message == told


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), 10**5000, "\ud800", "\0"], ids=lambda value: str(type(value))
)
def test_every_argument_can_be_stored(value: Any) -> None:
    storable(remote_error(ValueError(value)))


class RaisingText(str):
    __slots__ = ()

    def __repr__(self) -> str:
        raise RuntimeError("no text")


class RaisingStr(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class RaisingArgs(Exception):
    @property
    def args(self) -> Any:  # type: ignore[override]
        raise RuntimeError("no arguments")


class OddArgs(Exception):
    args = None  # type: ignore[assignment]


class RaisingArgument:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


BAD = [
    RaisingStr("x"),
    RaisingArgs(),
    OddArgs(),
    Exception(RaisingArgument()),
    Exception(RaisingText("x")),
    RaisingStr(RaisingStr()),
]


@pytest.mark.parametrize("error", BAD, ids=lambda error: type(error).__name__)
def test_an_error_that_cannot_be_looked_at_is_told_all_the_same(error: Exception) -> None:
    told = remote_error(raised(error))
    assert told.exc_type == type(error).__qualname__
    storable(told)
    assert type(error).__qualname__ in traceback_text(raised(error))


def test_a_long_argument_is_cut() -> None:
    assert len(storable(remote_error(ValueError("x" * 10_000_000)))) < 100_000
    assert len(storable(remote_error(ValueError(["x" * 10_000_000])))) < 100_000


def test_very_many_arguments_are_cut() -> None:
    with quickly():
        storable(remote_error(ValueError(*["x" * 1_000] * 10_000)))


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        SystemExit(1),
        GeneratorExit(),
        asyncio.CancelledError(),
        BaseExceptionGroup("all", [ValueError("in")]),
    ],
)
def test_errors_that_are_no_exceptions_are_told_too(error: BaseException) -> None:
    told = remote_error(raised(error))
    assert told.exc_type == type(error).__qualname__
    assert type(error).__qualname__ in traceback_text(raised(error))
    storable(told)


# --- tracebacks --------------------------------------------------------------------------------------------------


def test_a_traceback_says_where_and_what() -> None:
    text = traceback_text(raised(ValueError("boom")))
    assert text.startswith("Traceback (most recent call last):\n")
    assert "in raised\n    raise error\n" in text
    assert text.endswith("ValueError: boom\n")


def test_our_own_frames_at_the_start_are_left_out() -> None:
    def boom(error: BaseException) -> bool:
        raise KeyError("boom")

    own_first = from_further_down(error_of(KeyError, lambda: Retry(on=boom).wants(ValueError())), 2)
    assert "aqueue/retry.py" in "".join(traceback.format_exception(own_first))
    text = traceback_text(own_first)
    assert "retry.py" not in text
    assert "in boom" in text


def test_our_own_frames_further_down_are_shown() -> None:
    def boom(error: BaseException) -> bool:
        raise KeyError("boom")

    error = error_of(KeyError, lambda: Retry(on=boom).wants(ValueError()))
    assert error is not None
    assert "retry.py" in traceback_text(error)


def test_an_error_of_our_own_alone_keeps_its_last_frame() -> None:
    own = from_further_down(error_of(ValueError, lambda: Retry(attempts=0)), 2)
    assert "retry.py" in traceback_text(own)


def test_an_error_that_was_never_raised_has_a_text() -> None:
    assert traceback_text(ValueError("boom")) == "ValueError: boom\n"


def test_causes_are_shown() -> None:
    text = traceback_text(raised(ValueError("after"), cause=KeyError("before")))
    assert text.index("KeyError: 'before'") < text.index("direct cause") < text.index("ValueError: after")


def test_a_group_shows_its_members() -> None:
    text = traceback_text(raised(ExceptionGroup("all", [ValueError("one"), KeyError("two")])))
    assert "ValueError: one" in text
    assert "KeyError: 'two'" in text


def test_a_deep_recursion_is_cut_in_the_middle() -> None:
    def down(depth: int) -> None:
        if depth == 0:
            raise ValueError("bottom")
        further_down(depth - 1)

    def further_down(depth: int) -> None:  # two in turn, or Python itself would leave out equal lines
        down(depth)

    try:
        down(400)
    except ValueError as error:
        with quickly():
            text = traceback_text(error)
    assert "ValueError: bottom" in text
    assert 90 <= text.count("File ") <= 110
    assert "in test_a_deep_recursion_is_cut_in_the_middle" in text


def test_ten_thousand_errors_in_a_row_are_told_in_time() -> None:
    error: BaseException = ValueError("first")
    for number in range(10_000):
        following = ValueError(number)
        following.__context__ = error
        error = following
    with quickly(1.0):
        text = traceback_text(error)
        storable(remote_error(error))
    assert len(text) < 51_000
    assert text.rstrip().endswith("ValueError: 9999")


def test_errors_in_a_circle_are_told() -> None:
    one, other = ValueError("one"), ValueError("other")
    one.__context__, other.__context__ = other, one
    assert "ValueError: one" in traceback_text(one)


def test_groups_in_groups_without_end_are_told() -> None:
    error: Exception = ValueError("innermost")
    for _ in range(500):
        error = ExceptionGroup("one more", [error])
    with quickly():
        assert len(traceback_text(error)) < 51_000


def test_a_text_of_many_megabytes_is_cut_in_the_middle() -> None:
    with quickly():
        text = traceback_text(raised(ValueError("x" * 20_000_000 + "the end")))
    assert 45_000 < len(text) < 51_000
    assert text.startswith("Traceback")
    assert text.endswith("the end\n")
    assert "characters left out" in text


def test_half_a_surrogate_pair_in_a_traceback_can_be_stored() -> None:
    error = raised(ValueError("\ud800"))
    Documents(StoreOptions()).encode(
        Result(task_id="1", state=FAILURE, value=remote_error(error), traceback=traceback_text(error))
    )
