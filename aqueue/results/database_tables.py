"""The tables of Celery's ``db+`` backend (celery-protocol 4.10), and the statements on them.

The column types, sizes and sequences are Celery 5.7's: whichever of the two comes first makes the tables.
"""

from datetime import datetime
from typing import Final

import msgspec
import sqlalchemy as sa
from sqlalchemy.dialects import mysql, postgresql, sqlite
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.schema import CreateSequence

from aqueue.results import SUCCESS

#: Characters in a task's id, and in names.
LONGEST_NAME: Final = 155
LONGEST_STATUS: Final = 50
#: Bytes in one value of MySQL's and MariaDB's BLOB and TEXT; other databases have no such bound.
LONGEST_BLOB: Final = 65_535
_MYSQL: Final = ("mysql", "mariadb")
#: How often tables are looked at anew while others make them, too.
_TRIES: Final = 5

metadata: Final = sa.MetaData()
tasks: Final = sa.Table(
    "celery_taskmeta",
    metadata,
    sa.Column("id", sa.Integer, sa.Sequence("task_id_sequence"), primary_key=True, autoincrement=True),
    sa.Column("task_id", sa.String(LONGEST_NAME), unique=True),
    sa.Column("status", sa.String(LONGEST_STATUS)),
    sa.Column("result", sa.LargeBinary),
    sa.Column("date_done", sa.DateTime, index=True),
    sa.Column("traceback", sa.Text),
    sa.Column("children", sa.LargeBinary),
    sa.Column("name", sa.String(LONGEST_NAME)),
    sa.Column("args", sa.LargeBinary),
    sa.Column("kwargs", sa.LargeBinary),
    sa.Column("worker", sa.String(LONGEST_NAME)),
    sa.Column("retries", sa.Integer),
    sa.Column("queue", sa.String(LONGEST_NAME)),
    sa.Column("stamps", sa.LargeBinary),
    sqlite_autoincrement=True,
)
groups: Final = sa.Table(
    "celery_tasksetmeta",
    metadata,
    sa.Column("id", sa.Integer, sa.Sequence("taskset_id_sequence"), primary_key=True, autoincrement=True),
    sa.Column("taskset_id", sa.String(LONGEST_NAME), unique=True),
    sa.Column("result", sa.LargeBinary),
    sa.Column("date_done", sa.DateTime, index=True),
    sqlite_autoincrement=True,
)


class Row(msgspec.Struct, omit_defaults=True):
    """One task, as it is written; the names are those of the columns."""

    task_id: str
    status: str
    result: bytes
    #: When it ended or was stored, from which its life is reckoned; naive, UTC.
    date_done: datetime
    traceback: str | None = None
    children: bytes | None = None
    name: str | None = None
    args: bytes | None = None
    kwargs: bytes | None = None
    worker: str | None = None
    retries: int | None = None
    queue: str | None = None
    stamps: bytes | None = None


#: ``status`` comes last: MySQL assigns in this order, and each assignment asks for the status before.
_CHANGED: Final = (*(name for name in Row.__struct_fields__ if name not in ("task_id", "status")), "status")


def blob_limit(database: str) -> int | None:
    """Bytes in one value; None: as many as a message may have."""
    return LONGEST_BLOB if database in _MYSQL else None


def store(database: str) -> sa.Insert:
    """Store a row unless its task has succeeded: one statement, so no two writers come between each other."""
    if database in _MYSQL:
        row = mysql.insert(tasks)
        # MySQL has no name for the key that was double: never write into the row of another task.
        open_ = (tasks.c.task_id == row.inserted.task_id) & (tasks.c.status != sa.literal_column(f"'{SUCCESS}'"))
        kept = [(name, sa.case((open_, row.inserted[name]), else_=tasks.c[name])) for name in _CHANGED]
        return row.on_duplicate_key_update(kept)
    insert = _insert(database)
    return insert.on_conflict_do_update(
        index_elements=["task_id"],
        set_={name: insert.excluded[name] for name in _CHANGED},
        where=tasks.c.status != SUCCESS,
    )


def store_if_absent(database: str) -> sa.Insert:
    """Store a row unless its task has one."""
    if database in _MYSQL:
        return mysql.insert(tasks).on_duplicate_key_update(task_id=tasks.c.task_id)
    return _insert(database).on_conflict_do_nothing(index_elements=["task_id"])


def _insert(database: str) -> sqlite.Insert | postgresql.Insert:
    return sqlite.insert(tasks) if database == "sqlite" else postgresql.insert(tasks)


async def prepare(engine: AsyncEngine) -> None:
    """Make Celery's tables, and the columns that versions before 5.7 had not. Raises SQLAlchemyError."""
    for left in reversed(range(_TRIES)):
        try:
            async with engine.begin() as connection:
                await connection.run_sync(_make)
        except SQLAlchemyError:  # another process may have made what was missing a moment ago
            if not left:
                raise
        else:
            return


def _make(connection: sa.Connection) -> None:
    found = sa.inspect(connection)
    there = set(found.get_table_names())
    if connection.dialect.supports_sequences:
        for table in there & set(metadata.tables):
            _add_sequence(connection, found, metadata.tables[table])
    metadata.create_all(connection)
    if tasks.name in there:
        _add_columns(connection, {column["name"] for column in found.get_columns(tasks.name)})


def _add_sequence(connection: sa.Connection, found: sa.Inspector, table: sa.Table) -> None:
    """For a table made without one, as MariaDB's were once: it must not begin with ids that are taken."""
    sequence = table.c.id.default
    assert isinstance(sequence, sa.Sequence)
    if not found.has_sequence(sequence.name):
        last: int = connection.execute(sa.select(sa.func.coalesce(sa.func.max(table.c.id), 0))).scalar_one()
        connection.execute(CreateSequence(sa.Sequence(sequence.name, start=last + 1)))


def _add_columns(connection: sa.Connection, there: set[str]) -> None:
    for column in tasks.columns:
        if column.name not in there:
            kind = column.type.compile(connection.dialect)
            connection.execute(sa.text(f"ALTER TABLE {tasks.name} ADD COLUMN {column.name} {kind}"))
