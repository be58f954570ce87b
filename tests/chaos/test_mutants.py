"""The checker is proved: with each planted bug its verdict is red, by the check that is meant to find it.

On Redis, whose scripts can be planted with any of them; what the coats do is the same on every broker.
"""

from pathlib import Path
from typing import Any

import pytest

from aqueue import broker as brokers
from aqueue.broker import Ack, BrokerOptions
from aqueue.broker.redis.scripts import SETTLE
from aqueue.drivers.redis_link import RedisLink
from aqueue.protocol import Message
from aqueue.url import Url
from tests.chaos.cancelling import cancelling
from tests.chaos.checker import Verdict, hygiene, verdict
from tests.chaos.conftest import MakeRun
from tests.chaos.failpoints import Failpoints
from tests.chaos.ground import Ground
from tests.chaos.history import Recorder, read
from tests.chaos.mutants import MUTANTS, plant
from tests.chaos.plan import Step
from tests.chaos.run import Run
from tests.chaos.wrapper import RecordingBroker

#: By mutant: what is sent, how the plan is made red, and the checks that find it.
SCHEDULES: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "M1": ("quick", {"failpoints": [["claimed:kill9@2"]]}, {"lost"}),
    "M3": ("nap", {"workers": 2}, {"unexplained duplicate"}),
    "M4": ("quick", {"failpoints": [["started:kill9@2"]]}, {"lost"}),
    "M5": ("nap", {"workers": 2}, {"early redelivery", "unexplained duplicate"}),
    "M6": ("stubborn", {"failpoints": [["retry:kill9@1"]]}, {"unexplained duplicate"}),
    "M7": ("later", {"failpoints": [["reap:kill9@1"]], "seconds": 0.5}, {"lost"}),
    "M8": ("poison", {"max_deliveries": 1, "seconds": 0.2, "rate": 5.0}, {"limit"}),
    "M9": ("quick", {"steps": [Step(0.0, "refuse", "producers", 60.0)], "seconds": 0.5}, {"lost"}),
}

on_redis = pytest.mark.parametrize("kind", ["redis"], indirect=True)


@on_redis
@pytest.mark.parametrize("mutant", SCHEDULES)
def test_a_planted_bug_turns_the_verdict_red(make_run: MakeRun, mutant: str) -> None:
    task, options, wanted = SCHEDULES[mutant]
    run = make_run(mutant=mutant, patience=6.0, **{"rate": 20.0, "seconds": 0.5, **options})
    judged = run.go({task: 1.0})
    assert judged.word == "fail", judged.line
    assert wanted & judged.problems.keys(), judged.line


async def _stale_settle(run: Run, mutant: str) -> Verdict:
    """Claim, let the lease end, have another claim, settle by the older claim: found by no chance."""
    record = Recorder(run.folder, "w0.0")
    failpoints = Failpoints([], record)
    options = BrokerOptions(lease=0.3)
    factory = brokers.from_url(Url(run.ground.url))
    old = RecordingBroker(plant(mutant, failpoints)(factory(options)), record, failpoints)
    other = Recorder(run.folder, "w1.0")
    new = RecordingBroker(factory(options), other, failpoints)
    headers = {"task": "quick", "id": "quick-1", "lang": "py"}
    async with old, new:
        record("ENQ", id="quick-1")
        await old.publish([Message(queue="q", headers=headers, body=b"[[], {}, {}]")])
        record("ENQ_OK", id="quick-1")
        (first,) = await old.fetch(["q"], 1, 1)
        (second,) = await new.fetch(["q"], 1, 10)
        await old.settle([(first, Ack())])
        other("START", id="quick-1", attempt=1, token=second.receipt)
        other("END", id="quick-1", attempt=1, token=second.receipt)
        await new.settle([(second, Ack())])
    record("DRAINED")
    return verdict(read(run.folder))


@on_redis
@pytest.mark.parametrize("mutant", ["", "M2"])
async def test_a_settle_without_a_fence(make_run: MakeRun, monkeypatch: pytest.MonkeyPatch, mutant: str) -> None:
    for name in ("source", "digest"):  # put back when the test ends
        monkeypatch.setattr(SETTLE, name, getattr(SETTLE, name))
    judged = await _stale_settle(make_run(lease=0.3), mutant)
    if mutant:
        assert {"stale accepted", "settled twice"} & judged.problems.keys(), judged.line
    else:
        assert judged.word == "pass", judged.line


@on_redis
@pytest.mark.parametrize("mutant", ["", "M10"])
async def test_an_answer_that_is_given_to_another(
    ground: Ground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mutant: str
) -> None:
    monkeypatch.setattr(RedisLink, "_submit", RedisLink._submit)  # put back when the test ends
    plant(mutant, Failpoints([], Recorder(tmp_path, "w0.0")))
    wrong = await cancelling(ground.url) + list(hygiene({"log": caplog.text}, ()))
    assert bool(wrong) == bool(mutant), wrong


def test_every_mutant_is_tried() -> None:
    assert {*SCHEDULES, "M2", "M10"} == set(MUTANTS)
