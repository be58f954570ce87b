"""Watching the event loop from a thread: what blocks it is named, by task, file and line.

A blocked loop loses no lease (they are renewed elsewhere, see `aqueue.leases`), but nothing else goes on meanwhile:
no other task, no timeout, no answer. So it is said while it lasts, not after. Where a task holds the interpreter itself
this thread stands still, too; then the supervisor sees that the loop does not turn.
"""

import asyncio
import logging
import sys
import threading
import time
from typing import Any, Final, Protocol

from aqueue.frames import callers, place
from aqueue.vitals import Vitals

logger = logging.getLogger("aqueue.worker")

#: Seconds between two turns of the loop that are looked for.
_TURN: Final = 0.25


class Watched(Protocol):
    """Whose tasks run on the loop. Its methods are called in the guardian's thread."""

    #: Runs that have ended.
    ended: int

    def name_of(self, job: "asyncio.Task[Any]") -> str | None:
        """Which task of the app this is."""
        ...

    def first_deadline(self) -> float:
        """When the first of the running tasks must have ended, by ``time.monotonic``; 0: none has to."""
        ...


class Guardian:
    """Watches the loop on which it is made. ``patience``: seconds after which the loop counts as blocked."""

    def __init__(self, watched: Watched, vitals: Vitals | None = None, *, patience: float = 1.0) -> None:
        self._watched = watched
        self._vitals = vitals
        self._patience = patience
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._turned = time.monotonic()
        self._timer: asyncio.TimerHandle | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="aqueue-guardian", daemon=True)
        #: How often the loop was blocked, and for how many seconds in all.
        self.stalls = 0
        self.stalled_seconds = 0.0
        #: What blocked it last.
        self.stall = ""

    def start(self) -> None:
        self._turn()
        self._thread.start()

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._stop.set()
        self._thread.join(timeout=1.0)

    @property
    def late(self) -> float:
        """For how many seconds the loop has not turned, though it should have."""
        return max(0.0, time.monotonic() - self._turned - _TURN)

    def _turn(self) -> None:
        """On the loop: it turns."""
        self._turned = time.monotonic()
        if self._vitals is not None:
            self._vitals.tick = self._turned
        self._timer = self._loop.call_later(_TURN, self._turn)

    def _watch(self) -> None:
        while not self._stop.wait(_TURN):
            if self._vitals is not None:
                self._vitals.deadline = self._watched.first_deadline()
                self._vitals.ended = self._watched.ended
            if self.late > self._patience:
                self._see_it_through()

    def _see_it_through(self) -> None:
        """Say what blocks the loop, and when that has ended, how long it took."""
        began, where = self._turned, self._where()
        self.stalls += 1
        self.stall = where
        if self._vitals is not None:
            self._vitals.stalled(where)
        logger.warning(
            "the event loop is blocked since %.1f s by %s; other tasks wait. Call what blocks by `await "
            "asyncio.to_thread(...)`, or make the task a plain `def`",
            self.late,
            where,
        )
        while self._turned == began and not self._stop.wait(_TURN):
            pass
        blocked = max(0.0, self._turned - began - _TURN)
        self.stalled_seconds += blocked
        if not self._stop.is_set():
            logger.warning("the event loop turns again after %.1f s blocked by %s", blocked, where)

    def _where(self) -> str:
        task = asyncio.current_task(self._loop)
        name = None if task is None else self._watched.name_of(task)
        frame = sys._current_frames().get(self._loop_thread)  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - documented
        who = "something that is no task" if name is None else name
        return who if frame is None else f"{who} at {place(callers(frame))}"
