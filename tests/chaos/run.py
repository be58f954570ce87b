"""One run: a plan is carried out on a ground, healed, drained, and judged.

::

    plan ─> nemesis ─> faults ─┐
    producer ─> proxy ─> broker ─> proxy ─> workers     processes with the real aqueue
        │                                      │
        └── histories, one file a process ─────┴─> checker ─> verdict

Everything is ended by its own id, and at the end none of it is left.
"""

import asyncio
import heapq
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec

from aqueue import AQueue
from aqueue.errors import BadMessage
from aqueue.protocol import Message
from tests.chaos.checker import Verdict, confirmed, verdict
from tests.chaos.config import ProducerConfig, WorkerConfig
from tests.chaos.ground import CANARY, Ground
from tests.chaos.history import Recorder, monotonic, read
from tests.chaos.peers import Peer
from tests.chaos.plan import WORKER_FAULTS, Plan, Step
from tests.chaos.story import Setting, Story
from tests.chaos.tasks import ATTEMPTS, MIX
from tests.kit.servers import Process
from tests.kit.workers import AQUEUE

ROOT: Final = Path(__file__).parent.parent.parent
#: Seconds that a run may take to drain, beyond its load; then it is undetermined.
DRAIN: Final = 40.0
#: Seconds without a start after which nothing is left to come from a peer; several times what it gives up a worker by.
QUIET: Final = 30.0
#: Seconds that a process may take to end when asked to.
_FAREWELL: Final = 15.0


class Crew:
    """The processes of a run: workers and producers, each with a successor when it is killed."""

    def __init__(self, plan: Plan, ground: Ground, folder: Path, record: Recorder, peer: Peer | None) -> None:
        self._plan = plan
        self._peer = peer
        self._ground = ground
        self._folder = folder
        self._record = record
        #: By place (``w0``, ``p0``): the process that is there now.
        self.running: dict[str, Process] = {}
        self._count: dict[str, int] = {}
        #: By place: who stands still, and its process id.
        self._frozen: dict[str, tuple[str, int]] = {}

    def name(self, place: str) -> str:
        return f"{place}.{self._count[place] - 1}"

    def spawn_worker(self, place: str) -> None:
        plan = self._plan
        number = self._count.get(place, 0)
        mine = plan.failpoints[int(place[1:])] if int(place[1:]) < len(plan.failpoints) else []
        config = WorkerConfig(
            name=f"{place}.{number}",
            folder=str(self._folder),
            broker=self._ground.workers_url,
            results=self._ground.results_url or self._ground.workers_url,
            queue=self._ground.queue,
            lease=plan.lease,
            max_deliveries=plan.max_deliveries,
            concurrency=plan.concurrency,
            failpoints=mine[number : number + 1],
            mutant=plan.mutant,
        )
        self._spawn(place, "worker", config)

    def spawn_producer(self, place: str, seconds: float, mix: dict[str, float] | None = None) -> None:
        plan = self._plan
        number = self._count.get(place, 0)
        config = ProducerConfig(
            name=f"{place}.{number}",
            folder=str(self._folder),
            broker=self._ground.producers_url,
            results=self._ground.results_url or self._ground.producers_url,
            queue=self._ground.queue,
            lease=plan.lease,
            seed=plan.seed,
            rate=plan.rate,
            seconds=seconds,
            mix=MIX if mix is None else mix,
            repeats=plan.repeats,
            failpoints=plan.producer_failpoints[number : number + 1],
            mutant=plan.mutant,
        )
        self._spawn(place, "producer", config)

    def _spawn(self, place: str, duty: str, config: WorkerConfig | ProducerConfig) -> None:
        self._count[place] = self._count.get(place, 0) + 1
        text = msgspec.json.encode(config).decode()
        command = [sys.executable, "-m", f"tests.chaos.{duty}", text]
        if self._peer is not None:
            command = [self._peer.python, "-m", self._peer.module, "work" if duty == "worker" else "produce", text]
        elif self._plan.supervised and duty == "worker":
            command = [AQUEUE, "worker", "tests.chaos.app:app", "-n", config.name, "-c", str(self._plan.concurrency)]
        env = {**os.environ, "CHAOS_WORKER": text}
        with (self._folder / f"{config.name}.log").open("wb") as log:
            self.running[place] = Process(command, cwd=ROOT, stdout=log, stderr=log, env=env)

    def reap(self) -> list[str]:
        """Places whose process has ended; written down, once each."""
        ended = [place for place, process in self.running.items() if process.child.poll() is not None]
        for place in ended:
            process = self.running.pop(place)
            self._frozen.pop(place, None)
            self._record("EXIT", target=self.name(place), n=process.child.returncode)
        return ended

    def kill(self, place: str) -> None:
        child = self._child(place)
        if child is not None:
            self._record("EXIT", target=child[0], n=-9)
            with suppress(ProcessLookupError):
                os.kill(child[1], signal.SIGKILL)
        elif place in self.running and not self._plan.supervised:
            self.running[place].kill()

    def _child(self, place: str) -> tuple[str, int] | None:
        """The worker process below a supervisor: its name in histories, and its id."""
        if not self._plan.supervised or place not in self.running:
            return None
        parent = self.running[place].child.pid
        for pid in map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split()):
            name = f"{self.name(place)}-{pid}"
            if (self._folder / f"{name}.jsonl").exists():
                return name, pid
        return None

    def terminate(self, place: str) -> None:
        if place in self.running:
            self.running[place].signal(signal.SIGTERM)

    def freeze(self, place: str) -> None:
        if place in self.running and place not in self._frozen:
            name, pid = self._child(place) or (self.name(place), self.running[place].child.pid)
            self._record("FAULT", kind="stop", target=name, phase="begin")
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
            self._frozen[place] = (name, pid)

    def thaw(self, place: str) -> None:
        name, pid = self._frozen.pop(place, ("", 0))
        if place in self.running and name:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            self._record("FAULT", kind="stop", target=name, phase="end")

    def end(self) -> None:
        """Ask all that is left to end, and make it."""
        for place in list(self.running):
            self.thaw(place)
            self.terminate(place)
        deadline = monotonic() + _FAREWELL
        while self.running and monotonic() < deadline:
            self.reap()
            time.sleep(0.02)
        for process in self.running.values():
            process.kill()
        self.reap()

    def logs(self) -> dict[str, str]:
        return {path.stem: path.read_text(errors="replace") for path in sorted(self._folder.glob("*.log"))}


class Run:
    """See the module's text."""

    def __init__(
        self, plan: Plan, ground: Ground, folder: Path, patience: float = DRAIN, peer: Peer | None = None
    ) -> None:
        self.plan = plan
        self._peer = peer
        #: Seconds to wait for what waits to be done.
        self.patience = patience
        self.ground = ground
        self.folder = folder
        self.record = Recorder(folder, "nemesis")
        self.crew = Crew(plan, ground, folder, self.record, peer)
        plan.save(folder / "plan.json")
        setting = Setting(
            broker=plan.broker,
            lease=plan.lease,
            max_deliveries=plan.max_deliveries,
            attempts=ATTEMPTS,
            dedupes=plan.broker != "rabbitmq",
            sees_claims=peer is None and not plan.supervised,
            supervised=plan.supervised,
        )
        self.record("RUN", value=msgspec.to_builtins(setting))
        #: Faults to end: when, and which.
        self._ending: list[tuple[float, int, Step]] = []

    def go(self, mix: dict[str, float] | None = None) -> Verdict:
        """All of it; the verdict is saved beside the histories."""
        try:
            self._load(mix)
            return self.finish()
        finally:
            self.crew.end()

    def finish(self) -> Verdict:
        """Heal, drain, judge."""
        try:
            self._heal()
            if self._peer is None:
                self._drain()
            else:
                self._wait_for_quiet()
        finally:
            self.crew.end()
        if self._peer is None:
            self._tell_what_is_left()
        logs = self.crew.logs() if self._peer is None else {}
        found = verdict(read(self.folder), logs, (CANARY,))
        (self.folder / "verdict.json").write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1))
        return found

    # --- load ---

    def _load(self, mix: dict[str, float] | None) -> None:
        for number in range(self.plan.workers):
            self.crew.spawn_worker(f"w{number}")
        self.crew.spawn_producer("p0", self.plan.seconds, mix)
        began = monotonic()
        steps = list(self.plan.steps)
        while (now := monotonic() - began) < self.plan.seconds + 10.0:
            while steps and steps[0].at <= now:
                self._begin(steps.pop(0))
            self._end_what_is_due()
            for place in self.crew.reap():
                if place[0] == "w":
                    self.crew.spawn_worker(place)
                elif now < self.plan.seconds - 1.0:
                    self.crew.spawn_producer(place, self.plan.seconds - now, mix)
            if not steps and "p0" not in self.crew.running:
                return
            time.sleep(0.02)

    def _begin(self, step: Step) -> None:
        if step.fault in WORKER_FAULTS:
            {"kill9": self.crew.kill, "term": self.crew.terminate, "stop": self.crew.freeze}[step.fault](step.target)
        else:
            self.record("FAULT", kind=step.fault, target=step.target, phase="begin")
            self.ground.begin(step.fault, step.target, step.length)
        heapq.heappush(self._ending, (monotonic() + step.length, len(self._ending), step))

    def _end_what_is_due(self, *, all: bool = False) -> None:
        while self._ending and (all or self._ending[0][0] <= monotonic()):
            _, _, step = heapq.heappop(self._ending)
            if step.fault == "stop":
                self.crew.thaw(step.target)
            elif step.fault not in WORKER_FAULTS:
                self.ground.end(step.fault, step.target)
                self.record("FAULT", kind=step.fault, target=step.target, phase="end")

    def _heal(self) -> None:
        self._end_what_is_due(all=True)
        for place in list(self.crew.running):
            self.crew.thaw(place)
        self.record("HEALED")

    # --- drain ---

    def _drain(self) -> None:
        """Until everything confirmed has come out and nothing waits; or, with something missing, nothing waits."""
        deadline = monotonic() + self.patience
        empty_since = 0.0
        while monotonic() < deadline:
            for place in self.crew.reap():
                if place[0] == "w":
                    self.crew.spawn_worker(place)
            if self.ground.waiting() or "p0" in self.crew.running:
                empty_since = 0.0
            elif not empty_since:  # a look again: what moves from one queue to another is in none meanwhile
                empty_since = monotonic()
            elif not self._missing() or (self._was_long_ago(empty_since) and not self.ground.held()):
                self.record("DRAINED")
                self._wait_for_the_tidying()
                return
            time.sleep(0.1)

    def _wait_for_quiet(self) -> None:
        """A peer keeps messages where we don't look: it has drained when nothing has happened for long."""
        seen, since = 0, monotonic()
        while monotonic() - since < QUIET:
            for place in self.crew.reap():
                if place[0] == "w":
                    self.crew.spawn_worker(place)
            story = Story(read(self.folder))
            begun = len(story.of("START"))
            if begun != seen or "p0" in self.crew.running:
                seen, since = begun, monotonic()
            if "p0" not in self.crew.running and confirmed(story) <= {event.id for event in story.of("END")}:
                break
            time.sleep(0.5)
        self.record("DRAINED")

    def _wait_for_the_tidying(self) -> None:
        """What workers clear away from time to time."""
        deadline = monotonic() + 2 * self.plan.lease + 1.0
        while any(self.ground.left().values()) and monotonic() < deadline:
            time.sleep(0.1)

    def _was_long_ago(self, moment: float) -> bool:
        return monotonic() - moment > 2 * self.plan.lease + 1.0

    def _missing(self) -> bool:
        """Whether something confirmed has not come out yet, or a settle has no answer."""
        story = Story(read(self.folder))
        over = {event.id for event in story.events if event.e == "END" or (event.e == "RAISE" and event.final)}
        answered = {event.token for event in story.of("SETTLE")}
        alive = [event for event in story.of("SETTLING") if event.p not in story.gone]
        return bool(confirmed(story) - over) or any(event.token not in answered for event in alive)

    def _tell_what_is_left(self) -> None:
        for what, count in self.ground.left().items():
            self.record("LEFT", kind=what, n=count)
        ids = sorted({event.id for event in read(self.folder) if event.e == "ENQ"})
        asyncio.run(self._read_results(ids))

    async def _read_results(self, ids: Sequence[str]) -> None:
        app = AQueue("reader", broker=self.ground.url, backend=self.ground.results_url or None)
        async with app:
            producer = app.producer()
            for id in ids:
                found = await _state(producer.store, id)
                if found is not None:
                    self.record("RESULT", id=id, value=found)
            for letter in await producer.broker.inspection.dead(limit=10_000):
                message = letter.message
                id = str(message.headers.get("id")) if isinstance(message, Message) else "?"
                self.record("DEAD", id=id, kind=letter.reason, n=letter.deliveries)


async def _state(store: Any, id: str) -> str | None:
    try:
        found = await store.get(id)
    except BadMessage:
        return "unreadable"
    return None if found is None else str(found.state)
