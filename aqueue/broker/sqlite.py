"""The SQLite broker: one file, several processes, no server.

Every verb is one transaction, and what several callers want at once is one together (see
`aqueue.drivers.sqlite_file`). A claim is a column, not an open transaction; a receipt is ``<claim>:<id>``, and claims
are numbered for the whole file, so that an older claim of the same message is refused. Where broker and result store
share a file, results and verdicts are one transaction.
"""

import asyncio
import json
import sqlite3
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from fnmatch import fnmatchcase
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from aqueue.broker import (
    Ack,
    BrokerFactory,
    BrokerOptions,
    Bury,
    Delivery,
    Presence,
    Release,
    Verdict,
    in_turn,
    or_hand_back,
    settling_order,
)
from aqueue.broker.history import History, Loss, decode, encode
from aqueue.broker.sqlite_control import SqliteControl
from aqueue.broker.sqlite_inspection import SqliteInspection, message_of, overdue, put_presence
from aqueue.drivers import sqlite_checks
from aqueue.drivers.sqlite_file import SqliteFile, drop_ended, path_of, put_if_absent, put_records
from aqueue.errors import AQueueError, Border, BrokerUnavailable, EnqueueFailed
from aqueue.findings import Finding, Use
from aqueue.protocol import Message, Record
from aqueue.serialization import dumps_headers
from aqueue.url import Url

T = TypeVar("T")

#: How many messages one claim takes, or one look brings back.
_BATCH: Final = 1000
#: Seconds after which a listener looks by itself, in case a ring was lost with a killed process.
_LOOK_AGAIN: Final = 5.0


class SqliteBroker:
    """A `aqueue.broker.Broker` in a file."""

    pushes = False
    sends_at_once = 1

    def __init__(self, path: Path, options: BrokerOptions) -> None:
        self.lease = options.lease
        self.holder = ""
        self._options = options
        self._file = SqliteFile(path, options.timeout)
        self.control = SqliteControl(self._file)
        self._changed = asyncio.Event()
        self._stop_listening: Callable[[], None] | None = None
        self._renewing: sqlite3.Connection | None = None
        self._turn = 0

    @classmethod
    def factory(cls, url: Url) -> BrokerFactory:
        path = path_of(url)
        return lambda options: cls(path, options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.control.close()
        if self._stop_listening is not None:
            self._stop_listening()
            self._stop_listening = None
        if self._renewing is not None:
            self._renewing.close()
            self._renewing = None
        await self._file.close()

    @property
    def losses(self) -> "SqliteLosses":
        return SqliteLosses(self._file)

    @property
    def inspection(self) -> SqliteInspection:
        return SqliteInspection(self._file)

    async def check(self, use: Use) -> Sequence[Finding]:
        with _raising(BrokerUnavailable):
            found = sqlite_checks.check(self._file.path)
            if use.contents:
                found += await self._file.run(lambda connection: overdue(connection, self._file.path, self.lease))
        return found

    def now(self) -> float:
        return time.time()

    def keeps(self, place: object) -> bool:
        return place == self._file.path

    # --- sending ---

    async def publish(self, messages: Sequence[Message]) -> None:
        if any(message.exchange for message in messages):
            raise EnqueueFailed("sqlite:// has no exchanges; send to a queue")
        with _raising(EnqueueFailed):
            await self._file.run(lambda connection: self._insert(connection, messages), bell=self._file.messages_bell)

    def _insert(self, connection: sqlite3.Connection, messages: Sequence[Message]) -> None:
        new = [
            message for message in messages if message.announce is None or put_if_absent(connection, message.announce)
        ]
        first = _places(connection, len(new))
        now = time.time()
        connection.executemany(
            "INSERT INTO messages"
            " (queue, priority, headers, properties, content_type, content_encoding, body, place, due)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [
                (*_columns(message), place, now + message.delay if self._is_parked(message) else None)
                for place, message in enumerate(new, first)
            ],
        )

    def _is_parked(self, message: Message) -> bool:
        return message.delay > 0 and not any(fnmatchcase(message.queue, glob) for glob in self._options.eta_queues)

    # --- working ---

    async def fetch(self, queues: Sequence[str], limit: int, wait: float) -> Sequence[Delivery]:
        if self._stop_listening is None:
            self._stop_listening = self._file.messages_bell.listen(self._changed.set)
        self._turn += 1
        turned = in_turn(queues, self._turn)
        loop = asyncio.get_running_loop()
        deadline = loop.time() + wait
        while True:
            self._changed.clear()
            with _raising(BrokerUnavailable):
                claim = self._file.run(lambda connection: self._claim(connection, turned, min(limit, _BATCH)))
                found, pause = await or_hand_back(claim, self._hand_back)
            left = deadline - loop.time()
            if found or left <= 0:
                return found
            with suppress(TimeoutError):
                async with asyncio.timeout(min(left, pause, _LOOK_AGAIN)):
                    await self._changed.wait()

    async def let_go(self, delivery: Delivery) -> bool:
        return not await self.settle([(delivery, Ack())])

    async def waiting(self, queues: Sequence[str]) -> bool:
        with _raising(BrokerUnavailable):
            return await self._file.run(lambda connection: any(_has_ready(connection, queue) for queue in queues))

    def reconnect(self) -> None:
        if self._stop_listening is not None:
            self._stop_listening()
            self._stop_listening = None
        self._changed.set()

    def _claim(self, connection: sqlite3.Connection, queues: Sequence[str], limit: int) -> tuple[list[Delivery], float]:
        """Deliveries, and when there are none the seconds until something may become ready by itself."""
        now = time.time()
        patience = self.lease / 2
        _make_ready(connection, now)
        _take_back(connection, now, self._options)
        waiting: list[tuple[int, int, int, int]] = []
        for turn, queue in enumerate(queues):
            waiting += connection.execute(
                "SELECT -priority, ?, place, id FROM messages WHERE queue = ? AND due IS NULL AND lease_ends IS NULL"
                " ORDER BY priority DESC, place LIMIT ?",
                (turn, queue, limit),
            )
        ids = [row[3] for row in (sorted(waiting)[:limit] if len(queues) > 1 else waiting)]
        if not ids:
            return [], _pause(connection, now, patience)
        rows = connection.execute(
            "UPDATE messages SET claims = ? + chosen.key, lease_ends = ?, holder = ?, claimed = ?, suspected = NULL"
            " FROM json_each(?) AS chosen WHERE messages.id = chosen.value RETURNING id, claims, lost, history,"
            " queue, priority, headers, properties, content_type, content_encoding, body",
            (_places(connection, len(ids)), now + self.lease, self.holder, now, json.dumps(ids)),
        )
        claimed = {
            row[0]: Delivery(message_of(row[4:]), f"{row[1]}:{row[0]}", row[2] + 1, decode(row[3])) for row in rows
        }
        return [claimed[id] for id in ids], 0.0

    async def _hand_back(self, claimed: tuple[list[Delivery], float]) -> None:
        """Release what was claimed for a caller that is gone."""
        if claimed[0]:
            await self.settle([(delivery, Release()) for delivery in claimed[0]])

    def extend(self, deliveries: Collection[Delivery]) -> Sequence[Delivery]:
        return self._in_the_thread(lambda connection: self._renew(connection, deliveries), "could not renew leases")

    def present(self, presence: Presence, seconds: float) -> None:
        self._in_the_thread(
            lambda connection: put_presence(connection, presence, seconds), "could not say that this worker is here"
        )

    def _in_the_thread(self, work: Callable[[sqlite3.Connection], T], failed: str) -> T:
        try:
            if self._renewing is None:
                self._renewing = self._file.connect()
            return work(self._renewing)
        except sqlite3.Error as error:
            renewing, self._renewing = self._renewing, None
            if renewing is not None:
                renewing.close()
            raise BrokerUnavailable(f"{failed}: {error}") from None

    def _renew(self, connection: sqlite3.Connection, deliveries: Collection[Delivery]) -> list[Delivery]:
        connection.execute("BEGIN IMMEDIATE")
        held = _held(connection, deliveries)
        connection.execute(
            "UPDATE messages SET lease_ends = ?, suspected = NULL WHERE id IN (SELECT value FROM json_each(?))",
            (time.time() + self.lease, json.dumps([_id(delivery) for delivery in deliveries if _id(delivery) in held])),
        )
        connection.execute("COMMIT")
        return [delivery for delivery in deliveries if _id(delivery) not in held]

    async def settle(self, verdicts: Sequence[tuple[Delivery, Verdict]]) -> Sequence[Delivery]:
        ordered = settling_order(verdicts)
        rings = any(not isinstance(verdict, Ack) or verdict.publish for _, verdict in verdicts)
        with _raising(BrokerUnavailable):
            refused = await self._file.run(
                lambda connection: self._settle(connection, ordered), bell=self._file.messages_bell if rings else None
            )
        if any(getattr(verdict, "record", None) for _, verdict in verdicts):
            self._file.results_bell.ring()
        return refused

    def _settle(self, connection: sqlite3.Connection, verdicts: Sequence[tuple[Delivery, Verdict]]) -> list[Delivery]:
        held = _held(connection, [delivery for delivery, _ in verdicts])
        gone: list[int] = []
        records: list[Record] = []
        for delivery, verdict in verdicts:
            if _id(delivery) not in held:
                continue
            match verdict:
                case Release(delay=delay, last=last):
                    _release(connection, _id(delivery), delay, last)
                    continue
                case Bury():
                    _bury(connection, delivery, verdict, self.holder)
                case Ack(publish=messages):
                    if messages:
                        self._insert(connection, messages)
            if verdict.record is not None:
                records.append(verdict.record)
            gone.append(_id(delivery))
        connection.execute("DELETE FROM messages WHERE id IN (SELECT value FROM json_each(?))", (json.dumps(gone),))
        if records:
            put_records(connection, records)
            drop_ended(connection)
        return [delivery for delivery, _ in verdicts if _id(delivery) not in held]


class SqliteLosses:
    """`aqueue.broker.Losses` of one file."""

    def __init__(self, file: SqliteFile) -> None:
        self._file = file

    async def explain(self, receipts: Collection[str], cause: str) -> None:
        with _raising(BrokerUnavailable):
            await self._file.run(lambda connection: _explain(connection, receipts, cause))

    async def give_back_untaken(self) -> None:
        pass


def _explain(connection: sqlite3.Connection, receipts: Collection[str], cause: str) -> None:
    """A claim of before is in the history, the present one in columns."""
    for receipt in receipts:
        claim, _, id = receipt.partition(":")
        connection.execute(
            "UPDATE messages SET cause = ? WHERE id = ? AND claims = ? AND lease_ends IS NOT NULL", (cause, id, claim)
        )
        for (history,) in connection.execute("SELECT history FROM messages WHERE id = ?", (id,)).fetchall():
            connection.execute(
                "UPDATE messages SET history = ? WHERE id = ?", (_text(decode(history).explained(receipt, cause)), id)
            )


def _id(delivery: Delivery) -> int:
    return int(delivery.receipt.partition(":")[2])


def _held(connection: sqlite3.Connection, deliveries: Collection[Delivery]) -> set[int]:
    """The ids of those deliveries whose claim is the newest one and not taken back."""
    ids = json.dumps([_id(delivery) for delivery in deliveries])
    rows = connection.execute(
        "SELECT id, claims FROM messages WHERE lease_ends IS NOT NULL AND id IN (SELECT value FROM json_each(?))",
        (ids,),
    )
    claims = {f"{claim}:{id}": id for id, claim in rows}
    return {claims[delivery.receipt] for delivery in deliveries if delivery.receipt in claims}


def _columns(message: Message) -> tuple[Any, ...]:
    return (
        message.queue,
        message.priority,
        dumps_headers(message.headers).decode(),
        dumps_headers(message.properties).decode(),
        message.content_type,
        message.content_encoding,
        message.body,
    )


def _places(connection: sqlite3.Connection, count: int, *, front: bool = False) -> int:
    """Reserve places at the end, or at the front; returns the first. Those at the end number claims, too."""
    if front:
        row = connection.execute("UPDATE places SET front = front - ? RETURNING front", (count,)).fetchone()
        return int(row[0])
    row = connection.execute("UPDATE places SET back = back + ? RETURNING back - ? + 1", (count, count)).fetchone()
    return int(row[0])


def _has_ready(connection: sqlite3.Connection, queue: str) -> bool:
    """Whether a message of a queue can be claimed now."""
    found = connection.execute(
        "SELECT 1 FROM messages WHERE queue = ? AND due IS NULL AND lease_ends IS NULL LIMIT 1", (queue,)
    ).fetchone()
    return found is not None


def _make_ready(connection: sqlite3.Connection, now: float) -> None:
    """Parked messages whose time has come join the end of their queues."""
    due = connection.execute("SELECT id FROM messages WHERE due <= ? ORDER BY due LIMIT ?", (now, _BATCH)).fetchall()
    if due:
        first = _places(connection, len(due))
        connection.executemany(
            "UPDATE messages SET due = NULL, place = ? WHERE id = ?",
            [(place, row[0]) for place, row in enumerate(due, first)],
        )


def _take_back(connection: sqlite3.Connection, now: float, options: BrokerOptions) -> None:
    """Messages whose holder let the lease end come back on second sight (see tend.lua for why)."""
    ended = connection.execute(
        "SELECT id, suspected, claims, lost, holder, claimed, cause, history FROM messages WHERE lease_ends < ?"
        " ORDER BY place DESC LIMIT ?",
        (now, _BATCH),
    ).fetchall()
    if not ended:
        return
    connection.executemany(
        "UPDATE messages SET suspected = ? WHERE id = ?", [(now, row[0]) for row in ended if row[1] is None]
    )
    for id, suspected, claims, lost, holder, claimed, cause, history in ended:
        if suspected is None or now - suspected < options.lease / 2:
            continue
        loss = Loss(holder or "", claimed, now, cause or "", f"{claims}:{id}")
        pause = options.pause_after(lost + 1)
        due = now + pause if pause else None
        connection.execute(
            "UPDATE messages SET lease_ends = NULL, holder = NULL, suspected = NULL, cause = NULL, lost = lost + 1,"
            " history = ?, due = ?, place = ? WHERE id = ?",
            (_text(decode(history).after_loss(loss)), due, _places(connection, 1, front=True), id),
        )


def _text(history: History) -> str | None:
    document = encode(history)
    return None if document is None else document.decode()


def _pause(connection: sqlite3.Connection, now: float, patience: float) -> float:
    moments = connection.execute(
        "SELECT min(due) FROM messages WHERE due IS NOT NULL UNION ALL"
        " SELECT min(coalesce(suspected + ?, lease_ends)) FROM messages WHERE lease_ends IS NOT NULL",
        (patience,),
    ).fetchall()
    return max(0.001, min((moment for (moment,) in moments if moment is not None), default=now + 3600.0) - now)


def _release(connection: sqlite3.Connection, id: int, delay: float, last: bool) -> None:
    connection.execute(
        "UPDATE messages SET lease_ends = NULL, holder = NULL, suspected = NULL, cause = NULL, due = ?, place = ?"
        " WHERE id = ?",
        (time.time() + delay if delay > 0 else None, _places(connection, 1, front=not last), id),
    )


def _bury(connection: sqlite3.Connection, delivery: Delivery, verdict: Bury, holder: str) -> None:
    connection.execute(
        "INSERT INTO dead SELECT id, queue, priority, headers, properties, content_type, content_encoding, body,"
        " ?, ?, ?, ?, ?, history FROM messages WHERE id = ?",
        (verdict.reason, verdict.detail, time.time(), delivery.deliveries, holder, _id(delivery)),
    )


def _raising(kind: type[AQueueError]) -> Border:
    return Border(kind, sqlite3.Error, prefix="SQLite: ")
