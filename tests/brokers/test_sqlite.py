"""What is particular to SQLite: its tables, and those of older versions."""

import sqlite3
from pathlib import Path

from aqueue import broker as brokers
from aqueue.broker import Ack, BrokerOptions, Bury
from aqueue.drivers.sqlite_file import SCHEMA_VERSION
from aqueue.url import Url
from tests.conformance.test_broker import message, names

#: Of a file of version 1.
OLD = """
CREATE TABLE messages (id INTEGER PRIMARY KEY AUTOINCREMENT, queue TEXT NOT NULL, priority INTEGER NOT NULL,
    place INTEGER NOT NULL, headers TEXT NOT NULL, properties TEXT NOT NULL, content_type TEXT NOT NULL,
    content_encoding TEXT, body BLOB NOT NULL, due REAL, lease_ends REAL, holder TEXT, suspected REAL,
    claims INTEGER NOT NULL DEFAULT 0, lost INTEGER NOT NULL DEFAULT 0);
CREATE TABLE places (front INTEGER NOT NULL, back INTEGER NOT NULL);
INSERT INTO places VALUES (0, 1);
CREATE TABLE dead (id INTEGER PRIMARY KEY, queue TEXT NOT NULL, priority INTEGER NOT NULL, headers TEXT NOT NULL,
    properties TEXT NOT NULL, content_type TEXT NOT NULL, content_encoding TEXT, body BLOB NOT NULL,
    reason TEXT NOT NULL, detail TEXT NOT NULL, died REAL NOT NULL, deliveries INTEGER NOT NULL, worker TEXT NOT NULL);
CREATE TABLE results (key TEXT PRIMARY KEY, document BLOB NOT NULL, ends REAL);
INSERT INTO messages (queue, priority, place, headers, properties, content_type, body, lost)
    VALUES ('q', 0, 1, '{"task": "t", "id": "waits"}', '{}', 'application/json', x'5b5d', 1);
INSERT INTO dead VALUES (7, 'q', 0, '{"task": "t", "id": "died"}', '{}', 'application/json', NULL, x'5b5d',
    'rejected', 'no', 1.0, 1, 'worker@host');
PRAGMA user_version = 1;
"""


async def test_a_file_of_an_older_version_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "old.db"
    with sqlite3.connect(path) as file:
        file.executescript(OLD)
    async with brokers.from_url(Url(f"sqlite:///{path}"))(BrokerOptions()) as broker:
        (delivery,) = await broker.fetch(["q"], 10, 1)
        assert (names([delivery]), delivery.deliveries) == (["waits"], 2)
        assert not await broker.settle([(delivery, Bury("why"))])
        assert [letter.reason for letter in await broker.inspection.dead()] == ["why", "rejected"]
        assert await broker.inspection.retry_dead(["7"]) == 1
        (again,) = await broker.fetch(["q"], 10, 1)
        assert [death.reason for death in again.history.deaths] == ["rejected"]
        assert not await broker.settle([(again, Ack())])
    with sqlite3.connect(path) as file:
        assert file.execute("PRAGMA user_version").fetchone() == (SCHEMA_VERSION,)
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)


async def test_both_ways_to_a_file_give_the_same_tables(tmp_path: Path) -> None:
    old, new = tmp_path / "old.db", tmp_path / "new.db"
    with sqlite3.connect(old) as file:
        file.executescript(OLD)
    tables: list[dict[str, list[str]]] = []
    for path in (old, new):
        async with brokers.from_url(Url(f"sqlite:///{path}"))(BrokerOptions()) as broker:
            await broker.publish([message("q")])
        with sqlite3.connect(path) as file:
            found = file.execute(
                "SELECT m.name, c.name FROM sqlite_master m, pragma_table_info(m.name) c WHERE m.type = 'table'"
            ).fetchall()
        tables.append({name: [column for table, column in found if table == name] for name, _ in found})
    assert tables[0] == tables[1]
