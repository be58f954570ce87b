"""Why a task was begun once more: every extra start has a cause of its kind, or it is a fault of ours."""

import itertools
from collections import Counter

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
    claimed = _claimed(story, earlier)
    return (
        _of_its_process(story, earlier, later.t, claimed)
        or _given_back(story, earlier, later)
        or _sent_again(story, later)
        or story.link_fault(claimed, later.t)
        or _retried_twice(story, later)
    )


def _claimed(story: Story, start: Event) -> float:
    claims = story.told(start.token, "CLAIM")
    return claims[-1].began or claims[-1].t if claims else start.t


def _of_its_process(story: Story, earlier: Event, until: float, since: float) -> str | None:
    died = story.died(earlier.p)
    if died is not None and died <= until and story.gone[earlier.p].n != 0:
        return "killed"
    if story.frozen(earlier.p, since, until) >= story.setting.lease / 2:
        return "frozen"
    # Only what the broker has said at a renewal: a settle that is refused tells that nobody renewed.
    return "lease lost" if story.told(earlier.token, "LEASE_LOST") else None


def _given_back(story: Story, earlier: Event, later: Event) -> str | None:
    settling = story.told(earlier.token, "SETTLING")
    return "given back" if any(event.kind == "release" and event.t <= later.t for event in settling) else None


def _sent_again(story: Story, later: Event) -> str | None:
    """A second message with this id, which the broker doesn't keep out."""
    sent = [event for event in story.by_id[later.id] if event.e == "ENQ"]
    return "sent again" if len(sent) > 1 and not story.setting.dedupes else None


def _retried_twice(story: Story, later: Event) -> str | None:
    """Where a retry is sent first and settled second, what comes between makes two of it."""
    if story.setting.fenced or later.attempt < 2:
        return None
    before = story.starts.get((later.id, later.attempt - 1), [])
    return "retried twice" if len(before) > 1 or any(_cut_off(story, start, later.t) for start in before) else None


def _cut_off(story: Story, start: Event, until: float) -> bool:
    claimed = _claimed(story, start)
    return _of_its_process(story, start, until, claimed) is not None or story.link_fault(claimed, until) is not None
