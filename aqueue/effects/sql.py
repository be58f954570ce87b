"""Effects in any database that SQLAlchemy speaks to; loaded when one of its connections is given."""

from typing import Any, Final

import sqlalchemy as sa
from msgspec.structs import asdict
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.schema import CreateTable

from aqueue.effects.row import EffectRow
from aqueue.errors import ConfigurationError

_effects: Final = sa.Table(
    "aqueue_effects",
    sa.MetaData(),
    sa.Column("id", sa.String(64), primary_key=True),
    sa.Column("task_id", sa.String(255), nullable=False),
    sa.Column("step", sa.String(255), nullable=False),
    sa.Column("token", sa.BigInteger),
    sa.Column("made", sa.Double, nullable=False),
)
#: In `Connection.info`, which lives as long as the driver's connection: the table was there.
_SEEN: Final = "aqueue_effects"


class SqlTransaction:
    """A `aqueue.effects.Transaction` of a Session or a Connection."""

    def __init__(self, connection: Any) -> None:
        self._given = connection

    def claim(self, row: EffectRow) -> bool:
        return _claim(self._given, row)

    def commit(self) -> None:
        self._given.commit()

    def rollback(self) -> None:
        self._given.rollback()


class AsyncSqlTransaction:
    """A `aqueue.effects.AsyncTransaction` of an AsyncSession or an AsyncConnection."""

    def __init__(self, connection: Any) -> None:
        self._given = connection

    async def claim(self, row: EffectRow) -> bool:
        first: bool = await self._given.run_sync(_claim, row)
        return first

    async def commit(self) -> None:
        await self._given.commit()

    async def rollback(self) -> None:
        await self._given.rollback()


def _connection_of(given: Any) -> sa.Connection:
    found: sa.Connection = given if isinstance(given, sa.Connection) else given.connection()
    if found.get_execution_options().get("isolation_level") == "AUTOCOMMIT":
        raise ConfigurationError("an effect needs a transaction, and this connection commits each statement by itself")
    return found


def _claim(given: Any, row: EffectRow) -> bool:
    connection = _connection_of(given)
    if _SEEN not in connection.info:
        if sa.inspect(connection).has_table(_effects.name):
            connection.info[_SEEN] = True
        else:
            _make(connection)
    match connection.dialect.name:
        case "sqlite":
            statement: Any = sqlite.insert(_effects).on_conflict_do_nothing()
        case "postgresql":
            statement = postgresql.insert(_effects).on_conflict_do_nothing()
        case "mysql" | "mariadb":
            statement = _effects.insert().prefix_with("IGNORE")
        case _:
            return _claim_in_savepoint(connection, row)
    done = connection.execute(statement, asdict(row), execution_options={"preserve_rowcount": True})
    return done.rowcount == 1


def _claim_in_savepoint(connection: sa.Connection, row: EffectRow) -> bool:
    """For databases whose way to leave out what is there is not known here."""
    try:
        with connection.begin_nested():
            connection.execute(_effects.insert(), asdict(row))
    except IntegrityError:
        return False
    return True


def _make(connection: sa.Connection) -> None:
    """By a transaction of its own: making a table commits on some databases, and holds up others on the rest."""
    if connection.dialect.name == "sqlite":  # which has one writer, that may be us
        connection.execute(CreateTable(_effects, if_not_exists=True))
        return
    try:
        with connection.engine.begin() as other:
            _effects.create(other, checkfirst=True)
    except DBAPIError:  # somebody else may have made it a moment ago
        with connection.engine.connect() as other:
            if not sa.inspect(other).has_table(_effects.name):
                raise
