"""What is to be buried and can not be stays leased, or comes back, and is buried when that is possible again."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import amqp
import pytest

from aqueue import AQueue
from aqueue.protocol import Message
from tests.kit.waiting import until
from tests.worker.conftest import StartWorker

Change = Callable[[], object]


def on_redis(request: pytest.FixtureRequest) -> tuple[Change, Change]:
    client = request.getfixturevalue("redis_server").client()
    return lambda: client.set("aqueue:dead:messages", "no hash"), lambda: client.delete("aqueue:dead:messages")


def on_sqlite(path: Path) -> tuple[Change, Change]:
    def execute(statement: str) -> None:
        with sqlite3.connect(path) as file:
            file.execute(statement)

    return (
        lambda: execute("CREATE TRIGGER full BEFORE INSERT ON dead BEGIN SELECT RAISE(ABORT, 'no room'); END"),
        lambda: execute("DROP TRIGGER full"),
    )


def on_rabbitmq(request: pytest.FixtureRequest) -> tuple[Change, Change]:
    port = request.getfixturevalue("rabbit_server").port

    def replace(arguments: dict[str, object] | None) -> None:
        with amqp.Connection(f"127.0.0.1:{port}") as connection:
            channel = connection.channel()
            channel.queue_delete("aqueue.dead")
            channel.queue_declare("aqueue.dead", durable=True, auto_delete=False, arguments=arguments)

    return lambda: replace({"x-max-length": 0, "x-overflow": "reject-publish"}), lambda: replace(None)


@pytest.fixture
def changes(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Change, Change]:
    """Make that no dead letter can be written, and that it can."""
    if kind == "sqlite":
        return on_sqlite(tmp_path / "queue.db")
    return on_redis(request) if kind == "redis" else on_rabbitmq(request)


@pytest.mark.parametrize("kind", ["sqlite", "redis", "rabbitmq"], indirect=True)
async def test_what_can_not_be_buried_now_is_buried_later(
    app: AQueue,
    start_worker: StartWorker,
    changes: tuple[Change, Change],
    caplog: pytest.LogCaptureFixture,
) -> None:
    spoil, mend = changes

    @app.task(name="test.add")
    async def add(x: int, y: int) -> int:
        return x + y

    broker = app.producer().broker
    await broker.publish([Message(queue="celery", headers={"task": "test.add", "id": "1"}, body=b"garbage")])
    spoil()
    try:
        await start_worker(app)
        await until(lambda: "settle" in caplog.text, "the letter could not be written")
    finally:
        mend()
    (letter,) = await until(broker.inspection.dead, "the message is buried", 20)
    assert (letter.reason, letter.raw) == ("undecodable", b"garbage")
    result = await app.send_task("test.add", (1, 2))
    assert await result.get(10) == 3
    assert len(await broker.inspection.dead()) == 1
