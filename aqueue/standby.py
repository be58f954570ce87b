"""Renewing the leases of a worker process that can't, from its supervisor; loaded when that happens first."""

import logging
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from aqueue import broker as brokers
from aqueue.broker import BrokerOptions, Delivery
from aqueue.errors import AQueueError
from aqueue.protocol import Message
from aqueue.url import Url

logger = logging.getLogger("aqueue.supervisor")

_SOME_MESSAGE = Message(queue="", headers={}, body=b"")


class Standby:
    """Renews on a connection and in a thread of its own, so that the supervisor never waits for a server.

    ``hello`` is what the worker says of itself: ``broker`` (a URL) and ``lease`` (seconds).
    """

    def __init__(self, hello: Mapping[str, Any]) -> None:
        options = BrokerOptions(lease=hello["lease"], timeout=hello["timeout"])
        self._broker = brokers.from_url(Url(hello["broker"]))(options)
        self._receipts: Sequence[str] = ()
        self._wanted = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="aqueue-standby", daemon=True)
        self._thread.start()

    def renew(self, receipts: Sequence[str]) -> None:
        """Soon; while one renewal is under way, the next waits behind it."""
        self._receipts = receipts
        self._wanted.set()

    def close(self) -> None:
        self._closed = True
        self._wanted.set()

    def _work(self) -> None:
        while True:
            self._wanted.wait()
            self._wanted.clear()
            if self._closed:
                return
            deliveries = [Delivery(_SOME_MESSAGE, receipt) for receipt in self._receipts]
            try:
                if deliveries:
                    self._broker.extend(deliveries)
            except AQueueError as error:
                logger.warning("leases of a worker that stands still are not renewed: %s", error)
