"""Renewing leases from a thread of its own, so that a busy event loop doesn't lose its messages.

A lease says that the holder lives, nothing about how long the work takes. What the broker says is no
longer ours is reported at once, so that the work can be stopped.

A task that holds the interpreter stops this thread, too. What is held is therefore known to the supervisor
(`aqueue.vitals`), which renews when this thread is late.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from aqueue.broker import Broker, Delivery, Presence
from aqueue.errors import BrokerUnavailable
from aqueue.vitals import Vitals

logger = logging.getLogger("aqueue.leases")

#: Renewals in the time of one lease.
_BEATS: Final = 3
#: Seconds between two words of a worker about itself.
_TELLING: Final = 30.0


class LeaseKeeper:
    """Renews every delivery it holds, three times in the length of a lease.

    `hold` and `drop` are called from the event loop. ``lost`` and ``hangs`` are called in the thread; while
    ``hangs`` says that the holder hangs, nothing is renewed.
    """

    def __init__(
        self,
        broker: Broker,
        lost: Callable[[Sequence[Delivery]], None],
        *,
        hangs: Callable[[], bool] = lambda: False,
        presence: Callable[[], Presence] | None = None,
        vitals: Vitals | None = None,
    ) -> None:
        self._broker = broker
        self._lost = lost
        self._hangs = hangs
        self._presence = presence
        #: What was told last, and when it is to be told again.
        self._told: Presence | None = None
        self._tell_at = 0.0
        self._vitals = vitals
        #: By receipt; the dict's own operations are atomic, so loop and thread share it without a lock.
        self._held: dict[str, Delivery] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="aqueue-leases", daemon=True)

    def start(self) -> None:
        self._has_beaten()
        self._thread.start()

    def hold(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            self._held[delivery.receipt] = delivery
        if self._vitals is not None:
            for delivery in deliveries:
                self._vitals.hold(delivery.receipt)

    def drop(self, delivery: Delivery) -> None:
        self._held.pop(delivery.receipt, None)
        if self._vitals is not None:
            self._vitals.drop(delivery.receipt)

    def stop(self) -> None:
        """Stop renewing; what is still held comes back when its lease ends."""
        self._stop.set()
        self._thread.join(timeout=1.0)

    def _beat(self) -> None:
        with suppress(BrokerUnavailable):  # it is told later
            self._tell()
        while not self._stop.wait(self._broker.lease / _BEATS):
            if self._hangs():
                logger.error("leases are not renewed any more: the event loop has been blocked for too long")
                continue
            held = list(self._held.values())
            try:
                lost = self._broker.extend(held) if held else ()
                self._tell()
            except BrokerUnavailable as error:
                logger.warning("leases not renewed: %s", error)
                continue
            self._has_beaten()
            lost = [delivery for delivery in lost if self._held.pop(delivery.receipt, None) is not None]
            if lost:
                self._lost(lost)
        if self._told is not None:
            with suppress(BrokerUnavailable):  # it is forgotten soon
                self._broker.present(self._told, 0.0)

    def _tell(self) -> None:
        """Say of this worker what people may want to know: now and then, and when its loop was blocked."""
        if self._presence is None:
            return
        presence, now = self._presence(), time.monotonic()
        if now >= self._tell_at or (self._told is not None and presence.stalls != self._told.stalls):
            self._broker.present(presence, 3 * _TELLING)
            self._told, self._tell_at = presence, now + _TELLING

    def _has_beaten(self) -> None:
        if self._vitals is not None:
            self._vitals.beat = time.monotonic()
