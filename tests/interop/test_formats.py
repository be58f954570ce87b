"""Serializers, compressors, protocol 1: what one side writes the other reads."""

import asyncio
import json
from collections.abc import Callable
from copy import deepcopy
from datetime import date, datetime, timezone
from typing import Any, Final

import pytest

from aqueue import Limits, TaskFailed
from tests.interop import tasks
from tests.interop.celery_names import TaskRevokedError
from tests.interop.conftest import BOTH, SOON, TO_AQUEUE, TO_CELERY, Connect, Fleet, ended, working
from tests.interop.test_values import EXTENDED, UNICODE
from tests.interop.workers import aqueue_command
from tests.kit.waiting import until

COMPRESSORS: Final = ("gzip", "bzip2", "lzma", "brotli", "zstd")
ALIASES: Final = ("zlib", "bzip", "xz", "zstandard")
_COMMON: Final[dict[str, Any]] = {
    "text": UNICODE,
    "list": [1, 2.5, None, True, [[]]],
    "object": {"deep": {"deeper": -1}},
}
#: For each serializer, what it can say by itself.
VALUES: Final[dict[str, Any]] = {
    "json": [_COMMON, *EXTENDED],
    "msgpack": [_COMMON, b"bytes", b"\x00\xff", 2**60],
    "yaml": [_COMMON, date(2024, 2, 29), datetime(2024, 2, 29, 1, 2, 3, tzinfo=timezone.utc), b"\x00\xff"],
    "pickle": [_COMMON, *EXTENDED, (1, 2), {3, 4}],
}
_setex: Final = pytest.mark.filterwarnings("ignore:Call to deprecated setex:DeprecationWarning")

# --- task messages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, *COMPRESSORS])
@pytest.mark.parametrize("serializer", VALUES)
async def test_an_aqueue_worker_reads_what_a_celery_client_writes(
    formats_fleet: Fleet, serializer: str, compression: str | None
) -> None:
    values = VALUES[serializer]
    for value in values:
        result = formats_fleet.client.send_task(
            "interop.kinds", [value], {}, queue=TO_AQUEUE, serializer=serializer, compression=compression
        )
        assert await ended(result) == [type(value).__name__]
    result = formats_fleet.client.send_task(
        "interop.echo",
        [_COMMON],
        {"k": deepcopy(_COMMON)},
        queue=TO_AQUEUE,
        serializer=serializer,
        compression=compression,
    )
    assert await ended(result) == [[_COMMON], {"k": deepcopy(_COMMON)}]


@pytest.mark.parametrize("compression", [None, *COMPRESSORS])
@pytest.mark.parametrize("serializer", VALUES)
async def test_a_celery_worker_reads_what_an_aqueue_client_writes(
    formats_fleet: Fleet, connect: Connect, serializer: str, compression: str | None
) -> None:
    app = await connect(formats_fleet.site)
    for settings in ({}, {"compression": compression}) if compression else ({},):
        options: Any = {"queue": TO_CELERY, "serializer": serializer, **settings}
        for value in VALUES[serializer]:
            result = await app.send_task("interop.kinds", [value], **options)
            assert await result.get(SOON) == [type(value).__name__]
        result = await app.send_task("interop.echo", [_COMMON], {"k": deepcopy(_COMMON)}, **options)
        assert await result.get(SOON) == [[_COMMON], {"k": deepcopy(_COMMON)}]


async def test_one_object_may_stand_in_two_places_of_a_yaml_message(formats_fleet: Fleet, connect: Connect) -> None:
    """yaml writes it once, and refers to it at the second place."""
    twice = ["tea", "milk"]
    theirs = formats_fleet.client.send_task("interop.echo", [twice], {"k": twice}, queue=TO_AQUEUE, serializer="yaml")
    assert await ended(theirs) == [[twice], {"k": twice}]
    app = await connect(formats_fleet.site)
    ours = await app.send_task("interop.echo", [twice], {"k": twice}, queue=TO_CELERY, serializer="yaml")
    assert await ours.get(SOON) == [[twice], {"k": twice}]
    own = await app.send_task("interop.echo", [twice], {"k": twice}, queue=TO_AQUEUE, serializer="yaml")
    assert await own.get(SOON) == [[twice], {"k": twice}]


@pytest.mark.parametrize("name", ALIASES)
async def test_a_compressor_may_be_called_by_its_other_name(formats_fleet: Fleet, connect: Connect, name: str) -> None:
    text = "again and again " * 1000
    theirs = formats_fleet.client.send_task("interop.measure", [text], queue=TO_AQUEUE, compression=name)
    assert await ended(theirs) == len(text)
    app = await connect(formats_fleet.site)
    ours = await app.send_task("interop.measure", [text], queue=TO_CELERY, compression=name)
    assert await ours.get(SOON) == len(text)


async def test_an_apps_own_serializer_and_compression_are_used_for_every_call(
    formats_fleet: Fleet, connect: Connect, celery_client: Callable[..., Any]
) -> None:
    client = celery_client(formats_fleet.site, task_serializer="msgpack", task_compression="zstd")
    assert await ended(client.send_task("interop.kinds", [b"\xff"], queue=TO_AQUEUE)) == ["bytes"]
    app = await connect(formats_fleet.site, serializer="msgpack", compression="zstd")
    assert await (await app.send_task("interop.kinds", [b"\xff"], queue=TO_CELERY)).get(SOON) == ["bytes"]


async def test_a_large_payload_shrinks_on_its_way_in_both_directions(formats_fleet: Fleet, connect: Connect) -> None:
    """Half of a megabyte, which is well over what a message of either side would be, is small when compressed."""
    text = "0123456789" * 50_000
    app = await connect(formats_fleet.site)
    for compression in COMPRESSORS:
        theirs = formats_fleet.client.send_task("interop.measure", [text], queue=TO_AQUEUE, compression=compression)
        ours = await app.send_task("interop.measure", [text], queue=TO_CELERY, compression=compression)
        assert await ended(theirs) == await ours.get(SOON) == 500_000


class Explosive:
    """Unpickling it leaves a trace."""

    def __init__(self, port: int, key: str) -> None:
        self._arguments = (port, key)

    def __reduce__(self) -> Any:
        return tasks.count, self._arguments


async def test_pickle_that_is_not_accepted_is_buried_unread_and_the_worker_lives(plain_fleet: Fleet, key: str) -> None:
    bomb = Explosive(plain_fleet.site.port, key)
    result = plain_fleet.client.send_task("interop.give", [bomb], queue=TO_AQUEUE, serializer="pickle")
    alive = plain_fleet.client.send_task("interop.add", [2, 3], queue=TO_AQUEUE)
    assert await ended(alive) == 5

    def letter() -> Any:
        listed = aqueue_command("dead", "list", "--broker", plain_fleet.site.broker, "--json")
        assert listed.returncode == 0, listed.stderr
        return next((one for one in json.loads(listed.stdout) if one["task_id"] == result.id), None)

    found = await until(letter, "the message is among the dead letters")
    assert found["reason"] == "content_refused"
    assert found["task"] == "interop.give"
    assert found["queue"] == TO_AQUEUE
    assert plain_fleet.site.runs(key) == 0
    assert plain_fleet.aqueue.is_alive


async def test_a_celery_client_does_not_wait_in_vain_for_a_message_that_was_refused(plain_fleet: Fleet) -> None:
    for serializer in ("pickle", "msgpack", "yaml"):
        result = plain_fleet.client.send_task("interop.add", [2, 3], queue=TO_AQUEUE, serializer=serializer)
        with pytest.raises(Exception, match="not in accept_content"):
            await ended(result)
        assert result.state == "FAILURE"


@pytest.mark.parametrize("size", [1_500_000, 3_000_000])
async def test_a_celery_client_does_not_wait_in_vain_for_a_message_that_is_too_large(
    plain_fleet: Fleet, size: int
) -> None:
    """Celery has no limit, ours is a megabyte when nothing else is said."""
    result = plain_fleet.client.send_task("interop.measure", ["x" * size], queue=TO_AQUEUE)
    with pytest.raises(Exception, match="too_large"):
        await ended(result)


async def test_a_higher_limit_lets_larger_messages_of_a_celery_client_in(
    plain_fleet: Fleet, connect: Connect, key: str
) -> None:
    limits = Limits(message=8 * 1024 * 1024)
    async with working(await connect(plain_fleet.site, limits=limits), key):
        result = plain_fleet.client.send_task("interop.give", ["x" * 3_000_000], queue=key)
        assert len(await ended(result)) == 3_000_000


# --- results ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", [None, *COMPRESSORS])
@pytest.mark.parametrize("serializer", VALUES)
async def test_a_celery_client_reads_results_of_an_aqueue_worker_in_every_format(
    plain_fleet: Fleet,
    connect: Connect,
    celery_client: Callable[..., Any],
    key: str,
    serializer: str,
    compression: str | None,
) -> None:
    app = await connect(
        plain_fleet.site,
        result_serializer=serializer,
        result_compression=compression,
        result_accept_content=(serializer,),
        accept_content=("json", "pickle"),
    )
    client = celery_client(
        plain_fleet.site, result_serializer=serializer, result_accept_content=[serializer], accept_content=["json"]
    )
    async with working(app, key):
        for value in VALUES[serializer]:
            result = client.send_task("interop.give", [value], queue=key, serializer="pickle")
            found = await ended(result)
            assert found == value
        failing = client.send_task("interop.decline", ["no money", 402], queue=key)
        with pytest.raises(tasks.Declined) as caught:
            await ended(failing)
        assert caught.value.code == 402


@_setex
@pytest.mark.parametrize("compression", [None, *COMPRESSORS])
@pytest.mark.parametrize("serializer", VALUES)
async def test_an_aqueue_client_reads_results_that_celery_stored_in_every_format(
    plain_fleet: Fleet,
    connect: Connect,
    celery_client: Callable[..., Any],
    key: str,
    serializer: str,
    compression: str | None,
) -> None:
    client = celery_client(
        plain_fleet.site,
        result_serializer=serializer,
        result_accept_content=[serializer],
        result_compression=compression,
    )
    app = await connect(plain_fleet.site, result_serializer=serializer, result_accept_content=(serializer,))
    for number, value in enumerate(VALUES[serializer]):
        client.backend.store_result(f"{key}-{number}", value, "SUCCESS")
        assert await app.result(f"{key}-{number}").get(SOON) == value
    error = tasks.Declined("no money", 402)
    client.backend.store_result(f"{key}-failed", error, "FAILURE", traceback="Traceback: ...")
    with pytest.raises(TaskFailed) as caught:
        await app.result(f"{key}-failed").get(SOON)
    assert caught.value.type == "Declined"
    assert caught.value.message == "('no money', 402)"
    assert caught.value.traceback == "Traceback: ..."


@_setex
async def test_a_success_is_never_overwritten_by_the_other_side(
    plain_fleet: Fleet, connect: Connect, celery_client: Callable[..., Any], key: str
) -> None:
    """Each worker looks at what is stored before it writes."""
    for serializer, compression in (("json", None), ("msgpack", None), ("yaml", None), ("json", "gzip")):
        name = f"{key}-{serializer}-{compression}"
        conf: dict[str, Any] = {"result_serializer": serializer, "result_compression": compression}
        client = celery_client(plain_fleet.site, result_accept_content=[serializer], **conf)
        settings = {**conf, "result_accept_content": (serializer,)}
        app = await connect(plain_fleet.site, **settings)
        client.backend.store_result(name, "theirs", "SUCCESS")
        async with working(await connect(plain_fleet.site, **settings), name):
            again = await app.send_task("interop.fail", ["late"], queue=name, task_id=name)
            marker = await app.send_task("interop.give", ["ours"], queue=name)
            assert await marker.get(SOON) == "ours"
            assert await again.get(SOON) == "theirs"
        client.backend.store_result(marker.id, ValueError("late"), "FAILURE")
        assert await marker.get(SOON) == "ours"
        assert await asyncio.to_thread(client.AsyncResult(name).get, timeout=SOON) == "theirs"


# --- protocol 1 ------------------------------------------------------------------------------------------------------


@pytest.fixture
def old_client(formats_fleet: Fleet, celery_client: Callable[..., Any]) -> Any:
    """A Celery client that writes protocol 1."""
    return celery_client(formats_fleet.site, task_protocol=1)


async def test_an_aqueue_worker_runs_protocol_1(old_client: Any) -> None:
    for serializer in VALUES:
        result = old_client.send_task(
            "interop.echo", [1, UNICODE], {"k": [2]}, queue=TO_AQUEUE, serializer=serializer, compression="gzip"
        )
        assert await ended(result) == [[1, UNICODE], {"k": [2]}]


async def test_a_failure_of_a_protocol_1_task_is_seen(old_client: Any) -> None:
    result = old_client.send_task("interop.decline", ["no money", 402], queue=TO_AQUEUE)
    with pytest.raises(tasks.Declined):
        await ended(result)


async def test_the_countdown_of_a_protocol_1_task_is_kept(formats_fleet: Fleet, old_client: Any, key: str) -> None:
    before = formats_fleet.site.traces.time()
    result = old_client.send_task("interop.stamp", [formats_fleet.site.port, key], queue=TO_AQUEUE, countdown=0.5)
    ran = await ended(result)
    assert before[0] + before[1] / 1e6 + 0.5 <= ran < before[0] + 4


async def test_an_expired_protocol_1_task_is_not_run(formats_fleet: Fleet, old_client: Any, key: str) -> None:
    result = old_client.send_task(
        "interop.stamp", [formats_fleet.site.port, key], queue=TO_AQUEUE, countdown=0.6, expires=0.3
    )
    with pytest.raises(TaskRevokedError, match="expired"):
        await ended(result)
    assert formats_fleet.site.runs(key) == 0


@pytest.mark.parametrize("compression", [None, "gzip"])
@pytest.mark.parametrize("task", ["interop.retry_self", "interop.retry_now"])
async def test_a_protocol_1_task_is_retried_by_an_aqueue_worker(
    old_client: Any, task: str, compression: str | None
) -> None:
    for times, delay in ((3, 0), (1, 0.2)):
        result = old_client.send_task(task, [times, delay], queue=TO_AQUEUE, compression=compression)
        assert await ended(result) == [times, "aqueue"]


@pytest.mark.parametrize("compression", [None, "bzip2"])
async def test_a_protocol_1_task_that_an_aqueue_worker_retried_goes_on_at_a_celery_worker(
    formats_fleet: Fleet, connect: Connect, old_client: Any, key: str, compression: str | None
) -> None:
    """The first attempt is ours. The second, parked meanwhile, is theirs: their worker joins the queue late."""
    app = await connect(formats_fleet.site)
    async with working(app, key):
        result = old_client.send_task(
            "interop.retry_self", [1, 1.0, formats_fleet.site.port, key], queue=key, compression=compression
        )
        await until(lambda: result.state == "RETRY", "state RETRY")
    old_client.control.add_consumer(key, reply=True, timeout=SOON, limit=1)
    assert await ended(result) == [1, "celery"]
    assert formats_fleet.site.traces.lrange(f"attempts:{key}", 0, -1) == ["0 in-process", "1 celery"]


async def test_protocol_1_retries_may_change_hands_at_every_attempt(
    formats_fleet: Fleet, old_client: Any, key: str
) -> None:
    results = [
        old_client.send_task("interop.retry_self", [4, 0, formats_fleet.site.port, f"{key}-{i}"], queue=BOTH)
        for i in range(20)
    ]
    for i, result in enumerate(results):
        assert (await ended(result))[0] == 4
        attempts = formats_fleet.site.traces.lrange(f"attempts:{key}-{i}", 0, -1)
        assert [attempt.split()[0] for attempt in attempts] == ["0", "1", "2", "3", "4"]
