"""Looking into SQLite queues, for people."""

import sqlite3
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import msgspec

from aqueue.broker import DeadLetter, Presence, QueueDepth, Recovered
from aqueue.drivers.sqlite_file import SqliteFile, T, Work
from aqueue.errors import BadMessage, BrokerUnavailable
from aqueue.protocol import Message, Unreadable
from aqueue.serialization import Limits, loads_json
from aqueue.shapes import is_object

#: Constant text, so that building statements with it is safe.
_COLUMNS = "queue, priority, headers, properties, content_type, content_encoding, body"


_DEPTH = Limits().depth


def message_of(row: Sequence[Any]) -> Message | Unreadable:
    """A message from the columns queue, priority, headers, properties, content type and encoding, body."""
    queue, priority, headers, properties, content_type, content_encoding, body = row
    try:
        return Message(
            queue=queue,
            headers=_object(headers),
            body=body,
            content_type=content_type,
            content_encoding=content_encoding,
            properties=_object(properties),
            priority=priority,
        )
    except BadMessage as error:
        return Unreadable(queue, body if isinstance(body, bytes) else str(body).encode(), error)


def _object(text: Any) -> dict[str, Any]:
    found = loads_json(str(text).encode(), _DEPTH, extended=False)
    if not is_object(found):
        raise BadMessage("undecodable", "headers or properties are no JSON object")
    return found


#: Under which keys of the table of results workers are found: a worker lives shortly, as a result does.
_WORKER = "aqueue-worker-"


def put_presence(connection: sqlite3.Connection, presence: Presence, seconds: float) -> None:
    """Show a worker for so long; 0: no more."""
    key = f"{_WORKER}{presence.worker}"
    if seconds:
        values = (key, msgspec.json.encode(presence), time.time() + seconds)
        connection.execute("INSERT OR REPLACE INTO results VALUES (?, ?, ?)", values)
    else:
        connection.execute("DELETE FROM results WHERE key = ?", (key,))


class SqliteInspection:
    """A `aqueue.broker.Inspection` of one file."""

    def __init__(self, file: SqliteFile) -> None:
        self._file = file

    async def queues(self, known: Sequence[str] = ()) -> Sequence[QueueDepth]:
        rows = await self._run(
            lambda connection: connection.execute(
                "SELECT queue, sum(place = 0), sum(place = 1), sum(place = 2), sum(place = 3) FROM ("
                " SELECT queue, CASE WHEN lease_ends IS NOT NULL THEN 1 WHEN due IS NOT NULL THEN 2 ELSE 0 END AS place"
                " FROM messages UNION ALL SELECT queue, 3 FROM dead) GROUP BY queue ORDER BY queue"
            ).fetchall()
        )
        return [QueueDepth(*row) for row in rows]

    async def workers(self) -> Sequence[Presence]:
        rows = await self._run(
            lambda connection: connection.execute(
                "SELECT document FROM results WHERE key GLOB ? AND ends > ? ORDER BY key", (f"{_WORKER}*", time.time())
            ).fetchall()
        )
        return [msgspec.json.decode(row[0], type=Presence) for row in rows]

    async def peek(self, queue: str, limit: int) -> Sequence[Message | Unreadable]:
        rows = await self._run(
            lambda connection: connection.execute(
                f"SELECT {_COLUMNS} FROM messages WHERE queue = ? AND due IS NULL AND lease_ends IS NULL"
                " ORDER BY priority DESC, place LIMIT ?",
                (queue, limit),
            ).fetchall()
        )
        return [message_of(row) for row in rows]

    async def purge(self, queue: str) -> int:
        return await self._run(
            lambda connection: (
                connection.execute("DELETE FROM messages WHERE queue = ? AND lease_ends IS NULL", (queue,)).rowcount
            )
        )

    async def dead(self, queue: str | None = None, limit: int = 100) -> Sequence[DeadLetter]:
        return await self._letters("(?1 IS NULL OR queue = ?1)", queue, limit)

    async def find_dead(self, id: str) -> DeadLetter | None:
        found = await self._letters("id = ?1", id, 1)
        return found[0] if found else None

    async def _letters(self, where: str, value: str | None, limit: int) -> list[DeadLetter]:
        rows = await self._run(
            lambda connection: connection.execute(
                f"SELECT id, reason, detail, died, deliveries, worker, {_COLUMNS} FROM dead WHERE {where}"
                " ORDER BY died DESC, id DESC LIMIT ?2",
                (value, limit),
            ).fetchall()
        )
        return [
            DeadLetter(
                id=str(row[0]),
                reason=row[1],
                detail=row[2],
                died=datetime.fromtimestamp(row[3], timezone.utc),
                deliveries=row[4],
                worker=row[5],
                message=message_of(row[6:]),
            )
            for row in rows
        ]

    async def retry_dead(self, ids: Sequence[str]) -> int:
        def move(connection: sqlite3.Connection) -> int:
            moved = 0
            for id in ids:
                moved += connection.execute(
                    f"INSERT INTO messages (place, {_COLUMNS})"
                    f" SELECT (SELECT back + 1 FROM places), {_COLUMNS} FROM dead WHERE id = ?",
                    (id,),
                ).rowcount
                connection.execute("UPDATE places SET back = back + 1")
                connection.execute("DELETE FROM dead WHERE id = ?", (id,))
            return moved

        return await self._run(move, rings=True)

    async def drop_dead(self, ids: Sequence[str]) -> int:
        return await self._run(
            lambda connection: sum(connection.execute("DELETE FROM dead WHERE id = ?", (id,)).rowcount for id in ids)
        )

    async def recover(self, *, older_than: float, celery: bool, parked: bool) -> Recovered:
        return Recovered()

    async def _run(self, work: Work[T], *, rings: bool = False) -> T:
        try:
            return await self._file.run(work, bell=self._file.messages_bell if rings else None)
        except sqlite3.Error as error:
            raise BrokerUnavailable(f"SQLite: {error}") from None
