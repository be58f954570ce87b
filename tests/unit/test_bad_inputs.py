"""What anybody who can write to a queue may put there: each has a known end, a reason, and costs little.

Every element goes the whole way from the bytes to the request. `elements.refusal` fails on any other error than
BadMessage, on reasons that repeat a message at length, and on more than a second of work.
"""

import base64
import bz2
import json
import lzma
import os
import pickle
import random
import zlib
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import msgpack  # type: ignore[import-untyped]
import pytest

from aqueue.broker.redis.envelope import pack
from aqueue.protocol import retry_message
from aqueue.saferepr import printable
from aqueue.serialization import Limits, Serializer
from tests.unit.elements import ABSENT, element, message_of, nested, quickly, read, reason, refusal
from tests.unit.vectors import task

ALL = Serializer(["json", "yaml", "msgpack", "pickle"])
SIMPLE = task("simple").raw


def named(cases: dict[str, Any]) -> Any:
    """Parameters with their own names."""
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), id=name) for name, case in cases.items()]


# --- bytes that are no message ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raw",
    named(
        {
            "a word": b"not json",
            "random bytes": random.Random(1).randbytes(500),
            "nothing": b"",
            "null": b"null",
            "a list": b"[]",
            "a string": b'"x"',
            "a number": b"42",
            "a long number": b"9" * 5000,
            "an empty object": b"{}",
            "a body that is no string": b'{"body": [1]}',
            "headers that are a list": element(headers=[1]),
            "properties that are a list": json.dumps({**json.loads(element()), "properties": []}).encode(),
            "cut in the middle": SIMPLE[: len(SIMPLE) // 2],
            "cut at the end": SIMPLE[:-1],
            "more behind the end": SIMPLE + b"}",
            "two of them": SIMPLE + SIMPLE,
            "utf-16": SIMPLE.decode().encode("utf-16"),
            "a byte order mark": b"\xef\xbb\xbf" + SIMPLE,
            "a pickle": pickle.dumps({"body": "x"}),
            "bytes that are no utf-8 in a value": SIMPLE.replace(b"proj.tasks.add", b"\xff\xfe"),
            "bytes that are no utf-8 in a key": SIMPLE.replace(b'"shadow"', b'"\xc3\x28"'),
            "half a surrogate pair as bytes": SIMPLE.replace(b"proj.tasks.add", b"\xed\xa0\x80"),
        }
    ),
)
def test_bytes_that_are_no_message_are_undecodable(raw: bytes) -> None:
    found = reason(raw)
    assert found in ("undecodable", "number_too_large")


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_are_undecodable(seed: int) -> None:
    assert reason(random.Random(seed).randbytes(seed * 17)) == "undecodable"


@pytest.mark.parametrize(
    "raw",
    named(
        {
            "no base64": element("&&&"),
            "base64 with a line break": element("W1tdLCB7fSwg\ne31d"),
            "base64 of an odd length": element("W1tdLCB7fSwge31"),
            "letters beyond ascii": element("é" * 16),
            "an unknown body encoding": element(properties={"body_encoding": "hex"}),
            "a body encoding that is no string": element(properties={"body_encoding": 64}),
            "an unknown content encoding": element(content_encoding="klingon"),
            "a content encoding for no text": element(content_encoding="zlib"),
            "a content encoding with a null character": element(content_encoding="utf\0008"),
            "a content encoding that is a list": element(content_encoding=["utf-8"]),
            "a content encoding of 60,000 letters": element(content_encoding="x" * 60_000),
            "not of the encoding it declares": element(b"\xff\xfe\xff", content_encoding="utf-16"),
        }
    ),
)
def test_a_body_that_is_not_encoded_as_it_says_is_refused(raw: bytes) -> None:
    assert reason(raw) == "bad_encoding"


@pytest.mark.parametrize(
    "body",
    named(
        {
            "latin-1": b'[["\xe9"], {}, {}]',
            "utf-16": '[["é"], {}, {}]'.encode("utf-16"),
            "utf-32": '[["é"], {}, {}]'.encode("utf-32"),
            "a byte order mark": b'\xef\xbb\xbf[["e"], {}, {}]',
            "a surrogate as bytes": b'[["\xed\xa0\x80"], {}, {}]',
            "a byte that is no utf-8 beside an extended type": b'[[{"__type__": "date", "__value__": "\xff"}], {}, {}]',
        }
    ),
)
def test_a_body_in_another_encoding_than_declared_is_refused(body: bytes) -> None:
    assert reason(element(body)) in ("undecodable", "bad_encoding")


@pytest.mark.parametrize("encoding", ["utf-8", "UTF-8", "utf-16", "utf-32", "utf-8-sig", "latin-1", "cp1252"])
def test_a_body_in_the_encoding_that_it_declares_is_read(encoding: str) -> None:
    assert read(element('[["é"], {}, {}]'.encode(encoding), content_encoding=encoding)).args == ["é"]


@pytest.mark.parametrize("encoding", [ABSENT, None, "", "binary"])
def test_a_body_that_declares_no_encoding_is_utf_8(encoding: Any) -> None:
    assert read(element('[["é"], {}, {}]'.encode(), content_encoding=encoding)).args == ["é"]


@pytest.mark.parametrize("encoding", ["punycode", "idna", "unicode_escape", "raw_unicode_escape", "utf-7"])
def test_no_declared_encoding_costs_much_time(encoding: str) -> None:
    with quickly(0.25):
        reason(element(b"a" * 30_000 + b"-" + b"b" * 70_000, content_encoding=encoding))


@pytest.mark.parametrize(
    "encoding", ["unicode_escape", "raw_unicode_escape", "rot13", "hex", "mbcs", "undefined", "idna"]
)
def test_no_declared_encoding_causes_another_error(encoding: str) -> None:
    reason(element(b'[["\\d \\N{x} \\u12"], {}, {}]', content_encoding=encoding))


# --- content that is not accepted ------------------------------------------------------------------------


class _Trace:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._folder),)


def test_a_pickle_is_refused_and_never_loaded(tmp_path: Path) -> None:
    trace = tmp_path / "loaded"
    raw = element(pickle.dumps(([_Trace(trace)], {}, {})), content_type="application/x-python-serialize")
    assert reason(raw) == "content_refused"
    assert not trace.exists()
    assert reason(raw, ALL) is None
    assert trace.exists(), "loading it would have been seen"


@pytest.mark.parametrize(
    "content_type",
    [
        "application/x-yaml",
        "application/x-msgpack",
        "application/data",
        "text/plain",
        "application/JSON",
        "",
        "json",
        "x" * 60_000,
        ABSENT,
        None,
        5,
        10**4000,
        ["application/json"],
        {"a": 1},
    ],
    ids=lambda value: str(value)[:20],
)
def test_another_content_type_is_refused(content_type: Any) -> None:
    assert reason(element(content_type=content_type)) == "content_refused"


def test_a_content_type_of_a_megabyte_is_refused() -> None:
    assert reason(element(content_type="x" * 1_000_000)) == "headers_too_large"


@pytest.mark.parametrize("value", ["pickled", [1, 2], None])
def test_a_pickle_that_says_it_is_json_is_undecodable(value: Any) -> None:
    assert reason(element(pickle.dumps(([value], {}, {}))), ALL) == "undecodable"


# --- names and ids -----------------------------------------------------------------------------------------

TEXTS = {
    "empty": "",
    "10,000 letters": "x" * 10_000,
    "256 letters": "x" * 256,
    "a line break": "a\nb",
    "a terminal's escape": "\x1b[31mred",
    "a null character": "a\0b",
    "half a surrogate pair": "\ud800",
    "a separator": "a\u2028b",
    "a number": 5,
    "a list": ["t"],
    "an object": {"t": 1},
    "true": True,
    "null": None,
}


@pytest.mark.parametrize("name", named(TEXTS))
def test_a_bad_task_name_is_refused(name: Any) -> None:
    assert reason(element(headers={"task": name})) == "bad_name"
    assert reason(element({"task": name, "id": "1", "args": []}, headers=ABSENT)) == "bad_name"


@pytest.mark.parametrize("id", [*named(TEXTS), pytest.param(ABSENT, id="absent")])
def test_a_bad_task_id_is_refused(id: Any) -> None:
    assert reason(element(headers={"id": id})) == "bad_id"
    body = {"task": "t", "args": []} if id is ABSENT else {"task": "t", "id": id, "args": []}
    assert reason(element(body, headers=ABSENT)) == "bad_id"


def test_an_id_of_a_megabyte_is_refused() -> None:
    assert reason(element(headers={"id": "x" * 1_000_000})) == "headers_too_large"


@pytest.mark.parametrize("text", ["<script>", "../../etc/passwd", "a:b", "*", "x" * 255, "имя"])
def test_a_printable_name_or_id_is_taken_as_it_is(text: str) -> None:
    request = read(element(headers={"task": text, "id": text}))
    assert (request.task, request.id) == (text, text)


# --- bodies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    named(
        {
            "nothing": [],
            "one item": [[]],
            "two items": [[2, 3], {}],
            "four items": [[2, 3], {}, {}, {}],
            "a string": "x",
            "a number": 5,
            "null": b"null",
            "an object": {"hello": 1},
            "args a string": ["ab", {}, {}],
            "args a number": [5, {}, {}],
            "args null": [None, {}, {}],
            "kwargs a list": [[], [1], {}],
            "kwargs a string": [[], "x", {}],
            "kwargs null": [[], None, {}],
            "embed a list": [[], {}, [1]],
            "embed a string": [[], {}, "x"],
        }
    ),
)
def test_a_body_that_is_not_args_kwargs_embed_is_refused(body: Any) -> None:
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert reason(element(body)) == "bad_body"


@pytest.mark.parametrize("body", [b"[]", b"{}", b"null", b"5", b'{"task": 5, "id": "1"}', b'{"id": "1"}'])
def test_a_body_without_headers_that_is_no_task_is_refused(body: bytes) -> None:
    assert reason(element(body, headers=ABSENT)) in ("bad_body", "bad_name")


@pytest.mark.parametrize("kwargs", [[1], "x", 5])
def test_kwargs_of_protocol_1_are_an_object(kwargs: Any) -> None:
    assert reason(element({"task": "t", "id": "1", "args": [], "kwargs": kwargs}, headers=ABSENT)) == "bad_body"


# --- headers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("retries", "a"),
        ("retries", "-1"),
        ("retries", 1.5),
        ("retries", True),
        ("retries", [1]),
        ("retries", "9" * 7),
        ("retries", 10**9),
        ("retries", 10**30),
        ("timelimit", {}),
        ("timelimit", 30),
        ("timelimit", "30"),
        ("timelimit", [30]),
        ("timelimit", [30, 20, 10]),
        ("timelimit", ["30", None]),
        ("timelimit", [True, None]),
        ("timelimit", [-1, None]),
        ("timelimit", [float("nan"), None]),
        ("timelimit", [None, float("inf")]),
        ("timelimit", [10**400, None]),
        ("root_id", 5),
        ("parent_id", ["p"]),
        ("group", {}),
        ("group_index", "first"),
        ("ignore_result", "yes"),
        ("shadow", 5),
        ("compression", 5),
        ("compression", ["gzip"]),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_header_of_the_wrong_type_is_refused_by_its_name(header: str, value: Any) -> None:
    error = refusal(element(headers={header: value}))
    assert error is not None
    assert error.reason == "bad_header"
    assert header in error.detail


HEADERS_READ = [
    "retries", "timelimit", "root_id", "parent_id", "group", "group_index", "ignore_result", "shadow", "eta", "expires",
    "compression", "id", "task",
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS_READ)
@pytest.mark.parametrize("value", ["\ud800", ["\ud800"], {"\ud800": 1}, {"a": "\ud800"}], ids=ascii)
def test_half_a_surrogate_pair_in_any_header_is_refused_or_read(header: str, value: Any) -> None:
    assert reason(element(headers={header: value})) in (None, *REASONS)
    assert reason(element({"task": "t", "id": "1", "args": [], header: value}, headers=ABSENT)) in (None, *REASONS)


REASONS = ("bad_header", "bad_eta", "bad_expires", "bad_id", "bad_name", "bad_compression")


@pytest.mark.parametrize("part", ["body", "headers", "properties", "content-type", "content-encoding"])
@pytest.mark.parametrize("value", ["\ud800", ["\ud800"], {"\ud800": "\ud800"}], ids=ascii)
def test_half_a_surrogate_pair_in_any_part_of_the_envelope_is_refused_or_read(part: str, value: Any) -> None:
    found = reason(json.dumps({**json.loads(element()), part: value}).encode())
    assert found in (None, "undecodable", "bad_encoding", "content_refused", "bad_name", "bad_body")


@pytest.mark.parametrize("part", ["callbacks", "errbacks", "chain", "chord", "args", "kwargs", "taskset", "group"])
@pytest.mark.parametrize("value", ["\ud800", ["\ud800"], {"\ud800": 1}], ids=ascii)
def test_half_a_surrogate_pair_in_any_part_of_a_body_is_refused_or_read(part: str, value: Any) -> None:
    assert reason(element([[], {}, {part: value}])) in (None, "bad_canvas")
    assert reason(element({"task": "t", "id": "1", part: value}, headers=ABSENT)) in (
        None, "bad_body", "bad_canvas", "bad_header",
    )  # fmt: skip


@pytest.mark.parametrize(
    "value",
    [
        "soon",
        "",
        "2030-13-01T00:00:00",
        "2030-02-30T00:00:00",
        "2030-01-01T00:00:00+25:00",
        "9999-12-31T23:59:59-23:00",
        "0001-01-01T00:00:00+23:00",
        "2030-01-01T00:00:00" + "0" * 10_000,
        "\ud800",
        1_700_000_000,
        1.5,
        float("nan"),
        True,
        ["2030-01-01"],
        {"year": 2030},
    ],
    ids=lambda value: str(value)[:30].encode("ascii", "replace").decode(),
)
@pytest.mark.parametrize("header", ["eta", "expires"])
def test_a_time_that_is_none_is_refused(header: str, value: Any) -> None:
    assert reason(element(headers={header: value})) == f"bad_{header}"


@pytest.mark.parametrize(
    "text", ["9999-12-31T23:59:59+00:00", "0001-01-01T00:00:00+00:00", "9999-12-31T23:59:59.999999"]
)
def test_the_first_and_the_last_times_are_read(text: str) -> None:
    eta = read(element(headers={"eta": text})).eta
    assert eta is not None
    assert isinstance(eta.timestamp(), float)


@pytest.mark.parametrize(("priority", "read_as"), [(-1, 9), (0, 9), (5, 4), (9, 0), (10, 0), (255, 0), (10**30, 0)])
def test_a_priority_out_of_range_is_the_nearest(priority: int, read_as: int) -> None:
    assert read(element(properties={"priority": priority})).message.priority == read_as


@pytest.mark.parametrize("priority", ["high", "5", 1.5, True, [5], {}])
def test_a_priority_that_is_no_number_is_refused(priority: Any) -> None:
    error = refusal(element(properties={"priority": priority}))
    assert error is not None
    assert error.reason == "bad_header"
    assert "priority" in error.detail


@pytest.mark.parametrize("header", ["shadow", "origin", "argsrepr", "kwargsrepr"])
def test_what_people_are_shown_may_hold_anything_and_is_printed_on_one_line(header: str) -> None:
    text = "one\ntwo\r\x1b[31m\0\u2028\ud800" + "x" * 10_000
    message = read(element(headers={header: text})).message
    shown = printable(message.headers[header])
    assert message.headers[header] == text
    assert shown.isprintable()
    assert len(shown) <= 200


def test_stamps_named_like_headers_replace_none() -> None:
    stamps = {"task": "evil", "id": "evil", "retries": 99, "ignore_result": True}
    request = read(element(headers={"stamped_headers": list(stamps), "stamps": stamps}))
    assert (request.task, request.id, request.retries, request.ignore_result) == ("proj.tasks.add", "1", 0, None)


@pytest.mark.parametrize("embed", [{"callbacks": 5}, {"errbacks": "x"}, {"chain": {}, "chord": []}, {"chord": [1]}])
def test_what_follows_has_the_shape_of_signatures(embed: Any) -> None:
    if any(embed.values()):
        assert reason(element([[], {}, embed])) == "bad_canvas"


# --- sizes ---------------------------------------------------------------------------------------------------


def test_ten_thousand_headers_are_too_many() -> None:
    assert reason(element(headers={f"header{number}": number for number in range(10_000)})) == "headers_too_large"


def test_a_header_of_many_megabytes_is_too_large() -> None:
    assert reason(element(headers={"x": "y" * 5_000_000})) in ("headers_too_large", "too_large")


def test_properties_count_as_headers_do() -> None:
    assert reason(element(properties={"x": "y" * 70_000})) == "headers_too_large"


@pytest.mark.parametrize("part", ["headers", "properties"])
@pytest.mark.parametrize("depth", [201, 5_000, 30_000])
def test_headers_nested_without_end_are_refused(part: str, depth: int) -> None:
    raw = element(**{part: {"x": "HERE"}}).replace(b'"HERE"', b"[" * depth + b"]" * depth)
    assert reason(raw) in ("too_deep", "headers_too_large")


def test_a_message_over_the_limit_is_too_large() -> None:
    limits = Limits(message=1000)
    assert reason(element([["x" * 980], {}, {}]), limits=limits) is None
    assert reason(element([["x" * 1000], {}, {}]), limits=limits) == "too_large"
    assert reason(element([["x" * 100_000], {}, {}]), limits=limits) == "too_large"


def test_a_body_of_almost_the_limit_is_read() -> None:
    assert read(element([["x" * 1_000_000], {}, {}])).args == ["x" * 1_000_000]


# --- depth ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":'])
def test_json_nested_without_end_is_too_deep(opening: bytes) -> None:
    assert reason(element(opening * 100_000)) == "too_deep"


def test_json_is_read_to_the_limit_of_depth_and_not_beyond() -> None:
    value = nested(198)
    assert read(element([[value], {}, {}])).args == [value]
    assert reason(element([[nested(199)], {}, {}])) == "too_deep"


def test_brackets_inside_texts_are_not_depth() -> None:
    text = '[{"\\' * 1000
    assert read(element([[text, "\\"], {}, {}])).args == [text, "\\"]


@pytest.mark.parametrize(
    "tail",
    named(
        {
            "escaped quotes without an end": b'"' + b'\\"' * 10_000,
            "backslashes without an end": b'"' + b"\\" * 20_001,
            "quotes without an end": b'"' * 20_001,
            "letters without an end": b'"' + b"x" * 20_000,
        }
    ),
)
def test_a_text_without_an_end_costs_no_more_than_another(tail: bytes) -> None:
    with quickly(0.25):
        assert reason(element(b"[" + b"[]," * 201 + tail)) == "undecodable"


def test_depth_hidden_in_extended_types_is_seen() -> None:
    body = b'[[{"__type__": "x", "__value__": ' + b"[" * 300 + b"]" * 300 + b"}], {}, {}]"
    assert reason(element(body)) == "too_deep"


def test_msgpack_nested_without_end_is_refused() -> None:
    for depth in (300, 5_000, 100_000):
        body = b"\x93" + b"\x91" * depth + b"\x01\x80\x80"
        assert reason(element(body, content_type="application/x-msgpack"), ALL) in ("too_deep", "undecodable")


@pytest.mark.parametrize(
    "head", [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff"]
)
def test_msgpack_that_claims_more_than_it_holds_is_refused(head: bytes) -> None:
    assert reason(element(head + b"\x01", content_type="application/x-msgpack"), ALL) == "undecodable"


@pytest.mark.parametrize(
    "body", [b"[" * 3_000, b"[" * 300 + b"]" * 300, b"- " * 3_000, b"? " * 1_000, b"{a: " * 3_000, b"&a [*a]"]
)
def test_yaml_nested_without_end_is_refused(body: bytes) -> None:
    assert reason(element(body, content_type="application/x-yaml"), ALL) in ("too_deep", "undecodable")


# --- numbers ---------------------------------------------------------------------------------------------------


def test_not_a_number_and_infinity_are_read_as_celery_reads_them() -> None:
    args = read(element(b"[[NaN, Infinity, -Infinity, 1e400], {}, {}]")).args
    assert args[0] != args[0]
    assert args[1:] == [float("inf"), float("-inf"), float("inf")]


@pytest.mark.parametrize("digits", [4_301, 5_000, 500_000])
def test_a_number_of_very_many_digits_is_too_large(digits: int) -> None:
    assert reason(element(b"[[" + b"7" * digits + b"], {}, {}]")) == "number_too_large"


@pytest.mark.parametrize("number", [2**53 + 1, 2**63, 2**64 - 1, 2**64, 2**64 + 1, -(2**63) - 1, 10**40, 10**4000])
def test_a_large_number_stays_exact(number: int) -> None:
    assert read(element([[number], {}, {}])).args == [number]
    assert type(read(element([[number], {}, {}])).args[0]) is int


@pytest.mark.parametrize(
    "body",
    [
        b"0x" + b"f" * 5_000,
        b"[[0x" + b"f" * 5_000 + b"], {}, {}, {}]",
        b"[0x" + b"f" * 5_000 + b", {}, {}]",
        b"{task: t, id: '1', args: [], retries: 0x" + b"f" * 5_000 + b"}",
        b"{task: t, id: 0x" + b"f" * 5_000 + b", args: []}",
        b"{task: t, id: '1', args: [], timelimit: [0x" + b"f" * 5_000 + b", null]}",
    ],
    ids=["the body", "an argument too many", "args", "retries", "id", "timelimit"],
)
def test_a_number_too_long_to_be_shown_is_refused_like_any_other(body: bytes) -> None:
    with_headers = element(body, content_type="application/x-yaml")
    without = element(body, content_type="application/x-yaml", headers=ABSENT)
    assert reason(with_headers if body.startswith((b"0", b"[")) else without, ALL) is not None


# --- JSON's own oddities ---------------------------------------------------------------------------------------


def test_of_two_equal_keys_the_last_counts() -> None:
    assert read(element(b'[[], {"a": 1, "a": 2}, {}]')).kwargs == {"a": 2}


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\x00", "a\x00b", "\u2028", "\ufffe"])
def test_every_character_passes(text: str) -> None:
    assert read(element([[text], {text: text}, {}])).args == [text]


@pytest.mark.parametrize("text", ["\ud800", "\x00", "\u2028"])
def test_every_character_in_a_header_can_be_sent_again(text: str) -> None:
    request = read(element(headers={"x": text, "y": [{"z": text}]}))
    again = message_of(pack(retry_message(request, 0, 0)))
    assert (again.headers["x"], again.headers["y"]) == (text, [{"z": text}])


@pytest.mark.parametrize("text", ["\ud800", "\x00", "\u2028", "", " "])
def test_every_character_in_the_name_of_a_header_is_refused_or_can_be_sent_again(text: str) -> None:
    raw = element(headers={text: 1})
    if reason(raw) != "bad_header":
        again = message_of(pack(retry_message(read(raw), 0, 0)))
        assert again.headers[text] == 1


def test_not_a_number_in_a_header_is_nothing_when_it_is_sent_again() -> None:
    """JSON has no such number; Celery's writers make it all the same, and strict readers would refuse our message."""
    again = message_of(pack(retry_message(read(element(headers={"x": float("nan")})), 0, 0)))
    assert again.headers["x"] is None


@pytest.mark.parametrize("number", [2**64, -(10**30), 1e300])
def test_every_number_in_a_header_can_be_sent_again(number: float) -> None:
    request = read(element(headers={"x": number}))
    again = message_of(pack(retry_message(request, 0, 0)))
    assert repr(again.headers["x"]) == repr(number)


# --- extended types --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        {"__type__": "nope", "__value__": 1},
        {"__type__": "x"},
        {"__value__": 1},
        {"__type__": "uuid", "__value__": {"hex": "0" * 32}, "more": 1},
        {"__type__": ["uuid"], "__value__": 1},
        {"__type__": None, "__value__": 1},
        {"__type__": "os.system", "__value__": "true"},
    ],
    ids=str,
)
def test_an_object_of_the_user_that_looks_extended_stays_an_object(value: Any) -> None:
    assert read(element([[value], {"k": value}, {}])).args == [value]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("uuid", {"int": 5}),
        ("uuid", {"hex": "0" * 32, "version": 4}),
        ("uuid", {"bytes": "0" * 16}),
        ("uuid", {"hex": 5}),
        ("uuid", {"hex": "zz"}),
        ("uuid", "0" * 32),
        ("uuid", {}),
        ("datetime", "soon"),
        ("datetime", 5),
        ("datetime", None),
        ("datetime", [2030, 1, 1]),
        ("date", "2030-02-30"),
        ("time", "25:00"),
        ("time", "a" * 10_000),
        ("decimal", "ten"),
        ("decimal", 1.5),
        ("decimal", [0, [1], 0]),
        ("decimal", "1E+99999999999999999999"),
        ("bytes", 5),
        ("bytes", "\ud800"),
        ("base64", "&"),
        ("base64", "é"),
        ("base64", 5),
    ],
    ids=lambda value: str(value)[:20].encode("ascii", "replace").decode(),
)
def test_a_bad_extended_value_is_undecodable(name: str, value: Any) -> None:
    assert reason(element([[{"__type__": name, "__value__": value}], {}, {}])) == "undecodable"


@pytest.mark.parametrize("text", ["1E+1000000", "1E-1000000", "0E+1000000", "1" * 7_000, "9.9E+6145"])
def test_a_decimal_of_an_endless_exponent_is_too_large(text: str) -> None:
    assert reason(element([[{"__type__": "decimal", "__value__": text}], {}, {}])) == "number_too_large"


@pytest.mark.parametrize("text", ["1E+6144", "1E-6144", "0", "-1.10", "NaN", "Infinity"])
def test_other_decimals_are_read(text: str) -> None:
    (found,) = read(element([[{"__type__": "decimal", "__value__": text}], {}, {}])).args
    assert type(found) is Decimal
    assert str(found) == text


def test_a_type_spelled_with_escapes_is_still_seen() -> None:
    plain = {"__type__": "uuid", "__value__": {"hex": f"{1:032x}"}}
    for spelled in (r"\u005f_type__", r"__typ\u0065__", r"__\u0074ype_\u005F"):
        body = json.dumps([[plain], {}, {}]).replace("__type__", spelled).encode()
        assert read(element(body)).args == [UUID(int=1)]


# --- yaml --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        b"!!python/object/apply:os.system ['true']",
        b"!!python/name:os.system",
        b'!!int ""',
        b'!!int "x"',
        b'!!float ""',
        b'!!bool "x"',
        b'!!timestamp "x"',
        b"!!binary \xc3\xa9",
        b"!!timestamp 2030-02-30",
        b"!!omap [1]",
        b"!!set [1]",
        b"!unknown x",
        b"? {a: 1}\n: b",
        b"a: b: c",
        b"\x00",
        b"%YAML 9.9\n--- x",
        b"--- a\n--- b",
        b"1" * 5_000,
        b"&a [*a, *a]",
    ],
)
def test_bad_yaml_is_refused(body: bytes) -> None:
    assert reason(element(b"- [" + body + b"]\n- {}\n- {}", content_type="application/x-yaml"), ALL) is not None
    assert reason(element(body, content_type="application/x-yaml"), ALL) is not None


# --- compression ---------------------------------------------------------------------------------------------------

BODY = b"[[2, 3], {}, {}]"
ZEROS = b"\0" * 4_000_000
SMALL = Serializer(limits=Limits(decompressed=1_000_000))


@pytest.mark.parametrize(
    ("compression", "body"),
    named(
        {
            "zlib": ("application/x-gzip", zlib.compress(ZEROS)),
            "bzip2": ("application/x-bz2", bz2.compress(ZEROS)),
            "lzma": ("application/x-lzma", lzma.compress(ZEROS, preset=0)),
            "by a short name": ("gzip", zlib.compress(ZEROS)),
        }
    ),
)
def test_a_little_that_stands_for_much_is_too_large(compression: str, body: bytes) -> None:
    assert reason(element(body, headers={"compression": compression}), SMALL) == "too_large"


def test_only_one_layer_of_compression_is_taken_off() -> None:
    twice = zlib.compress(zlib.compress(BODY))
    assert reason(element(twice, headers={"compression": "gzip"})) in ("undecodable", "bad_encoding")


@pytest.mark.parametrize(
    ("compression", "body"),
    named(
        {
            "unknown": ("application/x-squeeze", BODY),
            "empty": ("", BODY),
            "two at once": ("gzip, bzip2", zlib.compress(BODY)),
            "a name of 10,000 letters": ("x" * 10_000, BODY),
            "not compressed": ("gzip", BODY),
            "a gzip file instead of a zlib stream": ("gzip", zlib.compress(BODY, wbits=31)),
            "cut": ("gzip", zlib.compress(BODY)[:-2]),
            "more behind the end": ("bzip2", bz2.compress(BODY) + b"x"),
            "two streams": ("lzma", lzma.compress(BODY) * 2),
            "nothing": ("gzip", b""),
            "damaged": ("gzip", zlib.compress(BODY)[:-4] + b"\0\0\0\0"),
        }
    ),
)
def test_a_body_that_is_not_compressed_as_it_says_is_refused(compression: str, body: bytes) -> None:
    assert reason(element(body, headers={"compression": compression})) == "bad_compression"


# --- what a refusal says -------------------------------------------------------------------------------------------


def test_a_refused_message_keeps_its_reason_and_its_detail_apart() -> None:
    error = refusal(element(headers={"eta": "soon"}))
    assert error is not None
    assert str(error) == f"{error.reason}: {error.detail}"


def test_kwargs_whose_keys_are_no_texts_are_left_to_the_task() -> None:
    """The call fails, as it does in a Celery worker; the message is not bad."""
    raw_kwargs: Any = {b"key": 1}
    body = msgpack.packb([[], raw_kwargs, {}])
    assert read(element(body, content_type="application/x-msgpack"), ALL).kwargs == raw_kwargs


def test_the_time_is_read_whatever_the_clock_says() -> None:
    request = read(element(headers={"eta": "1969-12-31T23:59:59Z"}))
    assert request.eta == datetime(1969, 12, 31, 23, 59, 59, tzinfo=timezone.utc)


def test_the_body_is_kept_as_it_came() -> None:
    body = b'[[ 2,3 ], {}, {"chain":null}]'
    assert read(element(body)).message.body == body
    assert base64.b64decode(json.loads(pack(message_of(element(body))))["body"]) == body
