"""The checker, on histories written by hand: what is well passes, each thing that must not happen is found."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.chaos.checker import Verdict, hygiene, verdict
from tests.chaos.failpoints import Failpoint
from tests.chaos.history import Event, Recorder, read
from tests.chaos.plan import Plan, Step, make_plan, shrink
from tests.chaos.story import Setting


class Story:
    """A history, told in order; times are in seconds, the lease is one."""

    def __init__(self, **setting: Any) -> None:
        self.events: list[Event] = []
        self.now = 100.0
        chosen = Setting(**{"broker": "redis", "lease": 1.0, "attempts": {"flaky": 3}, **setting})
        self.add("nemesis", "RUN", value=msgspec.to_builtins(chosen))

    def add(self, process: str, name: str, **fields: Any) -> "Story":
        self.events.append(Event(t=self.now, p=process, e=name, **fields))
        self.now += 0.001
        return self

    def wait(self, seconds: float) -> "Story":
        self.now += seconds
        return self

    def sent(self, id: str = "quick-1", answer: str = "ENQ_OK") -> "Story":
        return self.add("p0.0", "ENQ", id=id).add("p0.0", answer, id=id)

    def claimed(self, process: str, token: str, id: str = "quick-1", attempt: int = 1) -> "Story":
        return self.add(process, "CLAIM", id=id, attempt=attempt, token=token, began=self.now - 0.001, n=1)

    def begun(self, process: str, token: str, id: str = "quick-1", attempt: int = 1) -> "Story":
        self.claimed(process, token, id, attempt)
        return self.add(process, "START", id=id, attempt=attempt, token=token)

    def over(self, process: str, token: str, name: str = "END", **fields: Any) -> "Story":
        return self.add(process, name, **{"id": "quick-1", "attempt": 1, "token": token, **fields})

    def settled(self, process: str, token: str, ok: bool = True, kind: str = "ack", **fields: Any) -> "Story":
        named = {"id": "quick-1", "attempt": 1, "token": token, "kind": kind, **fields}
        self.add(process, "SETTLING", **named)
        return self.add(process, "SETTLE", **named, began=self.now - 0.001, ok=ok)

    def renewed(self, process: str, token: str) -> "Story":
        return self.add(process, "RENEW", id="quick-1", attempt=1, token=token, began=self.now - 0.001)

    def killed(self, process: str, code: int = -9) -> "Story":
        return self.add("nemesis", "EXIT", target=process, n=code)

    def fault(self, kind: str, target: str, length: float = 0.0) -> "Story":
        self.add("nemesis", "FAULT", kind=kind, target=target, phase="begin").wait(length)
        return self.add("nemesis", "FAULT", kind=kind, target=target, phase="end")

    def drained(self) -> Verdict:
        self.add("nemesis", "DRAINED")
        return verdict(self.events)


def well() -> Story:
    return Story().sent().begun("w0.0", "1:q").over("w0.0", "1:q").settled("w0.0", "1:q")


def found(judged: Verdict) -> set[str]:
    assert (judged.word == "fail") == bool(judged.problems)
    return set(judged.problems)


def test_a_run_without_faults_passes() -> None:
    judged = well().drained()
    assert judged.word == "pass", judged
    assert judged.counts["ok"] == 1
    assert judged.counts["lost"] == 0


def test_without_the_word_that_it_drained_nothing_passes() -> None:
    judged = verdict(Story().sent().events)
    assert judged.word == "undetermined"
    assert judged.counts["lost"] == -1
    assert verdict(well().events).word == "undetermined"


def test_what_is_confirmed_and_never_ends_is_lost() -> None:
    assert found(Story().sent().drained()) == {"lost"}
    assert found(Story().sent().begun("w0.0", "1:q").killed("w0.0").drained()) == {"lost"}
    first_of_three = Story().sent("flaky-1").begun("w0.0", "1:q", "flaky-1")
    first_of_three.over("w0.0", "1:q", "RAISE", id="flaky-1").settled("w0.0", "1:q", id="flaky-1")
    assert found(first_of_three.drained()) == {"lost"}


@pytest.mark.parametrize("answer", ["ENQ_FAIL", "ENQ_UNKNOWN"])
def test_what_is_not_confirmed_need_not_come(answer: str) -> None:
    assert Story().sent(answer=answer).drained().word == "pass"


@pytest.mark.parametrize(
    "end",
    [
        lambda story: story.add("nemesis", "DEAD", id="quick-1", kind="rejected"),
        lambda story: story.add("nemesis", "RESULT", id="quick-1", value="REVOKED"),
        lambda story: story.begun("w0.0", "1:q").over("w0.0", "1:q", "RAISE", final=True).settled("w0.0", "1:q"),
    ],
)
def test_every_end_is_an_end(end: Callable[[Story], Story]) -> None:
    assert end(Story().sent()).drained().word == "pass"


def test_what_nobody_sent_or_was_refused_is_unexpected() -> None:
    assert found(Story().begun("w0.0", "1:q").over("w0.0", "1:q").drained()) == {"unexpected"}
    assert found(Story().sent(answer="ENQ_FAIL").begun("w0.0", "1:q").drained()) == {"unexpected"}


def test_a_second_start_needs_a_cause() -> None:
    twice = well().wait(5.0).begun("w1.0", "2:q").over("w1.0", "2:q")
    assert "unexplained duplicate" in found(twice.drained())
    killed = Story().sent().begun("w0.0", "1:q").killed("w0.0").wait(2.0)
    killed.begun("w1.0", "2:q").over("w1.0", "2:q").settled("w1.0", "2:q")
    judged = killed.drained()
    assert judged.word == "pass", judged
    assert judged.causes == {"killed": 1}
    assert judged.counts["p99_recovery"] == pytest.approx(2.0, abs=0.1)


def test_the_death_of_a_worker_that_had_settled_is_no_cause() -> None:
    story = well().killed("w0.0").wait(2.0).begun("w1.0", "2:q").over("w1.0", "2:q").settled("w1.0", "2:q")
    assert found(story.drained()) == {"unexplained duplicate", "settled twice"}


def test_on_rabbitmq_what_a_dead_worker_had_moved_may_be_there_twice() -> None:
    story = Story(broker="rabbitmq").sent().killed("w1.0").add("w1.0", "SPAWN")
    story.begun("w0.0", "a.1").over("w0.0", "a.1").settled("w0.0", "a.1")
    story.begun("w2.0", "b.1").over("w2.0", "b.1").settled("w2.0", "b.1")
    assert story.drained().causes == {"moved twice": 1}


def test_a_claim_that_is_heard_of_late_is_the_older_one() -> None:
    """Its reply was on its way while its process stood still, and another ran the task meanwhile."""
    story = Story().sent()
    asked = story.now
    story.fault("stop", "w0.0", 3.0).begun("w1.0", "2:q").over("w1.0", "2:q").settled("w1.0", "2:q")
    story.events.sort(key=lambda event: event.t)
    story.add("w0.0", "CLAIM", id="quick-1", attempt=1, token="1:q", began=asked, n=1)
    story.add("w0.0", "START", id="quick-1", attempt=1, token="1:q")
    story.add("w0.0", "LEASE_LOST", id="quick-1", attempt=1, token="1:q").over("w0.0", "1:q", "CANCEL")
    judged = story.drained()
    assert judged.word == "pass", judged
    assert judged.causes == {"heard late": 1}


def test_a_worker_that_ended_well_is_no_cause() -> None:
    ended = Story().sent().begun("w0.0", "1:q").killed("w0.0", code=0).wait(2.0)
    ended.begun("w1.0", "2:q").over("w1.0", "2:q").settled("w1.0", "2:q")
    assert found(ended.drained()) == {"unexplained duplicate"}


@pytest.mark.parametrize(
    ("fault", "length", "is_a_cause"), [("silence", 2.0, True), ("silence", 0.2, False), ("reset", 0.0, False)]
)
def test_a_fault_of_the_link_is_a_cause_where_it_outlasts_the_lease(
    fault: str, length: float, is_a_cause: bool
) -> None:
    story = Story().sent().begun("w0.0", "1:q").fault(fault, "workers", length).wait(1.0)
    story.begun("w1.0", "2:q").over("w1.0", "2:q").settled("w1.0", "2:q").over("w0.0", "1:q").settled(
        "w0.0", "1:q", False
    )
    assert ("unexplained duplicate" in story.drained().problems) is not is_a_cause


def test_on_rabbitmq_a_reset_gives_everything_back_at_once() -> None:
    story = Story(broker="rabbitmq").sent().begun("w0.0", "a.1").fault("reset", "workers")
    story.begun("w1.0", "b.1").over("w1.0", "b.1").settled("w1.0", "b.1").over("w0.0", "a.1")
    judged = story.drained()
    assert judged.word == "pass", judged
    assert judged.causes == {"reset": 1}


def test_a_frozen_worker_is_a_cause_and_may_go_on_until_it_hears() -> None:
    story = Story().sent().begun("w0.0", "1:q").fault("stop", "w0.0", 2.0)
    story.events.sort(key=lambda event: event.t)
    story.now -= 0.5
    story.begun("w1.0", "2:q").wait(0.6).add("w0.0", "LEASE_LOST", id="quick-1", attempt=1, token="1:q")
    story.over("w0.0", "1:q", "CANCEL", why="lease lost").over("w1.0", "2:q").settled("w1.0", "2:q")
    judged = story.drained()
    assert judged.word == "pass", judged
    assert judged.counts["overlap"] == 1


def test_a_run_that_goes_on_beside_a_newer_one_is_found() -> None:
    story = Story(slack=0.0).sent().begun("w0.0", "1:q").fault("stop", "w0.0", 2.0)
    story.begun("w1.0", "2:q").over("w1.0", "2:q").settled("w1.0", "2:q").wait(3.0).over("w0.0", "1:q")
    assert found(story.drained()) == {"overlap"}


def test_on_rabbitmq_one_id_that_is_sent_twice_is_two_messages_that_may_run_beside_each_other() -> None:
    story = Story(broker="rabbitmq", dedupes=False, slack=0.0).sent(answer="ENQ_UNKNOWN").sent()
    story.begun("w0.0", "a.1").begun("w1.0", "b.1").wait(3.0)
    story.over("w0.0", "a.1").settled("w0.0", "a.1").over("w1.0", "b.1").settled("w1.0", "b.1")
    judged = story.drained()
    assert judged.word == "pass", judged
    assert judged.causes == {"sent again": 1}


def test_a_lease_that_was_renewed_may_not_be_given_away() -> None:
    early = Story().sent().begun("w0.0", "1:q").wait(0.8).renewed("w0.0", "1:q").wait(0.5).killed("w0.0")
    early.begun("w1.0", "2:q").over("w1.0", "2:q").settled("w1.0", "2:q")
    assert found(early.drained()) == {"early redelivery"}
    given_back = Story().sent().begun("w0.0", "1:q").settled("w0.0", "1:q", kind="release")
    given_back.begun("w1.0", "2:q").over("w1.0", "2:q").settled("w1.0", "2:q")
    assert given_back.drained().word == "pass"


def test_an_older_claim_may_not_settle_or_renew() -> None:
    def taken_over() -> Story:
        story = Story().sent().begun("w0.0", "1:q").fault("stop", "w0.0", 2.0)
        return story.begun("w1.0", "2:q").over("w0.0", "1:q", "CANCEL").over("w1.0", "2:q").wait(0.1)

    assert found(taken_over().settled("w0.0", "1:q").drained()) == {"stale accepted"}
    assert found(taken_over().renewed("w0.0", "1:q").settled("w1.0", "2:q").drained()) == {"stale accepted"}
    both = taken_over().settled("w1.0", "2:q").settled("w0.0", "1:q")
    assert found(both.drained()) == {"stale accepted", "settled twice"}
    refused = taken_over().settled("w1.0", "2:q").settled("w0.0", "1:q", ok=False).drained()
    assert refused.word == "pass", refused
    assert refused.counts["stale_refused"] == 1


def test_a_token_names_one_claim() -> None:
    story = well().sent("quick-2").begun("w1.0", "1:q", "quick-2").over("w1.0", "1:q", id="quick-2")
    assert "token reuse" in found(story.drained())


def test_what_is_claimed_is_begun_or_settled() -> None:
    story = well().wait(3.0).claimed("w1.0", "2:q").wait(1.0)
    assert "unaccounted" in found(story.drained())


def test_a_message_may_cost_so_many_workers_and_no_more() -> None:
    def poison(times: int) -> Story:
        story = Story(max_deliveries=2).sent("poison-1")
        for n in range(times):
            story.begun(f"w0.{n}", f"{n}:q", "poison-1").killed(f"w0.{n}").wait(2.0)
        return story.add("nemesis", "DEAD", id="poison-1", kind="delivery_limit")

    assert poison(3).drained().problems.keys() == {"limit"}
    assert found(poison(1).drained()) == {"limit"}  # a bystander
    buried = poison(2)
    buried.claimed("w1.0", "9:q", "poison-1").settled("w1.0", "9:q", kind="bury", id="poison-1")
    assert buried.drained().word == "pass"


def test_what_was_settled_has_its_result_and_a_success_stays() -> None:
    assert well().add("nemesis", "RESULT", id="quick-1", value="SUCCESS").drained().word == "pass"
    assert found(well().add("nemesis", "RESULT", id="quick-1", value="FAILURE").drained()) == {"results"}
    other = well().sent("fail-1").begun("w0.0", "2:q", "fail-1").over("w0.0", "2:q", "RAISE", id="fail-1", final=True)
    other.settled("w0.0", "2:q", id="fail-1").add("nemesis", "RESULT", id="quick-1", value="SUCCESS")
    assert found(other.drained()) == {"results"}


def test_what_a_dead_worker_held_comes_back_in_time() -> None:
    story = Story(slack=1.0).sent().begun("w0.0", "1:q").killed("w0.0").wait(8.0)
    story.begun("w1.0", "2:q").over("w1.0", "2:q").settled("w1.0", "2:q")
    assert found(story.drained()) == {"liveness"}


def test_what_is_left_on_the_server_is_a_leak() -> None:
    assert found(well().add("nemesis", "LEFT", kind="leases", n=1).drained()) == {"leaks"}
    assert well().add("nemesis", "LEFT", kind="leases", n=0).drained().word == "pass"
    assert verdict(well().add("nemesis", "LEFT", kind="leases", n=1).events).word == "undetermined"  # still under way


def test_noise_and_secrets_in_logs() -> None:
    assert not list(hygiene({"w0.0": "the broker is away, waiting for it"}, ("secret",)))
    for text in (
        "x redis://:secret@h",
        "Traceback (most recent call last):",
        "Task was destroyed but",
        "never awaited",
    ):
        assert list(hygiene({"w0.0": text}, ("secret",))), text


def test_histories_are_read_back_in_order_without_a_torn_line(tmp_path: Path) -> None:
    first, second = Recorder(tmp_path, "w0.0"), Recorder(tmp_path, "w1.0")
    first("START", id="a", attempt=1)
    second("START", id="b", attempt=1, value={"any": ["thing"]})
    first.many("END", [{"id": "a"}, {"id": "c"}])
    first.close()
    second.close()
    with second.path.open("ab") as file:
        file.write(b'{"t":1.0,"p":"w1.0","e":"EN')
    assert [(event.p, event.e, event.id) for event in read(tmp_path)] == [
        ("w0.0", "START", "a"), ("w1.0", "START", "b"), ("w0.0", "END", "a"), ("w0.0", "END", "c"),
    ]  # fmt: skip


@pytest.mark.parametrize("broker", ["sqlite", "redis", "rabbitmq"])
def test_a_seed_makes_one_plan_and_a_saved_plan_is_the_same(broker: str, tmp_path: Path) -> None:
    plan = make_plan(broker, 7, seconds=30, slow=True)
    assert plan == make_plan(broker, 7, seconds=30, slow=True) != make_plan(broker, 8, seconds=30, slow=True)
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert plan.steps
    assert max(step.at + step.length for step in plan.steps) < 30 - 3 * plan.lease
    for text in (*plan.producer_failpoints, *(text for texts in plan.failpoints for text in texts)):
        assert str(Failpoint.parse(text)) == text
    assert not make_plan(broker, 7, seconds=30, faults=False).steps


@pytest.mark.parametrize("text", ["", "claimed", "claimed:kill9", "nowhere:kill9@1", "claimed:laugh@1"])
def test_a_failpoint_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no failpoint"):
        Failpoint.parse(text)


def test_a_plan_shrinks_to_what_makes_it_red() -> None:
    dice = random.Random(1)
    steps = [Step(float(at), dice.choice(["reset", "silence"])) for at in range(30)]
    steps[17] = Step(17.0, "kill9", "w0")
    plan = Plan(broker="redis", seed=1, seconds=30.0, steps=steps, failpoints=[["claimed:kill9@3"]])
    shrunk = shrink(plan, lambda tried: any(step.fault == "kill9" for step in tried.steps))
    assert shrunk.steps == [steps[17]]
    assert shrunk.failpoints == []
