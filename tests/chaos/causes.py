"""Why a task was begun once more: every extra start has a cause of its kind, or it is a fault of ours."""

import itertools
from collections import Counter
from typing import Final

import msgspec

from tests.chaos.history import Event
from tests.chaos.story import Story


class Duplicates(msgspec.Struct):
    """Extra starts of one attempt of a task."""

    by_cause: Counter[str] = msgspec.field(default_factory=Counter[str])
    unexplained: list[str] = msgspec.field(default_factory=list[str])

    @property
    def explained(self) -> int:
        return sum(self.by_cause.values())


#: Causes for which there are two messages, each with a claim of its own that is good.
TWO_MESSAGES: Final = ("sent again", "retried twice", "moved twice")


def duplicates(story: Story) -> Duplicates:
    """Each start after the first, with the cause of it."""
    found = Duplicates()
    for copy, starts in story.starts.items():
        for earlier, later in itertools.pairwise(starts):
            cause = cause_of(story, earlier, later)
            if cause is None:
                found.unexplained.append(f"{copy[0]} attempt {copy[1]}: {earlier.p} began it, then {later.p}")
            else:
                found.by_cause[cause] += 1
    return found


def cause_of(story: Story, earlier: Event, later: Event) -> str | None:
    """What let ``later`` begin after ``earlier`` had begun; None when nothing did."""
    if _is_settled(story, earlier, later.t):
        return _heard_late(story, earlier, later) or _of_another_copy(story, earlier, later)
    claimed = _claimed(story, earlier)
    return (
        _heard_late(story, earlier, later)
        or _of_its_process(story, earlier, later.t, claimed)
        or _given_back(story, earlier, later)
        or story.link_fault(claimed, later.t)
        or _of_another_copy(story, earlier, later)
    )


def _heard_late(story: Story, earlier: Event, later: Event) -> str | None:
    """It was claimed before the other, by a process that was not told for longer than its lease."""
    asked = _claimed(story, later)
    heard = story.told(earlier.token, "CLAIM") if earlier.token else []
    if not heard or asked > heard[0].t or later.t - asked < story.setting.lease:
        return None
    stood_still = story.frozen(later.p, asked, later.t) >= story.setting.lease / 2
    return "heard late" if stood_still or story.link_fault(asked, later.t) is not None else None


def _is_settled(story: Story, start: Event, until: float) -> bool:
    """Its message is done, says the broker."""
    told = story.told(start.token, "SETTLE") if start.token else []
    return any(event.ok and event.kind != "release" and event.t <= until for event in told)


def _of_another_copy(story: Story, earlier: Event, later: Event) -> str | None:
    """Why there were two messages."""
    sent = [event for event in story.by_id[later.id] if event.e == "ENQ"]
    if len(sent) > 1 and not story.setting.dedupes:
        return "sent again"
    if story.setting.fenced:
        return None
    return (
        story.link_fault(_claimed(story, earlier), later.t)  # an acknowledgement that was on its way
        or _retried_twice(story, later)
        or (_moved_twice(story, sent[0].t, later.t) if sent else None)
    )


def _moved_twice(story: Story, since: float, until: float) -> str | None:
    """A worker sends back what it has not taken, and what it must count, and acknowledges it then: two steps."""
    deaths = [story.died(process) for process, event in story.gone.items() if event.n != 0]
    died = any(death is not None and since <= death <= until for death in deaths)
    return "moved twice" if died or story.link_fault(since, until) is not None else None


def _claimed(story: Story, start: Event) -> float:
    claims = story.told(start.token, "CLAIM")
    return claims[-1].began or claims[-1].t if claims else start.t


def _of_its_process(story: Story, earlier: Event, until: float, since: float) -> str | None:
    died = story.died(earlier.p)
    if died is not None and died <= until and story.gone[earlier.p].n != 0:
        return "killed"
    may_be_frozen = not story.setting.supervised or not story.setting.fenced
    if may_be_frozen and story.frozen(earlier.p, since, until) >= story.setting.lease / 2:
        return "frozen"
    # Only what the broker has said at a renewal: a settle that is refused tells that nobody renewed.
    return "lease lost" if story.told(earlier.token, "LEASE_LOST") else None


def _given_back(story: Story, earlier: Event, later: Event) -> str | None:
    settling = story.told(earlier.token, "SETTLING")
    return "given back" if any(event.kind == "release" and event.t <= later.t for event in settling) else None


def _retried_twice(story: Story, later: Event) -> str | None:
    """Where a retry is sent first and settled second, what comes between makes two of it."""
    if later.attempt < 2:
        return None
    before = story.starts.get((later.id, later.attempt - 1), [])
    return "retried twice" if len(before) > 1 or any(_cut_off(story, start, later.t) for start in before) else None


def _cut_off(story: Story, start: Event, until: float) -> bool:
    claimed = _claimed(story, start)
    return _of_its_process(story, start, until, claimed) is not None or story.link_fault(claimed, until) is not None
