"""Retry policies: when, how often, and for which errors."""

import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aqueue import ConfigurationError, Retry
from aqueue.errors import ControlFlow, RetryTask


def test_each_wait_is_twice_the_one_before() -> None:
    policy = Retry(backoff=1.5, jitter=False)
    assert [policy.delay(attempt) for attempt in range(1, 6)] == [1.5, 3, 6, 12, 24]


def test_no_wait_is_longer_than_the_longest() -> None:
    policy = Retry(backoff=100, max_backoff=250, jitter=False)
    assert [policy.delay(attempt) for attempt in (1, 2, 3, 60, 61, 62, 10_000, 10**9)] == [100, 200] + [250] * 6


def test_without_a_backoff_there_is_no_wait() -> None:
    assert Retry(backoff=0).delay(1) == Retry(backoff=0).delay(50) == 0


def test_jitter_takes_up_to_a_half_off() -> None:
    policy = Retry(backoff=10)
    waits = [policy.delay(1) for _ in range(300)]
    assert all(5 <= wait <= 10 for wait in waits)
    assert min(waits) < 6
    assert max(waits) > 9
    assert len(set(waits)) > 250


@given(
    attempt=st.integers(1, 10**6),
    backoff=st.floats(0, 1e9),
    longest=st.floats(0, 1e9),
    jitter=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_every_wait_is_between_nothing_and_the_longest(
    attempt: int, backoff: float, longest: float, jitter: bool
) -> None:
    assert 0 <= Retry(backoff=backoff, max_backoff=longest, jitter=jitter).delay(attempt) <= longest


def test_every_error_is_retried_unless_something_else_is_said() -> None:
    policy = Retry()
    assert policy.wants(ValueError())
    assert policy.wants(OSError())


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(), GeneratorExit(), BaseExceptionGroup("", [SystemExit()])]
)
def test_what_is_no_exception_is_not_retried_by_itself(error: BaseException) -> None:
    assert not Retry().wants(error)
    assert Retry(on=BaseException).wants(error)


def test_errors_are_chosen_by_type_types_or_a_function() -> None:
    assert Retry(on=OSError).wants(ConnectionError())
    assert not Retry(on=OSError).wants(ValueError())
    assert Retry(on=(OSError, KeyError)).wants(KeyError())
    assert not Retry(on=()).wants(ValueError())
    assert Retry(on=lambda error: "again" in str(error)).wants(ValueError("try again"))
    assert not Retry(on=lambda error: "again" in str(error)).wants(ValueError("no"))


def test_never_wins() -> None:
    policy = Retry(on=OSError, never=ConnectionError)
    assert policy.wants(FileNotFoundError())
    assert not policy.wants(ConnectionResetError())
    assert not Retry(never=lambda error: isinstance(error, ValueError)).wants(ValueError())


@pytest.mark.parametrize("attempts", [0, -1])
def test_a_task_is_run_at_least_once(attempts: int) -> None:
    with pytest.raises(ConfigurationError, match="attempts"):
        Retry(attempts=attempts)


@pytest.mark.parametrize("options", [{"backoff": -1}, {"max_backoff": -0.5}, {"backoff": -math.inf}])
def test_waits_are_not_negative(options: Any) -> None:
    with pytest.raises(ConfigurationError, match="backoff"):
        Retry(**options)


@pytest.mark.parametrize(
    "options", [{"backoff": math.nan}, {"max_backoff": math.nan}, {"backoff": math.inf, "max_backoff": math.inf}]
)
def test_waits_are_numbers_that_a_clock_can_say(options: Any) -> None:
    with pytest.raises(ConfigurationError, match="backoff"):
        Retry(**options)


def test_a_task_asks_to_be_run_again_by_raising() -> None:
    error = ValueError("boom")
    asked = Retry.now(after=30, error=error)
    assert isinstance(asked, RetryTask)
    assert (asked.after, asked.error, asked.attempts) == (30, error, None)
    assert Retry.now().after is None
    assert isinstance(asked, ControlFlow)
    assert not isinstance(asked, Exception), "so that `except Exception` in a task does not swallow it"


def test_celery_retries_three_times_and_a_task_without_a_policy_is_not_retried() -> None:
    assert Retry.default.attempts == 4
    assert Retry.none.attempts == 1


def test_policies_are_values() -> None:
    assert Retry(attempts=5) == Retry(attempts=5)
    assert hash(Retry(attempts=5)) == hash(Retry(attempts=5))
    with pytest.raises(AttributeError):
        Retry().attempts = 5  # type: ignore[misc]
