"""No worker sits connected and idle: messages wait, slots are free, nothing is claimed, so the consumer is made anew.

Every command to a server has a deadline, and a lost link is made again by its driver; this is for what nobody has
thought of: a subscription that tells nothing, a server that delivers to the dead. After three times the worker ends,
and its supervisor starts another.
"""

import asyncio
import logging
from collections.abc import Sequence
from typing import Final, NoReturn, Protocol

from aqueue.broker import Broker
from aqueue.errors import AQueueError, BrokerUnavailable

logger = logging.getLogger("aqueue.worker")

#: Consumers made anew without any claim in between, after which the worker ends.
_TRIES: Final = 3
#: Looks in the time after which something is done.
_LOOKS: Final = 6


class WorkerStuck(AQueueError):
    """Messages wait, slots are free, and nothing could be claimed, also not by a consumer made anew."""


class Claiming(Protocol):
    """Who claims."""

    #: The queues that are asked for messages now; none while no slot is free, or the broker is away.
    asking: Sequence[str]
    #: When messages last came, or could not have come, by the loop's clock.
    claimed: float


class Watchdog:
    """See the module's text. ``patience``: seconds without a claim after which the queues are looked at."""

    def __init__(self, broker: Broker, claiming: Claiming, *, patience: float = 30.0) -> None:
        self._broker = broker
        self._claiming = claiming
        self._patience = patience
        #: How often the consumer was made anew, in all.
        self.rebuilds = 0

    async def run(self) -> NoReturn:
        """Watch until cancelled. Raises WorkerStuck."""
        tries = 0
        since = self._claiming.claimed
        while True:
            await asyncio.sleep(self._patience / _LOOKS)
            if self._claiming.claimed > since:
                tries, since = 0, self._claiming.claimed
            if asyncio.get_running_loop().time() - since < self._patience:
                continue
            since = asyncio.get_running_loop().time()
            if not await self._is_deaf():
                tries = 0
                continue
            tries += 1
            if tries > _TRIES:
                raise WorkerStuck(
                    f"nothing can be claimed from {', '.join(self._claiming.asking)}, though messages wait"
                )
            self.rebuilds += 1
            logger.error(
                "messages wait in %s, slots are free, and nothing was claimed for %g s: listening anew (%d of %d)",
                ", ".join(self._claiming.asking),
                self._patience,
                tries,
                _TRIES,
            )
            self._broker.reconnect()

    async def _is_deaf(self) -> bool:
        """Whether messages wait, and still do a moment later, without any being claimed."""
        before = self._claiming.claimed
        for _ in range(2):
            queues = self._claiming.asking
            try:
                if not queues or not await self._broker.waiting(queues):
                    return False
            except BrokerUnavailable:
                return False
            await asyncio.sleep(self._patience / _LOOKS / 4)
        return self._claiming.claimed == before
