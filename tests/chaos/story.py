"""A history in the order in which the checks look at it: by task, by claim, by process."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec

from tests.chaos.history import Event

#: Brokers where a claim is a lease with a token, which the broker itself checks at settle.
FENCED: Final = ("memory", "sqlite", "redis")
#: Faults after which a message may come again, by broker. On RabbitMQ a claim ends with its connection; elsewhere it
#: takes a fault that outlasts the lease.
LINK_FAULTS: Final = frozenset(
    {"reset", "cut", "silence", "refuse", "client_kill", "close_connections", "restart", "stop_app", "pause", "lock"}
)
#: Faults that have an end of their own, and no other.
_STOP: Final = "stop"


class Setting(msgspec.Struct, frozen=True, kw_only=True):
    """What the checks must know of a run: the ``value`` of its RUN event."""

    broker: str
    lease: float
    max_deliveries: int = 5
    #: By the task's name, which is an id up to its first dash: how often it is tried. Others are tried once.
    attempts: dict[str, int] = msgspec.field(default_factory=dict[str, int])
    #: Sent twice with one id, it is stored once.
    dedupes: bool = True
    #: Whether the workers tell of claims and settles, or only of starts and ends.
    sees_claims: bool = True
    #: Whether somebody else renews the leases of a worker that stands still.
    supervised: bool = False
    #: Seconds that a busy machine may add to anything.
    slack: float = 5.0

    @property
    def fenced(self) -> bool:
        return self.broker in FENCED

    @property
    def comes_back_within(self) -> float:
        """Seconds from a worker's death to the next claim of what it held: the lease, half of it, a look."""
        return 1.75 * self.lease if self.fenced else 0.0


class Window(msgspec.Struct, frozen=True):
    """From a fault's begin to its end."""

    kind: str
    target: str
    begin: float
    end: float

    def overlap(self, begin: float, end: float) -> float:
        """Seconds; below 0 when they don't meet."""
        return min(self.end, end) - max(self.begin, begin)


class Story:
    """See the module's text. Everything is in order of time."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.events = sorted(events, key=lambda event: event.t)
        runs = self.of("RUN")
        if len(runs) != 1:
            raise ValueError(f"a history has one RUN event, this one {len(runs)}")
        self.setting = msgspec.convert(runs[0].value, Setting)
        self.ends = self.events[-1].t
        #: In the order in which the broker gave them out; a process may hear of its claim late.
        self.claims = _grouped(self.of("CLAIM"), lambda event: event.copy)
        if self.setting.fenced:
            self.claims = {copy: sorted(group, key=_token_order) for copy, group in self.claims.items()}
        self.starts = _grouped(self.of("START"), lambda event: event.copy)
        self.by_token = _grouped((event for event in self.events if event.token), lambda event: event.token)
        self.by_id = _grouped((event for event in self.events if event.id), lambda event: event.id)
        self.gone = {event.target: event for event in self.of("EXIT")}
        self._last = {event.p: event.t for event in self.events}
        self.windows = _windows(self.events, self.ends)

    def of(self, *names: str) -> list[Event]:
        """Events of these names."""
        return [event for event in self.events if event.e in names]

    def told(self, token: str, *names: str) -> list[Event]:
        """Events of one claim."""
        return [event for event in self.by_token.get(token, ()) if event.e in names]

    def has_drained(self) -> bool:
        return bool(self.of("DRAINED"))

    def attempts(self, id: str) -> int:
        """How often a task is tried."""
        return self.setting.attempts.get(id.partition("-")[0], 1)

    def died(self, process: str) -> float | None:
        """When a process ended: at its last word, as its end is noticed later. None while it lives."""
        return self._last.get(process) if process in self.gone else None

    def frozen(self, process: str, begin: float, end: float) -> float:
        """Seconds in which a process stood still."""
        found = [window for window in self.windows if window.kind == _STOP and window.target == process]
        return sum(max(0.0, window.overlap(begin, end)) for window in found)

    def link_fault(self, begin: float, end: float) -> str | None:
        """The kind of a fault of the link or the server in this time that can make a message come again."""
        for window in self.windows:
            if window.kind not in LINK_FAULTS or window.overlap(begin, end) < 0:
                continue
            if not self.setting.fenced or window.end - window.begin >= self.setting.lease / 2:
                return window.kind
        return None

    def ended(self, start: Event) -> float:
        """When a run was over, by its own word or by its process' end; else the end of the history."""
        for event in self.by_token.get(start.token, ()) or self.by_id[start.id]:
            if event.t >= start.t and event.p == start.p and event.copy == start.copy and event.e in _OVER:
                return event.t
        died = self.died(start.p)
        return self.ends if died is None else died


def _token_order(claim: Event) -> tuple[int, ...]:
    """Tokens begin with numbers: that of the claim, or that of the message and its claim."""
    return tuple(int(part) for part in claim.token.split(":")[:2] if part.isdigit())


_OVER: Final = ("END", "RAISE", "CANCEL")


def _grouped(events: Iterable[Event], key: Any) -> dict[Any, list[Event]]:
    groups: defaultdict[Any, list[Event]] = defaultdict(list)
    for event in events:
        groups[key(event)].append(event)
    return dict(groups)


def _windows(events: Sequence[Event], ends: float) -> list[Window]:
    """Faults, each with its end; one that nobody ended lasts to the end of its process, or of the history."""
    open_ones: dict[tuple[str, str], float] = {}
    found: list[Window] = []
    for event in events:
        key = (event.kind, event.target)
        if event.e == "EXIT" and (_STOP, event.target) in open_ones:
            found.append(Window(_STOP, event.target, open_ones.pop((_STOP, event.target)), event.t))
        if event.e != "FAULT":
            continue
        if event.phase == "end":
            found.append(Window(*key, open_ones.pop(key, event.t), event.t))
        elif event.phase == "begin":
            open_ones.setdefault(key, event.t)
        else:
            found.append(Window(*key, event.t, event.t))
    return found + [Window(*key, begin, ends) for key, begin in open_ones.items()]
