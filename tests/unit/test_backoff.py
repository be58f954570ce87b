"""The pause before the next try."""

import pytest

from aqueue.backoff import pause


@pytest.mark.parametrize(("failures", "whole"), [(1, 0.1), (2, 0.2), (5, 1.6), (6, 2.0), (20, 2.0)])
def test_pauses_double_up_to_the_longest_and_are_shortened_at_random(failures: int, whole: float) -> None:
    pauses = [pause(failures) for _ in range(200)]
    assert all(whole / 2 <= one <= whole for one in pauses)
    assert len(set(pauses)) > 100


@pytest.mark.parametrize("failures", [1_023, 1_024, 5_000, 10**9])
def test_an_outage_of_hours_ends_no_loop(failures: int) -> None:
    assert 1.0 <= pause(failures) <= 2.0
