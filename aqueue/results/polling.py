"""Waiting for results in stores that tell nobody of a change: one look a tick, for everybody who waits."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final

from aqueue.errors import AQueueError, StoreUnavailable
from aqueue.results import Result

#: Seconds between looks: at first, and at most. They double while nothing comes, so that nobody is told later than
#: after waiting as long again.
_SHORTEST: Final = 0.005
_LONGEST: Final = 0.5

#: Reads the results of some tasks: what is there, or why it can't be read. Must have a deadline of its own.
Read = Callable[[Sequence[str]], Awaitable[Mapping[str, Result | AQueueError]]]


class Polling:
    """Those who wait on one event loop; it looks only while somebody does."""

    def __init__(self, read: Read) -> None:
        self._read = read
        #: Who waits for which task.
        self._waiting: dict[str, set[asyncio.Future[Result]]] = {}
        self._somebody_came = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None

    async def final(self, task_id: str, wait: float) -> Result | None:
        """The result in its final state; None when it has not come within ``wait`` seconds.

        Raises what ``read`` raises, and StoreUnavailable when the store is closed meanwhile.
        """
        told: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        waiters = self._waiting.setdefault(task_id, set())
        waiters.add(told)
        self._somebody_came.set()
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look_while_somebody_waits())
        try:
            async with asyncio.timeout(wait):
                return await told
        except TimeoutError:
            return None
        finally:
            waiters.discard(told)
            if not waiters:
                self._waiting.pop(task_id, None)

    async def close(self) -> None:
        """Stop looking; who still waits is told so."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])
        self._tell_all(StoreUnavailable("the result store was closed while somebody waited for a result"))

    async def _look_while_somebody_waits(self) -> None:
        pause = _SHORTEST
        while self._waiting:
            self._somebody_came.clear()
            found = await self._look()
            pause = _SHORTEST if found else min(2 * pause, _LONGEST)
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._somebody_came.wait()
                    pause = _SHORTEST
                    await asyncio.sleep(pause)  # those who come one after the other share a look

    async def _look(self) -> bool:
        """Tell everybody what there is to tell; whether that was anything."""
        try:
            found = await self._read(list(self._waiting))
        except AQueueError as error:
            self._tell_all(error)
            return True
        ended = {key: news for key, news in found.items() if isinstance(news, AQueueError) or news.is_final}
        for task_id, news in ended.items():
            self._tell(task_id, news)
        return bool(ended)

    def _tell_all(self, error: AQueueError) -> None:
        for task_id in self._waiting:
            self._tell(task_id, error)

    def _tell(self, task_id: str, news: Result | AQueueError) -> None:
        for told in self._waiting.get(task_id, ()):
            if told.done():
                continue
            if isinstance(news, AQueueError):
                told.set_exception(news)
            else:
                told.set_result(news)
