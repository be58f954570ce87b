"""Task messages to requests: every captured vector, what Celery tolerates, and messages damaged at random."""

import base64
import json
import math
from datetime import datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aqueue.broker.redis.envelope import pack, unpack
from aqueue.errors import BadMessage
from aqueue.protocol import Embed, Message, Request, Unreadable, decode, is_success, retry_message
from aqueue.serialization import Limits, Serializer
from aqueue.signing import Auth
from tests.unit.elements import ABSENT, element, read, reason
from tests.unit.vectors import WIRE, Captured, corpus, instant, load, odd_elements, task, task_messages

#: The headers of protocol 2 and those that kombu adds; all others belong to the application.
OWN_OF_CELERY = frozenset(
    "lang task id shadow eta expires group group_index retries timelimit root_id parent_id argsrepr kwargsrepr "
    "origin ignore_result replaced_task_nesting stamped_headers stamps compression meth redelivered".split()
)
READS_ALL = Serializer(["json", "yaml", "msgpack", "pickle"])


def reader_of(captured: Captured) -> Serializer:
    if captured.envelope["content-type"] != "application/data":
        return READS_ALL
    keys = WIRE / "auth"
    return Serializer(["auth"], signer=Auth(keys / "worker.key", keys / "worker.pem", keys / "*.pem"))


def request_of(captured: Captured) -> Request:
    message = unpack(captured.raw, captured.queue, Limits())
    assert isinstance(message, Message), message
    return decode(message, reader_of(captured))


def sent_by_celery(name: str = "simple") -> Request:
    return request_of(task(name))


# --- the captured vectors -----------------------------------------------------------------------------

every_vector = pytest.mark.parametrize("captured", task_messages(), ids=lambda captured: captured.name)


def test_the_vectors_are_all_there() -> None:
    assert len({captured.name.split("[")[0] for captured in task_messages()}) == len(
        list(WIRE.glob("redis_task_*.json"))
    )


@every_vector
def test_a_captured_message_has_its_name_id_and_arguments(captured: Captured) -> None:
    request = request_of(captured)
    assert request.task == captured.fields["task"]
    assert request.id == captured.fields["id"]
    assert request.args == captured.args
    assert [type(value) for value in request.args] == [type(value) for value in captured.args]
    assert request.kwargs == captured.kwargs
    assert request.retries == captured.fields["retries"]


@every_vector
def test_a_captured_message_has_its_family(captured: Captured) -> None:
    request, fields = request_of(captured), captured.fields
    assert request.root_id == fields.get("root_id", fields["id"])
    assert request.parent_id == fields.get("parent_id")
    assert request.group == (fields.get("taskset") or fields["group"])
    assert request.group_index == fields["group_index"]


@every_vector
def test_a_captured_message_has_its_times_and_limits(captured: Captured) -> None:
    request, fields = request_of(captured), captured.fields
    assert request.eta == instant(fields["eta"])
    assert request.expires == instant(fields["expires"])
    assert [request.time_limit, request.soft_time_limit] == fields["timelimit"]


@every_vector
def test_a_captured_message_says_how_it_is_shown_and_kept(captured: Captured) -> None:
    request, headers = request_of(captured), captured.envelope["headers"]
    assert request.shadow == headers.get("shadow")
    assert request.ignore_result is headers.get("ignore_result")
    assert request.headers == {name: value for name, value in headers.items() if name not in OWN_OF_CELERY}


@every_vector
def test_what_follows_a_captured_message_comes_out_whole(captured: Captured) -> None:
    embed = request_of(captured).embed
    found = {part: getattr(embed, part) or None for part in ("callbacks", "errbacks", "chain", "chord")}
    assert found == captured.embed


def test_the_next_step_of_a_chain_is_its_last_item() -> None:
    chain = sent_by_celery("chain").embed.chain
    assert chain is not None
    assert [step["task"] for step in reversed(chain)] == ["proj.tasks.mul", "proj.tasks.add"]


def test_a_chord_names_its_body_in_each_part_of_the_header() -> None:
    for number in range(3):
        request = request_of(task("chord", number))
        assert request.embed.chord is not None
        assert request.embed.chord["task"] == "proj.tasks.tsum"
        assert request.group_index == number


def test_a_link_and_its_errback_are_kept_apart() -> None:
    embed = sent_by_celery("link").embed
    assert embed.callbacks is not None
    assert embed.errbacks is not None
    assert [embed.callbacks[0]["task"], embed.errbacks[0]["task"]] == ["proj.tasks.mul", "proj.tasks.old_errback"]


def test_nothing_follows_a_plain_task() -> None:
    assert sent_by_celery("simple").embed == Embed()


def test_stamps_are_not_taken_for_headers_of_the_application() -> None:
    request = sent_by_celery("stamped")
    assert request.headers == {}
    assert request.message.headers["stamps"] == {"monitoring_id": "m-1", "tags": ["a", "b"]}


# --- what Celery lets pass, and what it does not ---------------------------------------------------------

#: Labels of messages that a Celery worker can't run, with the reasons that fit; None when the message itself is fine.
NOT_RUN_BY_CELERY: dict[str, set[str | None]] = {
    "body element of 2 items": {"bad_body"},
    "body is a JSON array, not a string": {"undecodable"},
    "no delivery_info": {None},
    "no delivery_tag": {None},
    "content-type application/x-msgpack not accepted": {"content_refused"},
    "eta as number": {"bad_eta"},
    "eta garbage": {"bad_eta"},
    "no id header": {"bad_id"},
    "kwargs list": {"bad_body"},
    "JSON body not a task": {"bad_body"},
    "broken base64/JSON body": {"undecodable"},
    "headers null": {"bad_body"},
    "ignore_result true": {None},
    "body bytes contain non-utf8, utf-8 encoding": {"undecodable", "bad_encoding"},
    "element is not JSON": {"undecodable"},
}


@pytest.mark.parametrize("label", odd_elements())
def test_an_odd_message_is_read_when_celery_reads_it_and_refused_with_a_reason_otherwise(label: str) -> None:
    case = odd_elements()[label]
    expected = {None} if case["result_in_backend"] is not None else NOT_RUN_BY_CELERY[label]
    assert reason(case["element"].encode()) in expected


@pytest.mark.parametrize(
    ("label", "args"),
    [("args object instead of list", ["x", "y"]), ("missing args", [2]), ("eta with Z", [2, 3]), ("proto1", [2, 3])],
)
def test_an_odd_message_has_the_arguments_that_celery_gives_it(label: str, args: list[Any]) -> None:
    assert read(odd_elements()[label]["element"].encode()).args == args


def test_retries_as_a_text_are_counted() -> None:
    assert read(odd_elements()["retries as string"]["element"].encode()).retries == 1


def test_a_time_with_a_z_is_utc() -> None:
    request = read(odd_elements()["eta with Z"]["element"].encode())
    assert request.eta == datetime(2020, 1, 1, tzinfo=timezone.utc)


def test_a_time_without_an_offset_is_utc() -> None:
    request = read(element(headers={"eta": "2030-01-02T03:04:05"}))
    assert request.eta == datetime(2030, 1, 2, 3, 4, 5, tzinfo=timezone.utc)


def test_an_offset_is_carried_into_utc() -> None:
    request = read(element(headers={"expires": "2030-01-02T03:04:05.5+05:30"}))
    assert request.expires == datetime(2030, 1, 1, 21, 34, 5, 500000, tzinfo=timezone.utc)
    assert request.expires.utcoffset() == timedelta(0)


def test_bodies_with_headers_and_an_object_are_read_headers_first() -> None:
    body = {"task": "other", "id": "other", "args": [1], "retries": 2, "eta": "2030-01-01T00:00:00Z", "chord": None}
    request = read(element(body, headers={"retries": 5, "eta": None}))
    assert (request.task, request.id, request.args) == ("proj.tasks.add", "1", [1])
    assert (request.retries, request.eta) == (5, None)


def test_an_object_body_without_arguments_is_no_task() -> None:
    assert reason(element({"task": "t", "id": "1"})) == "bad_body"


def test_the_taskset_of_protocol_1_is_its_group() -> None:
    body = {"task": "t", "id": "1", "args": [], "group": "old", "taskset": "new"}
    assert read(element(body, headers=ABSENT)).group == "new"


def test_protocol_1_without_arguments_has_none() -> None:
    request = read(element({"task": "t", "id": "1"}, headers=ABSENT))
    assert (request.args, request.kwargs, request.embed) == ([], {}, Embed())
    assert request.root_id == "1"


def test_the_callbacks_of_protocol_1_follow() -> None:
    callbacks = sent_by_celery("v1_chain").embed.callbacks
    assert callbacks is not None
    assert callbacks[0]["task"] == "proj.tasks.mul"


# --- headers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "hard", "soft"),
    [([30, 20], 30, 20), ([None, 20], None, 20), ([1.5, None], 1.5, None), ([0, 0], None, None), (None, None, None)],
)
def test_limits_are_read_hard_first(limits: Any, hard: float | None, soft: float | None) -> None:
    request = read(element(headers={"timelimit": limits}))
    assert (request.time_limit, request.soft_time_limit) == (hard, soft)


def test_a_negative_count_of_retries_is_none() -> None:
    assert read(element(headers={"retries": -3})).retries == 0


def test_a_task_without_a_root_is_its_own() -> None:
    assert read(element()).root_id == "1"
    assert read(element(headers={"root_id": "root"})).root_id == "root"


@pytest.mark.parametrize("ignored", [True, False, None])
def test_whether_a_result_is_ignored_has_three_answers(ignored: bool | None) -> None:
    assert read(element(headers={"ignore_result": ignored})).ignore_result is ignored


def test_headers_of_the_application_are_seen_without_those_of_celery() -> None:
    request = read(element(headers={"x-trace": "abc", "nested": {"a": [1]}, "redelivered": True}))
    assert request.headers == {"x-trace": "abc", "nested": {"a": [1]}}


def test_a_message_over_the_limit_is_refused_before_it_is_decoded() -> None:
    message = Message(queue="q", headers={"task": "t", "id": "1"}, body=b"[[], {}, {}]")
    assert decode(message, Serializer(limits=Limits(message=12))).args == []
    with pytest.raises(BadMessage) as caught:
        decode(message, Serializer(limits=Limits(message=11)))
    assert caught.value.reason == "too_large"


def test_an_embed_of_the_wrong_shape_is_refused() -> None:
    assert reason(element([[], {}, 5])) == "bad_body"
    assert reason(element([[], {}, {"callbacks": {"task": "t"}}])) == "bad_canvas"
    assert reason(element([[], {}, {"chain": ["t"]}])) == "bad_canvas"
    assert reason(element([[], {}, {"chord": "t"}])) == "bad_canvas"


# --- once more ----------------------------------------------------------------------------------------------

NOW = datetime(2026, 11, 22, 8, 54, 55, 8667, tzinfo=timezone.utc)


def test_a_retry_is_the_message_that_a_celery_worker_would_publish() -> None:
    (entry,) = load("redis_retry_message")["broker_keys"]["unacked"]["value"].values()
    republished = json.loads(entry)[0]
    first = json.loads(json.dumps(republished))
    first["headers"].update(retries=0, eta=None, parent_id=None)
    request = read(json.dumps(first).encode())
    again = json.loads(pack(retry_message(request, 60, NOW.timestamp())))
    assert instant(again["headers"].pop("eta")) == instant(republished["headers"].pop("eta"))
    assert again["headers"] == republished["headers"]
    for envelope in (again, republished):
        del envelope["properties"]["delivery_tag"]
    assert again == republished


@pytest.mark.parametrize(
    "name", ["options", "chain_opts", "chord", "stamped", "gzip", "msgpack", "pickle", "yaml", "link", "ext_types"]
)
def test_a_retry_differs_from_its_message_in_retries_eta_and_parent_alone(name: str) -> None:
    captured = task(name)
    request = request_of(captured)
    again = json.loads(pack(retry_message(request, 0, NOW.timestamp())))
    expected = json.loads(captured.raw)
    expected["headers"].update(retries=1, eta=None, parent_id=request.id)
    for envelope in (again, expected):
        del envelope["properties"]["delivery_tag"]
    assert again == expected


def test_a_retry_at_once_has_no_eta() -> None:
    again = retry_message(sent_by_celery("eta"), 0, NOW.timestamp())
    assert again.headers["eta"] is None
    assert again.delay == 0


def test_a_retry_later_says_when() -> None:
    again = retry_message(sent_by_celery(), 1.5, NOW.timestamp())
    assert instant(again.headers["eta"]) == NOW + timedelta(seconds=1.5)
    assert again.delay == 1.5


def test_a_retry_is_no_redelivery_and_has_no_history_of_dead_letters() -> None:
    request = read(
        element(headers={"redelivered": True, "x-death": [{}], "x-first-death-queue": "q", "x-last-death-reason": "r"})
    )
    assert request.message.redelivered
    again = retry_message(request, 0, NOW.timestamp())
    assert not again.redelivered
    assert not {name for name in again.headers if name.startswith("x-") or name == "redelivered"}


def test_a_retry_leaves_the_message_it_repeats_alone() -> None:
    request = sent_by_celery()
    before = msgspec.structs.replace(request.message, headers=dict(request.message.headers))
    retry_message(request, 5, NOW.timestamp())
    assert request.message == before


@pytest.mark.parametrize("name", ["v1", "v1_chain"])
def test_a_retry_of_protocol_1_becomes_readable_by_both_protocols(name: str) -> None:
    first = sent_by_celery(name)
    second = read(pack(retry_message(first, 0, NOW.timestamp())))
    assert (second.task, second.id, second.args, second.kwargs) == (first.task, first.id, first.args, first.kwargs)
    assert (second.retries, second.eta, second.expires) == (1, None, first.expires)
    assert second.embed == first.embed
    third = read(pack(retry_message(second, 30, NOW.timestamp())))
    assert (third.retries, third.eta) == (2, NOW + timedelta(seconds=30))


@given(retries=st.integers(0, 1000), delay=st.floats(0, 1e6), priority=st.integers(0, 9))
@settings(max_examples=50, deadline=None)
def test_retries_count_up_and_keep_the_priority(retries: int, delay: float, priority: int) -> None:
    request = read(element(headers={"retries": retries}, properties={"priority": priority}))
    again = read(pack(retry_message(request, delay, NOW.timestamp())))
    assert again.retries == retries + 1
    assert again.message.priority == request.message.priority == 9 - priority
    assert again.args == request.args


# --- success at a glance ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("document", "success"),
    [
        (b'{"status": "SUCCESS", "result": 5}', True),
        (b'{"status":"SUCCESS","result":5}', True),
        (b'{"status": "SUCCESSFUL"}', False),
        (b'{"status": "FAILURE", "result": "\\"status\\": \\"SUCCESS\\""}', False),
        (b'{"result": {"status": "SUCCESS"}, "status": "FAILURE"}', False),
        (b"", False),
    ],
)
def test_success_is_seen_at_the_start_of_a_document(document: bytes, success: bool) -> None:
    assert is_success(document) is success


@pytest.mark.parametrize("more", [0, 9, 10, 20])
def test_success_is_seen_in_msgpack_however_many_keys_there_are(more: int) -> None:
    stamps = {f"stamp{number}": "x" for number in range(more)}
    found = {"status": "SUCCESS", "result": 1, "traceback": None, "children": [], "date_done": None, "task_id": "1"}
    assert is_success(msgspec.msgpack.encode({**found, **stamps}))
    assert not is_success(msgspec.msgpack.encode({**found, **stamps, "status": "FAILURE"}))


# --- damaged at random -----------------------------------------------------------------------------------------

FUZZED = Serializer(["json", "yaml", "msgpack"])  # a damaged pickle could do anything


def survives(raw: bytes) -> None:
    """What the bytes hold may be refused in two ways and in no other."""
    message = unpack(raw, "celery", Limits())
    if isinstance(message, Unreadable):
        assert message.raw == raw
        return
    try:
        request = decode(message, FUZZED)
    except BadMessage:
        return
    assert request.id
    assert request.task
    assert isinstance(request.args, list)
    assert request.retries >= 0
    assert all(limit is None or math.isfinite(limit) for limit in (request.time_limit, request.soft_time_limit))


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes]) -> bytes:
    """Bytes with a few places overwritten, cut out, put in or repeated."""
    data = bytearray(draw(whole))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 20)))
        data[start:end] = draw(st.binary(max_size=8) | st.just(bytes(data[start:end]) * 2) | st.sampled_from(TROUBLE))
    return bytes(data)


TROUBLE = [
    b"null",
    b"{}",
    b"[]",
    b'""',
    b"-1",
    b"1e999",
    b"NaN",
    b"\\ud800",
    b"\\u0000",
    b"9" * 30,
    b'{"__type__"',
    b"\xff",
]


@given(damaged(st.sampled_from(corpus())))
@settings(max_examples=150, deadline=None)
def test_a_damaged_element_is_refused_or_read_and_nothing_else(raw: bytes) -> None:
    survives(raw)


def bodies() -> list[tuple[bytes, str]]:
    found = []
    for captured in task_messages():
        kind = captured.envelope["content-type"]
        if kind != "application/x-python-serialize":
            found.append((base64.b64decode(captured.envelope["body"]), kind))
    return found


@given(st.sampled_from(bodies()).flatmap(lambda pair: st.tuples(damaged(st.just(pair[0])), st.just(pair[1]))))
@settings(max_examples=100, deadline=None)
def test_a_damaged_body_is_refused_or_read_and_nothing_else(body: tuple[bytes, str]) -> None:
    survives(element(body[0], content_type=body[1]))


#: What a field may hold that it should not.
ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 255, 2**64, -(10**30), 10**4000, 0.5, 1e308, float("nan"), float("inf"), "", "x", "a\nb",
    "\ud800", "\0", "2030-01-01", "9999-12-31T23:59:59-23:00", "application/json", "application/x-yaml", "gzip",
    "base64", "utf-16", "punycode", "x" * 300, {"__type__": "uuid", "__value__": {}},
]  # fmt: skip
json_values = st.recursive(
    st.sampled_from(ODD_VALUES),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["task", "args", ""]), inner, max_size=2)
    ),
    max_leaves=5,
)
header_names = st.sampled_from([*sorted(OWN_OF_CELERY), "x", ""])


@given(headers=st.dictionaries(header_names, json_values, max_size=4))
@settings(max_examples=60, deadline=None)
def test_headers_may_hold_anything(headers: dict[str, Any]) -> None:
    survives(element(headers=headers))


@given(body=json_values | st.tuples(json_values, json_values, json_values), whole=st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_body_may_be_anything(body: Any, whole: bool) -> None:
    survives(element(body, headers={} if whole else ABSENT))


@given(
    body=st.fixed_dictionaries(
        {},
        optional={name: json_values for name in (*OWN_OF_CELERY, "args", "kwargs", "chord", "chain", "taskset", "utc")},
    )
)
@settings(max_examples=60, deadline=None)
def test_a_body_of_protocol_1_may_hold_anything(body: dict[str, Any]) -> None:
    survives(element({"task": "t", "id": "1", **body}, headers=ABSENT))


@given(
    top=st.dictionaries(st.sampled_from(["content_type", "content_encoding", "headers", "body"]), json_values),
    properties=st.dictionaries(
        st.sampled_from(["priority", "body_encoding", "delivery_info", "delivery_tag", "expiration"]), json_values
    ),
)
@settings(max_examples=60, deadline=None)
def test_the_envelope_may_hold_anything(top: dict[str, Any], properties: dict[str, Any]) -> None:
    found = json.loads(element(properties=properties))
    survives(json.dumps({**found, **{name.replace("_", "-"): value for name, value in top.items()}}).encode())
