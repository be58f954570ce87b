"""Renewing leases from a thread of its own, so that a busy event loop doesn't lose its messages.

A lease says that the holder lives, nothing about how long the work takes. What the broker says is no
longer ours is reported at once, so that the work can be stopped.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Final

from aqueue.broker import Broker, Delivery
from aqueue.errors import BrokerUnavailable

logger = logging.getLogger("aqueue.leases")

#: Renewals in the time of one lease.
_BEATS: Final = 3


class LeaseKeeper:
    """Renews every delivery it holds, three times in the length of a lease.

    `hold` and `drop` are called from the event loop. ``lost`` is called in the thread.
    """

    def __init__(self, broker: Broker, lost: Callable[[Sequence[Delivery]], None]) -> None:
        self._broker = broker
        self._lost = lost
        #: By receipt; the dict's own operations are atomic, so loop and thread share it without a lock.
        self._held: dict[str, Delivery] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="aqueue-leases", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def hold(self, delivery: Delivery) -> None:
        self._held[delivery.receipt] = delivery

    def drop(self, delivery: Delivery) -> None:
        self._held.pop(delivery.receipt, None)

    def stop(self) -> None:
        """Stop renewing; what is still held comes back when its lease ends."""
        self._stop.set()
        self._thread.join(timeout=1.0)

    def _beat(self) -> None:
        while not self._stop.wait(self._broker.lease / _BEATS):
            held = list(self._held.values())
            if not held:
                continue
            try:
                lost = self._broker.extend(held)
            except BrokerUnavailable as error:
                logger.warning("leases not renewed: %s", error)
                continue
            lost = [delivery for delivery in lost if self._held.pop(delivery.receipt, None) is not None]
            if lost:
                self._lost(lost)
