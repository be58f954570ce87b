"""What is particular to results in SQL databases: Celery's tables as they may be found, and servers that go."""

import asyncio
import json
import pickle
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, closing, contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio
from msgspec.structs import replace

from aqueue import results as stores
from aqueue.errors import BadMessage, MessageTooLarge, StoreUnavailable
from aqueue.results import FAILURE, FINAL_STATES, PENDING, SUCCESS, RemoteError, Result, StoreOptions
from aqueue.results import database_tables as tables
from aqueue.results.database import DatabaseResults
from aqueue.url import Url
from tests.kit.certificates import make_certificates
from tests.kit.databases import MariaDbServer, PostgresServer
from tests.kit.proxy import Proxy
from tests.kit.waiting import until

Make = Callable[..., Awaitable[DatabaseResults]]

WIRE: Final = Path(__file__).parent.parent / "wire"

#: Celery's table before 5.7, without the columns that came with it.
OLD_TABLE: Final = """
CREATE TABLE celery_taskmeta (
    id INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT, task_id VARCHAR(155), status VARCHAR(50), result BLOB,
    date_done DATETIME, traceback TEXT, UNIQUE (task_id)
)
"""


def now(later: float = 0.0) -> str:
    return (datetime.now(timezone.utc) + timedelta(seconds=later)).isoformat()


def column(later: float = 0.0) -> str:
    """A time as Celery writes it to SQLite."""
    return now(later)[:-6].replace("T", " ")


def ended(task_id: str, value: Any = 5, **fields: Any) -> Result:
    return Result(task_id=task_id, state=SUCCESS, value=value, date_done=now(), **fields)


def failed(task_id: str, text: str = "no luck", **fields: Any) -> Result:
    value = RemoteError("ValueError", [text], "builtins")
    return Result(task_id=task_id, state=FAILURE, value=value, date_done=now(), **fields)


async def put(store: DatabaseResults, *results: Result) -> None:
    await store.put([store.record(result) for result in results])


async def value_of(store: DatabaseResults, task_id: str) -> Any:
    found = await store.get(task_id)
    assert found is not None
    return found.value


@pytest_asyncio.fixture
async def make() -> AsyncIterator[Make]:
    async with AsyncExitStack() as stack:

        async def make(url: str, **options: Any) -> DatabaseResults:
            store = stores.from_url(Url(url))(replace(StoreOptions(), **options))
            assert isinstance(store, DatabaseResults)
            return await stack.enter_async_context(store)

        yield make


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "db.sqlite3"


@contextmanager
def opened(file: Path) -> Iterator[sqlite3.Connection]:
    with closing(sqlite3.connect(file)) as connection, connection:
        yield connection


def ids(file: Path, table: str = "celery_taskmeta", column: str = "task_id") -> list[str]:
    with opened(file) as connection:
        return [row[0] for row in connection.execute(f"SELECT {column} FROM {table} ORDER BY 1")]


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def url(request: pytest.FixtureRequest, file: Path) -> str:
    if request.param == "sqlite":
        return f"db+sqlite:///{file}"
    found: str = request.getfixturevalue(f"{request.param}_url")
    return found


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL that a test may kill."""
    server = PostgresServer()
    yield server
    server.stop()


# --- writers beside each other ---------------------------------------------------------------------------------------


async def test_of_many_writers_the_first_success_stays(url: str, make: Make) -> None:
    writers = [await make(url) for _ in range(4)]
    names = [f"t{n}" for n in range(20)]
    for turn in range(3):
        results = [
            [ended(name, [number, turn]) if (number + turn) % 2 else failed(name) for name in names]
            for number in range(len(writers))
        ]
        for number, batch in enumerate(results):
            if number % 2:
                batch.reverse()
        await asyncio.gather(*(put(writer, *batch) for writer, batch in zip(writers, results, strict=True)))
        if not turn:
            first = [await value_of(writers[0], name) for name in names]
            assert not any(isinstance(value, RemoteError) for value in first)
    assert [await value_of(writers[0], name) for name in names] == first


async def test_stores_that_open_at_once_make_the_tables_once(url: str, make: Make) -> None:
    made = [await make(url) for _ in range(6)]
    await asyncio.gather(*(put(store, ended(f"t{number}", number)) for number, store in enumerate(made)))
    assert [await value_of(made[0], f"t{number}") for number in range(6)] == list(range(6))


async def test_a_batch_with_one_task_twice_keeps_its_success(url: str, make: Make) -> None:
    store = await make(url)
    await put(store, failed("a"), ended("a", 1), failed("a"), ended("b", 2), ended("b", 3))
    assert (await value_of(store, "a"), await value_of(store, "b")) == (1, 2)


# --- what columns can hold -------------------------------------------------------------------------------------------


async def test_texts_that_a_column_can_not_hold_are_cut_or_cleaned(url: str, make: Make) -> None:
    """Refused by the database they would be tried again for ever, and hold up all the others."""
    store = await make(url)
    extra = {"name": "n" * 300, "worker": "w\0\ud800" * 100, "queue": "q" * 156}
    state = "A STATE OF " + "X" * 60
    await put(store, failed("a", "\0\ud800", traceback="line\0\ud800\n" * 10_000, extra=extra))
    await put(store, Result(task_id="b", state=state, value="\0"), ended("c" * 156), ended("d"))
    a, b = await store.get("a"), await store.get("b")
    assert a is not None
    assert b is not None
    assert a.value.exc_message == ["\0\ud800"]
    assert (a.traceback or "").startswith("line?\nline?\n")
    assert (a.extra["name"], a.extra["worker"][:4]) == ("n" * 155, "w?w?")
    assert (b.state, b.value) == (state[:50], "\0")
    assert await value_of(store, "d") == 5


@pytest.mark.parametrize("task_id", ["\0", "\ud800", "x" * 200])
async def test_an_id_that_no_table_holds_is_unknown(url: str, make: Make, task_id: str) -> None:
    store = await make(url)
    waiting = asyncio.create_task(store.get("a", wait=10))
    assert await store.get(task_id, wait=0.05) is None
    await store.forget(task_id)
    await put(store, ended(task_id), ended("a"))
    found = await waiting
    assert found is not None
    assert await store.get(task_id) is None


async def test_a_value_over_the_size_of_a_blob_is_refused_before_it_is_stored(mariadb_url: str, make: Make) -> None:
    store = await make(mariadb_url)
    await put(store, ended("a", "x" * 65_533))
    with pytest.raises(MessageTooLarge, match=r"65,537 bytes, and a column of .*holds 65,535"):
        store.record(ended("a", "x" * 65_535))


async def test_stamps_and_children_come_back(url: str, make: Make) -> None:
    store = await make(url)
    extra = {"stamped_headers": ["who"], "who": "me", "args": [1], "kwargs": {}, "retries": 2}
    result = ended("a", children=[[["b", None], None]], extra=extra)
    await put(store, result)
    found = await store.get("a")
    assert found is not None
    assert (found.extra, found.children) == (extra, result.children)


# --- Celery's rows and tables as they are found ----------------------------------------------------------------------


def write(file: Path, table: str, **columns: Any) -> None:
    with opened(file) as connection:
        marks = ", ".join("?" * len(columns))
        connection.execute(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks})", list(columns.values()))


async def test_an_older_table_gets_the_columns_that_it_lacks(file: Path, make: Make) -> None:
    with opened(file) as connection:
        connection.execute(OLD_TABLE)
    write(file, "celery_taskmeta", task_id="old", status="SUCCESS", result=b"7", date_done=None)
    store = await make(f"db+sqlite:///{file}")
    await put(store, ended("new", extra={"name": "n", "args": [1], "kwargs": {}, "retries": 0}))
    assert await value_of(store, "old") == 7
    found = await store.get("new")
    assert found is not None
    assert found.extra["name"] == "n"


async def test_a_table_without_a_sequence_keeps_the_rows_that_it_has(
    mariadb_server: MariaDbServer, mariadb_url: str, make: Make
) -> None:
    with closing(mariadb_server.connect()) as connection, connection.cursor() as cursor:
        columns = OLD_TABLE.replace("AUTOINCREMENT", "AUTO_INCREMENT")
        cursor.execute(columns)
        for number in range(3):
            row = "INSERT INTO celery_taskmeta (task_id, status, result) VALUES (%s, 'FAILURE', '{}')"
            cursor.execute(row, (f"old {number}",))
        connection.commit()
    store = await make(mariadb_url)
    await put(store, ended("a", 1), ended("b", 2))
    await store.announce([store.record(Result(task_id="c", state=PENDING))])
    assert [await value_of(store, name) for name in ("a", "b", "c")] == [1, 2, None]
    for number in range(3):
        found = await store.get(f"old {number}")
        assert found is not None
        assert found.state == FAILURE


def captured(name: str) -> Any:
    return json.loads((WIRE / name).read_text())


def blob(value: Any) -> Any:
    return value["bytes_utf8"].encode() if isinstance(value, dict) else value


@pytest.mark.parametrize("name", ["db_results.json", "db_results_extended.json"])
async def test_captured_rows_are_read_and_written_alike(name: str, file: Path, tmp_path: Path, make: Make) -> None:
    found = captured(name)
    rows = [{key: blob(value) for key, value in row.items()} for row in found["tables"]["celery_taskmeta"]]
    with opened(file) as connection:
        for statement in found["schema"]:
            if "sqlite_sequence" not in statement:
                connection.execute(statement)
    for row in rows:
        write(file, "celery_taskmeta", **row)
    reader = await make(f"db+sqlite:///{file}", expires=None)
    writer = await make(f"db+sqlite:///{tmp_path}/ours.db", expires=None)
    for row in rows:
        result = await reader.get(row["task_id"])
        assert result is not None
        assert (result.state, result.traceback) == (row["status"], row["traceback"])
        await put(writer, result)
    with opened(tmp_path / "ours.db") as connection:
        connection.row_factory = sqlite3.Row
        ours = [dict(row) for row in connection.execute("SELECT * FROM celery_taskmeta ORDER BY id")]
        schema = [row[0] for row in connection.execute("SELECT sql FROM sqlite_master")]
    assert [comparable(row) for row in ours] == [comparable(row) for row in rows]
    assert sorted(map(plain, filter(None, schema))) == sorted(map(plain, found["schema"]))


def comparable(row: dict[str, Any]) -> dict[str, Any]:
    """JSON has more than one way to be written, and a state on the way has no time at Celery's."""
    kept = {key: json.loads(value) if isinstance(value, bytes) else value for key, value in row.items()}
    if kept["status"] not in FINAL_STATES:
        del kept["date_done"]
    return kept


def plain(statement: str) -> str:
    return " ".join(statement.split()).replace('"', "")


@pytest.mark.parametrize("wait", [0, 5])
async def test_pickles_of_older_workers_are_read_only_where_pickle_is_accepted(
    file: Path, make: Make, wait: float
) -> None:
    careful = await make(f"db+sqlite:///{file}")
    await put(careful, ended("good"))
    for name, value in (("value", {"a": 5}), ("error", ValueError("boom", 7))):
        state = "FAILURE" if name == "error" else "SUCCESS"
        write(file, "celery_taskmeta", task_id=name, status=state, result=pickle.dumps(value, 2), date_done=column())
    reads = await asyncio.gather(*(careful.get(name, wait) for name in ("value", "good")), return_exceptions=True)
    assert isinstance(reads[0], BadMessage)
    assert "pickled by Celery 5.6 or older" in str(reads[0])
    assert isinstance(reads[1], Result)  # another's bad row is not in its way
    trusting = await make(f"db+sqlite:///{file}", accept=("json", "pickle"))
    assert await value_of(trusting, "value") == {"a": 5}
    assert await value_of(trusting, "error") == RemoteError("ValueError", ["boom", 7], "builtins")


async def test_bytes_that_are_nothing_are_a_bad_message(file: Path, make: Make) -> None:
    store = await make(f"db+sqlite:///{file}")
    await put(store, ended("a"))
    with opened(file) as connection:
        connection.execute("UPDATE celery_taskmeta SET result = ?", (b"{",))
    with pytest.raises(BadMessage):
        await store.get("a")


# --- the end of results ----------------------------------------------------------------------------------------------


async def test_whoever_writes_removes_what_has_ended(file: Path, make: Make) -> None:
    before = await make(f"db+sqlite:///{file}")
    await put(before, ended("young"))
    for number in range(3):
        done = column(-7200)
        write(file, "celery_taskmeta", task_id=f"old {number}", status="SUCCESS", result=b"5", date_done=done)
        write(file, "celery_tasksetmeta", taskset_id=f"group {number}", result=b"[]", date_done=done)
    write(file, "celery_taskmeta", task_id="undated", status="STARTED", result=b"null", date_done=None)
    writer = await make(f"db+sqlite:///{file}", expires=3600)
    assert await writer.get("old 1") is None
    await put(writer, ended("new"))
    assert ids(file) == ["new", "undated", "young"]
    assert ids(file, "celery_tasksetmeta", "taskset_id") == []


async def test_what_was_announced_for_later_lives_on_until_then(file: Path, make: Make) -> None:
    store = await make(f"db+sqlite:///{file}", expires=60)
    record = store.record(Result(task_id="a", state=PENDING))
    await store.announce([type(record)(record.key, record.value, 60.0 + 3600)])
    with opened(file) as connection:
        (done,) = connection.execute("SELECT date_done FROM celery_taskmeta").fetchone()
    assert datetime.fromisoformat(done) > datetime.now(timezone.utc).replace(tzinfo=None) + timedelta(seconds=3500)


# --- a server that goes ----------------------------------------------------------------------------------------------


async def test_a_killed_server_is_told_and_found_again(own_postgres: PostgresServer, make: Make) -> None:
    store = await make(own_postgres.url, timeout=2.0)
    await put(store, ended("a"))
    waiting = asyncio.create_task(store.get("b", wait=60))
    await asyncio.sleep(0)
    own_postgres.kill()
    for call in (store.get("a"), put(store, ended("c")), store.forget("x"), waiting):
        with pytest.raises(StoreUnavailable, match=str(own_postgres.port)) as caught:
            await call
        assert own_postgres.secret not in str(caught.value)
    own_postgres.start()
    assert await value_of(store, "a") == 5
    waiting = asyncio.create_task(store.get("b", wait=20))
    await put(store, ended("b", 6))
    found = await waiting
    assert found is not None
    assert found.value == 6


@pytest.mark.parametrize("server", ["postgres_server", "mariadb_server"])
async def test_a_silent_server_is_told_in_time_and_found_again(
    server: str, request: pytest.FixtureRequest, make: Make
) -> None:
    found: PostgresServer | MariaDbServer = request.getfixturevalue(server)
    found.empty()
    proxy = Proxy(found.port)
    store = await make(found.url.replace(f":{found.port}", f":{proxy.port}"), timeout=1.0)
    try:
        await put(store, ended("a"))
        proxy.silence()
        start = asyncio.get_running_loop().time()
        with pytest.raises(StoreUnavailable, match="did not answer within 1 s"):
            await store.get("a")
        assert asyncio.get_running_loop().time() - start < 5
        proxy.heal()

        async def works() -> bool:
            try:
                return await store.get("a") is not None
            except StoreUnavailable:
                return False

        await until(works, "an answer after the silence")
        proxy.cut()
        await until(works, "an answer after the cut")
    finally:
        proxy.close()


async def test_tables_that_somebody_drops_are_made_again(url: str, file: Path, make: Make) -> None:
    store = await make(url)
    await put(store, ended("a"))
    engine = store._engine
    assert engine is not None
    async with engine.begin() as connection:
        await connection.run_sync(tables.metadata.drop_all)
    with pytest.raises(StoreUnavailable, match=r"celery_taskmeta|task_id_sequence"):
        await put(store, ended("b"))
    await put(store, ended("b"))
    assert await value_of(store, "b") == 5


@pytest.mark.parametrize("server", ["postgres_server", "mariadb_server"])
async def test_a_wrong_password_is_told_without_showing_it(
    server: str, request: pytest.FixtureRequest, make: Make
) -> None:
    found: PostgresServer | MariaDbServer = request.getfixturevalue(server)
    store = await make(found.url.replace(":p%40ss", ":wr0ng"))
    with pytest.raises(StoreUnavailable, match=r"aqueue:\*\*\*@127.*(password|denied)") as caught:
        await store.get("a")
    assert "wr0ng" not in f"{caught.value}{caught.value.__cause__}"


@pytest.mark.parametrize(
    ("kind", "right", "wrong"),
    [
        (PostgresServer, "sslmode=verify-full&sslrootcert={ca}", "sslmode=verify-full&sslrootcert={other}"),
        (MariaDbServer, "ssl_ca={ca}", "ssl_ca={other}"),
    ],
)
async def test_tls_is_verified(
    kind: type[PostgresServer | MariaDbServer], right: str, wrong: str, tmp_path: Path, make: Make
) -> None:
    server = kind(tls=True)
    try:
        files = {"ca": server.certificates["ca-cert-file"], "other": make_certificates(tmp_path)["ca-cert-file"]}
        store = await make(f"{server.url}?{right.format_map(files)}")
        await put(store, ended("a"))
        assert await value_of(store, "a") == 5
        with pytest.raises(StoreUnavailable, match="certificate verify failed"):
            await (await make(f"{server.url}?{wrong.format_map(files)}")).get("a")
    finally:
        server.stop()


async def test_parameters_of_libpq_reach_the_server(postgres_server: PostgresServer, make: Make) -> None:
    postgres_server.empty()
    store = await make(f"{postgres_server.url}?application_name=shop&connect_timeout=3")
    await put(store, ended("a"))
    with closing(postgres_server.connect()) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'shop'")
        assert cursor.fetchone() == (1,)


@pytest.mark.parametrize("start", ["db+postgresql://aqueue:s3cret", "db+mysql://aqueue:s3cret"])
async def test_a_wrong_host_is_told(start: str, make: Make) -> None:
    store = await make(f"{start}@no-such-host.invalid/results", timeout=5.0)
    with pytest.raises(StoreUnavailable, match=r"no-such-host\.invalid") as caught:
        await store.get("a")
    assert "s3cret" not in str(caught.value)


async def test_a_folder_that_is_not_there_is_told(tmp_path: Path, make: Make) -> None:
    store = await make(f"db+sqlite:///{tmp_path}/nowhere/db.sqlite3")
    with pytest.raises(StoreUnavailable, match=r"nowhere/db\.sqlite3: unable to open database file"):
        await store.get("a")


async def test_who_waits_is_told_when_the_store_is_closed(file: Path) -> None:
    store = stores.from_url(Url(f"db+sqlite:///{file}"))(StoreOptions())
    async with store:
        await store.get("a")
        waiting = asyncio.create_task(store.get("a", wait=60))
        await asyncio.sleep(0)
    with pytest.raises(StoreUnavailable, match="closed"):
        await waiting
