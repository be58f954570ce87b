"""What will go wrong, decided before it does: a seed makes a plan, a saved plan is carried out again.

Two kinds of triggers: a *time* of the run, and a *stage* of the road with a count (`tests.chaos.failpoints`); times do
not come again exactly, the 17th claim does.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

#: Fault at a time: its weight, and its shortest and longest length in leases.
_LINK: Final = {
    "reset": (2, 0.0, 0.0),
    "cut": (2, 0.0, 0.0),
    "silence": (2, 0.3, 3.0),
    "refuse": (1, 0.3, 3.0),
    "delay": (1, 0.5, 2.0),
}
_FAULTS: Final[dict[str, dict[str, tuple[int, float, float]]]] = {
    "sqlite": {"kill9": (4, 0, 0), "stop": (4, 0.3, 4), "term": (1, 0, 0), "lock": (3, 0.3, 2)},
    "redis": {
        "kill9": (4, 0, 0), "stop": (4, 0.3, 4), "term": (1, 0, 0), **_LINK, "client_kill": (2, 0, 0),
        "client_pause": (1, 0.3, 2), "script_flush": (1, 0, 0), "debug_sleep": (1, 0.3, 2), "restart": (1, 0, 0),
        "pause": (1, 0.3, 3), "memory": (1, 0.5, 1.5),
    },
    "rabbitmq": {"kill9": (4, 0, 0), "stop": (4, 0.3, 4), "term": (1, 0, 0), **_LINK},
}  # fmt: skip
#: Slow to carry out: only in long runs.
_SLOW: Final[dict[str, dict[str, tuple[int, float, float]]]] = {
    "sqlite": {},
    "redis": {},
    "rabbitmq": {
        "close_connections": (2, 0, 0), "pause": (1, 0.3, 2), "restart": (1, 0, 0), "stop_app": (1, 0, 0),
        "alarm": (1, 1, 2),
    },
}  # fmt: skip
#: Faults of a worker's own.
WORKER_FAULTS: Final = ("kill9", "stop", "term")
#: Stages at which workers break, by weight.
_STAGES: Final = ("claim_sent", "claimed", "started", "body_done", "settle", "result_done", "settle_sent", "retry")


class Step(msgspec.Struct, frozen=True):
    """One fault at a time (seconds from the start); ``target`` is a worker, ``workers``, ``producers`` or ""."""

    at: float
    fault: str
    target: str = ""
    length: float = 0.0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """All that makes a run; see `tests.chaos.run`."""

    broker: str
    seed: int
    #: Seconds of load.
    seconds: float
    rate: float = 40.0
    lease: float = 1.0
    workers: int = 3
    concurrency: int = 8
    max_deliveries: int = 50
    mutant: str = ""
    #: Workers are what ``aqueue worker`` starts: a supervisor, which is left alone, and its process, which is not.
    supervised: bool = False
    #: Send again what was not answered.
    repeats: bool = False
    steps: list[Step] = msgspec.field(default_factory=list[Step])
    #: By worker: what its processes break at, one after the other; those after the last live on.
    failpoints: list[list[str]] = msgspec.field(default_factory=list[list[str]])
    #: The same for the one producer.
    producer_failpoints: list[str] = msgspec.field(default_factory=list[str])

    def save(self, path: Path) -> None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))

    @classmethod
    def load(cls, path: Path) -> "Plan":
        return msgspec.json.decode(path.read_bytes(), type=cls)


def make_plan(
    broker: str, seed: int, *, seconds: float = 20.0, slow: bool = False, faults: bool = True, lease: float = 1.0
) -> Plan:
    """The plan of a seed. After two thirds of the time nothing breaks any more by the clock."""
    dice = random.Random(f"{broker} {seed}")
    plan = Plan(broker=broker, seed=seed, seconds=seconds, lease=lease, repeats=seed % 2 == 1)
    if not faults:
        return plan
    table = _FAULTS[broker] | (_SLOW[broker] if slow else {})
    steps: list[Step] = []
    at = 0.5
    while at < seconds * 0.66:
        fault = dice.choices(list(table), [weight for weight, _, _ in table.values()])[0]
        _, shortest, longest = table[fault]
        length = round(lease * dice.uniform(shortest, longest), 2)
        target = _target(dice, fault, plan.workers)
        steps.append(Step(round(at, 2), fault, target, length))
        # A server does one thing at a time: frozen, it can't be told to do another.
        at += (length / 2 if target else length) + dice.uniform(0.2, 1.6)
    failpoints = [[_failpoint(dice) for _ in range(dice.randint(0, 2))] for _ in range(plan.workers)]
    breaks = [f"publish_sent:kill9@{dice.randint(5, 60)}"] if dice.random() < 0.5 else []
    return msgspec.structs.replace(plan, steps=steps, failpoints=failpoints, producer_failpoints=breaks)


def _target(dice: random.Random, fault: str, workers: int) -> str:
    if fault in WORKER_FAULTS:
        return f"w{dice.randrange(workers)}"
    return dice.choice(("workers", "producers")) if fault in _LINK else ""


def _failpoint(dice: random.Random) -> str:
    return f"{dice.choice(_STAGES)}:kill9@{dice.randint(1, 40)}"


def shrink(plan: Plan, is_red: Callable[[Plan], bool]) -> Plan:
    """A smaller plan whose verdict is still red: its faults are taken out by halves, then one by one."""
    size = len(plan.steps) // 2
    while size >= 1:
        start = 0
        while start < len(plan.steps):
            smaller = msgspec.structs.replace(plan, steps=plan.steps[:start] + plan.steps[start + size :])
            if is_red(smaller):
                plan = smaller
            else:
                start += size
        size //= 2
    for name in ("failpoints", "producer_failpoints"):
        smaller = msgspec.structs.replace(plan, **{name: []})
        if getattr(plan, name) and is_red(smaller):
            plan = smaller
    return plan
