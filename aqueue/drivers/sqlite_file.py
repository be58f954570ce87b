"""One SQLite file, worked on by one thread: the broker's and the result store's floor.

Work comes as functions of the connection. What has gathered while the thread was busy runs in one
transaction, each piece in a savepoint of its own, and is answered after the commit: so a batch costs one
write to the disk, and an answer means that it is on the disk (WAL, ``synchronous=FULL``).
"""

import asyncio
import json
import logging
import queue
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, TypeVar

from aqueue.drivers.doorbell import Doorbell
from aqueue.errors import ConfigurationError
from aqueue.protocol import Record, is_success
from aqueue.url import Url

logger = logging.getLogger("aqueue.sqlite")

T = TypeVar("T")
Work = Callable[[sqlite3.Connection], T]

#: Raised by one more when the tables change; a file of a newer version is refused.
SCHEMA_VERSION: Final = 2

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    queue TEXT NOT NULL,
    priority INTEGER NOT NULL,
    place INTEGER NOT NULL,          -- order within queue and priority; the front has small numbers
    headers TEXT NOT NULL,           -- JSON
    properties TEXT NOT NULL,        -- JSON
    content_type TEXT NOT NULL,
    content_encoding TEXT,
    body BLOB NOT NULL,
    due REAL,                        -- parked until then (unix time)
    lease_ends REAL,                 -- leased until then
    holder TEXT,
    suspected REAL,                  -- the lease was first seen ended at
    claims INTEGER NOT NULL DEFAULT 0,   -- fencing: the number of the last claim, of all claims in the file
    lost INTEGER NOT NULL DEFAULT 0,     -- claims whose holder let the lease end
    claimed REAL,                        -- by the holder, at (unix time)
    cause TEXT,                          -- why the holder is gone, said before the lease has ended
    history TEXT                         -- JSON, see aqueue.broker.history
);
CREATE INDEX IF NOT EXISTS messages_ready ON messages (queue, priority DESC, place)
    WHERE due IS NULL AND lease_ends IS NULL;
CREATE INDEX IF NOT EXISTS messages_parked ON messages (due) WHERE due IS NOT NULL;
CREATE INDEX IF NOT EXISTS messages_leased ON messages (lease_ends) WHERE lease_ends IS NOT NULL;
CREATE TABLE IF NOT EXISTS places (front INTEGER NOT NULL, back INTEGER NOT NULL);
INSERT INTO places SELECT 0, 0 WHERE NOT EXISTS (SELECT 1 FROM places);
CREATE TABLE IF NOT EXISTS dead (
    id INTEGER PRIMARY KEY,
    queue TEXT NOT NULL,
    priority INTEGER NOT NULL,
    headers TEXT NOT NULL,
    properties TEXT NOT NULL,
    content_type TEXT NOT NULL,
    content_encoding TEXT,
    body BLOB NOT NULL,
    reason TEXT NOT NULL,
    detail TEXT NOT NULL,
    died REAL NOT NULL,
    deliveries INTEGER NOT NULL,
    worker TEXT NOT NULL,
    history TEXT
);
CREATE INDEX IF NOT EXISTS dead_by_time ON dead (died, id);
CREATE TABLE IF NOT EXISTS results (
    key TEXT PRIMARY KEY,
    document BLOB NOT NULL,
    ends REAL                        -- unix time; NULL keeps it for ever
);
CREATE INDEX IF NOT EXISTS results_end ON results (ends) WHERE ends IS NOT NULL;
"""

#: From a version to the next.
_CHANGES: Final = {
    1: """
ALTER TABLE messages ADD COLUMN claimed REAL;
ALTER TABLE messages ADD COLUMN cause TEXT;
ALTER TABLE messages ADD COLUMN history TEXT;
ALTER TABLE dead ADD COLUMN history TEXT;
CREATE INDEX dead_by_time ON dead (died, id);
"""
}


class _Job:
    """A piece of work, and how it ended."""

    __slots__ = ("answer", "bell", "error", "future", "work")

    def __init__(self, work: Work[Any], future: "asyncio.Future[Any]", bell: Doorbell | None) -> None:
        self.work = work
        self.bell = bell
        self.future = future
        self.answer: Any = None
        self.error: BaseException | None = None

    def resolve(self) -> None:
        """On the event loop: hand the answer over."""
        if self.future.done():
            return  # nobody waits for it any more
        if self.error is not None:
            self.future.set_exception(self.error)
        else:
            self.future.set_result(self.answer)


class SqliteFile:
    """See the module's text. Used from one event loop; opened by the first work.

    ``timeout`` (seconds) bounds the wait for other processes' transactions.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        self.path = path
        folder = path.with_name(path.name + ".wakeup")
        self.messages_bell: Final = Doorbell(folder, "messages")
        self.results_bell: Final = Doorbell(folder, "results")
        self.control_bell: Final = Doorbell(folder, "control")
        self._timeout = timeout
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closed: asyncio.Future[None] | None = None

    async def run(self, work: Work[T], *, bell: Doorbell | None = None) -> T:
        """Do work in a transaction; returns after the commit, which rings ``bell``.

        Raises what the work raises (its own changes are undone), sqlite3.Error when the file can't be used.
        Cancelled, the work is done all the same.
        """
        loop = asyncio.get_running_loop()
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._serve, args=(loop,), name=f"aqueue-sqlite-{self.path.name}", daemon=True
            )
            self._thread.start()
        job = _Job(work, loop.create_future(), bell)
        self._jobs.put(job)
        answer: T = await job.future
        return answer

    async def close(self) -> None:
        """Finish what was given to do, and close the file."""
        if self._thread is None:
            return
        self._thread = None
        self._closed = asyncio.get_running_loop().create_future()
        self._jobs.put(None)
        await self._closed

    def connect(self) -> sqlite3.Connection:
        """A connection of one's own, for one thread at a time. Raises sqlite3.Error, ConfigurationError."""
        deadline = time.monotonic() + self._timeout
        while True:
            connection = sqlite3.connect(
                self.path, timeout=self._timeout, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare(connection)
            except sqlite3.OperationalError as error:
                connection.close()
                # Of two that make the file at once, SQLite refuses one without waiting.
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(random.uniform(0.005, 0.02))
            except BaseException:
                connection.close()
                raise
            else:
                return connection

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version > SCHEMA_VERSION:
            raise ConfigurationError(f"{self.path} was written by a newer aqueue (its tables are version {version})")
        if version < SCHEMA_VERSION:
            connection.execute("BEGIN IMMEDIATE")  # and look again: another process may have done it
            version = connection.execute("PRAGMA user_version").fetchone()[0]
            changes = "".join(_CHANGES[older] for older in range(version, SCHEMA_VERSION)) if version else _SCHEMA
            for statement in changes.split(";\n"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
            connection.execute("COMMIT")

    # --- in the thread ---

    def _serve(self, loop: asyncio.AbstractEventLoop) -> None:
        connection: sqlite3.Connection | None = None
        while (jobs := self._take()) is not None:
            try:
                connection = connection or self.connect()
                self._transact(connection, jobs)
                for bell in {job.bell for job in jobs if job.bell and not job.error}:
                    bell.ring()
            except (sqlite3.Error, ConfigurationError) as error:
                _close(connection)
                connection = None
                for job in jobs:
                    job.error = job.error or error
            try:
                loop.call_soon_threadsafe(_resolve, jobs)
            except RuntimeError:  # the loop is closed: nobody waits any more
                break
        _close(connection)
        closed = self._closed
        if closed is not None:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(closed.set_result, None)

    def _take(self) -> list[_Job] | None:
        """All that waits, at least one; None at the end."""
        job = self._jobs.get()
        jobs: list[_Job] = []
        while job is not None:
            jobs.append(job)
            if self._jobs.empty():
                return jobs
            job = self._jobs.get()
        self._jobs.put(None)  # met again after these
        return jobs or None

    def _transact(self, connection: sqlite3.Connection, jobs: list[_Job]) -> None:
        connection.execute("BEGIN IMMEDIATE")
        try:
            for job in jobs:
                _do(connection, job)
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise


def _do(connection: sqlite3.Connection, job: _Job) -> None:
    connection.execute("SAVEPOINT job")
    try:
        job.answer = job.work(connection)
    except Exception as error:  # noqa: BLE001 - carried to who gave the work
        connection.execute("ROLLBACK TO job")
        job.error = error
    finally:
        connection.execute("RELEASE job")


def _resolve(jobs: list[_Job]) -> None:
    for job in jobs:
        job.resolve()


def _close(connection: sqlite3.Connection | None) -> None:
    if connection is not None:
        try:
            connection.close()
        except sqlite3.Error as error:
            logger.debug("closing a broken SQLite connection: %s", error)


def put_records(
    connection: sqlite3.Connection, records: Sequence[Record], says_success: Callable[[bytes], bool] = is_success
) -> None:
    """Store results; a SUCCESS is never overwritten."""
    keys = json.dumps([record.key for record in records])
    before = connection.execute(
        "SELECT key, document FROM results WHERE key IN (SELECT value FROM json_each(?))", (keys,)
    )
    kept = {key for key, document in before if says_success(document)}
    for record in records:
        if record.key not in kept:
            connection.execute("INSERT OR REPLACE INTO results VALUES (?, ?, ?)", _row(record))
            if says_success(record.value):
                kept.add(record.key)


def put_if_absent(connection: sqlite3.Connection, record: Record) -> bool:
    """Store a record whose key is absent; False when it was there."""
    connection.execute("DELETE FROM results WHERE key = ? AND ends < ?", (record.key, time.time()))
    return connection.execute("INSERT OR IGNORE INTO results VALUES (?, ?, ?)", _row(record)).rowcount == 1


def drop_ended(connection: sqlite3.Connection, limit: int = 100) -> None:
    """Remove results whose life has ended; called along with writes, so it never has much to do."""
    connection.execute(
        "DELETE FROM results WHERE key IN (SELECT key FROM results WHERE ends < ? LIMIT ?)", (time.time(), limit)
    )


def _row(record: Record) -> tuple[str, bytes, float | None]:
    return record.key, record.value, None if record.ttl is None else time.time() + record.ttl


def path_of(url: Url) -> Path:
    """``sqlite:///shop.db`` is relative to the working directory, ``sqlite:////var/shop.db`` is absolute."""
    text = url.path.removeprefix("/")
    if not text or url.query:
        raise ConfigurationError(f"expected sqlite:///file or sqlite:////absolute/file, got {url}")
    return Path(text).absolute()
