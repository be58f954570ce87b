"""The worker: fetch -> decode -> admit -> run -> settle.

::

    fetch ──> decode ──> admit ──> run ──> settle
    broker    bytes to   is it     gates,   mailbox: results are stored, the broker settles, in batches
              Request    time?     onion,
                         ours?     runner
    `Intake`  `aqueue.admission`   `Runs`   `aqueue.verdicts`, `Settler`

What comes out of a run is one `Outcome`; `Verdicts` turns it into what the broker is told. A lost broker is
a pause, in `Intake`. Anything else that goes wrong in here is a bug: it ends the worker loudly, a
supervisor starts it again, and leases bring the work back.
"""

import asyncio
import logging
import os
from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final, NoReturn

from aqueue import checks
from aqueue.app import AQueue
from aqueue.backoff import pause
from aqueue.broker import Broker, Delivery
from aqueue.control import Following
from aqueue.errors import BrokerUnavailable
from aqueue.identifiers import node_name
from aqueue.process_pool import ProcessPool, check_not_in_a_child
from aqueue.run import Run
from aqueue.runners import Runners, ThreadPool
from aqueue.runs import Runs
from aqueue.slots import Slots
from aqueue.task import Kind
from aqueue.vitals import Vitals
from aqueue.watchdog import Watchdog

logger = logging.getLogger("aqueue.worker")

#: Seconds one fetch waits for messages; they wake it.
_WAIT: Final = 15.0
#: Longest pause (seconds) between tries to reach a lost broker, shortened at random.
_LONGEST_PAUSE: Final = 5.0
#: Seconds that cancelled runs, and what is left to settle, may take at the end.
_FAREWELL: Final = 5.0


class Worker:
    """Runs an app's tasks until stopped. Used once, on one event loop.

    ``queues`` defaults to every queue that the app names. ``concurrency`` bounds the coroutines, ``threads``
    the plain functions that run at once, in threads; ``processes``, by default one for each CPU, those that run in
    child processes. ``grace`` is how long (seconds) running tasks may go on after `stop`. A loop
    that has been blocked for ``max_stall`` seconds loses its messages to others. ``vitals`` is shared with a
    supervisor. With ``force`` it starts whatever the checks refuse.
    """

    def __init__(
        self,
        app: AQueue,
        *,
        queues: Sequence[str] = (),
        concurrency: int = 100,
        threads: int = 16,
        processes: int | None = None,
        name: str = "worker",
        grace: float = 25.0,
        max_stall: float = 300.0,
        vitals: Vitals | None = None,
        force: bool = False,
    ) -> None:
        check_not_in_a_child()
        self.app = app
        self.queues = list(queues) or app.queues()
        self.name = node_name(name)
        self.grace = grace
        self.max_stall = max_stall
        self._vitals = vitals
        self.force = force
        self.slots: dict[Kind, int] = {
            "coroutine": concurrency,
            "thread": threads,
            "process": processes or os.cpu_count() or 1,
        }
        self._stopping = asyncio.Event()
        self._hurrying = asyncio.Event()
        self._stuck: Collection[Run] = ()

    @property
    def stuck(self) -> int:
        """Runs that were told to end and go on: their slots are taken. After `run` they may still go on."""
        return len(self._stuck)

    def stop(self) -> None:
        """Claim nothing more, and end when the running tasks have; called again, give them back at once."""
        if self._stopping.is_set():
            self._hurrying.set()
        self._stopping.set()

    async def run(self) -> None:
        """Work until `stop`. A lost broker is waited for; a bug is raised, and so is what the checks refuse."""
        async with AsyncExitStack() as stack:
            producer = (await stack.enter_async_context(self.app)).producer()
            producer.broker.holder = self.name
            await checks.at_start(self.app, self.queues, self.slots, force=self.force)
            state = await self._enter_lifespans(stack)
            threads = ThreadPool(self.slots["thread"], asyncio.get_running_loop())
            stack.callback(threads.close)
            slots = Slots(self.slots, whole=producer.broker.pushes)
            processes = ProcessPool(self.app.tasks, self.app.settings)
            stack.push_async_callback(processes.close)
            runners = Runners(threads, processes, self.app.tasks)
            runs = Runs(
                self.app,
                self.name,
                state,
                producer.broker,
                producer.store,
                slots,
                runners,
                queues=self.queues,
                max_stall=self.max_stall,
                vitals=self._vitals,
            )
            self._stuck = runs.stuck
            for watching in (runs.leases, runs.guardian):
                watching.start()
                stack.callback(watching.stop)
            following = Following(producer.control, runs.revoke, producer.broker.lease)
            intake = Intake(producer.broker, self.queues, slots, runs, following.up_to_date)
            await self._work(runs, intake, following)

    @asynccontextmanager
    async def running(self) -> AsyncGenerator["Worker"]:
        """Work beside other code on this loop, until the block ends; what breaks the worker is raised there."""
        working = asyncio.create_task(self.run())
        working.add_done_callback(self._ended_beside)
        try:
            yield self
        finally:
            self.stop()
            await working

    def _ended_beside(self, working: "asyncio.Task[None]") -> None:
        if not self._stopping.is_set() and not working.cancelled():
            logger.critical("%s has ended, nothing is run any more", self.name, exc_info=working.exception())

    async def _enter_lifespans(self, stack: AsyncExitStack) -> Mapping[str, Any]:
        state: dict[str, Any] = {}
        for lifespan in self.app.lifespans:
            made: Mapping[str, Any] | None = await stack.enter_async_context(lifespan(self.app))
            state.update(made or {})
        return state

    async def _work(self, runs: Runs, intake: "Intake", following: Following) -> None:
        logger.info("%s is ready", self.name)
        if self._vitals is not None:
            self._vitals.ready = True
        taking = asyncio.create_task(intake.run())
        settling = asyncio.create_task(runs.settler.run())
        hearing = asyncio.create_task(following.run())
        stopping = asyncio.create_task(self._stopping.wait())
        watching = asyncio.create_task(Watchdog(intake.broker, intake).run())
        exhausted = asyncio.create_task(self._exhausted(runs))
        try:
            watched: list[asyncio.Future[Any]] = [taking, settling, hearing, stopping, watching, exhausted, runs.broken]
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _cancel(taking, stopping, watching, exhausted)
            if self._vitals is not None:
                self._vitals.ready = False
            runs.stop_waiting()
            if self._stopping.is_set():
                await self._let_finish(runs)
            await _end(runs)
            runs.settler.close()
            await asyncio.wait([settling], timeout=_FAREWELL)
            await _cancel(settling, hearing)
        for part in (taking, settling, hearing, watching, runs.broken):
            if part.done() and not part.cancelled():
                part.result()
        if runs.settler.backlog:
            logger.error("%d tasks could not be settled; their leases will end by themselves", runs.settler.backlog)

    async def _exhausted(self, runs: Runs) -> None:
        """Stop when what does not end holds every slot of a kind, if a supervisor will start another worker."""
        await runs.exhausted.wait()
        if self._vitals is None:
            logger.error("all slots of a kind are held by tasks that do not end; nothing helps but to start again")
            await asyncio.Event().wait()
        logger.error("all slots of a kind are held by tasks that do not end; another process takes over")
        self.stop()

    async def _let_finish(self, runs: Runs) -> None:
        """Give running tasks their time, unless asked to hurry."""
        if runs.active:
            logger.info("waiting up to %g s for %d running tasks", self.grace, len(runs.active))
        hurrying = asyncio.create_task(self._hurrying.wait())
        jobs = _jobs(runs)
        if jobs:
            watched: list[asyncio.Future[Any]] = [asyncio.gather(*jobs), hurrying]
            await asyncio.wait(watched, timeout=self.grace, return_when=asyncio.FIRST_COMPLETED)
        await _cancel(hurrying)


async def _end(runs: Runs) -> None:
    """Stop what still runs; its messages go back to the front, uncounted."""
    for run in list(runs.active.values()):
        run.end("shutdown")
    if jobs := _jobs(runs):
        await asyncio.wait(jobs, timeout=_FAREWELL)
    await runs.give_up()
    if runs.stuck:
        logger.error(
            "%d tasks ignore that they were told to end; those that ran out of time are settled so, the leases of the "
            "others will end by themselves",
            len(runs.stuck),
        )


def _jobs(runs: Runs) -> "list[asyncio.Task[None]]":
    """What is worth waiting for."""
    return [run.job for run in runs.active.values() if run.job is not None and run not in runs.stuck]


async def _cancel(*tasks: "asyncio.Task[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


class Intake:
    """Claims what can be started, and pauses while the broker is away."""

    def __init__(
        self, broker: Broker, queues: Sequence[str], slots: Slots, runs: Runs, up_to_date: asyncio.Event
    ) -> None:
        self.broker = broker
        self._queues = queues
        self._slots = slots
        self._runs = runs
        #: Set while it is known which tasks are cancelled.
        self._up_to_date = up_to_date
        #: For the watchdog, see `aqueue.watchdog.Claiming`.
        self.asking: Sequence[str] = ()
        self.claimed = asyncio.get_running_loop().time()

    async def run(self) -> NoReturn:
        while True:
            queues, limit = self._slots.demand(self._queues)
            self._runs.room.clear()
            if not queues or self._runs.holds_back:
                self._is_not_idle()
                await self._runs.room.wait()
                self._is_not_idle()
            elif len(queues) == len(self._queues):
                self._runs.accept(await self._fetch(queues, limit))
            else:
                self._runs.accept(await self._fetch_until_room(queues, limit))

    async def _fetch_until_room(self, queues: Sequence[str], limit: int) -> Sequence[Delivery]:
        """Claim from some queues, but no longer than until another one may have room again."""
        fetching = asyncio.create_task(self._fetch(queues, limit))
        room = asyncio.create_task(self._runs.room.wait())
        try:
            await asyncio.wait([fetching, room], return_when=asyncio.FIRST_COMPLETED)
            return fetching.result() if fetching.done() else ()
        finally:
            await _cancel(fetching, room)

    async def _fetch(self, queues: Sequence[str], limit: int) -> Sequence[Delivery]:
        failures = 0
        while True:
            await self._up_to_date.wait()
            self.asking = queues
            try:
                found = await self.broker.fetch(queues, limit, _WAIT)
            except BrokerUnavailable as error:
                self._is_not_idle()
                failures += 1
                if failures == 1:
                    logger.warning("the broker is away, waiting for it: %s", error)
                await asyncio.sleep(pause(failures, first=0.1, longest=_LONGEST_PAUSE))
            else:
                if failures:
                    logger.info("the broker is back")
                if found:
                    self._is_not_idle()
                return found

    def _is_not_idle(self) -> None:
        self.asking = ()
        self.claimed = asyncio.get_running_loop().time()
