"""Remote control on a SQLite file: a table, and a bell of its own.

The table is made by its first use, so that a file without cancelled tasks has none.
"""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

from aqueue.broker.control import MOST_KEPT
from aqueue.drivers.sqlite_file import SqliteFile
from aqueue.errors import Border, BrokerUnavailable
from aqueue.pidbox import Revocation, Revoked

_TABLE: Final = """
CREATE TABLE IF NOT EXISTS revoked (
    number INTEGER PRIMARY KEY AUTOINCREMENT,   -- in the order of revoking
    task_id TEXT NOT NULL UNIQUE,
    reason TEXT NOT NULL,
    terminate INTEGER NOT NULL,
    ends REAL NOT NULL                          -- unix time
)
"""


class SqliteControl:
    """A `aqueue.broker.control.Control` in a file."""

    durable = True

    def __init__(self, file: SqliteFile) -> None:
        self._file = file
        self._rung = asyncio.Event()
        self._stop_listening: Callable[[], None] | None = None
        #: The number of the last one that we have heard of.
        self._heard = 0

    async def revoke(self, ids: Sequence[str], revocation: Revocation) -> None:
        with _RAISING:
            await self._file.run(lambda connection: _keep(connection, ids, revocation), bell=self._file.control_bell)

    async def revoked(self) -> Revoked:
        with _RAISING:
            number, kept = await self._file.run(lambda connection: _read(connection, 0))
        self._heard = max(self._heard, number)
        return kept

    async def news(self, wait: float) -> Revoked:
        if self._stop_listening is None:
            self._stop_listening = self._file.control_bell.listen(self._rung.set)
            self._rung.set()
        if wait > 0:
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._rung.wait()
        if not self._rung.is_set():
            return {}
        self._rung.clear()
        with _RAISING:
            self._heard, told = await self._file.run(lambda connection: _read(connection, self._heard))
        return told

    async def close(self) -> None:
        if self._stop_listening is not None:
            self._stop_listening()
            self._stop_listening = None


_RAISING: Final = Border(BrokerUnavailable, sqlite3.Error, prefix="SQLite: ")


def _keep(connection: sqlite3.Connection, ids: Sequence[str], revocation: Revocation) -> None:
    connection.execute(_TABLE)
    now = time.time()
    connection.execute("DELETE FROM revoked WHERE ends < ?", (now,))
    connection.executemany(
        "INSERT OR REPLACE INTO revoked (task_id, reason, terminate, ends) VALUES (?, ?, ?, ?)",
        [(id, revocation.reason, revocation.terminate, now + revocation.keep) for id in ids],
    )
    connection.execute(
        "DELETE FROM revoked WHERE number IN (SELECT number FROM revoked ORDER BY ends DESC LIMIT -1 OFFSET ?)",
        (MOST_KEPT,),
    )


def _read(connection: sqlite3.Connection, after: int) -> tuple[int, Revoked]:
    """The last number, and what is kept behind the number ``after``."""
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name = 'revoked'").fetchone() is None:
        return after, {}
    now = time.time()
    rows = connection.execute(
        "SELECT number, task_id, reason, terminate, ends FROM revoked WHERE number > ? AND ends > ? ORDER BY number",
        (after, now),
    ).fetchall()
    kept = {id: Revocation(reason, bool(terminate), ends - now) for _, id, reason, terminate, ends in rows}
    return rows[-1][0] if rows else after, kept
