"""Messages that may be what kills their workers run alone, so that nobody else's message dies with them.

Whoever was lost twice is a suspect: one of those that ran together was guilty, and the others come back with the same
count. A suspect waits, leased, until nothing else runs here and all that ended is settled; nothing else is started
until it has ended. If its worker dies now, its guilt is certain. If it succeeds its losses are forgotten.
"""

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from aqueue.broker import Delivery, Losses
from aqueue.errors import BrokerUnavailable

logger = logging.getLogger("aqueue.worker")

#: The delivery from which on a message is a suspect: its workers were lost twice.
_SUSPICIOUS: Final = 3
#: Seconds that a suspect waits for the others to end. Then it runs in their company, so that it does not starve.
PATIENCE: Final = 30.0


class Suspects:
    """At most one suspect, from its claim to its end; ``alone`` says whether nothing else is under way here.

    ``last`` is the last delivery that is run at all. Where ``links_count`` a lost link is a loss, which says nothing of
    the message: there the last delivery alone is suspect, so that a link that breaks twice leaves the fleet at work.
    """

    def __init__(self, losses: Losses, alone: Callable[[], bool], *, last: int, links_count: bool) -> None:
        self._losses = losses
        self._suspicious = max(2, last if links_count else min(_SUSPICIOUS, last))
        self._alone = alone
        #: While there is one nothing is to be claimed.
        self.held: Delivery | None = None
        #: It has not been let run yet.
        self.waits = False
        self._changed = asyncio.Event()

    def turns_away(self, delivery: Delivery) -> bool:
        """Whether it has to go back, because another suspect is here: it shall not die with that one."""
        return self.held is not None and delivery.deliveries >= self._suspicious

    def meet(self, delivery: Delivery) -> bool:
        """A message is about to be run; True, and held, if it is a suspect, which has to `wait` for that."""
        if delivery.deliveries < self._suspicious:
            return False
        self.held = delivery
        self.waits = True
        return True

    async def wait(self) -> None:
        """Until the suspect may run."""
        assert self.held is not None, "it waits"
        queue, losses = self.held.message.queue, self.held.deliveries - 1
        logger.info("a message from queue %s, whose workers were lost %d times, is to run alone", queue, losses)
        try:
            async with asyncio.timeout(PATIENCE):
                while not self._alone():
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            logger.warning(
                "a message from queue %s, whose workers were lost %d times, runs beside others, which have not ended "
                "in %g s: if this worker is lost, that counts for all of them",
                queue,
                losses,
                PATIENCE,
            )
        with suppress(BrokerUnavailable):  # then the connection is lost, and they are back
            await self._losses.give_back_untaken()
        self.waits = False

    def notice(self) -> None:
        """Something has ended, or was settled."""
        self._changed.set()

    def ended(self, delivery: Delivery) -> None:
        """A run has."""
        if self.held is delivery:
            self.held = None
            self.waits = False
        self._changed.set()
