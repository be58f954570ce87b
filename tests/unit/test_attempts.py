"""The history of failed attempts: what is kept, how much of it, and that nobody's bytes can break it."""

from typing import Any

import pytest

from aqueue.attempts import ERRORS, SNOOZES, Attempt, attempts_of, remembered, snoozes_of
from aqueue.serialization import dumps_headers


def attempt(number: int, text: str = "boom") -> Attempt:
    return Attempt(number, 1_900_000_000.1234567, "worker@host", "ValueError", text)


def test_attempts_are_remembered_in_their_order() -> None:
    headers: dict[str, Any] = {}
    for number in (1, 2, 3):
        headers[ERRORS] = remembered(headers, attempt(number))
    assert [one.number for one in attempts_of(headers[ERRORS])] == [1, 2, 3]
    assert attempts_of(headers[ERRORS])[0] == Attempt(1, 1_900_000_000.123, "worker@host", "ValueError", "boom")


def test_only_the_last_ones_are_kept() -> None:
    headers: dict[str, Any] = {}
    for number in range(1, 1001):
        headers[ERRORS] = remembered(headers, attempt(number))
    assert [one.number for one in attempts_of(headers[ERRORS])] == list(range(991, 1001))


@pytest.mark.parametrize("text", ["x" * 100_000, "é" * 100_000, "\x00" * 100_000, "\ud800" * 1000, "😀" * 1000])
def test_the_header_stays_small(text: str) -> None:
    headers: dict[str, Any] = {}
    for number in range(1, 31):
        one = Attempt(number, 1.0, "w" * 10_000, "T" * 10_000, text)
        headers[ERRORS] = remembered(headers, one)
        assert len(dumps_headers({ERRORS: headers[ERRORS]})) <= 2048
    (*_, last) = attempts_of(headers[ERRORS])
    assert last.number == 30
    assert len(last.text) <= 200


@pytest.mark.parametrize(
    "told", [None, 1, "text", {}, [1], [{}], [{"number": "x"}], [["a"]], [{"number": 1, "time": 0, "worker": 1}]]
)
def test_what_is_no_history_is_none(told: Any) -> None:
    assert attempts_of(told) == ()
    assert [one["number"] for one in remembered({ERRORS: told}, attempt(4))] == [4]


@pytest.mark.parametrize(("told", "count"), [(None, 0), (3, 3), (-3, 0), ("3", 0), (True, 0), (2.5, 0)])
def test_snoozes_are_counted(told: Any, count: int) -> None:
    assert snoozes_of({SNOOZES: told}) == count
