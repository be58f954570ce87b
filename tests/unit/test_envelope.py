"""kombu's envelope on Redis: what is packed is unpacked, and what kombu may leave out may be missing."""

import base64
import json
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aqueue.broker.redis.envelope import pack, unpack
from aqueue.protocol import Message, Unreadable
from aqueue.serialization import Limits
from tests.unit.elements import ABSENT, element, message_of
from tests.unit.vectors import Captured, task_messages


def message(**fields: Any) -> Message:
    return Message(**{"queue": "celery", "headers": {"task": "t", "id": "1"}, "body": b"[[], {}, {}]", **fields})


def unreadable(raw: bytes, limits: Limits | None = None) -> Unreadable:
    found = unpack(raw, "celery", limits or Limits())
    assert isinstance(found, Unreadable), found
    return found


def properties(packed: bytes) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(packed)["properties"]
    return found


# --- out -----------------------------------------------------------------------------------------------------


def test_a_packed_message_has_what_kombu_needs() -> None:
    found = json.loads(pack(message(body=b"\x00\xff")))
    assert list(found) == ["body", "content-encoding", "content-type", "headers", "properties"]
    assert base64.b64decode(found["body"]) == b"\x00\xff"
    assert found["properties"]["body_encoding"] == "base64"
    assert found["properties"]["delivery_info"] == {"exchange": "", "routing_key": "celery"}


def test_every_packing_has_a_tag_of_its_own() -> None:
    tags = {properties(pack(message()))["delivery_tag"] for _ in range(100)}
    assert len(tags) == 100
    assert {UUID(tag).version for tag in tags} == {4}


def test_a_body_of_any_length_is_one_line() -> None:
    packed = pack(message(body=bytes(range(256)) * 100))
    assert b"\\n" not in packed
    assert b"\n" not in packed


@pytest.mark.parametrize("priority", range(10))
def test_the_more_urgent_the_smaller_is_the_number_on_redis(priority: int) -> None:
    packed = pack(message(priority=priority))
    assert properties(packed)["priority"] == 9 - priority
    assert message_of(packed).priority == priority


def test_an_exchange_and_a_routing_key_travel() -> None:
    packed = pack(message(exchange="media", routing_key="media.news"))
    assert properties(packed)["delivery_info"] == {"exchange": "media", "routing_key": "media.news"}
    found = message_of(packed)
    assert (found.exchange, found.routing_key) == ("media", "media.news")


def test_what_a_message_says_of_itself_wins_over_properties_it_came_with() -> None:
    came_with = {"priority": 7, "delivery_tag": "old", "body_encoding": "utf-8", "delivery_info": {"redelivered": True}}
    found = properties(pack(message(priority=9, properties={**came_with, "reply_to": "r"})))
    assert (found["priority"], found["body_encoding"], found["reply_to"]) == (0, "base64", "r")
    assert found["delivery_tag"] != "old"
    assert "redelivered" not in found["delivery_info"]


# --- in ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("captured", task_messages(), ids=lambda captured: captured.name)
def test_a_captured_element_is_carried_unread(captured: Captured) -> None:
    found = unpack(captured.raw, captured.queue, Limits())
    assert isinstance(found, Message)
    envelope = captured.envelope
    assert found.queue == captured.queue
    assert found.headers == envelope["headers"]
    assert found.body == base64.b64decode(envelope["body"])
    assert (found.content_type, found.content_encoding) == (envelope["content-type"], envelope["content-encoding"])
    assert found.properties == envelope["properties"]
    assert found.priority == 9 - envelope["properties"]["priority"]
    delivery_info = envelope["properties"]["delivery_info"]
    assert (found.exchange, found.routing_key) == (delivery_info["exchange"], delivery_info["routing_key"])
    assert not found.redelivered
    assert found.delay == 0
    assert found.announce is None


@pytest.mark.parametrize("captured", task_messages(), ids=lambda captured: captured.name)
def test_a_captured_element_is_packed_again_as_it_was(captured: Captured) -> None:
    again = json.loads(pack(message_of(captured.raw)))
    again["properties"]["delivery_tag"] = captured.envelope["properties"]["delivery_tag"]
    assert again == captured.envelope


def test_the_queue_is_where_it_was_found_whatever_the_envelope_says() -> None:
    found = unpack(element(properties={"delivery_info": {"exchange": "", "routing_key": "other"}}), "here", Limits())
    assert isinstance(found, Message)
    assert (found.queue, found.routing_key) == ("here", "other")


@pytest.mark.parametrize("encoding", [ABSENT, None, "", "utf-8"])
def test_a_body_without_base64_is_its_own_text(encoding: Any) -> None:
    text = '[["é\\n"], {}, {}]'
    assert message_of(element(text, properties={"body_encoding": encoding})).body == text.encode()


@pytest.mark.parametrize("text", ["a", '"', "\\", "é", "中", "\U0001f600", "\n"])
@pytest.mark.parametrize("ascii", [True, False])
def test_the_size_of_a_text_body_is_not_counted_as_headers(text: str, ascii: bool) -> None:
    body = json.dumps([[text * 40_000], {}, {}], ensure_ascii=ascii)
    whole = json.loads(element(body, properties={"body_encoding": ABSENT}))
    raw = json.dumps(whole, ensure_ascii=ascii).encode()
    found = unpack(raw, "celery", Limits())
    assert isinstance(found, Message), found.error
    assert found.body == body.encode()


@pytest.mark.parametrize("part", ["headers", "properties"])
def test_headers_and_properties_may_be_missing_or_null(part: str) -> None:
    whole = json.loads(element())
    for found in ({**whole, part: None}, {name: value for name, value in whole.items() if name != part}):
        assert getattr(message_of(json.dumps(found).encode()), part) == {}


def test_without_a_priority_a_message_is_as_urgent_as_celery_takes_it() -> None:
    assert message_of(element(properties={"priority": ABSENT})).priority == 9
    assert message_of(element(properties={"priority": None})).priority == 9


@pytest.mark.parametrize("info", [ABSENT, None, 5, "x", [], {}, {"exchange": 5, "routing_key": None}])
def test_delivery_info_that_says_nothing_routes_nowhere(info: Any) -> None:
    found = message_of(element(properties={"delivery_info": info}))
    assert (found.exchange, found.routing_key) == ("", "")


@pytest.mark.parametrize(
    ("headers", "info", "redelivered"),
    [
        ({}, {}, False),
        ({"redelivered": True}, {}, True),
        ({}, {"redelivered": True}, True),
        ({"redelivered": "no"}, {}, False),
    ],
)
def test_a_redelivery_is_marked_in_either_place(headers: Any, info: Any, redelivered: bool) -> None:
    assert message_of(element(headers=headers, properties={"delivery_info": info})).redelivered is redelivered


def test_what_cannot_be_read_is_kept_whole() -> None:
    found = unreadable(b"not json")
    assert (found.queue, found.raw) == ("celery", b"not json")
    assert found.error.reason == "undecodable"


def test_keys_nobody_knows_are_passed_over() -> None:
    found = json.loads(element())
    assert isinstance(unpack(json.dumps({**found, "more": [1]}).encode(), "celery", Limits()), Message)


def test_extended_types_in_headers_stay_the_objects_they_are_written_as() -> None:
    value = {"__type__": "datetime", "__value__": "2030-01-01T00:00:00"}
    found = message_of(element(headers={"when": value}))
    assert found.headers["when"] == value
    assert message_of(pack(found)).headers["when"] == value


@pytest.mark.parametrize("size", [0, 1, 1000])
def test_headers_are_measured_apart_from_the_body(size: int) -> None:
    limits = Limits(headers=1000)
    rest = len(element(b"", headers={"x": ""}))
    assert isinstance(unpack(element(b"y" * size, headers={"x": "x" * (1000 - rest)}), "q", limits), Message)
    assert (
        unreadable(element(b"y" * size, headers={"x": "x" * (1001 - rest)}), limits).error.reason == "headers_too_large"
    )


def test_an_element_of_more_than_body_and_headers_may_take_is_not_even_parsed() -> None:
    limits = Limits(message=100, headers=100)
    assert unreadable(b"x" * 301, limits).error.reason == "too_large"
    assert unreadable(b"x" * 300, limits).error.reason == "undecodable"


# --- there and back ----------------------------------------------------------------------------------------------

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


@given(
    body=st.binary(max_size=50),
    headers=st.dictionaries(st.text(max_size=5), plain, max_size=3),
    priority=st.integers(0, 9),
    content_type=st.text(max_size=10),
    content_encoding=st.none() | st.text(max_size=10),
    routing=st.tuples(st.text(max_size=5), st.text(min_size=1, max_size=5)),
)
@settings(max_examples=60, deadline=None)
def test_any_message_comes_back_as_it_went(
    body: bytes,
    headers: dict[str, Any],
    priority: int,
    content_type: str,
    content_encoding: str | None,
    routing: tuple[str, str],
) -> None:
    went = message(
        body=body,
        headers=headers,
        priority=priority,
        content_type=content_type,
        content_encoding=content_encoding,
        exchange=routing[0],
        routing_key=routing[1],
    )
    came = message_of(pack(went))
    came.properties = {}
    came.redelivered = False
    assert came == went


@given(st.binary(max_size=200))
@settings(max_examples=100, deadline=None)
def test_unpacking_never_raises(raw: bytes) -> None:
    unpack(raw, "celery", Limits())
