"""Results in a SQLite file, of one machine's processes."""

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from aqueue.drivers import sqlite_checks
from aqueue.drivers.sqlite_file import SqliteFile, drop_ended, path_of, put_if_absent, put_records
from aqueue.errors import AQueueError, BadMessage, Border, StoreUnavailable
from aqueue.findings import Finding, Use
from aqueue.protocol import Record
from aqueue.results import Documents, Result, StoreFactory, StoreOptions
from aqueue.url import Url

#: Seconds after which a waiter looks by itself, in case a ring was lost with a killed process.
_LOOK_AGAIN: Final = 5.0
_BORDER: Final = Border(StoreUnavailable, sqlite3.Error, prefix="SQLite: ")


class SqliteResults:
    """A `aqueue.results.ResultStore` in a file."""

    reply_to = ""

    def __init__(self, path: Path, options: StoreOptions) -> None:
        self._documents = Documents(options)
        self._expires = options.expires
        self._file = SqliteFile(path, options.timeout)
        self._stop_listening: Callable[[], None] | None = None
        self._telling: asyncio.Task[None] | None = None
        self._rung = asyncio.Event()
        #: Who waits for which task.
        self._waiting: dict[str, set[asyncio.Future[Result]]] = {}

    @classmethod
    def factory(cls, url: Url) -> StoreFactory:
        path = path_of(url)
        return lambda options: cls(path, options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._stop_listening is not None:
            self._stop_listening()
            self._stop_listening = None
        if self._telling is not None:
            self._telling.cancel()
            await asyncio.wait([self._telling])
        await self._file.close()

    async def check(self, use: Use) -> Sequence[Finding]:
        with _BORDER:
            return sqlite_checks.check(self._file.path)

    @property
    def place(self) -> Path | None:
        return self._file.path if self._documents.status_is_readable else None

    def record(self, result: Result) -> Record:
        return Record(result.task_id, self._documents.encode(result), self._expires)

    async def put(self, records: Sequence[Record]) -> None:
        def write(connection: sqlite3.Connection) -> None:
            put_records(connection, records, self._documents.says_success)
            drop_ended(connection)

        with _BORDER:
            await self._file.run(write, bell=self._file.results_bell)

    async def announce(self, records: Sequence[Record]) -> None:
        def write(connection: sqlite3.Connection) -> None:
            for record in records:
                put_if_absent(connection, record)

        with _BORDER:
            await self._file.run(write)

    async def get(self, task_id: str, wait: float = 0.0) -> Result | None:
        if wait <= 0:
            return (await self._read([task_id])).get(task_id)
        if self._stop_listening is None:
            self._stop_listening = self._file.results_bell.listen(self._rung.set)
            self._telling = asyncio.create_task(self._tell_forever())
        told: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        waiters = self._waiting.setdefault(task_id, set())
        waiters.add(told)
        self._rung.set()
        try:
            async with asyncio.timeout(wait):
                return await told
        except TimeoutError:
            return (await self._read([task_id])).get(task_id)
        finally:
            waiters.discard(told)
            if not waiters:
                self._waiting.pop(task_id, None)

    async def _tell_forever(self) -> None:
        """At each ring, one look for everybody who waits."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_AGAIN):
                    await self._rung.wait()
            self._rung.clear()
            if self._waiting:
                try:
                    found = await self._read(list(self._waiting))
                except (StoreUnavailable, BadMessage) as error:
                    self._tell(error)
                else:
                    self._tell(found)

    def _tell(self, news: dict[str, Result] | AQueueError) -> None:
        for task_id, waiters in self._waiting.items():
            for told in waiters:
                if told.done():
                    continue
                if isinstance(news, AQueueError):
                    told.set_exception(news)
                elif task_id in news and news[task_id].is_final:
                    told.set_result(news[task_id])

    async def _read(self, task_ids: Sequence[str]) -> dict[str, Result]:
        with _BORDER:
            rows = await self._file.run(
                lambda connection: connection.execute(
                    "SELECT key, document FROM results"
                    " WHERE key IN (SELECT value FROM json_each(?)) AND (ends IS NULL OR ends > ?)",
                    (json.dumps(task_ids), time.time()),
                ).fetchall()
            )
        return {key: self._documents.decode(key, document) for key, document in rows}

    async def forget(self, task_id: str) -> None:
        with _BORDER:
            await self._file.run(lambda connection: connection.execute("DELETE FROM results WHERE key = ?", (task_id,)))
