"""From a history to verdicts: pure functions, one for each thing that must not have happened.

After Jepsen's total queue: what was confirmed must come out, what was sent without an answer may. A run that did not
drain says nothing of what is missing: it is *undetermined*, never passed.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Final

import msgspec

from tests.chaos.causes import TWO_MESSAGES, cause_of, duplicates
from tests.chaos.history import Event
from tests.chaos.story import Story

#: Of each check, so many findings are told.
_TOLD: Final = 20
_DONE_STATES: Final = ("SUCCESS", "FAILURE", "REVOKED")


class Verdict(msgspec.Struct):
    """What the checks say of one run."""

    #: ``pass``, ``fail`` or ``undetermined``.
    word: str
    #: By check: what was found, in words.
    problems: dict[str, list[str]]
    #: What the table of runs shows.
    counts: dict[str, float]
    #: Extra starts that have a cause, by cause.
    causes: dict[str, int]

    @property
    def line(self) -> str:
        """One line for people."""
        counted = " ".join(f"{name} {number:g}" for name, number in self.counts.items())
        found = "; ".join(f"{name}: {len(texts)}: {texts[0]}" for name, texts in self.problems.items())
        return f"{self.word}: {counted}" + (f" | {found}" if found else "")


Check = Callable[[Story], Iterator[str]]


def verdict(events: list[Event], logs: Mapping[str, str] | None = None, secrets: tuple[str, ...] = ()) -> Verdict:
    """``logs`` are what processes have written, by their names; ``secrets`` must not stand in them."""
    story = Story(events)
    checks = CHECKS if story.setting.sees_claims else {name: CHECKS[name] for name in ("lost", "unexpected", "leaks")}
    problems = {name: list(check(story)) for name, check in checks.items()}
    found = duplicates(story)
    problems["unexplained duplicate"] = found.unexplained
    problems["hygiene"] = list(hygiene(logs or {}, secrets))
    drained = story.has_drained()
    missing, left = problems.pop("lost"), problems.pop("leaks")
    if drained:  # what is still under way is neither lost nor left behind
        problems |= {"lost": missing, "leaks": left}
    problems = {name: texts for name, texts in problems.items() if texts}
    word = "fail" if problems else "pass" if drained else "undetermined"
    counts: dict[str, float] = {
        "enq": len({event.id for event in story.of("ENQ")}),
        "ok": len(confirmed(story)),
        "lost": len(missing) if drained else -1,
        "dup_explained": found.explained,
        "dup_unexplained": len(found.unexplained),
        "overlap": sum(1 for _ in overlapping(story)),
        "stale_refused": sum(event.ok is False for event in story.of("SETTLE")),
        "settled_twice": len(problems.get("settled twice", ())),
        "dead": len(story.of("DEAD")),
        "faults": len(story.windows) + sum(event.n == -9 for event in story.gone.values()),
        "p99_recovery": _percentile(sorted(seconds for seconds, _ in recoveries(story)), 0.99),
    }
    return Verdict(word, {name: texts[:_TOLD] for name, texts in problems.items()}, counts, dict(found.by_cause))


# --- what came out ------------------------------------------------------------------------------------


def confirmed(story: Story) -> set[str]:
    """Ids that a producer was told are stored."""
    return {event.id for event in story.of("ENQ_OK")}


def lost(story: Story) -> Iterator[str]:
    """Confirmed, and never brought to an end."""
    for id in sorted(confirmed(story)):
        events = story.by_id[id]
        if not any(_is_end(event) for event in events):
            what = ", ".join(f"{event.e} {event.p}" for event in events[-6:])
            yield f"{id}: the last of it: {what}"


def _is_end(event: Event) -> bool:
    if event.e == "RESULT":
        return event.value in _DONE_STATES
    return event.e in ("END", "DEAD") or (event.e == "RAISE" and event.final)


def unexpected(story: Story) -> Iterator[str]:
    """Begun, and never sent; or told to be certainly not stored."""
    sent = {event.id for event in story.of("ENQ")}
    answers: dict[str, set[str]] = {}
    for event in story.of("ENQ_OK", "ENQ_FAIL", "ENQ_UNKNOWN"):
        answers.setdefault(event.id, set()).add(event.e)
    for id, _ in sorted(story.starts):
        if id not in sent:
            yield f"{id} was begun, and nobody had sent it"
        elif answers.get(id) == {"ENQ_FAIL"}:
            yield f"{id} was begun, and its sender was told that it is not stored"


# --- claims and settles -------------------------------------------------------------------------------


def token_reuse(story: Story) -> Iterator[str]:
    """One name for two claims."""
    for token, events in story.by_token.items():
        claims = [event for event in events if event.e == "CLAIM"]
        if len(claims) > 1:
            yield f"{token}: claimed by {', '.join(event.p for event in claims)}"


def settled_twice(story: Story) -> Iterator[str]:
    """Two settles of one message that the broker has carried out, by different claims."""
    for copy, claims in story.claims.items():
        told = [event for claim in claims for event in story.told(claim.token, "SETTLE")]
        done = [event for event in told if event.ok and event.kind != "release"]
        for first, second in itertools.pairwise(done):
            if first.token != second.token and not _may_settle_both(story, first, second):
                yield f"{copy[0]} attempt {copy[1]}: by {first.p}, then by {second.p}"


def _may_settle_both(story: Story, first: Event, second: Event) -> bool:
    """On RabbitMQ an acknowledgement has no answer: what was on its way when a link broke comes again.

    And one id sent twice is two messages where the broker doesn't keep the second out.
    """
    if story.setting.fenced:
        return _is_another_message(story, first, second)
    starts = [start for event in (first, second) for start in story.told(event.token, "START")]
    return len(starts) < 2 or cause_of(story, starts[0], starts[-1]) is not None


def stale_accepted(story: Story) -> Iterator[str]:
    """Settled or renewed by a claim after a newer one was in other hands."""
    if not story.setting.fenced:
        return
    for copy, claims in story.claims.items():
        for older, newer in itertools.pairwise(claims):
            late = [event for event in story.told(older.token, "SETTLE", "RENEW") if event.began > newer.t]
            accepted = [event for event in late if event.e == "RENEW" or event.ok]
            if accepted and not _is_another_message(story, older, newer):
                yield f"{copy[0]} attempt {copy[1]}: {accepted[0].e} by {older.p} after {newer.p} had claimed it"


def _is_another_message(story: Story, older: Event, newer: Event) -> bool:
    """Two messages of one id, where a producer has sent it twice and the broker keeps both."""
    return sum(event.e == "ENQ" for event in story.by_id[older.id]) > 1 and not story.setting.dedupes


def early_redelivery(story: Story) -> Iterator[str]:
    """Claimed again while the lease was valid and nobody had let go of it."""
    setting = story.setting
    if not setting.fenced:
        return
    for copy, claims in story.claims.items():
        for older, newer in itertools.pairwise(claims):
            settling = story.told(older.token, "SETTLING")
            if any(event.t <= newer.t for event in settling) or _is_another_message(story, older, newer):
                continue
            renewed = [event.began for event in story.told(older.token, "RENEW") if event.t <= newer.t]
            left = max([older.began, *renewed]) + setting.lease - newer.t
            if left > 0.02:
                yield f"{copy[0]} attempt {copy[1]}: by {newer.p}, {left:.2f} s before the lease of {older.p} ended"


def unaccounted(story: Story) -> Iterator[str]:
    """Claimed, and neither begun nor settled, by a process that lives on with its link."""
    for copy, claims in story.claims.items():
        for claim in claims:
            if story.told(claim.token, "START", "SETTLING", "LEASE_LOST") or claim.p in story.gone:
                continue
            if story.link_fault(claim.t, story.ends) is None:
                yield f"{copy[0]} attempt {copy[1]}: {claim.p} claimed it and did nothing"


# --- runs ---------------------------------------------------------------------------------------------


def overlapping(story: Story) -> Iterator[tuple[Event, Event]]:
    """Two runs of one attempt of a task at the same time."""
    for starts in story.starts.values():
        for older, newer in itertools.pairwise(starts):
            if newer.t < story.ended(older):
                yield older, newer


def overlap(story: Story) -> Iterator[str]:
    """A run that went on beside a newer one though it could have heard that it had lost its message."""
    setting = story.setting
    for older, newer in overlapping(story):
        if cause_of(story, older, newer) in TWO_MESSAGES:
            continue
        told = story.told(older.token, "LEASE_LOST")
        ended = told[0].t if told else story.ended(older)
        deaf = story.frozen(older.p, newer.t, ended)
        deaf += sum(max(0.0, window.overlap(newer.t, ended)) for window in story.windows if window.kind != "stop")
        if ended - newer.t - deaf > setting.lease + setting.slack / 5:
            yield f"{older.id} attempt {older.attempt}: {older.p} went on for {ended - newer.t:.1f} s beside {newer.p}"


def limit(story: Story) -> Iterator[str]:
    """Begun more often than a message may be lost, or buried as lost too often though it was not."""
    most = story.setting.max_deliveries
    for copy, starts in story.starts.items():
        fatal = [start for start in starts if story.ended(start) == story.died(start.p)]
        if len(fatal) > most:
            yield f"{copy[0]} attempt {copy[1]}: {len(fatal)} workers died while they ran it, {most} may"
    for event in story.of("DEAD"):
        claims = [claim for copy, group in story.claims.items() if copy[0] == event.id for claim in group]
        if event.kind == "delivery_limit" and len(claims) <= most:
            yield f"{event.id}: buried as lost {most} times, and claimed only {len(claims)} times"


def results(story: Story) -> Iterator[str]:
    """What ended and was settled has its result, and a success stays one."""
    if not story.of("RESULT"):
        return
    stored = {event.id: event for event in story.of("RESULT")}
    for event in story.of("END", "RAISE"):
        if not any(settle.ok and settle.kind == "ack" for settle in story.told(event.token, "SETTLE")):
            continue
        found = stored.get(event.id)
        state = "nothing" if found is None else found.value
        if event.e == "END" and state != "SUCCESS":
            yield f"{event.id}: ended well at {event.p} and was settled, and the store says {state}"
        if event.e == "RAISE" and event.final and state not in ("FAILURE", "SUCCESS"):
            yield f"{event.id}: failed at {event.p} and was settled, and the store says {state}"


# --- the whole ----------------------------------------------------------------------------------------


def recoveries(story: Story) -> Iterator[tuple[float, Event]]:
    """Seconds from a worker's death to the next claim of what it held, and that claim."""
    for claims in story.claims.values():
        for older, newer in itertools.pairwise(claims):
            died = story.died(older.p)
            if died is not None and died <= newer.t and not story.told(older.token, "SETTLE"):
                yield newer.t - died, newer


def liveness(story: Story) -> Iterator[str]:
    """What a dead worker held came back late, with no other fault in the way.

    What was lost before waits longer, and for a worker that does nothing else; which holds up what is behind it.
    """
    alone = [claim.t for claim in story.of("CLAIM") if claim.n > 2]
    bound = story.setting.comes_back_within + story.setting.slack
    for seconds, claim in recoveries(story):
        died = claim.t - seconds
        others = [window for window in story.windows if window.overlap(died, claim.t) >= 0]
        if seconds > bound and not others and not any(died <= moment <= claim.t for moment in alone):
            yield f"{claim.id}: claimed again {seconds:.1f} s after its worker had died, {bound:.1f} s at most"


def leaks(story: Story) -> Iterator[str]:
    """What is left on the broker's side when nothing waits any more."""
    for event in story.of("LEFT"):
        if event.n:
            yield f"{event.n} of {event.kind}"


_NOISE: Final = re.compile(r"Task was destroyed|never awaited|Traceback \(most recent call last\)|ResourceWarning")


#: What a worker shows of a task that fails on purpose.
_MEANT: Final = re.compile(r"Traceback \(most recent call last\):\n(?:  .*\n)+ValueError: no luck with \d+\n")


def hygiene(logs: Mapping[str, str], secrets: tuple[str, ...]) -> Iterator[str]:
    """Secrets and noise in what processes have written."""
    for name, whole in logs.items():
        text = _MEANT.sub("", whole)
        for found in sorted({match.group() for match in _NOISE.finditer(text)}):
            at = text.index(found)
            yield f"{name}: {found}: ...{text[max(0, at - 200) : at + 600]}"
        for secret in secrets:
            if secret in text:
                yield f"{name}: a secret stands in the log"


def _percentile(values: list[float], part: float) -> float:
    return round(values[min(len(values) - 1, int(len(values) * part))], 3) if values else 0.0


CHECKS: Final[dict[str, Check]] = {
    "lost": lost,
    "unexpected": unexpected,
    "token reuse": token_reuse,
    "settled twice": settled_twice,
    "stale accepted": stale_accepted,
    "early redelivery": early_redelivery,
    "unaccounted": unaccounted,
    "overlap": overlap,
    "limit": limit,
    "results": results,
    "liveness": liveness,
    "leaks": leaks,
}
