"""Results in this process, for tests and single programs."""

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import islice
from types import TracebackType
from typing import Self

from aqueue.protocol import Record
from aqueue.results import Documents, Result, StoreFactory, StoreOptions
from aqueue.url import Url


class MemoryRecords:
    """The shared state of one app's ``memory://`` store: documents with the end of their life."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: dict[str, tuple[bytes, float]] = {}
        self.waiters: dict[Callable[[], None], str] = {}

    def read(self, key: str) -> bytes | None:
        with self._lock:
            document, ends = self._kept.get(key, (None, 0.0))
            return document if ends > time.monotonic() else None

    def write(self, record: Record, keep: Callable[[bytes], bool]) -> None:
        """Store a record, unless ``keep`` says that what is there shall stay."""
        before = self.read(record.key)
        if before is not None and keep(before):
            return
        ends = float("inf") if record.ttl is None else time.monotonic() + record.ttl
        with self._lock:
            self._kept.pop(record.key, None)
            self._kept[record.key] = (record.value, ends)
            self._drop_ended()
        for wake in [wake for wake, key in tuple(self.waiters.items()) if key == record.key]:
            wake()

    def _drop_ended(self) -> None:
        """Entries are in the order of writing, so with one life for all the oldest end first."""
        now = time.monotonic()
        for key in list(islice(self._kept, 2)):
            if self._kept[key][1] <= now:
                del self._kept[key]

    def delete(self, key: str) -> None:
        with self._lock:
            self._kept.pop(key, None)


class MemoryResults:
    """A `aqueue.results.ResultStore` in this process."""

    reply_to = ""

    def __init__(self, records: MemoryRecords, options: StoreOptions) -> None:
        self._records = records
        self._documents = Documents(options)
        self._expires = options.expires

    @classmethod
    def factory(cls, url: Url) -> StoreFactory:
        records = MemoryRecords()
        return lambda options: cls(records, options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    @property
    def place(self) -> None:
        return None

    def record(self, result: Result) -> Record:
        return Record(result.task_id, self._documents.encode(result), self._expires)

    async def put(self, records: Sequence[Record]) -> None:
        for record in records:
            self._records.write(record, keep=self._documents.says_success)

    async def announce(self, records: Sequence[Record]) -> None:
        for record in records:
            self._records.write(record, keep=lambda _: True)

    async def get(self, task_id: str, wait: float = 0.0) -> Result | None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait
        changed = asyncio.Event()

        def wake() -> None:
            with suppress(RuntimeError):  # that loop is closed: nobody waits there
                loop.call_soon_threadsafe(changed.set)

        self._records.waiters[wake] = task_id
        try:
            while True:
                changed.clear()
                data = self._records.read(task_id)
                result = None if data is None else self._documents.decode(task_id, data)
                left = deadline - loop.time()
                if left <= 0 or (result is not None and result.is_final):
                    return result
                with suppress(TimeoutError):
                    async with asyncio.timeout(left):
                        await changed.wait()
        finally:
            self._records.waiters.pop(wake, None)

    async def forget(self, task_id: str) -> None:
        self._records.delete(task_id)
