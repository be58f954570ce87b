"""From a delivery to its verdict: decode, admit, run inside the onion, conclude.

`Runs` is the middle of the worker's road (see `aqueue.worker`). Every delivery that enters leaves as one
verdict in the settler's mailbox, or is dropped when its lease was lost meanwhile.
"""

import asyncio
import logging
import os
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final

from aqueue.admission import UnknownTasks, admit, killed_by_reading, repeated, understand
from aqueue.app import AQueue
from aqueue.broker import Ack, Broker, Delivery, Presence, Release
from aqueue.context import Context, enter
from aqueue.control import Revocations
from aqueue.errors import BrokerUnavailable, StoreUnavailable, TimeLimitExceeded, WorkerLostError
from aqueue.guardian import Guardian
from aqueue.leases import LeaseKeeper
from aqueue.outcome import Dead, Done, Failed, GiveBack, Outcome, PutOff, Revoked, fold
from aqueue.pidbox import Revoked as RevokedIds
from aqueue.protocol import Request
from aqueue.results import ResultStore
from aqueue.retry import Retry
from aqueue.run import Run, TimeLimits, warned
from aqueue.runners import Runners
from aqueue.saferepr import printable
from aqueue.settler import Settlement, Settler
from aqueue.slots import Slots
from aqueue.suspects import Suspects
from aqueue.task import Kind, Task
from aqueue.verdicts import Verdicts, outcome_of
from aqueue.vitals import Vitals

logger = logging.getLogger("aqueue.worker")

#: Seconds in which what is interrupted for the last time may still end by itself.
_LAST_CHANCE: Final = 0.1
#: Why a run ends of which somebody has said that it shall.
CANCELLED: Final = "cancelled"


class Runs:
    """The runs of one worker. Everything here happens on its event loop."""

    def __init__(
        self,
        app: AQueue,
        worker: str,
        state: Mapping[str, Any],
        broker: Broker,
        store: ResultStore,
        slots: Slots,
        runners: Runners,
        *,
        queues: Sequence[str] = (),
        max_stall: float = 300.0,
        vitals: Vitals | None = None,
    ) -> None:
        self._app = app
        self._worker = worker
        self._queues = queues
        self._started = time.time()
        self._state = state
        self._broker = broker
        self._store = store
        self._slots = slots
        self._runners = runners
        self._call = fold(app.middleware, runners.run)
        self._verdicts = Verdicts(app.settings, store, worker)
        self._unknown = UnknownTasks()
        self._loop = asyncio.get_running_loop()
        self._limits = TimeLimits(app.settings, self._loop, self._report_stuck)
        self.settler = Settler(broker, store, self._settled)
        self.guardian = Guardian(self, vitals)
        self.leases = LeaseKeeper(
            broker,
            self._lost,
            hangs=lambda: self.guardian.late > max_stall,
            presence=self.presence,
            vitals=vitals,
        )
        self.suspects = Suspects(
            broker.losses, self._is_all_that_is_left, last=app.settings.max_deliveries, links_count=broker.pushes
        )
        #: Tasks that are cancelled.
        self.revocations = Revocations(broker.now)
        #: By receipt, from the start of a run until its verdict is posted.
        self.active: dict[str, Run] = {}
        #: Runs that were told to end and go on; their slots and leases stay taken until they do end.
        self.stuck: set[Run] = set()
        #: Receipts of messages on their way back for want of a slot. What is claimed before they are there again
        #: overtakes them.
        self.returning: set[str] = set()
        #: Runs that have ended.
        self.ended = 0
        #: Set when a slot has become free, or a verdict is settled.
        self.room = asyncio.Event()
        #: Set when runs that do not end hold every slot of a kind: only a new process helps.
        self.exhausted = asyncio.Event()
        #: Fails when something in here is broken.
        self.broken: asyncio.Future[None] = self._loop.create_future()

    # --- in ---

    @property
    def holds_back(self) -> bool:
        """Whether nothing is to be claimed: messages are on their way back, a suspect is here, or settling lags."""
        return bool(self.returning or self.suspects.held or self.settler.backlog > self._slots.total)

    def accept(self, deliveries: Sequence[Delivery]) -> None:
        """Start what can run, conclude what can't, give back what has no free slot."""
        now, started = self._broker.now(), self._loop.time()
        begun: list[Run] = []
        met: defaultdict[str, set[Kind]] = defaultdict(set)
        self.leases.hold(deliveries)
        for delivery in deliveries:
            lost_before = delivery.deliveries > 1
            if lost_before and self.suspects.turns_away(delivery):
                self._return(delivery)
                continue
            admitted = self._admit(delivery, now)
            if admitted is None:
                continue
            request, task = admitted
            met[delivery.message.queue].add(task.definition.kind)
            if not self._slots.take(task.definition.kind):
                self._return(delivery)
                continue
            run = self._start(delivery, request, task, started)
            if not (lost_before and self.suspects.meet(delivery)):
                begun.append(run)
        for queue, kinds in met.items():
            self._slots.meet(queue, frozenset(kinds))
        if begun:
            # A process's time begins later, see `_take_process`.
            self._limits.watch([run for run in begun if run.task.definition.kind != "process"])

    def _admit(self, delivery: Delivery, now: float) -> tuple[Request, Task[..., Any]] | None:
        """What is to be run; None when it isn't, and that is concluded."""
        settings = self._app.settings
        killed = killed_by_reading(delivery, settings) if delivery.deliveries > 1 else None
        request = killed or understand(delivery, self._app.serializer)
        if isinstance(request, Dead):
            self._conclude(delivery, None, None, request)
            return None
        revoked = self._revoked(request) if self.revocations.known else None
        task = revoked or admit(delivery, request, self._app.tasks, settings, now)
        if isinstance(task, Task):
            return request, task
        self._conclude(delivery, request, None, task)
        if isinstance(task, PutOff):
            self._unknown.tell(request, task.delay)
        self._tell(Context(request, deliveries=delivery.deliveries, worker=self._worker), task, 0.0)
        return None

    def _return(self, delivery: Delivery) -> None:
        """To the front, as it came: another worker, or this one later, may run it."""
        self.returning.add(delivery.receipt)
        self.settler.post(delivery, Release())

    def _revoked(self, request: Request) -> Revoked | None:
        """That a task is cancelled."""
        found = self.revocations.find(request.id)
        return None if found is None else Revoked(found.reason)

    def revoke(self, revoked: RevokedIds) -> None:
        """Tasks are cancelled: they don't begin any more, and those to be ended that run are ended."""
        if not revoked:
            return
        self.revocations.add(revoked)
        for run in list(self.active.values()):
            found = revoked.get(run.request.id)
            if found is not None and found.terminate:
                run.end(CANCELLED)

    def _start(self, delivery: Delivery, request: Request, task: Task[..., Any], started: float) -> Run:
        context = Context(
            request,
            deliveries=delivery.deliveries,
            receipt=delivery.receipt,
            max_attempts=(task.definition.retry or Retry.none).attempts,
            worker=self._worker,
            state=self._state,
            reporter=self,
            loop=self._loop,
        )
        run = Run(delivery, request, task, context, started, self._limits)
        self.active[delivery.receipt] = run
        run.job = self._loop.create_task(self._perform(run))
        return run

    # --- run ---

    async def _perform(self, run: Run) -> None:
        try:
            enter(run.context)
            run.begun = True
            running = self._outcome(run)
            self._finish(run, await (running if self._limits.soft(run) is None else warned(running, run)))
            if self.stuck:
                self.stuck.discard(run)
        except Exception as error:  # noqa: BLE001 - a bug in here ends the worker
            if not self.broken.done():
                self.broken.set_exception(error)

    async def _outcome(self, run: Run) -> Outcome | None:
        """How the run ended; None when the message is no longer ours to settle."""
        try:
            too_early = run.context.cancel_reason
            if too_early is not None:
                return self._interrupted(run, asyncio.CancelledError(too_early))
            if self._app.gates or run.is_special or self.suspects.held or self.revocations.known:
                refused = await self._refused(run)
                if refused is not None:
                    return refused
            request = run.request
            run.context.args, run.context.kwargs = run.task.codec.decode(request.args, request.kwargs)
            if run.task.definition.at_most_once and not await self._lets_go(run):
                return None
            if self._app.settings.track_started and self._verdicts.keeps_result(request, run.task):
                await self._report_start(request)
            value = await self._call(run.context)
            return self._timed_out(run, None) if run.context.cancel_reason == "timeout" else Done(value)
        except BaseException as error:  # noqa: BLE001 - whatever a task raises is its outcome
            return self._interrupted(run, error)

    async def _refused(self, run: Run) -> Outcome | None:
        """What keeps it from running after all; else it has all that it needs."""
        if run.delivery.deliveries > 1 or run.request.message.redelivered:
            again = await self._repeated(run.request, run.task)
            if again is not None:
                return again
        if self.suspects.held is run.delivery:
            await self._wait_to_be_alone(run)
        if run.task.definition.kind == "process":
            await self._take_process(run)
        for gate in self._app.gates:
            refused = await gate(run.context)
            if refused is not None:
                return refused
        return self._revoked(run.request)

    async def _lets_go(self, run: Run) -> bool:
        """Settle the message before its task begins; False when nobody can say that it will not come again."""
        run.let_go = True  # what is settled by ourselves is not lost to us
        try:
            run.let_go = await self._broker.let_go(run.delivery)
        except BrokerUnavailable as error:
            run.let_go = False
            logger.error("%s[%s] is not run here: %s", run.request.task, run.request.id, error)
        self.leases.drop(run.delivery)
        return run.let_go

    async def _take_process(self, run: Run) -> None:
        """Its time begins when its process is ready: imports may take longer than the task."""
        await self._runners.take(run.context)
        run.started = self._loop.time()
        self._limits.watch([run])

    async def _wait_to_be_alone(self, run: Run) -> None:
        """What may kill this worker; its time begins afterwards."""
        await self.suspects.wait()
        if run.task.definition.kind != "process":
            run.started = self._loop.time()
            self._limits.watch([run])

    def _is_all_that_is_left(self) -> bool:
        """Whether one run is under way, and all others are settled."""
        return len(self.active) == 1 and not self.settler.backlog

    def stop_waiting(self) -> None:
        """Give a suspect that waits for its turn back."""
        if self.suspects.held is not None and self.suspects.waits:
            self.active[self.suspects.held.receipt].end("shutdown")

    async def _repeated(self, request: Request, task: Task[..., Any]) -> Outcome | None:
        kept = not self._store.reply_to and self._verdicts.keeps_result(request, task)
        return await repeated(request, self._store) if kept else None

    def _interrupted(self, run: Run, error: BaseException) -> Outcome | None:
        reason = run.context.cancel_reason
        if reason == "timeout":
            return self._timed_out(run, error)
        if reason == CANCELLED:
            return self._revoked(run.request) or Revoked(CANCELLED)
        if reason is None or not isinstance(error, asyncio.CancelledError):
            return outcome_of(error, run.request, run.task)
        return GiveBack() if reason == "shutdown" else None

    def _timed_out(self, run: Run, error: BaseException | None) -> Outcome:
        """The outcome of a run past its hard limit, however it ended then."""
        exceeded = TimeLimitExceeded(self._limits.hard(run))
        if error is not None:
            exceeded = exceeded.with_traceback(error.__traceback__)
        if not isinstance(error, asyncio.CancelledError):
            exceeded.__cause__ = error
        return outcome_of(exceeded, run.request, run.task)

    async def _report_start(self, request: Request) -> None:
        try:
            await self._store.put([self._verdicts.started(request)])
        except StoreUnavailable as error:  # the task matters more than the word that it began
            logger.warning("%s[%s] runs, but is not recorded as started: %s", request.task, request.id, error)

    async def report(self, request: Request, state: str, meta: Any) -> None:
        """Store a state that a task tells of itself. Raises EncodeError, MessageTooLarge, StoreUnavailable."""
        await self._store.put([self._verdicts.own_state(request, state, meta)])

    # --- out ---

    def _finish(self, run: Run, outcome: Outcome | None) -> None:
        if run.timer is not None:
            run.timer.cancel()
        if self.active.pop(run.delivery.receipt, None) is None:
            return  # it was given up
        self.ended += 1
        self._slots.give(run.task.definition.kind)
        if run.task.definition.kind == "process":
            self._runners.give(run.context)
        if self.suspects.held is not None:
            self.suspects.ended(run.delivery)
        self.room.set()
        if outcome is not None:
            if run.let_go:
                self._conclude_let_go(run, outcome)
            else:
                self._conclude(run.delivery, run.request, run.task, outcome)
            if self._app.observers:
                self._tell(run.context, outcome, self._loop.time() - run.started)

    def _conclude(
        self, delivery: Delivery, request: Request | None, task: Task[..., Any] | None, outcome: Outcome
    ) -> None:
        self.settler.post(delivery, self._verdicts.of(delivery, request, task, outcome, self._broker.now()))
        if isinstance(outcome, Dead):
            _log_dead(delivery, request, outcome)

    def _conclude_let_go(self, run: Run, outcome: Outcome) -> None:
        """There is no message any more that could be given back or buried."""
        if isinstance(outcome, GiveBack):
            outcome = Failed(WorkerLostError("it was interrupted, and may not begin twice"))
        elif isinstance(outcome, Dead):
            outcome = Failed(outcome.error or WorkerLostError(outcome.detail))
        verdict = self._verdicts.of(run.delivery, run.request, run.task, outcome, self._broker.now())
        assert isinstance(verdict, Ack), "the others are made failures above"
        self.settler.post_let_go(verdict)

    def _report_stuck(self, run: Run) -> None:
        kind = run.task.definition.kind
        self.stuck.add(run)
        held = sum(stuck.task.definition.kind == kind for stuck in self.stuck)
        logger.error(
            "%s[%s] was told to end (%s) and still runs after %.1f s, %s; it holds its slot and its message until it "
            "ends, and %d of %d %s slots are held so",
            run.request.task,
            run.request.id,
            run.context.cancel_reason,
            self._loop.time() - run.started,
            self._runners.where(run.task, run.context, run.job),
            held,
            self._slots.sizes[kind],
            kind,
        )
        if held >= self._slots.sizes[kind]:
            self.exhausted.set()

    async def give_up(self) -> None:
        """At the worker's end: conclude what ran out of time or was cancelled, and ran on; the rest stays leased."""
        for run in self.active.values():
            run.interrupt()  # ends the wait for a thread
        jobs = [run.job for run in self.active.values() if run.job is not None]
        if jobs:
            await asyncio.wait(jobs, timeout=_LAST_CHANCE)
        self.stuck.update(self.active.values())
        for run in list(self.active.values()):
            if run.context.cancel_reason in ("timeout", CANCELLED):
                self._finish(run, self._interrupted(run, asyncio.CancelledError()))

    def _tell(self, context: Context, outcome: Outcome, seconds: float) -> None:
        """Tell the observers of a run, or (after 0.0 s) of a message that was not run."""
        for observer in self._app.observers:
            try:
                observer(context, outcome, seconds)
            except Exception:
                logger.exception("observer %r failed on %s[%s]", observer, context.task, context.id)

    def _settled(self, settlements: Sequence[Settlement]) -> None:
        for delivery, _ in settlements:
            self.leases.drop(delivery)
            self.returning.discard(delivery.receipt)
        self.suspects.notice()
        self.room.set()

    def _lost(self, deliveries: Sequence[Delivery]) -> None:
        """Told by the lease keeper's thread: others may run these now, so ours are stopped."""
        self._loop.call_soon_threadsafe(self._drop, deliveries)

    def _drop(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self.leases.drop(delivery)
            run = self.active.get(delivery.receipt)
            if run is not None and not run.let_go:
                logger.error("lost the lease of %s[%s]; its run is stopped", run.request.task, run.request.id)
                run.end("lease lost")

    # --- asked by guardian and lease keeper, in their threads ---

    def presence(self) -> Presence:
        """What people may want to know of this worker."""
        return Presence(
            worker=self._worker,
            pid=os.getpid(),
            started=self._started,
            told=time.time(),
            queues=self._queues,
            slots={str(kind): size for kind, size in self._slots.sizes.items()},
            running=len(self.active),
            ended=self.ended,
            stalls=self.guardian.stalls,
            stalled_seconds=round(self.guardian.stalled_seconds, 3),
            stall=self.guardian.stall,
        )

    def name_of(self, job: "asyncio.Task[Any]") -> str | None:
        """``task[id]`` of the run that this is."""
        for run in list(self.active.values()):
            if run.job is job:
                return f"{printable(run.request.task)}[{printable(run.request.id)}]"
        return None

    def first_deadline(self) -> float:
        """By the loop's clock, which is ``time.monotonic``."""
        running = [run for run in list(self.active.values()) if run not in self.stuck]
        return min((run.started + self._limits.hard(run) for run in running), default=0.0)


def _log_dead(delivery: Delivery, request: Request | None, outcome: Dead) -> None:
    what = "a message" if request is None else f"{request.task}[{request.id}]"
    logger.error(
        "buried %s from queue %s: %s: %s (see `aqueue dead list`)",
        printable(what),
        delivery.message.queue,
        outcome.reason,
        printable(outcome.detail, 500),
    )
