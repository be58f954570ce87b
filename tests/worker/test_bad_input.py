"""Messages nobody should have sent: each is buried byte for byte, and nothing else is disturbed."""

import base64
import bz2
import json
import pickle
import zlib
from collections.abc import Callable
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest
import redis

from aqueue import AQueue, Limits, TaskFailed
from aqueue.broker import DeadLetter
from aqueue.protocol import Message
from tests.kit.servers import RedisServer
from tests.kit.waiting import until
from tests.worker.conftest import MakeApp, StartWorker, running

GOOD_BODY = b'[[1, 2], {}, {"callbacks": null, "errbacks": null, "chain": null, "chord": null}]'


def element(body: bytes = GOOD_BODY, *, headers: Any = None, **changes: Any) -> bytes:
    """A kombu envelope for ``test.add``; changes replace its keys (``whole_headers`` all headers), ... removes one."""
    envelope: dict[str, Any] = {
        "body": base64.b64encode(body).decode(),
        "content-type": "application/json",
        "content-encoding": "utf-8",
        "headers": {"task": "test.add", "id": "bad-1", **(headers or {})},
        "properties": {
            "delivery_tag": "tag",
            "delivery_info": {"exchange": "", "routing_key": "celery"},
            "body_encoding": "base64",
            "priority": 0,
        },
    }
    for key, value in changes.items():
        name = key.removeprefix("whole_").replace("_", "-") if key != "properties" else key
        envelope[name] = value
    return json.dumps({key: value for key, value in envelope.items() if value is not ...}).encode()


def without(*names: str) -> bytes:
    found = json.loads(element())
    for name in names:
        del found["headers"][name]
    return json.dumps(found).encode()


BOMB = zlib.compress(b"0" * 40_000_000)

#: (what is wrong, the list element, the reason it is buried under)
ELEMENTS: list[tuple[str, bytes, str]] = [
    ("random bytes", b"\x00\xff\xfe random", "undecodable"),
    ("empty", b"", "undecodable"),
    ("null", b"null", "undecodable"),
    ("a list", b"[]", "undecodable"),
    ("a string", b'"x"', "undecodable"),
    ("a number", b"42", "undecodable"),
    ("cut off", element()[:100], "undecodable"),
    ("body is no string", element(whole_body=[[1, 2], {}, {}]), "undecodable"),
    ("body is not base64", element().replace(b"W1sx", b"!!!!"), "bad_encoding"),
    ("unknown body encoding", element().replace(b'"base64"', b'"rot13"'), "bad_encoding"),
    ("unknown content encoding", element(content_encoding="klingon"), "bad_encoding"),
    ("content encoding is a list", element(content_encoding=["utf-8"]), "bad_encoding"),
    ("body is not text", element(b"\xff\xfe[["), "undecodable"),
    (
        "pickle",
        element(pickle.dumps([[1, 2], {}, {}]), content_type="application/x-python-serialize"),
        "content_refused",
    ),
    ("json that is pickle", element(pickle.dumps([[1, 2], {}, {}])), "undecodable"),
    ("yaml", element(b"[[1, 2], {}, {}]", content_type="application/x-yaml"), "content_refused"),
    ("msgpack", element(msgpack.packb([[1, 2], {}, {}]), content_type="application/x-msgpack"), "content_refused"),
    ("unknown content type", element(content_type="text/klingon"), "content_refused"),
    ("no content type", element(content_type=...), "content_refused"),
    ("content type is a list", element(content_type=[]), "content_refused"),
    ("a huge content type", element(content_type="x" * 1_000_000), "headers_too_large"),
    ("no task anywhere", without("task"), "bad_body"),
    ("an empty task name", element(headers={"task": ""}), "bad_name"),
    ("a huge task name", element(headers={"task": "x" * 10_000}), "bad_name"),
    ("a task name with control characters", element(headers={"task": "a\n\x1b[31mb"}), "bad_name"),
    ("a task name that is no string", element(headers={"task": 5}), "bad_name"),
    ("no id", without("id"), "bad_id"),
    ("an id that is no string", element(headers={"id": {"a": 1}}), "bad_id"),
    ("a huge id", element(headers={"id": "x" * 10_000}), "bad_id"),
    ("an id with a zero", element(headers={"id": "a\0b"}), "bad_id"),
    ("a body of two", element(b"[[1, 2], {}]"), "bad_body"),
    ("a body that is text", element(b'"hello"'), "bad_body"),
    ("args that are no list", element(b"[5, {}, {}]"), "bad_body"),
    ("kwargs that are a list", element(b"[[1, 2], [], {}]"), "bad_body"),
    ("an embed that is a list", element(b"[[1, 2], {}, [1]]"), "bad_body"),
    ("callbacks that are no signatures", element(b'[[1, 2], {}, {"callbacks": [5]}]'), "bad_canvas"),
    ("headers null with a protocol 2 body", element(whole_headers=None), "bad_body"),
    ("retries that are no number", element(headers={"retries": "many"}), "bad_header"),
    ("retries beyond belief", element(headers={"retries": 10**9}), "bad_header"),
    ("a time limit that is an object", element(headers={"timelimit": {}}), "bad_header"),
    ("a negative time limit", element(headers={"timelimit": [-1, None]}), "bad_header"),
    ("an eta that is a number", element(headers={"eta": 1700000000}), "bad_eta"),
    ("an eta in words", element(headers={"eta": "soon"}), "bad_eta"),
    ("an eta of no zone there is", element(headers={"eta": "2026-01-01T00:00:00+25:00"}), "bad_eta"),
    ("expires in words", element(headers={"expires": "never"}), "bad_expires"),
    ("priority in words", element().replace(b'"priority": 0', b'"priority": "high"'), "bad_header"),
    ("json a hundred thousand deep", element(b"[[" + b"[" * 100_000 + b"]" * 100_000 + b"], {}, {}]"), "too_deep"),
    ("a number of 5000 digits", element(b"[[" + b"1" * 5000 + b", 2], {}, {}]"), "number_too_large"),
    (
        "a decimal that takes seconds",
        element(b'[[{"__type__": "decimal", "__value__": "1E+1000000"}, 2], {}, {}]'),
        "number_too_large",
    ),
    ("an impossible date", element(b'[[{"__type__": "datetime", "__value__": "x"}, 2], {}, {}]'), "undecodable"),
    ("a uuid with other keys", element(b'[[{"__type__": "uuid", "__value__": {"int": 1}}, 2], {}, {}]'), "undecodable"),
    ("a zlib bomb", element(BOMB, headers={"compression": "application/x-gzip"}), "too_large"),
    ("a bz2 bomb", element(bz2.compress(b"0" * 40_000_000), headers={"compression": "bzip2"}), "too_large"),
    ("unknown compression", element(headers={"compression": "application/x-rar"}), "bad_compression"),
    ("compression that is no string", element(headers={"compression": 1}), "bad_header"),
    (
        "a cut compressed body",
        element(zlib.compress(GOOD_BODY)[:-6], headers={"compression": "zlib"}),
        "bad_compression",
    ),
    (
        "bytes behind the body",
        element(zlib.compress(GOOD_BODY) + b"x", headers={"compression": "zlib"}),
        "bad_compression",
    ),
    ("a message over the limit", element(b'[["' + b"x" * 1_100_000 + b'", 2], {}, {}]'), "too_large"),
    ("ten thousand headers", element(headers={f"h{i}": i for i in range(10_000)}), "headers_too_large"),
    ("signed though nobody asked", element(b"abc", content_type="application/data"), "content_refused"),
]


@pytest.fixture
def client(redis_server: RedisServer, redis_url: str) -> redis.Redis:
    return redis_server.client()


def declare(app: AQueue) -> Callable[[], list[int]]:
    ran: list[int] = []

    @app.task(name="test.add")
    async def add(x: int, y: int) -> int:
        ran.append(x + y)
        return x + y

    return lambda: ran


async def only_letter(app: AQueue) -> DeadLetter:
    async def found() -> DeadLetter | None:
        letters = await app.producer().broker.inspection.dead()
        return letters[0] if letters else None

    letter = await until(found, "the message is buried")
    assert isinstance(letter, DeadLetter)
    return letter


@pytest.mark.parametrize("kind", ["redis"], indirect=True)
@pytest.mark.parametrize(("raw", "reason"), [pytest.param(raw, why, id=what) for what, raw, why in ELEMENTS])
async def test_a_bad_element_is_buried_and_the_good_ones_around_it_run(
    app: AQueue,
    start_worker: StartWorker,
    client: redis.Redis,
    caplog: pytest.LogCaptureFixture,
    raw: bytes,
    reason: str,
) -> None:
    ran = declare(app)
    client.lpush("celery", element(b"[[1, 2], {}, {}]", headers={"id": "before"}))
    client.lpush("celery", raw)
    client.lpush("celery", element(b"[[3, 4], {}, {}]", headers={"id": "after"}))
    await start_worker(app, concurrency=2)
    await until(lambda: len(ran()) == 2, "the good messages ran")
    assert sorted(ran()) == [3, 7]
    letter = await only_letter(app)
    assert letter.reason == reason
    assert letter.worker.startswith("worker@")
    assert client.hget("aqueue:dead:messages", letter.id) == raw
    buried = [record for record in caplog.records if "buried" in record.getMessage()]
    assert len(buried) == 1
    assert "\n" not in buried[0].getMessage()
    assert "\x1b" not in buried[0].getMessage()
    assert len(buried[0].getMessage()) < 2000
    await until(lambda: client.zcard("aqueue:leases") == 0, "nothing is left leased")


TOLERATED: list[tuple[str, bytes]] = [
    ("only task and id", element(b"[[1, 2], {}, {}]")),
    ("embed null", element(b"[[1, 2], {}, null]")),
    ("no content encoding", element(content_encoding=...)),
    ("unknown headers", element(headers={"lang": "js", "x-own": [1], "timelimit": None})),
    ("retries as text", element(headers={"retries": "1"})),
    ("plain text body", element(whole_body="[[1, 2], {}, {}]").replace(b'"base64"', b'""')),
    ("no delivery tag or info", element(properties={"body_encoding": "base64"})),
    ("duplicate keys", element(b'[[1], {"y": 5, "y": 2}, {}]')),
    ("a protocol 1 message", element(b'{"task": "test.add", "id": "bad-1", "args": [1, 2]}', whole_headers=None)),
    ("numbers of any size", element(b"[[1, 2], {}, {}]", headers={"own": 2**80})),
    ("retries below zero", element(headers={"retries": -3})),
    ("a time limit of ages", element(headers={"timelimit": [10**12, None]})),
    ("priorities beyond the last", element().replace(b'"priority": 0', b'"priority": 255')),
    ("a language nobody knows, of a later protocol", element(headers={"lang": "klingon", "protocol": 3})),
    ("an id with what separates keys", element(headers={"id": "a:b*c{d}"})),
    ("an eta in the first year", element(headers={"eta": "0001-01-01T00:00:00+00:00"})),
]


@pytest.mark.parametrize("kind", ["redis"], indirect=True)
@pytest.mark.parametrize("raw", [pytest.param(raw, id=what) for what, raw in TOLERATED])
async def test_what_celery_lets_pass_runs(
    app: AQueue, start_worker: StartWorker, client: redis.Redis, raw: bytes
) -> None:
    ran = declare(app)
    client.lpush("celery", raw)
    await start_worker(app)
    await until(lambda: len(ran()) == 1, "it ran")
    assert await app.producer().broker.inspection.dead() == []


MESSAGES: list[tuple[str, dict[str, Any], str]] = [
    ("bad body", {"body": b"{"}, "undecodable"),
    ("bad content type", {"content_type": "application/x-yaml"}, "content_refused"),
    ("bad headers", {"headers": {"task": "test.add", "id": 7}}, "bad_id"),
    ("bad body shape", {"body": b"[]"}, "bad_body"),
    ("bad eta", {"headers": {"task": "test.add", "id": "1", "eta": "soon"}}, "bad_eta"),
    ("bomb", {"body": BOMB, "headers": {"task": "test.add", "id": "1", "compression": "zlib"}}, "too_large"),
    ("bad encoding", {"content_encoding": "klingon"}, "bad_encoding"),
    (
        "pickle",
        {"body": pickle.dumps([[1], {}, {}]), "content_type": "application/x-python-serialize"},
        "content_refused",
    ),
    ("bad name", {"headers": {"task": "a\n\x1b[31mb", "id": "1"}}, "bad_name"),
    ("bad callbacks", {"body": b'[[1, 2], {}, {"callbacks": [5]}]'}, "bad_canvas"),
    ("deep", {"body": b"[[" + b"[" * 50_000 + b"]" * 50_000 + b"], {}, {}]"}, "too_deep"),
    ("long number", {"body": b"[[" + b"1" * 5000 + b", 2], {}, {}]"}, "number_too_large"),
    ("large", {"body": b'[["' + b"x" * 1_100_000 + b'", 2], {}, {}]'}, "too_large"),
]


@pytest.mark.parametrize(("fields", "reason"), [pytest.param(f, why, id=what) for what, f, why in MESSAGES])
async def test_bad_messages_are_buried_on_every_broker(
    app: AQueue, start_worker: StartWorker, fields: dict[str, Any], reason: str
) -> None:
    ran = declare(app)
    good = {"task": "test.add", "id": "good"}
    bad = Message(**{"queue": "celery", "headers": {"task": "test.add", "id": "1"}, "body": GOOD_BODY, **fields})
    broker = app.producer().broker
    await broker.publish([Message(queue="celery", headers=good, body=GOOD_BODY), bad])
    await broker.publish([Message(queue="celery", headers=good, body=GOOD_BODY)])
    await start_worker(app)
    await until(lambda: len(ran()) == 2, "the good messages ran")
    letter = await only_letter(app)
    assert (letter.reason, letter.raw) == (reason, bad.body)
    assert isinstance(letter.message, Message)
    assert letter.message.headers == bad.headers
    assert await broker.inspection.drop_dead([letter.id]) == 1


@pytest.mark.parametrize("kind", ["sqlite", "redis", "rabbitmq"], indirect=True)  # two apps don't share memory://
async def test_what_was_refused_runs_once_its_cause_is_gone(make_app: MakeApp) -> None:
    refusing, accepting = make_app(), make_app(accept_content=("json", "yaml"))
    async with refusing:
        broker = refusing.producer().broker
        body = b"[[1, 2], {}, {}]"
        headers = {"task": "test.add", "id": "1"}
        await broker.publish([Message(queue="celery", headers=headers, body=body, content_type="application/x-yaml")])
        declare(refusing)
        async with running(refusing):
            letter = await only_letter(refusing)
        assert letter.reason == "content_refused"
        assert await broker.inspection.retry_dead([letter.id]) == 1
    ran = declare(accepting)
    async with accepting, running(accepting):
        await until(lambda: ran() == [3], "it ran")


async def test_the_same_bytes_twice_are_two_messages(app: AQueue, start_worker: StartWorker) -> None:
    """A broker may double a message, a client may repeat an id or a delivery tag: nothing is mixed up or left."""
    ran = declare(app)
    twin = Message(queue="celery", headers={"task": "test.add", "id": "1"}, body=GOOD_BODY)
    await app.producer().broker.publish([twin, twin])
    await start_worker(app, concurrency=1)
    await until(lambda: ran() == [3, 3], "both ran")
    await until(lambda: nothing_is_left(app), "both are settled")


async def nothing_is_left(app: AQueue) -> bool:
    rows = await app.producer().broker.inspection.queues(["celery"])
    return not any(row.ready or row.leased or row.parked or row.dead for row in rows)


@pytest.mark.parametrize("kind", ["redis"], indirect=True)
async def test_the_same_delivery_tag_twice_is_no_matter(
    app: AQueue, start_worker: StartWorker, client: redis.Redis
) -> None:
    ran = declare(app)
    client.lpush("celery", element(), element(), element(b"[[3, 4], {}, {}]"))
    await start_worker(app)
    await until(lambda: sorted(ran()) == [3, 3, 7], "all ran")
    await until(lambda: nothing_is_left(app), "all are settled")


@pytest.mark.parametrize(
    "body",
    [
        b'[[1], {"y": 2, "self": 3}, {}]',
        b'[[1, 2], {"__class__": 3}, {}]',
        b'[[1, 2], {"": 3}, {}]',
        b'[[1, 2], {"x": 1}, {}]',
        b'[[1, 2], {"not a name": 3}, {}]',
    ],
)
@pytest.mark.parametrize("kind", ["redis"], indirect=True)
async def test_arguments_of_strange_names_fail_and_harm_nobody(
    app: AQueue, start_worker: StartWorker, body: bytes
) -> None:
    ran = declare(app)
    await app.producer().broker.publish([Message(queue="celery", headers={"task": "test.add", "id": "1"}, body=body)])
    await start_worker(app)
    with pytest.raises(TaskFailed, match="InvalidArguments"):
        await app.result("1", known=True).get(5)
    assert ran() == []


async def test_an_eta_at_the_end_of_times_is_parked_and_holds_up_nobody(
    app: AQueue, start_worker: StartWorker, kind: str, queue: str
) -> None:
    ran = declare(app)
    far = {"task": "test.add", "id": "far", "eta": "9999-12-31T23:59:59+00:00"}
    broker = app.producer().broker
    await broker.publish([Message(queue=queue, headers=far, body=b"[[5, 5], {}, {}]")])
    await broker.publish([Message(queue=queue, headers={"task": "test.add", "id": "1"}, body=GOOD_BODY)])
    await start_worker(app, queues=[queue], concurrency=1)
    await until(lambda: ran() == [3], "the other one ran")

    async def parked() -> bool:
        rows = {row.queue: row for row in await broker.inspection.queues([queue])}
        return queue not in rows if kind == "rabbitmq" else rows[queue].parked == 1

    await until(parked, "it waits, held by no worker")
    assert await broker.inspection.dead() == []


async def test_an_unknown_task_waits_and_then_dies(make_app: MakeApp, start_worker: StartWorker) -> None:
    app = make_app(unknown_grace=0.4)
    async with app:
        result = await app.send_task("somebody.elses", (1,))
        await start_worker(app)
        with pytest.raises(TaskFailed, match=r"NotRegistered: somebody\.elses"):
            await result.get(5)
        letter = await only_letter(app)
        assert letter.reason == "unknown_task"

        # Once the task is there, a retry brings it to its end.
        @app.task(name="somebody.elses")
        async def now_known(x: int) -> int:
            return x

        headers = letter.message.headers  # type: ignore[union-attr]
        assert headers["aqueue_unknown_since"] > 0
        assert await app.producer().broker.inspection.retry_dead([letter.id]) == 1
        await until(lambda: _succeeded(app, result.id), "the task ran")


async def test_an_unknown_task_is_told_once_for_each_name(
    app: AQueue, start_worker: StartWorker, caplog: pytest.LogCaptureFixture, queue: str
) -> None:
    declare(app)
    for name in ("nobody.knows", "nobody.knows", "nobody.knows"):
        await app.producer().broker.publish([Message(queue=queue, headers={"task": name, "id": "1"}, body=GOOD_BODY)])
    good = await app.send_task("test.add", (1, 2), queue=queue)
    await start_worker(app, queues=[queue], concurrency=1)
    assert await good.get(10) == 3
    told = [record.getMessage() for record in caplog.records if "no task here is called" in record.getMessage()]
    assert len(told) == 1
    assert "nobody.knows" in told[0]
    assert queue in told[0]


async def _succeeded(app: AQueue, task_id: str) -> bool:
    return bool(await app.result(task_id).state() == "SUCCESS")


@pytest.mark.parametrize("kind", ["sqlite", "redis"], indirect=True)  # two apps don't share memory://
async def test_a_worker_that_knows_the_task_gets_what_another_put_off(
    make_app: MakeApp, start_worker: StartWorker
) -> None:
    old, new = make_app(), make_app()

    @new.task(name="new.task")
    async def task() -> str:
        return "done"

    async with old, new:
        result = await new.send_task("new.task")

        async def put_off() -> bool:
            return any(row.parked for row in await old.producer().broker.inspection.queues())

        async with running(old):
            await until(put_off, "the worker that doesn't know it has put it off")
        await start_worker(new)
        assert await result.get(10) == "done"


async def test_a_message_that_kills_its_workers_is_buried(make_app: MakeApp) -> None:
    app = make_app(lease=0.3, max_deliveries=2)
    ran = declare(app)
    async with app:
        await app.send_task("test.add", (1, 2))
        broker = app.producer().broker
        for number in (1, 2):
            (delivery,) = await broker.fetch(["celery"], 1, 5)  # and is never heard of again
            assert delivery.deliveries == number
        async with running(app):
            letter = await only_letter(app)
    assert letter.reason == "delivery_limit"
    assert letter.deliveries == 3
    assert ran() == []


async def test_limits_are_the_apps(make_app: MakeApp, start_worker: StartWorker) -> None:
    app = make_app(limits=Limits(message=2_000_000, depth=500))
    ran = declare(app)
    async with app:
        deep = "[" * 300 + "]" * 300
        body = b'[[1, 2], {}, {"own": "' + b"x" * 1_500_000 + b'"}]'
        await app.producer().broker.publish(
            [
                Message(queue="celery", headers={"task": "test.add", "id": "a"}, body=body),
                Message(
                    queue="celery",
                    headers={"task": "test.add", "id": "b"},
                    body=f'[[1, 2], {{}}, {{"own": {deep}}}]'.encode(),
                ),
            ]
        )
        await start_worker(app)
        await until(lambda: len(ran()) == 2, "both ran")


@pytest.mark.parametrize("kind", ["redis"], indirect=True)
async def test_a_stored_failure_is_told_and_never_rebuilt(app: AQueue, client: redis.Redis) -> None:
    document: dict[str, Any] = {
        "status": "FAILURE",
        "result": {"exc_type": "SystemExit", "exc_message": ["gone"], "exc_module": "builtins"},
        "traceback": None,
        "children": [],
        "task_id": "x",
    }
    client.set("celery-task-meta-x", json.dumps(document))
    with pytest.raises(TaskFailed, match="SystemExit: gone"):
        await app.result("x").get(1)


@pytest.mark.parametrize("kind", ["rabbitmq"], indirect=True)
async def test_no_result_is_sent_into_a_queue_that_is_no_clients(
    app: AQueue, start_worker: StartWorker, caplog: pytest.LogCaptureFixture, queue: str
) -> None:
    """``reply_to`` is for whoever can write to the broker to choose."""
    ran = declare(app)
    broker = app.producer().broker
    await broker.publish([Message(queue=queue, headers={"task": "test.add", "id": "kept"}, body=GOOD_BODY)])
    asked = {"reply_to": queue, "correlation_id": "1"}
    await broker.publish(
        [Message(queue="celery", headers={"task": "test.add", "id": "1"}, body=GOOD_BODY, properties=asked)]
    )
    await start_worker(app, queues=["celery"])
    await until(lambda: ran() == [3], "it ran")
    await until(lambda: "no client's queue" in caplog.text, "it is said that its result goes nowhere")
    (row,) = [row for row in await broker.inspection.queues([queue]) if row.queue == queue]
    assert row.ready == 1
