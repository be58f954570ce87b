"""Two seeds of random faults on each broker, and one run without: all of it with real processes and servers."""

import pytest

from tests.chaos.conftest import MakeRun, passed
from tests.chaos.plan import Plan, Step, make_plan

#: Seconds of load; a run takes about twice as long.
SECONDS = 3.0


@pytest.mark.parametrize("seed", [1, 2])
def test_a_seed(make_run: MakeRun, kind: str, seed: int) -> None:
    judged = passed(make_run(make_plan(kind, seed, seconds=SECONDS)).go())
    assert judged.counts["faults"]


@pytest.mark.parametrize("kind", ["redis"], indirect=True)
def test_a_seed_with_supervisors(make_run: MakeRun, kind: str) -> None:
    """What people start: a worker that stands still keeps its messages, as its supervisor renews their leases."""
    plan = Plan(
        broker=kind,
        seed=1,
        seconds=SECONDS,
        workers=2,
        supervised=True,
        steps=[Step(1.0, "stop", "w0", 2.5), Step(1.5, "kill9", "w1"), Step(2.5, "reset", "workers")],
    )
    judged = passed(make_run(plan).go())
    assert set(judged.causes) <= {"killed"}


def test_without_faults_nothing_runs_twice(make_run: MakeRun, kind: str) -> None:
    judged = passed(make_run(make_plan(kind, 1, seconds=2.0, faults=False, lease=1.5)).go())
    assert judged.counts["dup_explained"] == judged.counts["dup_unexplained"] == judged.counts["overlap"] == 0
