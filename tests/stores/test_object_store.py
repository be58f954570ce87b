"""What is particular to objects: names, age, files in the midst of writing, conditions, addresses, secrets."""

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import pytest_asyncio

from aqueue import AQueue
from aqueue.drivers.buckets import open_bucket
from aqueue.errors import BadMessage, ConfigurationError, EncodeError, StoreUnavailable
from aqueue.results import FAILURE, PENDING, STARTED, SUCCESS, RemoteError, Result, ResultStore, StoreOptions, from_url
from aqueue.results.object_store import ObjectResults
from aqueue.url import Url
from tests.kit.servers import S3Server

SECRET = "c2VjcmV0c2VjcmV0"
Open = Callable[..., Awaitable[ResultStore]]


@pytest_asyncio.fixture
async def open_store() -> AsyncIterator[Open]:
    async with AsyncExitStack() as stack:

        async def make(url: str, timeout: float = 5.0, expires: float | None = 86400.0) -> ResultStore:
            options = StoreOptions(timeout=timeout, expires=expires)
            return await stack.enter_async_context(from_url(Url(url))(options))

        yield make


@pytest.fixture
def own_s3(tmp_path: Path) -> Iterator[S3Server]:
    """One that a test may kill."""
    server = S3Server(tmp_path / "s3")
    yield server
    server.stop()


def success(task_id: str, value: object = 5) -> Result:
    return Result(task_id=task_id, state=SUCCESS, value=value)


async def put(store: ResultStore, *results: Result) -> None:
    await store.put([store.record(result) for result in results])


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["file://{}", "file://{}/", "file://localhost{}/"])
async def test_a_result_is_a_file_of_celerys_name(tmp_path: Path, open_store: Open, form: str) -> None:
    folder = tmp_path / "made for us" / "results"
    store = await open_store(form.format(folder))
    await put(store, success("a"))
    assert [path.name for path in folder.iterdir()] == ["celery-task-meta-a"]
    assert (folder / "celery-task-meta-a").read_bytes() == store.record(success("a")).value


async def test_a_prefix_is_before_the_name(tmp_path: Path, open_store: Open) -> None:
    await put(await open_store(f"file://{tmp_path}/?key_prefix=mine"), success("a"))
    assert (tmp_path / "mine_celery-task-meta-a").exists()


async def test_an_old_file_is_absent_and_is_removed_when_it_is_seen(tmp_path: Path, open_store: Open) -> None:
    store = await open_store(f"file://{tmp_path}", expires=60)
    path = tmp_path / "celery-task-meta-a"
    await put(store, success("a", 1))
    age(path, 61)
    assert await store.get("a") is None
    assert not path.exists()
    await put(store, success("a", 1))
    age(path, 61)
    await put(store, success("a", 2))  # a success that is over protects nothing
    assert await store.get("a") == success("a", 2)


async def test_who_keeps_results_for_ever_reads_old_files(tmp_path: Path, open_store: Open) -> None:
    store = await open_store(f"file://{tmp_path}", expires=None)
    await put(store, success("a"))
    age(tmp_path / "celery-task-meta-a", 1e8)
    assert await store.get("a") == success("a")


async def test_a_task_that_waits_for_next_week_stays_known(tmp_path: Path, open_store: Open) -> None:
    store = await open_store(f"file://{tmp_path}", expires=60)
    await store.announce([store.record(Result(task_id="a", state=PENDING))])
    age(tmp_path / "celery-task-meta-a", 1e6)
    result = await store.get("a")
    assert result is not None
    assert result.state == PENDING


async def test_an_empty_file_is_no_result_yet(tmp_path: Path, open_store: Open) -> None:
    store = await open_store(f"file://{tmp_path}")
    (tmp_path / "celery-task-meta-a").touch()
    assert await store.get("a") is None
    await put(store, success("a"))
    assert await store.get("a") == success("a")


async def test_a_file_that_is_no_result_is_told(tmp_path: Path, open_store: Open) -> None:
    store = await open_store(f"file://{tmp_path}")
    (tmp_path / "celery-task-meta-a").write_bytes(b"no document")
    for wait in (0, 5):
        with pytest.raises(BadMessage):
            await store.get("a", wait=wait)
    await put(store, success("a"))
    assert await store.get("a") == success("a")


async def test_a_file_that_is_just_being_written_is_read_when_it_is_written(tmp_path: Path, open_store: Open) -> None:
    """Celery empties a file and writes it then, and so does the thread here, all the time."""
    store = await open_store(f"file://{tmp_path}")
    path = tmp_path / "celery-task-meta-a"
    documents = [store.record(success("a", letter * size)).value for letter, size in (("x", 10), ("y", 90_000))]
    path.write_bytes(documents[0])
    over = threading.Event()

    def write() -> None:
        turn = 0
        while not over.wait(0.005):
            turn += 1
            path.write_bytes(documents[turn % 2])

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(300):
            result = await store.get("a")
            assert result is not None
            assert set(result.value) in ({"x"}, {"y"})
    finally:
        over.set()
        writer.join()


@pytest.mark.parametrize("task_id", ["", "../up", "a/b", "a\\b", "line\n", "\x00", "a#1", "x" * 300])
async def test_an_id_that_makes_no_name_is_refused(tmp_path: Path, open_store: Open, task_id: str) -> None:
    store = await open_store(f"file://{tmp_path}/results")
    with pytest.raises(EncodeError, match="name of an object"):
        store.record(success(task_id))
    assert await store.get(task_id) is None
    assert await store.get(task_id, wait=0.05) is None
    await store.forget(task_id)


async def test_a_folder_that_is_taken_away_is_told(tmp_path: Path, open_store: Open) -> None:
    folder = tmp_path / "results"
    store = await open_store(f"file://{folder}")
    folder.rmdir()
    folder.touch()
    with pytest.raises(StoreUnavailable, match="results"):
        await put(store, success("a"))
    folder.unlink()
    folder.mkdir()
    await put(store, success("a"))
    assert await store.get("a") == success("a")


def test_a_folder_that_can_not_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match="can't be used"):
        from_url(Url(f"file://{tmp_path}/file/results"))


# --- S3 --------------------------------------------------------------------------------------------------------------


async def test_an_object_has_celerys_name_behind_the_base_path(s3_server: S3Server, open_store: Open) -> None:
    s3_server.make_bucket("named")
    await put(await open_store(s3_server.url("named", "a/b-")), success("x"))
    await put(await open_store(s3_server.url("named")), success("x"))
    listed = s3_server.client().list_objects_v2(Bucket="named")["Contents"]
    assert sorted(found["Key"] for found in listed) == ["a/b-celery-task-meta-x", "celery-task-meta-x"]


async def test_of_many_writers_none_overwrites_a_success(s3_url: str, open_store: Open) -> None:
    stores = [await open_store(s3_url) for _ in range(4)]
    ids = [f"{i}" for i in range(10)]
    await put(stores[0], *[Result(task_id=task_id, state=STARTED) for task_id in ids])

    async def fail(store: ResultStore) -> None:
        failure = RemoteError("E", [], "m")
        for _ in range(2):
            await put(store, *[Result(task_id=task_id, state=FAILURE, value=failure) for task_id in ids])

    async def succeed() -> None:
        for task_id in ids:
            await put(stores[0], success(task_id))
            assert await stores[1].get(task_id) == success(task_id)

    await asyncio.gather(succeed(), *[fail(store) for store in stores[1:]])
    for task_id in ids:
        assert await stores[0].get(task_id) == success(task_id)


@pytest.mark.parametrize("state", [None, STARTED])
async def test_what_was_read_before_a_success_came_does_not_overwrite_it(
    s3_url: str, open_store: Open, state: str | None
) -> None:
    """The steps of two writers, one between the other's."""
    one, other = await open_store(s3_url), await open_store(s3_url)
    assert isinstance(one, ObjectResults)
    failure = one.record(Result(task_id="a", state=FAILURE, value=RemoteError("E", [], "m")))
    if state is not None:
        await put(other, Result(task_id="a", state=state))
    read = await one._load(failure.key)
    await put(other, success("a"))
    assert not await one._write(failure, read)
    assert await one.get("a") == success("a")


async def test_a_service_without_conditions_is_read_first_and_written_then(s3_url: str, open_store: Open) -> None:
    for prefix in ("put", "announce"):
        store = await open_store(f"{s3_url}&conditional_put=disabled&key_prefix={prefix}")
        pending = store.record(Result(task_id="a", state=PENDING))
        if prefix == "put":
            await put(store, Result(task_id="a", state=STARTED))
        else:
            await store.announce([pending])
        await put(store, success("a"))
        await put(store, Result(task_id="a", state=FAILURE, value=RemoteError("E", [], "m")))
        await store.announce([pending])
        fresh = await open_store(f"{s3_url}&conditional_put=disabled&key_prefix={prefix}")
        await fresh.announce([pending])
        assert await fresh.get("a") == success("a")


async def test_settings_are_taken_from_the_environment(
    s3_server: S3Server, open_store: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    s3_server.make_bucket("from-environment")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.SECRET_KEY)
    monkeypatch.setenv("AWS_REGION", s3_server.REGION)
    store = await open_store(f"s3://from-environment/?endpoint_url={s3_server.endpoint}")
    await put(store, success("a"))
    assert await store.get("a") == success("a")


async def test_a_service_that_is_lost_is_used_again_when_it_is_back(own_s3: S3Server, open_store: Open) -> None:
    own_s3.make_bucket("results")
    store = await open_store(own_s3.url("results"), timeout=2.0)
    await put(store, success("a"))
    own_s3.kill()
    with pytest.raises(StoreUnavailable, match="s3://results/") as caught:
        await put(store, success("b"))
    assert own_s3.SECRET_KEY not in str(caught.value)
    for call in (store.get("a"), store.get("a", wait=5), store.forget("a")):
        with pytest.raises(StoreUnavailable):
            await call
    own_s3.start()
    own_s3.make_bucket("results")
    await put(store, success("b"))
    assert await store.get("b", wait=5) == success("b")


async def test_a_bucket_that_is_not_there_is_told(s3_server: S3Server, open_store: Open) -> None:
    store = await open_store(s3_server.url("nobody-made-it"))
    with pytest.raises(StoreUnavailable, match="no such folder, bucket or container"):
        await put(store, success("a"))


# --- addresses, of all of them ---------------------------------------------------------------------------------------


async def asked(url: Callable[[str], str]) -> str:
    """The first line of the request for result ``a`` in a store at an address of ours."""
    lines: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        lines.append(await reader.readline())
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        endpoint = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with from_url(Url(url(endpoint)))(StoreOptions()) as store:
            assert await store.get("a") is None
    return unquote(lines[0].decode().rstrip())


@pytest.mark.parametrize(
    ("url", "path"),
    [
        (
            "s3://bucket/base/?endpoint_url={}&region=r&access_key_id=me&secret_access_key=s",
            "/bucket/base/celery-task-meta-a",
        ),
        ("gs://bucket/?endpoint_url={}&anonymous=true", "/bucket/celery-task-meta-a"),
        ("gs://bucket/some/base?endpoint_url={}&anonymous=true&gcs_project=p", "/bucket/some/base/celery-task-meta-a"),
        (f"azureblockblob://AccountName=me;AccountKey={SECRET};BlobEndpoint={{}}/me", "/me/celery/celery-task-meta-a"),
        (
            f"azureblockblob://AccountName=me;AccountKey={SECRET};BlobEndpoint={{}}/me?container_name=c&base_path=b/",
            "/me/c/b/celery-task-meta-a",
        ),
        (
            "azureblockblob://BlobEndpoint={}/me;SharedAccessSignature=sv=2020-01-01&sig=abc",
            "/me/celery/celery-task-meta-a?sv=2020-01-01&sig=abc",
        ),
    ],
)
async def test_objects_are_asked_for_where_celery_has_them(url: str, path: str) -> None:
    assert await asked(url.format) == f"GET {path} HTTP/1.1"


WITH_SECRETS = [
    f"s3://bucket/?region=r&access_key_id=me&secret_access_key={SECRET}&session_token={SECRET}",
    f"azureblockblob://DefaultEndpointsProtocol=https;AccountName=me;AccountKey={SECRET};EndpointSuffix=core.windows.net",
    f"azureblockblob://AccountName=me;SharedAccessSignature=sv=2020-01-01&sig={SECRET}",
]


@pytest.mark.parametrize("url", WITH_SECRETS)
async def test_no_text_shows_a_secret(url: str) -> None:
    bucket = open_bucket(Url(url))
    app = AQueue("app", broker="memory://", backend=url)
    texts: list[Any] = [repr(bucket), repr(app), bucket.shown]
    async with from_url(Url(url))(StoreOptions()) as store:
        texts += [repr(store), str(vars(store))]
    for text in texts:
        assert SECRET not in text


@pytest.mark.parametrize(
    "url",
    [
        "file://",
        "file:///tmp/results?mode=1",
        "s3://",
        f"s3://me:{SECRET}@bucket/",
        "s3://bucket/?bucket=other",
        "gs://",
        "gs://bucket/?service_account=/nowhere/at/all.json",
        "azureblockblob://",
        "azureblockblob://AccountName=me",
        f"azureblockblob://AccountKey={SECRET}",
        f"azureblockblob://AccountName=me;AccountKey={SECRET}?container=c",
        "azureblockblob://AccountName=me;AccountKey=no base 64",
    ],
)
def test_a_url_that_can_not_work_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        from_url(Url(url))
    assert SECRET not in str(caught.value)
