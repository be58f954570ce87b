"""Which tasks are cancelled, as far as this worker knows; and the duty that keeps it up to date.

The road looks into `Revocations`, a dict in memory. `Following` fills it: with everything that is kept before the
first claim, then with each word as it comes, and from time to time with everything once more.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Final, NoReturn

from aqueue.backoff import pause
from aqueue.broker.control import Control
from aqueue.errors import BrokerUnavailable, ControlRefused
from aqueue.pidbox import Revocation, Revoked

logger = logging.getLogger("aqueue.worker")

#: Of more, those are forgotten whose time ends first: about 10 MB.
_MOST_KNOWN: Final = 50_000
#: Seconds for which nothing is claimed while the word of what is cancelled can't be had.
_PATIENCE: Final = 10.0
#: Longest pause (seconds) between tries to listen again.
_LONGEST_PAUSE: Final = 1.0
#: Seconds until permissions may have changed.
_ASK_AGAIN: Final = 300.0


class Revocations:
    """By task id, with an end; empty as long as nobody cancels anything."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        #: When it ends, by the clock of ``now``.
        self.known: dict[str, tuple[float, Revocation]] = {}

    def find(self, task_id: str) -> Revocation | None:
        known = self.known.get(task_id)
        if known is None:
            return None
        ends, revocation = known
        if ends > self._now():
            return revocation
        del self.known[task_id]
        return None

    def add(self, revoked: Revoked) -> None:
        if not revoked:
            return
        now = self._now()
        self.known |= {id: (now + revocation.keep, revocation) for id, revocation in revoked.items()}
        if len(self.known) > _MOST_KNOWN:
            last = sorted(self.known.items(), key=lambda item: item[1][0])[-_MOST_KNOWN // 2 :]
            forgotten = sum(ends > now for ends, _ in self.known.values()) - sum(ends > now for _, (ends, _) in last)
            if forgotten > 0:
                logger.warning("%d cancelled tasks are forgotten here: over %d at once", forgotten, _MOST_KNOWN)
            self.known = dict(last)


class Following:
    """See the module's text. ``obey`` is told what is revoked; ``every``: seconds between two looks at everything."""

    def __init__(self, control: Control, obey: Callable[[Revoked], None], every: float) -> None:
        self._control = control
        self._obey = obey
        self._every = every
        #: Set while nothing can have been missed, or nobody wants to wait for that any longer.
        self.up_to_date = asyncio.Event()
        self._patience: asyncio.TimerHandle | None = None

    async def run(self) -> NoReturn:
        """Until cancelled."""
        failures = 0
        self._be_patient()
        try:
            while True:
                try:
                    await self._catch_up()
                    failures = 0
                    await self._listen()
                except ControlRefused as error:
                    logger.error("working without word of cancelled tasks: %s", error)
                    self._go_on()
                    await asyncio.sleep(_ASK_AGAIN)
                except BrokerUnavailable as error:
                    if not failures:
                        logger.warning("the broker is away, there is no word of cancelled tasks: %s", error)
                        self._be_patient()
                    failures += 1
                    await asyncio.sleep(pause(failures, first=0.05, longest=_LONGEST_PAUSE))
        finally:
            self._stop_timer()

    def _be_patient(self) -> None:
        """Something may have been missed: nothing is claimed for a while."""
        self._stop_timer()
        self.up_to_date.clear()
        self._patience = asyncio.get_running_loop().call_later(_PATIENCE, self._lose_patience)

    def _lose_patience(self) -> None:
        logger.error("working without word of cancelled tasks for now: none can be had for %g s", _PATIENCE)
        self._go_on()

    def _go_on(self) -> None:
        self._stop_timer()
        self.up_to_date.set()

    def _stop_timer(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    async def _catch_up(self) -> None:
        """Listen first and read second, so that nothing is missed in between."""
        self._obey(await self._control.news(0.0))
        self._obey(await self._control.revoked())
        self._go_on()

    async def _listen(self) -> NoReturn:
        loop = asyncio.get_running_loop()
        while True:
            look_again = loop.time() + self._every * random.uniform(0.75, 1.0)
            while (left := look_again - loop.time()) > 0:
                self._obey(await self._control.news(left))
            self._obey(await self._control.revoked())
