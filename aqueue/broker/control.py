"""What aqueue asks of a broker's remote control: keep what is revoked, and tell the workers.

A revocation is kept where a worker that starts later finds it, with an end, and is told to those that run. A word that
got lost only delays: a worker reads again what is kept, from time to time and after each broken connection.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, Protocol

from aqueue.errors import BrokerUnavailable
from aqueue.pidbox import Revocation, Revoked

#: Tasks that are kept as revoked; of more the ones are forgotten whose time ends first.
MOST_KEPT: Final = 10_000


class Control(Protocol):
    """The remote control of one broker, seen from one event loop."""

    #: Whether what is revoked is kept by the server, for workers that start later.
    durable: bool

    async def revoke(self, ids: Sequence[str], revocation: Revocation) -> None:
        """Keep ids as revoked, and tell every worker: ours, and Celery's on the same broker.

        Raises BrokerUnavailable, ControlRefused.
        """
        ...

    async def revoked(self) -> Revoked:
        """Everything that is kept and has not ended. Raises BrokerUnavailable, ControlRefused."""
        ...

    async def news(self, wait: float) -> Revoked:
        """What was told since the last call, waiting up to ``wait`` seconds for something; the first begins to listen.

        Raises BrokerUnavailable when something may have been missed: then ask for what is kept. Raises ControlRefused.
        """
        ...

    async def close(self) -> None:
        """Stop listening. The broker calls it when it is closed."""
        ...


class KeptControl:
    """A `Control` of two: a broker's that tells and keeps nothing, and another server's that keeps."""

    durable = True

    def __init__(self, telling: Control, keeping: Control) -> None:
        self._telling = telling
        self._keeping = keeping

    async def revoke(self, ids: Sequence[str], revocation: Revocation) -> None:
        await self._telling.revoke(ids, revocation)
        await self._keeping.revoke(ids, revocation)

    async def revoked(self) -> Revoked:
        return await self._keeping.revoked()

    async def news(self, wait: float) -> Revoked:
        return await self._telling.news(wait)

    async def close(self) -> None:
        await self._telling.close()
        await self._keeping.close()


class Inbox:
    """What was told and not asked for yet."""

    def __init__(self) -> None:
        self._told: dict[str, Revocation] = {}
        self._arrived = asyncio.Event()
        self._missed = ""

    def put(self, revoked: Revoked) -> None:
        if revoked:
            self._told.update(revoked)
            self._arrived.set()

    def miss(self, reason: str) -> None:
        """Something may get lost from now on: the next `take` says so."""
        self._missed = reason
        self._arrived.set()

    def check(self) -> None:
        """Raises BrokerUnavailable, once, when something was missed."""
        missed, self._missed = self._missed, ""
        if missed:
            raise BrokerUnavailable(missed)

    async def take(self, wait: float) -> Revoked:
        """See `Control.news`."""
        if wait > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._arrived.wait()
        self._arrived.clear()
        self.check()
        told, self._told = self._told, {}
        return told
