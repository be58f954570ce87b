"""Effects in a SQLite database, through the connections of sqlite3 and aiosqlite."""

import sqlite3
from typing import Any, Final

from msgspec.structs import astuple

from aqueue.effects.row import EffectRow

_MAKE: Final = (
    "CREATE TABLE IF NOT EXISTS aqueue_effects"
    " (id TEXT PRIMARY KEY, task_id TEXT NOT NULL, step TEXT NOT NULL, token INTEGER, made REAL NOT NULL)"
)
_INSERT: Final = "INSERT OR IGNORE INTO aqueue_effects (id, task_id, step, token, made) VALUES (?, ?, ?, ?, ?)"
#: At once a writer: one that has read before can't become one when another has written meanwhile.
_BEGIN: Final = "BEGIN IMMEDIATE"


class SqliteTransaction:
    """A `aqueue.effects.Transaction` of the standard library's driver, in any of its ways to begin and commit."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def claim(self, row: EffectRow) -> bool:
        if not self._connection.in_transaction:
            self._connection.execute(_BEGIN)
        self._connection.execute(_MAKE)
        return self._connection.execute(_INSERT, astuple(row)).rowcount == 1

    def commit(self) -> None:
        self._end("COMMIT", self._connection.commit)

    def rollback(self) -> None:
        self._end("ROLLBACK", self._connection.rollback)

    def _end(self, statement: str, method: Any) -> None:
        if getattr(self._connection, "autocommit", None) is not True:
            method()
        elif self._connection.in_transaction:  # the methods do nothing then
            self._connection.execute(statement)


class AioSqliteTransaction:
    """A `aqueue.effects.AsyncTransaction` of aiosqlite, which hands everything to a thread of its own."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def claim(self, row: EffectRow) -> bool:
        if not self._connection.in_transaction:
            await self._connection.execute(_BEGIN)
        await self._connection.execute(_MAKE)
        async with self._connection.execute(_INSERT, astuple(row)) as cursor:
            return bool(cursor.rowcount == 1)

    async def commit(self) -> None:
        await self._connection.commit()

    async def rollback(self) -> None:
        await self._connection.rollback()
