"""What both clients write for one and the same call, laid side by side."""

import base64
import bz2
import json
import pickle
import zlib
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]
import pytest
import yaml  # type: ignore[import-untyped]

from tests.interop.conftest import Connect, Fleet
from tests.interop.test_values import EXTENDED, UNICODE
from tests.interop.workers import Site

_TIME: Final = datetime(2124, 2, 29, 1, 2, 3, 456789, tzinfo=timezone.utc)
#: Headers and properties that tell one sender, or one sending, from another.
_OWN_HEADERS: Final = frozenset({"origin"})
#: Shown to people; what is not plain text is shown in each side's own way.
_SHOWN: Final = frozenset({"argsrepr", "kwargsrepr"})
_SHOWN_OTHERWISE: Final = frozenset({"unicode", "extended types", "msgpack", "long arguments"})
_OWN_PROPERTIES: Final = frozenset({"reply_to", "delivery_tag"})
#: On Redis the two sides have each their own sense of it.
_URGENCY: Final = frozenset({"priority"})
#: Celery's options that have gone where they mean nothing.
_LEAKED: Final = frozenset({"argsrepr", "kwargsrepr"})

CALLS: Final[dict[str, dict[str, Any]]] = {
    "no arguments": {},
    "arguments": {"args": [1, "two", None, [3.5]], "kwargs": {"four": {"five": True}}},
    "unicode": {"args": [UNICODE], "kwargs": {"naïve": "ß"}},
    "extended types": {"args": EXTENDED},
    "eta": {"eta": _TIME},
    "ignore_result": {"ignore_result": True},
    "shadow": {"shadow": "shown.name"},
    "own headers": {"headers": {"tenant": "acme", "nested": {"a": [1]}}},
    "own representations": {"args": ["secret"], "argsrepr": "(***)", "kwargsrepr": "{***}"},
    "msgpack": {"args": [b"\xff", "text"], "serializer": "msgpack"},
    "yaml": {"args": ["text", [1]], "serializer": "yaml"},
    "pickle": {"args": [(1, 2), {3}], "serializer": "pickle"},
    "gzip": {"args": ["text" * 100], "compression": "gzip"},
    "bzip2": {"args": ["text" * 100], "compression": "bzip2"},
    "long arguments": {"args": ["x" * 5000, list(range(3000))], "kwargs": {"k": {"deep": [[[[[1]]]]]}}},
}

_READERS: Final[dict[str, Callable[[bytes], Any]]] = {
    "application/json": json.loads,
    "application/x-msgpack": msgpack.unpackb,
    "application/x-yaml": yaml.safe_load,
    "application/x-python-serialize": pickle.loads,
}
_EXPANDERS: Final[dict[str | None, Callable[[bytes], bytes]]] = {
    None: bytes,
    "application/x-gzip": zlib.decompress,
    "application/x-bz2": bz2.decompress,
}


def body_of(envelope: Mapping[str, Any]) -> Any:
    """Arguments, keyword arguments, and what follows."""
    data = base64.b64decode(envelope["body"], validate=True)
    data = _EXPANDERS[envelope["headers"].get("compression")](data)
    args, kwargs, embed = _READERS[envelope["content-type"]](data)
    return list(args), kwargs, embed


def without(table: Mapping[str, Any], own: frozenset[str]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in own}


async def sent_by_both(
    fleet: Fleet, connect: Connect, queue: str, options: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The envelopes of one call, by the Celery client and by ours."""
    options = {"args": [], "kwargs": {}, **options}
    options = {**options, "args": tuple(options["args"])}
    fleet.client.tasks["interop.echo"].apply_async(queue=queue, task_id="the-same", **options)
    app = await connect(fleet.site, eta_queues=(queue,), track_sent=False)
    await app.tasks["interop.echo"].apply_async(queue=queue, task_id="the-same", **options)
    return envelope_on(fleet, queue), envelope_on(fleet, queue)


def envelope_on(fleet: Fleet, queue: str) -> dict[str, Any]:
    """The oldest message in a queue, in the shape that it has on Redis."""
    return from_rabbit(fleet.site, queue) if fleet.site.rabbit else from_redis(fleet, queue)


def from_rabbit(site: Site, queue: str) -> dict[str, Any]:
    with site.rabbit_channel() as channel:
        message = channel.basic_get(queue, no_ack=True)
    if message is None:
        pytest.fail(f"nothing was sent to {queue}")
    properties = {"priority": 0, **message.properties}  # without one it has this
    return {
        "headers": properties.pop("application_headers"),
        "content-type": properties.pop("content_type"),
        "content-encoding": properties.pop("content_encoding"),
        "properties": properties,
        "body": base64.b64encode(as_bytes(message.body)),
    }


def as_bytes(body: bytes | str) -> bytes:
    """py-amqp decodes what says that it is text."""
    return body.encode() if isinstance(body, str) else body


def from_redis(fleet: Fleet, queue: str) -> dict[str, Any]:
    """The oldest envelope on any of the queue's lists."""
    with fleet.site.broker_keys() as keys:
        for step in ("", "\x06\x163", "\x06\x166", "\x06\x169"):
            element = keys.rpop(f"{queue}{step}")
            if element is not None:
                found: dict[str, Any] = json.loads(element)
                return found
    pytest.fail(f"nothing was sent to {queue}")


@pytest.mark.parametrize("call", CALLS)
async def test_both_clients_write_the_same_message(either_fleet: Fleet, connect: Connect, key: str, call: str) -> None:
    theirs, ours = await sent_by_both(either_fleet, connect, key, CALLS[call])
    assert ours.keys() == theirs.keys()
    own = _OWN_HEADERS | (_SHOWN if call in _SHOWN_OTHERWISE else frozenset())
    assert without(ours["headers"], own) == without(theirs["headers"], own)
    own = _OWN_PROPERTIES | _LEAKED | (frozenset() if either_fleet.site.rabbit else _URGENCY)
    assert without(ours["properties"], own) == without(theirs["properties"], own)
    assert ours["properties"].keys() == theirs["properties"].keys() - _LEAKED
    assert (ours["content-type"], ours["content-encoding"]) == (theirs["content-type"], theirs["content-encoding"])
    assert body_of(ours) == body_of(theirs)


async def test_both_clients_cut_the_representation_of_long_arguments(
    either_fleet: Fleet, connect: Connect, key: str
) -> None:
    for envelope in await sent_by_both(either_fleet, connect, key, CALLS["long arguments"]):
        assert 500 < len(envelope["headers"]["argsrepr"]) < 1500


async def test_both_clients_write_the_same_time_to_expire(plain_fleet: Fleet, connect: Connect, key: str) -> None:
    theirs, ours = await sent_by_both(plain_fleet, connect, key, {"expires": _TIME})
    assert ours["headers"]["expires"] == theirs["headers"]["expires"] == _TIME.isoformat()
    found = [int(envelope["properties"]["expiration"]) for envelope in (theirs, ours)]
    assert abs(found[0] - found[1]) < 5000


async def test_both_clients_write_time_limits_the_same_way(either_fleet: Fleet, connect: Connect, key: str) -> None:
    either_fleet.client.send_task("interop.echo", queue=key, time_limit=30, soft_time_limit=20)
    app = await connect(either_fleet.site, track_sent=False)
    await app.send_task("interop.echo", queue=key, timeout=30, soft_timeout=20)
    theirs, ours = envelope_on(either_fleet, key), envelope_on(either_fleet, key)
    assert ours["headers"]["timelimit"] == theirs["headers"]["timelimit"] == [30, 20]


async def test_both_clients_turn_a_countdown_into_an_eta(either_fleet: Fleet, connect: Connect, key: str) -> None:
    theirs, ours = await sent_by_both(either_fleet, connect, key, {"countdown": 100})
    found = [datetime.fromisoformat(envelope["headers"]["eta"]) for envelope in (theirs, ours)]
    assert all(time.utcoffset() is not None for time in found)
    assert abs((found[1] - found[0]).total_seconds()) < 5


async def test_both_clients_turn_seconds_to_expire_into_a_time(plain_fleet: Fleet, connect: Connect, key: str) -> None:
    theirs, ours = await sent_by_both(plain_fleet, connect, key, {"expires": 100})
    found = [datetime.fromisoformat(envelope["headers"]["expires"]) for envelope in (theirs, ours)]
    assert abs((found[1] - found[0]).total_seconds()) < 5
    for envelope in (theirs, ours):
        assert 95_000 < int(envelope["properties"]["expiration"]) <= 100_000


@pytest.mark.parametrize("wire", range(10))
async def test_a_priority_of_ours_is_the_same_place_in_line_as_celerys(
    plain_fleet: Fleet, connect: Connect, key: str, wire: int
) -> None:
    plain_fleet.client.send_task("interop.echo", queue=key, priority=wire)
    app = await connect(plain_fleet.site, track_sent=False)
    await app.send_task("interop.echo", queue=key, priority=9 - wire)
    step = max(step for step in (0, 3, 6, 9) if step <= wire)
    with plain_fleet.site.broker_keys() as keys:
        waiting = keys.lrange(f"{key}\x06\x16{step}" if step else key, 0, -1)
        assert [json.loads(element)["properties"]["priority"] for element in waiting] == [wire, wire]
        keys.delete(key, f"{key}\x06\x16{step}")


async def test_every_message_has_a_delivery_tag_of_its_own(plain_fleet: Fleet, connect: Connect, key: str) -> None:
    app = await connect(plain_fleet.site, track_sent=False)
    echo = app.tasks["interop.echo"].options(queue=key)
    await app.send_many([echo.s(number) for number in range(50)])
    tags = {envelope_on(plain_fleet, key)["properties"]["delivery_tag"] for _ in range(50)}
    assert len(tags) == 50


async def test_both_clients_declare_a_queue_in_the_same_bindings(
    plain_fleet: Fleet, connect: Connect, key: str
) -> None:
    app = await connect(plain_fleet.site, track_sent=False)
    await app.send_task("interop.echo", queue=f"{key}-ours")
    plain_fleet.client.send_task("interop.echo", queue=f"{key}-theirs")
    with plain_fleet.site.broker_keys() as keys:
        for kind in ("binding", "binding_permanent"):
            ours = keys.smembers(f"_kombu.{kind}.{key}-ours")
            theirs = keys.smembers(f"_kombu.{kind}.{key}-theirs")
            assert {member.replace(b"-ours", b"") for member in ours} == {
                member.replace(b"-theirs", b"") for member in theirs
            }
        keys.delete(f"{key}-theirs", f"{key}-ours\x06\x169")
