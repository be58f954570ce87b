"""Values to bytes and back, in every format, and what each format refuses."""

import ast
import json
import pickle
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
import yaml  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st

from aqueue.errors import BadMessage, ConfigurationError, EncodeError, MessageTooLarge
from aqueue.serialization import (
    JSON,
    MSGPACK,
    PICKLE,
    YAML,
    Limits,
    Serializer,
    check_depth,
    decode_base64,
    dumps_json,
    is_finite_number,
    loads_json,
    text_of,
)
from tests.unit.elements import error_of, nested, quickly
from tests.unit.vectors import task

ALL = Serializer(["json", "yaml", "msgpack", "pickle"])
FORMATS = ["json", "yaml", "msgpack", "pickle"]
INDIA = timezone(timedelta(hours=5, minutes=30))


def there_and_back(value: Any, serializer: str) -> Any:
    encoded = ALL.dumps(value, serializer)
    return ALL.loads(encoded.data, encoded.content_type, encoded.content_encoding)


def refused(data: bytes, content_type: str, content_encoding: str | None = "utf-8") -> str:
    with pytest.raises(BadMessage) as caught:
        ALL.loads(data, content_type, content_encoding)
    return caught.value.reason


# --- all formats -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("serializer", "vector"), [("json", "simple"), ("yaml", "yaml"), ("msgpack", "msgpack"), ("pickle", "pickle")]
)
def test_a_format_travels_under_the_names_that_celery_gives_it(serializer: str, vector: str) -> None:
    captured = task(vector)
    encoded = ALL.dumps([[2, 3], {}, {}], serializer)
    assert encoded.content_type == captured.envelope["content-type"]
    assert encoded.content_encoding == captured.envelope["content-encoding"]


def test_json_is_written_byte_for_byte_as_celery_writes_it() -> None:
    body = [[2, 3], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    assert dumps_json(body).decode() == _body_text("simple")
    unicode = json.loads(_body_text("unicode"))
    assert dumps_json(unicode).decode() == _body_text("unicode")


def _body_text(vector: str) -> str:
    found: str = decode_base64(task(vector).envelope["body"]).decode()
    return found


@pytest.mark.parametrize("serializer", FORMATS)
@pytest.mark.parametrize(
    "value", [None, True, 0, -1, 2**63 - 1, 1.5, "", "é\u2028\U0001f600", [], {}, [1, [2, {"a": [None]}]]], ids=repr
)
def test_plain_values_come_back_from_every_format(serializer: str, value: Any) -> None:
    found = there_and_back(value, serializer)
    assert found == value
    assert type(found) is type(value)


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=10)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=10,
)


@given(json_values)
@settings(max_examples=80, deadline=None)
def test_any_json_value_comes_back_from_json(value: Any) -> None:
    assert repr(there_and_back(value, "json")) == repr(value)


@given(json_values)
@settings(max_examples=80, deadline=None)
def test_our_json_is_read_alike_by_the_standard_library(value: Any) -> None:
    assert repr(json.loads(dumps_json(value))) == repr(value)


msgpack_values = st.recursive(
    st.none() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | texts | st.binary(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=10,
)


@given(msgpack_values)
@settings(max_examples=60, deadline=None)
def test_any_msgpack_value_comes_back_from_msgpack(value: Any) -> None:
    assert repr(there_and_back(value, "msgpack")) == repr(value)


extended = (
    st.datetimes(timezones=st.none() | st.just(timezone.utc) | st.just(INDIA)).map(
        lambda moment: moment.replace(fold=0)
    )
    | st.dates()
    | st.times().map(lambda moment: moment.replace(fold=0))
    | st.decimals(allow_nan=False, places=3)
    | st.uuids()
    | st.binary(max_size=12)
)


@given(st.lists(extended | json_values, max_size=4))
@settings(max_examples=60, deadline=None)
def test_any_extended_value_comes_back_from_json(values: list[Any]) -> None:
    assert repr(there_and_back(values, "json")) == repr(values)


@pytest.mark.parametrize("serializer", FORMATS)
def test_a_value_that_stands_in_two_places_comes_back(serializer: str) -> None:
    shared: Any = {"when": "now"}
    assert there_and_back([shared, shared], serializer) == [shared, shared]
    moment = datetime(2030, 1, 1, tzinfo=timezone.utc)
    if serializer != "msgpack":
        assert there_and_back([moment, moment], serializer) == [moment, moment]


@pytest.mark.parametrize("serializer", FORMATS)
@pytest.mark.parametrize("depth", [100, 195, 199, 201, 300, 700])
def test_what_can_be_written_can_be_read(serializer: str, depth: int) -> None:
    """Limits are for both directions: what no worker could read is not sent."""
    value = nested(depth)
    try:
        encoded = ALL.dumps(value, serializer)
    except EncodeError:
        assert depth > 190
    else:
        assert ALL.loads(encoded.data, encoded.content_type, encoded.content_encoding) == value


@pytest.mark.parametrize("serializer", FORMATS)
def test_numbers_as_keys_are_refused_or_come_back_somehow(serializer: str) -> None:
    try:
        encoded = ALL.dumps([{1: "a"}], serializer)
    except EncodeError:
        return
    assert ALL.loads(encoded.data, encoded.content_type, encoded.content_encoding) in ([{1: "a"}], [{"1": "a"}])


class Unwritable:
    """Nothing that a format knows, and no class that can be found by name."""

    def __reduce__(self) -> Any:
        raise RuntimeError("not to be pickled")


def unwritable() -> dict[str, Any]:
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    return {
        "an object": Unwritable(),
        "a lambda": lambda: None,
        "a generator": (number for number in (1, 2)),
        "a module": json,
        "a lock": __import__("threading").Lock(),
        "a cycle": cyclic,
        "not a number": float("nan"),
        "infinity": [float("inf")],
        "a number of 5,000 digits": 10**5000,
        "half a surrogate pair": "\ud800",
        "a decimal": Decimal("1.10"),
        "a set": {1},
        "a complex number": 1j,
        "a range": range(3),
        "an ellipsis": ...,
        "keys that are no texts": {(1, 2): 3},
        "a deep list": nested(5_000),
    }


@pytest.mark.parametrize("serializer", FORMATS)
@pytest.mark.parametrize("what", unwritable())
def test_what_a_format_cannot_write_is_an_encode_error_and_no_other(serializer: str, what: str) -> None:
    error = error_of(EncodeError, lambda: ALL.dumps(unwritable()[what], serializer))
    if error is None:
        there_and_back(unwritable()[what], serializer)
    else:
        assert f"can't be written as {serializer}" in str(error)


@pytest.mark.parametrize("value", [{1}, 1j, Unwritable, float("nan"), float("inf"), {(1, 2): 3}, nested(201)], ids=repr)
def test_json_refuses_to_write_what_json_has_no_form_for(value: Any) -> None:
    with pytest.raises(EncodeError):
        ALL.dumps(value, "json")


def test_an_unknown_serializer_is_a_mistake_of_the_settings() -> None:
    with pytest.raises(ConfigurationError, match=r"unknown serializer 'xml'.*json"):
        ALL.dumps(1, "xml")
    with pytest.raises(ConfigurationError, match="xml"):
        Serializer(["xml"])


def test_content_may_be_accepted_by_name_or_by_type() -> None:
    for accepted in ("msgpack", "application/x-msgpack"):
        assert Serializer([accepted]).loads(b"\x05", MSGPACK, "binary") == 5


@pytest.mark.parametrize(
    "content_type", [YAML, MSGPACK, PICKLE, "text/plain", "application/data", "application/text", ""]
)
def test_by_default_json_alone_is_accepted(content_type: str) -> None:
    with pytest.raises(BadMessage) as caught:
        Serializer().loads(b"5", content_type, "utf-8")
    assert caught.value.reason == "content_refused"


def test_json_is_accepted_when_it_is_listed_and_only_then() -> None:
    with pytest.raises(BadMessage):
        Serializer(["msgpack"]).loads(b"5", JSON, "utf-8")


def test_signed_content_needs_somebody_who_verifies() -> None:
    with pytest.raises(ConfigurationError, match="signer"):
        Serializer(["auth"])
    with pytest.raises(ConfigurationError, match="signer"):
        ALL.dumps(1, "auth")


@pytest.mark.parametrize(("size", "fits"), [(99, True), (100, True), (101, False)])
def test_the_limit_of_a_message_is_a_size_that_still_fits(size: int, fits: bool) -> None:
    serializer = Serializer(limits=Limits(message=100))
    if fits:
        serializer.check_size(size, "it")
    else:
        with pytest.raises(MessageTooLarge, match="it is 101 bytes, the limit is 100"):
            serializer.check_size(size, "it")


# --- JSON --------------------------------------------------------------------------------------------------------

MOMENT = datetime(2024, 1, 2, 3, 4, 5, 6)  # noqa: DTZ001


@pytest.mark.parametrize(
    ("value", "name", "written"),
    [
        (MOMENT, "datetime", "2024-01-02T03:04:05.000006"),
        (MOMENT.replace(tzinfo=INDIA), "datetime", "2024-01-02T03:04:05.000006+05:30"),
        (date(2024, 1, 2), "date", "2024-01-02"),
        (time(3, 4, 5), "time", "03:04:05"),
        (Decimal("1.10"), "decimal", "1.10"),
        (UUID(int=1), "uuid", {"hex": "0" * 31 + "1"}),
        (b"utf8", "bytes", "utf8"),
        (b"\xff\xfe", "base64", "//4="),
        (bytearray(b"\xff"), "base64", "/w=="),
    ],
    ids=str,
)
def test_an_extended_type_is_written_in_celerys_envelope(value: Any, name: str, written: Any) -> None:
    assert json.loads(dumps_json(value)) == {"__type__": name, "__value__": written}
    found = loads_json(dumps_json(value), 200)
    assert found == value


def test_the_captured_extended_types_come_out_with_their_types() -> None:
    captured = task("ext_types")
    found = loads_json(decode_base64(captured.envelope["body"]), 200)
    assert repr(found[0]) == repr(captured.args)
    assert found[1] == {"k": {"__type__": "x"}}


def test_a_date_is_also_read_from_a_time() -> None:
    assert loads_json(b'{"__type__": "date", "__value__": "2024-01-02T03:04:05"}', 200) == date(2024, 1, 2)


def test_a_tuple_is_written_as_a_list() -> None:
    assert dumps_json((1, (2,))) == b"[1, [2]]"


def test_what_says_how_it_becomes_json_is_asked() -> None:
    class Signature:
        def __json__(self) -> Any:
            return {"task": "t", "at": date(2024, 1, 2)}

    assert loads_json(dumps_json([Signature()]), 200) == [{"task": "t", "at": date(2024, 1, 2)}]


def test_without_extended_types_they_stay_objects() -> None:
    text = b'{"__type__": "date", "__value__": "2024-01-02"}'
    assert loads_json(text, 200, extended=False) == {"__type__": "date", "__value__": "2024-01-02"}


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[1,]", b"{'a': 1}", b"nul", b"01", b"+1", b"[1] [2]", b'"\xff"', b'"\\ud800', b"\xff"]
)
def test_text_that_is_no_json_is_undecodable(text: bytes) -> None:
    for data in (text, b'["__type__", ' + text + b"]"):
        with pytest.raises(BadMessage) as caught:
            loads_json(data, 200)
        assert caught.value.reason == "undecodable"


@pytest.mark.parametrize(
    "number", ["0", "-0.0", "1e3", "1E-3", "123456789.123456789", "5e-324", "1.7976931348623157e308"]
)
def test_numbers_are_read_alike_with_and_without_an_extended_type_beside_them(number: str) -> None:
    fast = loads_json(f"[{number}]".encode(), 200)
    careful = loads_json(f'[{number}, {{"__type__": "bytes", "__value__": ""}}]'.encode(), 200)
    assert repr(fast[0]) == repr(careful[0]) == repr(ast.literal_eval(number))


@pytest.mark.parametrize(
    ("text", "limit", "fits"),
    [
        (b"1", 0, True),
        (b"[]", 0, False),
        (b"[]", 1, True),
        (b"[[]]", 1, False),
        (b"[[],[],[]]", 2, True),
        (b'[{"a":[]}]', 2, False),
        (b'["[[[["]', 1, True),
        (b'["\\"[[["]', 1, True),
        (b'["\\\\",[]]', 1, False),
        (b'["\\\\\\"[["]', 1, True),
        (b"]]][[", 2, True),
    ],
)
def test_depth_is_counted_outside_of_texts(text: bytes, limit: int, fits: bool) -> None:
    if fits:
        check_depth(text, limit)
    else:
        with pytest.raises(BadMessage) as caught:
            check_depth(text, limit)
        assert caught.value.reason == "too_deep"


@given(st.recursive(st.integers() | texts | st.just('[{"\\'), lambda inner: st.lists(inner, max_size=3), max_leaves=20))
@settings(max_examples=80, deadline=None)
def test_depth_is_counted_as_one_counts_the_value(value: Any) -> None:
    def depth(item: Any) -> int:
        return 1 + max(map(depth, item), default=0) if isinstance(item, list) else 0

    data = dumps_json(value)
    check_depth(data, depth(value))
    if isinstance(value, list):
        with pytest.raises(BadMessage):
            check_depth(data, depth(value) - 1)


def test_counting_depth_costs_time_in_proportion() -> None:
    with quickly(0.25):
        check_depth(b"[" + b'[],"\\"[",' * 20_000 + b"1]", 200)
    with quickly(0.25), pytest.raises(BadMessage):
        loads_json(b"[]" * 201 + b'"' + b'\\"' * 8_000, 200)


# --- msgpack, yaml, pickle -----------------------------------------------------------------------------------------


def test_msgpack_keeps_bytes_and_texts_apart() -> None:
    assert there_and_back([b"a", "a", b"\xff"], "msgpack") == [b"a", "a", b"\xff"]


@pytest.mark.parametrize(
    "data", [b"", b"\xc1", b"\x92\x01", b"\x01\x02", b"\xa1\xff", b"\xd4\x05\x00", b"\x81\x01\x02", b"\xd6\xff"]
)
def test_bytes_that_are_no_msgpack_are_undecodable(data: bytes) -> None:
    assert refused(data, MSGPACK, "binary") == "undecodable"


def test_yaml_is_read_safely() -> None:
    assert refused(b"!!python/object/apply:os.getcwd []", YAML) == "undecodable"


def test_yaml_has_types_of_its_own() -> None:
    value = {"when": datetime(2030, 1, 2, 3, 4, 5, tzinfo=timezone.utc), "day": date(2030, 1, 2), "raw": b"\xff"}
    assert there_and_back(value, "yaml") == value


@pytest.mark.parametrize("data", [b"a: b: c", b"[", b"\xff", b'"\\x', b"&a [*a]", b"--- 1\n--- 2", b"\x00"])
def test_bytes_that_are_no_yaml_are_refused(data: bytes) -> None:
    assert refused(data, YAML) in ("undecodable", "bad_encoding")


def test_few_letters_of_yaml_do_not_stand_for_a_huge_value() -> None:
    lines = [b"a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [b"a%d: &a%d [" % (n, n) + b", ".join([b"*a%d" % (n - 1)] * 9) + b"]" for n in range(1, 12)]
    with quickly():
        try:
            found = ALL.loads(b"\n".join(lines), YAML, "utf-8")
        except BadMessage:
            return
    pytest.fail(f"read as {len(yaml.safe_dump(found['a0']))} characters")


@pytest.mark.parametrize("data", [b"", b"\x80\x04", b"not a pickle", pickle.dumps(5)[:-1], b"\x80\xff."])
def test_bytes_that_are_no_pickle_are_undecodable(data: bytes) -> None:
    assert refused(data, PICKLE, "binary") == "undecodable"


def test_a_pickle_of_an_unknown_class_is_undecodable() -> None:
    assert refused(b"cno_such_module\nThing\n.", PICKLE, "binary") == "undecodable"


def test_pickle_is_of_a_protocol_that_every_python_3_reads() -> None:
    assert ALL.dumps([1], "pickle").data[:2] == b"\x80\x04"


# --- small parts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "encoding", "text"),
    [
        ("é".encode(), "utf-8", "é"),
        ("é".encode(), None, "é"),
        ("é".encode(), "", "é"),
        ("é".encode(), "binary", "é"),
        (b"\xe9", "latin-1", "é"),
        ("é".encode("utf-16"), "utf-16", "é"),
    ],
)
def test_text_is_read_by_its_declared_encoding(data: bytes, encoding: str | None, text: str) -> None:
    assert text_of(data, encoding) == text


@pytest.mark.parametrize(
    ("data", "encoding"), [(b"\xff", "utf-8"), (b"\xff", None), (b"a", "klingon"), (b"a", "hex"), (b"a", "a\0b")]
)
def test_text_that_is_not_of_its_encoding_is_refused(data: bytes, encoding: str | None) -> None:
    with pytest.raises(BadMessage) as caught:
        text_of(data, encoding)
    assert caught.value.reason == "bad_encoding"


def test_base64_is_read_strictly() -> None:
    assert decode_base64("AP8=") == b"\x00\xff"
    assert decode_base64("") == b""
    for text in ("AP8", "AP8=\n", "A P8=", "=AP8", "AP8==", "é", "AP8=AP8=", "_-8="):
        with pytest.raises(BadMessage) as caught:
            decode_base64(text)
        assert caught.value.reason == "bad_encoding"


@pytest.mark.parametrize("value", [0, 1.5, -1, 2**70, 10**300])
def test_real_finite_numbers_are_seen(value: Any) -> None:
    assert is_finite_number(value)


@pytest.mark.parametrize("value", [True, None, "1", float("nan"), float("inf"), 1j, [1], Decimal(1)], ids=repr)
def test_what_is_no_real_finite_number_is_seen(value: Any) -> None:
    assert not is_finite_number(value)


@pytest.mark.parametrize("value", [10**400, -(10**400)], ids=["positive", "negative"])
def test_a_number_past_every_float_is_looked_at_without_an_error(value: int) -> None:
    assert is_finite_number(value) in (True, False)
