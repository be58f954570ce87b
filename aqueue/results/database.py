"""Results in a SQL database, in the tables of Celery's ``db+`` backend (celery-protocol 4.10).

Celery 5.7 reads what is written here, and the other way round, on SQLite, PostgreSQL and MariaDB. A database tells
nobody of a change, and PostgreSQL's NOTIFY would not tell of those that Celery makes. So one query a tick looks for
everybody who waits.

What differs from other stores is the table's doing: group_id and parent_id have no column, nothing is compressed
(Celery would not read it), and MySQL and MariaDB hold values of at most 65,535 bytes.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta, timezone
from types import TracebackType
from typing import Any, Final, Self

import msgspec
import sqlalchemy as sa
from msgspec.structs import asdict, replace
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from aqueue.drivers.sql_address import SqlAddress
from aqueue.errors import AQueueError, BadMessage, MessageTooLarge, StoreUnavailable
from aqueue.protocol import Record
from aqueue.results import FINAL_STATES, SUCCESS, Documents, Result, StoreFactory, StoreOptions, told_value
from aqueue.results.database_tables import (
    LONGEST_NAME,
    LONGEST_STATUS,
    Row,
    blob_limit,
    groups,
    prepare,
    store,
    store_if_absent,
    tasks,
)
from aqueue.results.polling import Polling
from aqueue.serialization import CONTENT_TYPES
from aqueue.shapes import is_object
from aqueue.url import Url

logger = logging.getLogger("aqueue.results")

#: Ids in one statement; databases bound the number of parameters.
_IDS: Final = 500
#: Seconds between removals of what has ended, and rows in one of them; a full one is soon followed by the next.
_CLEANING: Final = 3600.0
_CLEANING_ON: Final = 1.0
_CLEANED: Final = 500
#: Keys of ``result_extended`` that are encoded, and those that are columns of text.
_ENCODED: Final = ("args", "kwargs")
_NAMES: Final = ("name", "worker", "queue")
#: How every pickle that Celery wrote begins, and how nothing else does that it writes.
_PICKLE: Final = b"\x80"

_pack = msgspec.msgpack.Encoder().encode
_unpack = msgspec.msgpack.Decoder(Row).decode


class DatabaseResults:
    """A `aqueue.results.ResultStore` in a SQL database; see the module's text."""

    reply_to = ""

    def __init__(self, address: SqlAddress, options: StoreOptions) -> None:
        self._documents = Documents(replace(options, compression=None))
        self._address = address
        self._expires = options.expires
        self._timeout = options.timeout
        self._blob_limit = blob_limit(address.database)
        self._store_statement = store(address.database)
        self._announce_statement = store_if_absent(address.database)
        self._engine: AsyncEngine | None = None
        #: Whether the tables are there, as far as is known: after an error they are looked for again.
        self._prepared = False
        self._preparing = asyncio.Lock()
        self._next_cleaning = 0.0
        self._polling = Polling(self._read_all, read_ended=self._read_ended)

    @classmethod
    def factory(cls, url: Url) -> StoreFactory:
        address = SqlAddress(url)
        return lambda options: cls(address, options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._polling.close()
        if self._engine is not None:
            engine, self._engine = self._engine, None
            with suppress(TimeoutError, *self._address.errors):
                async with asyncio.timeout(self._timeout):
                    await engine.dispose()

    @property
    def place(self) -> None:
        """No broker keeps its messages here."""
        return None

    # --- writing ---

    def record(self, result: Result) -> Record:
        task = f"task {result.task_id}"
        if not _is_possible(result.task_id):
            return Record(result.task_id, b"", self._expires)  # `put` leaves it out
        row = Row(
            task_id=result.task_id,
            status=_text(result.state, LONGEST_STATUS),
            result=self._encode(result.value, f"the result of {task}"),
            date_done=_moment(result.date_done),
            traceback=None if result.traceback is None else _text(result.traceback, self._blob_limit),
            children=self._encode(result.children, f"the children of {task}") if result.children else None,
            retries=result.extra.get("retries"),
        )
        for name in _ENCODED:
            if result.extra.get(name) is not None:
                setattr(row, name, self._encode(result.extra[name], f"{name} of {task}"))
        for name in _NAMES:
            if result.extra.get(name) is not None:
                setattr(row, name, _text(result.extra[name], LONGEST_NAME))
        if stamped := result.extra.get("stamped_headers"):
            stamps = {header: result.extra[header] for header in stamped if header in result.extra}
            row.stamps = self._encode({"stamped_headers": stamped, "stamps": stamps}, f"the stamps of {task}")
        return Record(result.task_id, _pack(row), self._expires)

    def _encode(self, value: Any, what: str) -> bytes:
        data = self._documents.encode_value(value, what)
        if self._blob_limit is not None and len(data) > self._blob_limit:
            raise MessageTooLarge(
                f"{what} is {len(data):,} bytes, and a column of {self._address} holds {self._blob_limit:,}. "
                "Return a reference to the data instead, or use another result store"
            )
        return data

    async def put(self, records: Sequence[Record]) -> None:
        rows: dict[str, Row] = {}
        for row in _readable(records):
            if row.task_id not in rows or rows[row.task_id].status != SUCCESS:
                rows[row.task_id] = row
        await self._execute(self._store_statement, rows.values())
        await self._clean()

    async def announce(self, records: Sequence[Record]) -> None:
        rows = list(_readable(records))
        lives = {record.key: record.ttl for record in records}
        for row in rows:  # a task for later: its life begins later, too
            life = lives[row.task_id]
            if life is not None and self._expires is not None:
                row.date_done += timedelta(seconds=life - self._expires)
        await self._execute(self._announce_statement, rows)

    async def _execute(self, statement: sa.Insert, rows: Iterable[Row]) -> None:
        """In the order of their ids, so that two writers never wait for each other."""
        values = [asdict(row) for row in sorted(rows, key=lambda row: row.task_id)]
        if values:
            async with self._transaction() as connection:
                await connection.execute(statement, values)

    async def _clean(self) -> None:
        """Now and then, remove what has ended; whoever wrote it, as Celery's daily clean-up does."""
        now = asyncio.get_running_loop().time()
        oldest = self._oldest()
        if oldest is None or now < self._next_cleaning:
            return
        self._next_cleaning = now + _CLEANING
        try:
            async with self._transaction() as connection:
                if await _remove(connection, tasks, oldest) + await _remove(connection, groups, oldest) >= _CLEANED:
                    self._next_cleaning = now + _CLEANING_ON
        except StoreUnavailable as error:  # what was to be stored is stored
            logger.warning("old results are not removed for now: %s", error)

    def _oldest(self) -> datetime | None:
        """What ended before is over; None: nothing is."""
        return None if self._expires is None else _moment(None) - timedelta(seconds=self._expires)

    async def forget(self, task_id: str) -> None:
        if not _is_possible(task_id):
            return
        async with self._transaction() as connection:
            await connection.execute(tasks.delete().where(tasks.c.task_id == task_id))

    # --- reading ---

    async def get(self, task_id: str, wait: float = 0.0) -> Result | None:
        return await self._polling.get(task_id, wait)

    async def _read_all(self, task_ids: Sequence[str]) -> dict[str, Result | AQueueError]:
        return await self._read(task_ids, sa.true())

    async def _read_ended(self, task_ids: Sequence[str]) -> dict[str, Result | AQueueError]:
        return await self._read(task_ids, tasks.c.status.in_(FINAL_STATES))

    async def _read(self, task_ids: Sequence[str], which: sa.ColumnElement[bool]) -> dict[str, Result | AQueueError]:
        oldest = self._oldest()
        if oldest is not None:
            which &= tasks.c.date_done.is_(None) | (tasks.c.date_done > oldest)
        task_ids = [task_id for task_id in task_ids if _is_possible(task_id)]
        rows: list[sa.Row[Any]] = []
        async with self._transaction() as connection:
            for start in range(0, len(task_ids), _IDS):
                wanted = tasks.c.task_id.in_(task_ids[start : start + _IDS])
                rows += (await connection.execute(sa.select(tasks).where(wanted & which))).all()
        return {row.task_id: self._result(row) for row in rows}

    def _result(self, row: sa.Row[Any]) -> Result | AQueueError:
        try:
            return Result(
                task_id=row.task_id,
                state=row.status,
                value=told_value(row.status, self._value(row)),
                traceback=row.traceback,
                children=self._decode(row.children) or [],
                date_done=_iso(row.date_done) if row.status in FINAL_STATES else None,
                extra=self._extra(row),
            )
        except BadMessage as error:
            return error

    def _value(self, row: sa.Row[Any]) -> Any:
        """Celery before 5.7 pickled the value, whatever the serializer was."""
        try:
            return self._decode(row.result)
        except BadMessage:
            if not row.result.startswith(_PICKLE):
                raise
        try:
            return self._documents.decode_value(row.result, CONTENT_TYPES["pickle"])
        except BadMessage as error:
            raise BadMessage(
                error.reason,
                f"the result of {row.task_id} was pickled by Celery 5.6 or older: {error.detail}. Let it expire, "
                "or accept pickle for results if all who can write to this database are trusted",
            ) from None

    def _decode(self, data: bytes | None) -> Any:
        return None if data is None else self._documents.decode_value(data)

    def _extra(self, row: sa.Row[Any]) -> dict[str, Any]:
        extra = {name: self._decode(getattr(row, name)) for name in _ENCODED if getattr(row, name) is not None}
        extra |= {name: getattr(row, name) for name in (*_NAMES, "retries") if getattr(row, name) is not None}
        stamps = self._decode(row.stamps)
        if is_object(stamps) and is_object(stamps.get("stamps")):
            extra |= {"stamped_headers": stamps.get("stamped_headers"), **stamps["stamps"]}
        return extra

    # --- the connection ---

    @asynccontextmanager
    async def _transaction(self) -> AsyncGenerator[AsyncConnection]:
        try:
            async with asyncio.timeout(self._timeout):
                engine = await self._ready()
                async with engine.begin() as connection:
                    yield connection
        except TimeoutError:
            self._prepared = False
            raise StoreUnavailable(f"{self._address} did not answer within {self._timeout:g} s") from None
        except self._address.errors as error:
            self._prepared = False
            raise StoreUnavailable(f"{self._address}: {self._address.sentence(error)}") from None

    async def _ready(self) -> AsyncEngine:
        if self._engine is None:
            self._engine = self._address.engine(self._timeout)
        if not self._prepared:
            async with self._preparing:
                if not self._prepared:
                    await prepare(self._engine)
                    self._prepared = True
        return self._engine


async def _remove(connection: AsyncConnection, table: sa.Table, oldest: datetime) -> int:
    """Some of the rows that ended before, and how many; not all at once, as that can take minutes."""
    over = sa.select(table.c.id).where(table.c.date_done < oldest).limit(_CLEANED)
    ids = (await connection.execute(over)).scalars().all()
    if ids:
        await connection.execute(table.delete().where(table.c.id.in_(ids)))
    return len(ids)


def _readable(records: Sequence[Record]) -> Iterable[Row]:
    """The rows; one that no table of Celery's can hold must not keep the others from being stored."""
    for record in records:
        if not _is_possible(record.key):
            logger.error(
                "no state of task %.200r is stored: Celery's tables hold ids of %d printable characters",
                record.key,
                LONGEST_NAME,
            )
        else:
            yield _unpack(record.value)


def _is_possible(task_id: str) -> bool:
    """Whether every database takes this id; some drivers raise anything for one that they don't."""
    return task_id.isprintable() and len(task_id) <= LONGEST_NAME


def _text(text: str, longest: int | None) -> str:
    """What every database takes as text, of so many bytes at most."""
    data = str(text).replace("\0", "").encode(errors="replace")[:longest]
    return data.decode(errors="ignore")


def _moment(text: str | None) -> datetime:
    """A time of Celery's documents, or now, as the column holds it."""
    moment = datetime.now(timezone.utc) if text is None else datetime.fromisoformat(text)
    return moment.astimezone(timezone.utc).replace(tzinfo=None)


def _iso(moment: datetime | None) -> str | None:
    return None if moment is None else moment.replace(tzinfo=timezone.utc).isoformat()
