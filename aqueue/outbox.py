"""Sends of one event loop, gathered: while a batch is on its way, the next one gathers behind it.

So a lone send costs one round trip, and a thousand concurrent ones cost a few. Where a server takes its time for each
message, several batches are on their way at once: the next one is made while it works on the last.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from itertools import chain
from typing import Final

from aqueue.errors import EnqueueFailed, EnqueueUnknown
from aqueue.protocol import Message

#: Messages on their way at once; keeps each call short for the server.
_MOST: Final = 500


#: Like `aqueue.broker.Broker.publish`.
Publish = Callable[[Sequence[Message]], Awaitable[None]]


class _Parcel:
    """What one caller sends, and the answer it waits for."""

    __slots__ = ("due", "messages", "stored")

    def __init__(self, messages: Sequence[Message], stored: "asyncio.Future[None]", due: float) -> None:
        self.messages = messages
        self.stored = stored
        #: When it must be on its way, by the loop's clock.
        self.due = due

    def ids(self) -> list[str]:
        return [str(message.properties.get("correlation_id")) for message in self.messages]


class Outbox:
    """See the module's text.

    ``timeout`` (seconds) is what a caller waits, for a turn and for the answer; the broker's own bound on
    sending, which knows better what has become of the messages, is given a little more. ``at_once``: how many
    batches may be under way at once.
    """

    def __init__(self, publish: Publish, timeout: float, at_once: int = 1) -> None:
        self._publish = publish
        self._timeout = timeout
        self._at_once = at_once
        #: Messages in one batch.
        self._most = _MOST // at_once
        #: In the order of their due times.
        self._waiting: deque[_Parcel] = deque()
        self._on_its_way: dict[asyncio.Task[None], list[_Parcel]] = {}
        #: When to look for what has waited too long.
        self._timer: asyncio.TimerHandle | None = None

    async def publish(self, messages: Sequence[Message]) -> None:
        """Like `Broker.publish`, together with what others send meanwhile."""
        loop = asyncio.get_running_loop()
        parcel = _Parcel(messages, loop.create_future(), loop.time() + self._timeout)
        self._waiting.append(parcel)
        self._send_more()
        try:
            await parcel.stored
        except asyncio.CancelledError:
            if parcel in self._waiting:
                self._waiting.remove(parcel)
            raise

    async def close(self) -> None:
        """Wait for what is on its way, and behind that, each within its time."""
        while self._on_its_way:
            await asyncio.wait(self._on_its_way)

    def _send_more(self) -> None:
        """Have what waits sent, as far as so many batches may be on their way."""
        if self._waiting and len(self._on_its_way) < self._at_once:
            task = asyncio.get_running_loop().create_task(self._send_some())
            self._on_its_way[task] = []
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(self._timeout, self._expire)

    async def _send_some(self) -> None:
        """Send batches until none waits."""
        task = asyncio.current_task()
        assert task is not None, "made by _send_more"
        try:
            while self._waiting:
                batch = self._on_its_way[task] = self._next_batch()
                self._send_more()
                await self._send(batch)
        finally:
            del self._on_its_way[task]
            if not self._on_its_way and self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _expire(self) -> None:
        """Give up what has waited too long, for its turn behind others or for the answer."""
        loop = asyncio.get_running_loop()
        while self._waiting and self._waiting[0].due <= loop.time():
            error = EnqueueFailed(f"not sent within {self._timeout:g} s: the broker is busy or unreachable")
            _fail(self._waiting.popleft(), error)
        for parcel in chain.from_iterable(self._on_its_way.values()):
            if parcel.due + self._timeout / 5 <= loop.time():
                _fail(parcel, EnqueueUnknown(f"no answer within {self._timeout:g} s: stored or not", parcel.ids()))
        self._timer = loop.call_later(self._timeout / 10, self._expire)

    def _next_batch(self) -> list[_Parcel]:
        batch = [self._waiting.popleft()]
        size = len(batch[0].messages)
        while self._waiting and size + len(self._waiting[0].messages) <= self._most:
            batch.append(self._waiting.popleft())
            size += len(batch[-1].messages)
        return batch

    async def _send(self, batch: list[_Parcel]) -> None:
        try:
            async with asyncio.timeout(2 * self._timeout):  # the broker's own bound comes first
                await self._publish([message for parcel in batch for message in parcel.messages])
        except EnqueueFailed as error:
            self._refuse(batch, error)
        except (EnqueueUnknown, TimeoutError) as error:
            for parcel in batch:
                _fail(parcel, EnqueueUnknown(str(error) or "no answer: stored or not", parcel.ids()))
        except Exception as error:  # noqa: BLE001 - whoever waits is told, whatever it is
            for parcel in batch:
                _fail(parcel, error)
        else:
            for parcel in batch:
                _succeed(parcel)

    def _refuse(self, batch: list[_Parcel], error: EnqueueFailed) -> None:
        """Tell those whose messages were refused; the others are stored."""
        start = 0
        for parcel in batch:
            end = start + len(parcel.messages)
            refused = {i: f"{error}" for i in range(len(parcel.messages))}
            if error.refused is not None:
                refused = {i - start: why for i, why in error.refused.items() if start <= i < end}
            start = end
            if refused:
                everything = len(refused) == len(parcel.messages)
                _fail(parcel, EnqueueFailed("; ".join(sorted(set(refused.values()))), None if everything else refused))
            else:
                _succeed(parcel)


def _succeed(parcel: _Parcel) -> None:
    if not parcel.stored.done():
        parcel.stored.set_result(None)


def _fail(parcel: _Parcel, error: Exception) -> None:
    if not parcel.stored.done():
        parcel.stored.set_exception(error)
