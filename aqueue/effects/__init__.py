"""Writes to a database that happen once, however often their task runs.

A task may run again after it has done its work: a worker that dies between the commit and the settling leaves its
message to another. `Effect` is a transaction of the caller's own database in which a row goes beside the caller's
writes; whoever finds that row knows that they are there::

    async with ctx.effect(session, "charge") as first:
        if first:
            session.add(Payment(...))

Both become durable together or not at all. Of two attempts at once the database's unique key lets one go first; the
other waits for its end, and then finds the row or, after a rollback, goes first itself.

The block is the transaction: its end commits, an exception rolls back. With ``commit=False`` both are left to the
caller, who has begun it.

Kinds of connection: SQLAlchemy's AsyncSession, AsyncConnection and aiosqlite's Connection, with ``async with``;
SQLAlchemy's Session and Connection and sqlite3's Connection, with ``with``.

Rows are in the table ``aqueue_effects``, made when it is missing. ``made`` is unix time; a row is of use as long as
its task may run again.
"""

import sqlite3
import time
from hashlib import sha256
from importlib import import_module
from types import TracebackType
from typing import Any, Final, Protocol

from aqueue.effects.row import EffectRow
from aqueue.effects.sqlite import AioSqliteTransaction, SqliteTransaction
from aqueue.errors import ConfigurationError

#: Characters in the name of a step.
_LONGEST_STEP: Final = 200

_KINDS: Final = (
    "SQLAlchemy's AsyncSession, AsyncConnection, Session and Connection, sqlite3's Connection, aiosqlite's Connection"
)


class Transaction(Protocol):
    """The caller's transaction, with a connection that blocks."""

    def claim(self, row: EffectRow) -> bool:
        """Insert a row, with the table if it is missing; False when it was there. Raises the driver's errors."""
        ...

    def commit(self) -> None: ...

    def rollback(self) -> None: ...


class AsyncTransaction(Protocol):
    """The caller's transaction, with a connection for asyncio; otherwise as `Transaction`."""

    async def claim(self, row: EffectRow) -> bool: ...

    async def commit(self) -> None: ...

    async def rollback(self) -> None: ...


class Effect:
    """See the module's text. Made by `aqueue.Context.effect`; entered once.

    What ``as`` gives is True for the first, who writes, and False for everybody after. A call outside of a worker has
    no ``key``: it is always first, and leaves no row.
    """

    __slots__ = ("_commit", "_connection", "_key", "_step", "_token")

    def __init__(self, connection: Any, key: str, step: str, token: int | None, *, commit: bool = True) -> None:
        if len(step) > _LONGEST_STEP:
            raise ConfigurationError(f"a step's name has {_LONGEST_STEP} characters at most; got {step!r:.80}")
        self._connection = connection
        self._key = key
        self._step = step
        self._token = token
        self._commit = commit

    def __enter__(self) -> bool:
        transaction = _blocking(self._connection)
        try:
            return not self._key or transaction.claim(self._row())
        except BaseException:
            if self._commit:
                transaction.rollback()
            raise

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._commit:
            return
        transaction = _blocking(self._connection)
        if error is not None:
            transaction.rollback()
            return
        try:
            transaction.commit()
        except BaseException:
            transaction.rollback()
            raise

    async def __aenter__(self) -> bool:
        transaction = _asynchronous(self._connection)
        try:
            return not self._key or await transaction.claim(self._row())
        except BaseException:
            if self._commit:
                await transaction.rollback()
            raise

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self._commit:
            return
        transaction = _asynchronous(self._connection)
        if error is not None:
            await transaction.rollback()
            return
        try:
            await transaction.commit()
        except BaseException:
            await transaction.rollback()
            raise

    def _row(self) -> EffectRow:
        digest = sha256(f"{self._key}\n{self._step}".encode()).hexdigest()
        return EffectRow(digest, self._key, self._step, self._token, time.time())


def _blocking(connection: Any) -> Transaction:
    if isinstance(connection, sqlite3.Connection):
        return SqliteTransaction(connection)
    if _is_of(connection, "sqlalchemy") and not hasattr(connection, "run_sync"):
        made: Transaction = import_module("aqueue.effects.sql").SqlTransaction(connection)
        return made
    raise _refusal(connection, "with")


def _asynchronous(connection: Any) -> AsyncTransaction:
    if _is_of(connection, "aiosqlite"):
        return AioSqliteTransaction(connection)
    if _is_of(connection, "sqlalchemy") and hasattr(connection, "run_sync"):
        made: AsyncTransaction = import_module("aqueue.effects.sql").AsyncSqlTransaction(connection)
        return made
    raise _refusal(connection, "async with")


def _is_of(connection: Any, package: str) -> bool:
    """Whether its class, or one that it is derived from, is a library's: which is imported by then."""
    return any(kind.__module__.partition(".")[0] == package for kind in type(connection).__mro__)


def _refusal(connection: Any, word: str) -> TypeError:
    name = f"{type(connection).__module__}.{type(connection).__qualname__}"
    return TypeError(
        f"no effect through a {name} by `{word}`; there are {_KINDS}: the first two and the last with `async with`, "
        "the others with `with`"
    )
