"""Waiting for results in stores that tell nobody of a change: one task looks for everybody who waits.

Each id has a rhythm of its own: it is read at once, again within milliseconds, then the more rarely the longer it is
waited for, so nobody is told much later than after waiting a quarter as long again. Ids that are due at nearly the same
time are read together, and old ones are not read more often because new ones come.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Final

from aqueue.errors import AQueueError, StoreUnavailable
from aqueue.results import Result

#: Seconds between the first two looks for an id.
_SHORTEST: Final = 0.005
#: A pause is this part of the time waited so far...
_PART: Final = 0.25
#: ... but no longer than this, in seconds, unless the store says so.
_LONGEST: Final = 0.5
#: An id is read along when it is due within this part of its pause.
_EARLY: Final = 0.25
#: Seconds that a look which is under way gets to end by itself when the store is closed.
_FAREWELL: Final = 1.0

#: Reads the results of some tasks: what is there, or why it can't be read. Must have a deadline of its own.
Read = Callable[[Sequence[str]], Awaitable[Mapping[str, Result | AQueueError]]]


class Polling:
    """Those who wait on one event loop; it looks only while somebody does.

    ``read_ended``, for those who wait, may leave out what has not ended; ``read`` leaves out nothing.
    """

    def __init__(self, read: Read, *, read_ended: Read | None = None, longest: float = _LONGEST) -> None:
        self._read_anything = read
        self._read = read_ended or read
        self._longest = longest
        self._waiting: dict[str, _Wanted] = {}
        self._somebody_came = asyncio.Event()
        self._looking: asyncio.Task[None] | None = None
        self._closing = False

    async def get(self, task_id: str, wait: float) -> Result | None:
        """Like `aqueue.results.ResultStore.get`."""
        if wait > 0:
            ended = await self.final(task_id, wait)
            if ended is not None:
                return ended
        found = (await self._read_anything([task_id])).get(task_id)
        if isinstance(found, AQueueError):
            raise found
        return found

    async def final(self, task_id: str, wait: float) -> Result | None:
        """The result in its final state; None when it has not come within ``wait`` seconds.

        Raises what ``read`` raises, and StoreUnavailable when the store is closed meanwhile.
        """
        loop = asyncio.get_running_loop()
        told: asyncio.Future[Result] = loop.create_future()
        wanted = self._waiting.setdefault(task_id, _Wanted())
        wanted.waiters.add(told)
        wanted.since = wanted.due = loop.time()  # a newcomer is as quick as the first
        self._somebody_came.set()
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look_while_somebody_waits())
        try:
            async with asyncio.timeout(wait):
                return await told
        except TimeoutError:
            return None
        finally:
            wanted.waiters.discard(told)
            if not wanted.waiters and self._waiting.get(task_id) is wanted:
                del self._waiting[task_id]
                self._somebody_came.set()  # the last one to go ends the looking
            if told.done() and not told.cancelled():
                told.exception()  # heard, even if the time was over first

    async def close(self) -> None:
        """Stop looking; who still waits is told so.

        A query is not cancelled in its middle if it can be helped: its driver may answer from a thread, and would find
        the event loop closed.
        """
        self._closing = True
        self._somebody_came.set()
        if self._looking is not None:
            await asyncio.wait([self._looking], timeout=_FAREWELL)
            self._looking.cancel()
            await asyncio.wait([self._looking])
        self._closing = False
        for task_id in self._waiting:
            self._tell(task_id, StoreUnavailable("the result store was closed while somebody waited for a result"))

    async def _look_while_somebody_waits(self) -> None:
        now = asyncio.get_running_loop().time
        while self._waiting and not self._closing:
            self._somebody_came.clear()
            started = now()
            due = [task_id for task_id, wanted in self._waiting.items() if wanted.is_due(started)]
            if due:
                await self._look(due)
            for task_id in due:
                if task_id in self._waiting:
                    self._waiting[task_id].seen(started, now(), self._longest)
            next_look = min((wanted.due for wanted in self._waiting.values()), default=started)
            with suppress(TimeoutError):
                async with asyncio.timeout_at(next_look):
                    await self._somebody_came.wait()

    async def _look(self, task_ids: Sequence[str]) -> None:
        """Tell everybody what there is to tell of these."""
        try:
            found = await self._read(task_ids)
        except AQueueError as error:
            found = dict.fromkeys(task_ids, error)
        for task_id, news in found.items():
            if isinstance(news, AQueueError) or news.is_final:
                self._tell(task_id, news)

    def _tell(self, task_id: str, news: Result | AQueueError) -> None:
        wanted = self._waiting.get(task_id)
        for told in wanted.waiters if wanted is not None else ():
            if told.done():
                continue
            if isinstance(news, AQueueError):
                told.set_exception(news)
            else:
                told.set_result(news)


class _Wanted:
    """An id that is waited for; times are the loop's."""

    __slots__ = ("due", "pause", "since", "waiters")

    def __init__(self) -> None:
        self.waiters: set[asyncio.Future[Result]] = set()
        self.since = 0.0
        self.due = 0.0
        self.pause = _SHORTEST

    def is_due(self, now: float) -> bool:
        return self.due <= now + _EARLY * self.pause

    def seen(self, asked: float, now: float, longest: float) -> None:
        """Plan the next look after one that was asked for then; who came meanwhile is still due."""
        if self.since > asked:
            return
        self.pause = min(longest, max(_SHORTEST, _PART * (now - self.since)))
        self.due = now + self.pause
