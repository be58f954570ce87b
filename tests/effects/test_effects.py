"""Effects in real databases, through every kind of connection: once, whatever happens around them."""

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import aiosqlite
import pytest
import pytest_asyncio
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from aqueue import ConfigurationError, Context
from aqueue.effects import Effect
from aqueue.protocol import NOTHING_FOLLOWS, Message, Request

#: Kind of connection, database, driver.
KINDS = {
    "sqlite3": ("sqlite", ""),
    "aiosqlite": ("sqlite", ""),
    "session-sqlite": ("sqlite", "sqlite"),
    "connection-sqlite": ("sqlite", "sqlite"),
    "async-session-sqlite": ("sqlite", "sqlite+aiosqlite"),
    "session-postgresql": ("postgresql", "postgresql+psycopg2"),
    "async-session-postgresql": ("postgresql", "postgresql+asyncpg"),
    "async-connection-postgresql": ("postgresql", "postgresql+asyncpg"),
    "connection-mariadb": ("mariadb", "mysql+pymysql"),
    "async-session-mariadb": ("mariadb", "mysql+asyncmy"),
}
#: A context manager of either kind around a transaction.
Attempt = Callable[..., Awaitable[bool]]


class Crash(Exception):
    """Raised inside of a block."""


class Database:
    """One database, and attempts to put something into its table ``payments`` as an effect."""

    def __init__(self, kind: str, url: str) -> None:
        self.kind = kind
        self.url = url
        self.engine: Any = None
        if KINDS[kind][1]:
            make = create_async_engine if kind.startswith("async") else sa.create_engine
            self.engine = make(url)

    async def close(self) -> None:
        if self.engine is not None:
            disposed = self.engine.dispose()
            if disposed is not None:
                await disposed

    async def attempt(
        self,
        key: str,
        step: str = "",
        *,
        inside: Callable[[], object] = lambda: None,
        commit: bool = True,
        token: int | None = None,
    ) -> bool:
        """Whether it was first; ``inside`` is called in the block, in a thread where the connection blocks."""
        if self.kind == "aiosqlite" or self.kind.startswith("async"):
            return await self._await(key, step, inside, commit, token)
        return await asyncio.to_thread(self._block, key, step, inside, commit, token)

    def _block(self, key: str, step: str, inside: Callable[[], object], commit: bool, token: int | None) -> bool:
        with closing(self._open()) as connection:
            with Effect(connection, key, step, token, commit=commit) as first:
                if first:
                    connection.execute(_statement(connection, key))
                inside()
            return first

    async def _await(self, key: str, step: str, inside: Callable[[], object], commit: bool, token: int | None) -> bool:
        async with self._open() as connection:
            async with Effect(connection, key, step, token, commit=commit) as first:
                if first:
                    await connection.execute(_statement(connection, key))
                await asyncio.to_thread(inside)
            return first

    def _open(self) -> Any:
        if self.kind == "sqlite3":
            return sqlite3.connect(self.url, timeout=20)
        if self.kind == "aiosqlite":
            return aiosqlite.connect(self.url, timeout=20)
        if self.kind.startswith("async-session"):
            return AsyncSession(self.engine)
        return Session(self.engine) if self.kind.startswith("session") else self.engine.connect()

    async def rows(self, statement: str = "SELECT task FROM payments ORDER BY task") -> list[tuple[Any, ...]]:
        if self.engine is None:
            with closing(sqlite3.connect(self.url)) as connection:
                return connection.execute(statement).fetchall()
        if self.kind.startswith("async"):
            async with self.engine.connect() as connection:
                return [tuple(row) for row in await connection.execute(sa.text(statement))]
        with self.engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sa.text(statement))]

    async def run(self, statement: str) -> None:
        if self.engine is None:
            with closing(sqlite3.connect(self.url)) as connection, connection:
                connection.execute(statement)
        elif self.kind.startswith("async"):
            async with self.engine.begin() as connection:
                await connection.execute(sa.text(statement))
        else:
            with self.engine.begin() as connection:
                connection.execute(sa.text(statement))


def _statement(connection: Any, key: str) -> Any:
    text = f"INSERT INTO payments (task) VALUES ('{key}')"
    return text if isinstance(connection, sqlite3.Connection | aiosqlite.Connection) else sa.text(text)


@pytest.fixture(params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest_asyncio.fixture
async def database(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Database]:
    server, driver = KINDS[kind]
    if server == "sqlite":
        path = tmp_path / "shop.db"
        url = f"{driver}:///{path}?timeout=20" if driver else str(path)
    else:
        found: str = request.getfixturevalue(f"{server}_url")
        url = f"{driver}://{found.partition('://')[2]}"
    made = Database(kind, url)
    await made.run("CREATE TABLE payments (task VARCHAR(80))")
    yield made
    await made.close()


async def test_a_second_attempt_finds_what_the_first_has_done(database: Database) -> None:
    assert await database.attempt("a", token=7)
    assert not await database.attempt("a", token=8)
    assert await database.attempt("b")
    assert await database.rows() == [("a",), ("b",)]
    stored = await database.rows("SELECT task_id, step, token FROM aqueue_effects ORDER BY task_id")
    assert stored == [("a", "", 7), ("b", "", None)]


async def test_steps_and_keys_are_told_apart_to_the_letter(database: Database) -> None:
    names = [("a", ""), ("A", ""), ("a", "charge"), ("a", "Charge"), ("a ", ""), ("é", ""), ("e", "")]
    assert [await database.attempt(key, step) for key, step in names] == [True] * len(names)
    assert [await database.attempt(key, step) for key, step in names] == [False] * len(names)


async def test_what_is_rolled_back_can_be_done_again(database: Database) -> None:
    def crash() -> None:
        raise Crash

    with pytest.raises(Crash):
        await database.attempt("a", inside=crash)
    assert await database.rows() == []
    assert await database.attempt("a")
    with pytest.raises(Crash):
        await database.attempt("a", inside=crash)
    assert not await database.attempt("a")
    assert await database.rows() == [("a",)]


async def test_of_many_attempts_at_once_one_is_first(database: Database) -> None:
    """With no table yet, which each of them would make."""
    found = await asyncio.gather(*[database.attempt("a") for _ in range(4)])
    assert sorted(found) == [False, False, False, True]
    assert await database.rows() == [("a",)]


@pytest.mark.parametrize("fails", [False, True])
async def test_who_comes_meanwhile_waits_for_the_end(database: Database, fails: bool) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        inside.set()
        assert go_on.wait(20)
        if fails:
            raise Crash

    assert await database.attempt("before")  # the table is there
    holding = asyncio.create_task(database.attempt("a", inside=hold))
    assert await asyncio.to_thread(inside.wait, 20)
    coming = asyncio.create_task(database.attempt("a"))
    done, _ = await asyncio.wait([coming], timeout=0.2)
    assert not done
    go_on.set()
    (first,) = await asyncio.gather(holding, return_exceptions=True)
    assert isinstance(first, Crash) if fails else first is True
    assert await coming is fails
    assert await database.rows() == [("a",), ("before",)]


async def test_a_caller_with_a_transaction_of_its_own_ends_it(database: Database) -> None:
    assert await database.attempt("a", commit=False)  # closed without a commit
    assert await database.rows() == []
    assert await database.attempt("a")


async def test_a_call_outside_of_a_worker_is_always_first(database: Database) -> None:
    assert [await database.attempt(""), await database.attempt("")] == [True, True]
    assert await database.rows() == [("",), ("",)]


async def test_old_rows_are_removed_by_their_time(database: Database) -> None:
    assert await database.attempt("old")
    await database.run("UPDATE aqueue_effects SET made = made - 3000000")
    assert await database.attempt("new")
    ((now,),) = await database.rows("SELECT max(made) FROM aqueue_effects")
    await database.run(f"DELETE FROM aqueue_effects WHERE made < {now} - 30 * 86400")
    assert await database.rows("SELECT task_id FROM aqueue_effects") == [("new",)]


@pytest.mark.parametrize("isolation", [None, "", "IMMEDIATE"])
def test_every_way_of_sqlite3_to_begin(tmp_path: Path, isolation: Any) -> None:
    with closing(sqlite3.connect(tmp_path / "x.db", isolation_level=isolation)) as connection:
        connection.execute("CREATE TABLE payments (task)")
        for wanted in (True, False):
            with Effect(connection, "a", "", None) as first:
                assert first is wanted
                if first:
                    connection.execute("INSERT INTO payments VALUES (1)")
            assert not connection.in_transaction
        connection.execute("BEGIN")
        connection.execute("INSERT INTO payments VALUES (2)")
        with Effect(connection, "b", "", None) as first:
            assert first
        assert connection.execute("SELECT count(*) FROM payments").fetchone() == (2,)


async def test_what_can_carry_no_effect_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"no effect through a sqlite3.Connection by `async with`"):
        async with Effect(sqlite3.connect(":memory:"), "a", "", None):
            pass
    with pytest.raises(TypeError, match=r"no effect through a builtins.str by `with`"), Effect("x", "a", "", None):
        pass
    with pytest.raises(ConfigurationError, match="200 characters at most"):
        Effect(None, "a", "x" * 201, None)
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'x.db'}")
    async with engine.connect() as connection:
        assert isinstance(connection, AsyncConnection)
        with pytest.raises(TypeError, match=r"AsyncConnection by `with`"), Effect(connection, "a", "", None):
            pass
        autocommit = await connection.execution_options(isolation_level="AUTOCOMMIT")
        with pytest.raises(ConfigurationError, match="commits each statement"):
            async with Effect(autocommit, "a", "", None):
                pass
    await engine.dispose()


def test_a_context_gives_its_key_and_the_number_of_its_claim() -> None:
    message = Message(queue="q", headers={}, body=b"")
    request = Request(
        id="x", task="t", args=[], kwargs={}, embed=NOTHING_FOLLOWS, message=message, retries=0, root_id="x"
    )
    assert Context(request, receipt="12:celery").token == 12
    assert Context(request, receipt="34").token == 34
    assert Context(request, receipt="12345678.1").token is None
    assert Context(request).token is None
    assert Context(request).idempotency_key == "x"
