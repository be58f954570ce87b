"""Two seeds of random faults on each broker, and one run without: all of it with real processes and servers."""

import pytest

from tests.chaos.conftest import MakeRun, passed
from tests.chaos.plan import make_plan

#: Seconds of load; a run takes about twice as long.
SECONDS = 3.0


@pytest.mark.parametrize("seed", [1, 2])
def test_a_seed(make_run: MakeRun, kind: str, seed: int) -> None:
    judged = passed(make_run(make_plan(kind, seed, seconds=SECONDS)).go())
    assert judged.counts["faults"]


def test_without_faults_nothing_runs_twice(make_run: MakeRun, kind: str) -> None:
    judged = passed(make_run(make_plan(kind, 1, seconds=2.0, faults=False, lease=1.5)).go())
    assert judged.counts["dup_explained"] == judged.counts["dup_unexplained"] == judged.counts["overlap"] == 0
