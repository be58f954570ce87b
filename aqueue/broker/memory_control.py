"""Remote control within one process."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from aqueue.broker.control import MOST_KEPT, Inbox
from aqueue.pidbox import Revocation, Revoked


class MemoryRevocations:
    """The shared state: what is revoked, and who listens."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        #: With its end, in monotonic seconds.
        self._kept: dict[str, tuple[float, Revocation]] = {}
        self.listeners: set[Callable[[Revoked], None]] = set()

    def add(self, revoked: Revoked) -> None:
        now = time.monotonic()
        with self._lock:
            self._kept |= {id: (now + revocation.keep, revocation) for id, revocation in revoked.items()}
            self._kept = {id: kept for id, kept in self._kept.items() if kept[0] > now}
            if len(self._kept) > MOST_KEPT:
                last = sorted(self._kept, key=lambda one: self._kept[one][0])[-MOST_KEPT:]
                self._kept = {id: self._kept[id] for id in last}
        for tell in tuple(self.listeners):
            tell(revoked)

    def kept(self) -> Revoked:
        now = time.monotonic()
        with self._lock:
            return {
                id: Revocation(one.reason, one.terminate, ends - now)
                for id, (ends, one) in self._kept.items()
                if ends > now
            }


class MemoryControl:
    """A `aqueue.broker.control.Control` in this process."""

    durable = True  # as everything here: until the process ends

    def __init__(self, revocations: MemoryRevocations) -> None:
        self._revocations = revocations
        self._inbox = Inbox()
        self._listener: Callable[[Revoked], None] | None = None

    async def revoke(self, ids: Sequence[str], revocation: Revocation) -> None:
        self._revocations.add(dict.fromkeys(ids, revocation))

    async def revoked(self) -> Revoked:
        return self._revocations.kept()

    async def news(self, wait: float) -> Revoked:
        if self._listener is None:
            loop = asyncio.get_running_loop()

            def tell(revoked: Revoked) -> None:
                with suppress(RuntimeError):  # that loop is closed: nobody listens there
                    loop.call_soon_threadsafe(self._inbox.put, revoked)

            self._listener = tell
            self._revocations.listeners.add(tell)
        return await self._inbox.take(wait)

    async def close(self) -> None:
        if self._listener is not None:
            self._revocations.listeners.discard(self._listener)
            self._listener = None
