"""Looking into SQLite queues, for people."""

import sqlite3
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

import msgspec

from aqueue.broker import DeadLetter, Presence, QueueDepth, Recovered, Visit
from aqueue.broker.history import decode, encode
from aqueue.drivers.sqlite_file import SqliteFile, T, Work
from aqueue.errors import BadMessage, BrokerUnavailable
from aqueue.findings import PATIENCE, Finding
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


#: Letters read at once.
_PAGE: Final = 500
#: Places in the order of dying, before all and behind all.
_START: Final[tuple[float, int]] = (float("-inf"), 0)
_END: Final[tuple[float, int]] = (float("inf"), 0)
_LETTER = f"id, reason, detail, died, deliveries, worker, history, {_COLUMNS}"


def _letter(row: Sequence[Any]) -> DeadLetter:
    return DeadLetter(
        id=str(row[0]),
        reason=row[1],
        detail=row[2],
        died=datetime.fromtimestamp(row[3], timezone.utc),
        deliveries=row[4],
        worker=row[5],
        history=decode(row[6]),
        message=message_of(row[7:]),
    )


def _replay(connection: sqlite3.Connection, id: str) -> int:
    """Put one dead letter back; returns how many there were."""
    row = connection.execute(f"SELECT {_LETTER} FROM dead WHERE id = ?", (id,)).fetchone()
    if row is None:
        return 0
    history = encode(_letter(row).after_replay(time.time()))
    connection.execute("UPDATE places SET back = back + 1")
    connection.execute(
        f"INSERT INTO messages (place, history, {_COLUMNS})"
        f" SELECT (SELECT back FROM places), ?, {_COLUMNS} FROM dead WHERE id = ?",
        (None if history is None else history.decode(), id),
    )
    connection.execute("DELETE FROM dead WHERE id = ?", (id,))
    return 1


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

    async def dead(
        self, queue: str | None = None, limit: int = 100, where: Callable[[DeadLetter], bool] | None = None
    ) -> Sequence[DeadLetter]:
        found: list[DeadLetter] = []
        before = _END
        while len(found) < limit:
            page = await self._page(
                "(died, id) < (?1, ?2) AND (?3 IS NULL OR queue = ?3) ORDER BY died DESC, id DESC",
                (before[0], before[1], queue),
                min(limit, _PAGE),
            )
            found += [letter for letter, _ in page if where is None or where(letter)]
            if not page:
                break
            before = page[-1][1]
        return found[:limit]

    async def find_dead(self, id: str) -> DeadLetter | None:
        found = await self._page("id = ?1", (id, None, None), 1)
        return found[0][0] if found else None

    async def sift_dead(self, visit: Visit, page: int = 500) -> tuple[int, int]:
        retried = dropped = 0
        after, now = _START, time.time()
        while True:
            found = await self._page(
                "(died, id) > (?1, ?2) AND died < ?3 ORDER BY died, id", (after[0], after[1], now), page
            )
            if not found:
                return retried, dropped
            sifted = await visit([letter for letter, _ in found])
            retried += await self.retry_dead(sifted.retry)
            dropped += await self.drop_dead(sifted.drop)
            after = found[-1][1]

    async def _page(
        self, where: str, values: tuple[Any, Any, Any], limit: int
    ) -> list[tuple[DeadLetter, tuple[float, int]]]:
        """Letters, each with its place in the order of dying."""
        rows = await self._run(
            lambda connection: connection.execute(
                f"SELECT {_LETTER} FROM dead WHERE {where} LIMIT ?4", (*values, limit)
            ).fetchall()
        )
        return [(_letter(row), (row[3], row[0])) for row in rows]

    async def retry_dead(self, ids: Sequence[str]) -> int:
        return await self._run(lambda connection: sum(_replay(connection, id) for id in ids), rings=True)

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


def overdue(connection: sqlite3.Connection, path: Path, lease: float) -> list[Finding]:
    """What every live worker would have moved by now; ``lease`` is in seconds."""
    now = time.time()
    ended, parked = connection.execute(
        "SELECT count(*) FILTER (WHERE lease_ends < ?), count(*) FILTER (WHERE due < ?) FROM messages",
        (now - 2 * lease - PATIENCE, now - PATIENCE),
    ).fetchone()
    found: list[Finding] = []
    if ended:
        what = f"{ended} messages in {path} are held by workers that let their leases end, and nobody takes them back"
        found.append(Finding("AQ605", what, "start a worker, or `aqueue recover`"))
    if parked:
        what = f"{parked} messages in {path} are past their time, and nobody moves them to their queues"
        found.append(Finding("AQ606", what, "start a worker: any moves them all"))
    return found
