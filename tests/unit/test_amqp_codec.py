"""AMQP's frames: what is written is read again, by us and by pamqp; what can't be read is Malformed, nothing else."""

import json
import math
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from decimal import Decimal
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pamqp import commands, decode, frame, header
from pamqp.heartbeat import Heartbeat as PamqpHeartbeat

from aqueue.drivers import amqp_codec
from aqueue.drivers.amqp_codec import (
    HEARTBEAT,
    PROTOCOL_HEADER,
    Confirmed,
    Delivered,
    FrameReader,
    Heartbeat,
    Incoming,
    Malformed,
    Method,
    Returned,
    ack_frame,
    decode_properties,
    decode_table,
    encode_properties,
    encode_short,
    encode_table,
    method_frame,
    publication,
    requeue_frame,
)
from aqueue.drivers.amqp_methods import Consume, ExchangeDeclare, QueueBind, QueueDeclare, QueuePurge
from tests.unit.elements import error_of, nested
from tests.unit.vectors import WIRE

FRAME_MAX = 131072
examples = settings(max_examples=50, deadline=None)

keys = st.text(max_size=40)
times = st.integers(0, (1 << 32) - 1).map(lambda seconds: datetime.fromtimestamp(seconds, timezone.utc))
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False, width=32)  # pamqp writes no others
    | st.text(max_size=30)
    | st.binary(max_size=30)
    | times
    | st.builds(
        lambda number, scale: Decimal(number).scaleb(-scale), st.integers(-999_999_999, 999_999_999), st.integers(0, 20)
    )
)
values = st.recursive(leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4))
tables = st.dictionaries(keys, values, max_size=6)


class Colour(StrEnum):
    RED = "red"


def reads(*data: bytes, frame_max: int = FRAME_MAX) -> list[Incoming]:
    """What a reader makes of these pieces."""
    reader = FrameReader(frame_max)
    return [found for piece in data for found in reader.feed(piece)]


def content(method: bytes, properties: bytes, body: bytes, frame_max: int = FRAME_MAX) -> bytes:
    """A method with its content, as a server sends it."""
    published = publication(1, "", "", properties, body, frame_max)
    return method + published[published.index(b"\xce\x02\x00\x01") + 1 :]


def deliver(properties: bytes = b"\x00\x00", body: bytes = b"body", redelivered: bool = False) -> bytes:
    method = commands.Basic.Deliver("tag", 7, redelivered, "exchange", "key")
    return content(method_frame(method, 1), properties, body)


# --- tables -------------------------------------------------------------------------------------------


@examples
@given(tables)
def test_a_table_is_read_as_it_was_written(table: dict[str, Any]) -> None:
    data = encode_table(table)
    assert decode_table(data, 0) == (table, len(data))
    assert decode_table(b"xx" + data + b"yy", 2) == (table, len(data) + 2)


@examples
@given(tables)
def test_pamqp_reads_what_we_write(table: dict[str, Any]) -> None:
    data = encode_table(table)
    consumed, found = decode.field_table(data)
    assert consumed == len(data)
    assert found == table


@examples
@given(tables)
def test_we_read_what_pamqp_writes(table: dict[str, Any]) -> None:
    published = header.ContentHeader(0, 0, commands.Basic.Properties(headers=table))
    try:
        data = frame.marshal(published, 1)
    except (ValueError, TypeError):  # keys over 128 bytes, which it does not take
        return
    found = decode_properties(data[7 + 12 : -1]).get("headers", {})
    assert found == table


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ((1, 2), [1, 2]),
        (Colour.RED, "red"),
        (True, True),
        (1 << 31, 1 << 31),
        (-(1 << 63), -(1 << 63)),
        (datetime(1960, 1, 1, tzinfo=timezone.utc), datetime(1970, 1, 1, tzinfo=timezone.utc)),
        (datetime(2020, 1, 1, tzinfo=timezone.utc).replace(tzinfo=None), datetime(2020, 1, 1, tzinfo=timezone.utc)),
        (Decimal("-0.05"), Decimal("-0.05")),
        ("\ud800", "\udced\udca0\udc80"),
        (nested(64), nested(64)),
    ],
)
def test_values_of_other_types_are_written_as_their_nearest(value: object, expected: object) -> None:
    found = decode_table(encode_table({"a": value}), 0)[0]["a"]
    assert (found, type(found)) == (expected, type(expected))


def test_times_in_milliseconds_are_read_as_such() -> None:
    """As clients in JavaScript write them; as seconds they would be of no year that there is."""
    found = decode_properties(b"\x00\x40" + (1_700_000_000_123).to_bytes(8, "big"))
    assert found["timestamp"] == datetime(2023, 11, 14, 22, 13, 20, 123000, tzinfo=timezone.utc)


def test_a_number_that_is_none_travels() -> None:
    assert math.isnan(decode_table(encode_table({"a": math.nan}), 0)[0]["a"])


@pytest.mark.parametrize(
    "value",
    [
        1 << 63,
        -(1 << 63) - 1,
        {1},
        object(),
        Decimal("1E+3"),
        Decimal("NaN"),
        Decimal(1 << 40),
        {"k" * 256: 1},
        nested(65),
        nested(5000),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_amqp_cannot_carry_is_refused(value: object) -> None:
    with pytest.raises(Malformed):
        encode_table({"a": value})


def test_a_list_that_holds_itself_is_refused() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(Malformed):
        encode_table({"a": endless})


@examples
@given(st.binary(max_size=60))
@example(b"\xff\xfe")
@example(b"\xed\xa0\x80")
def test_strings_of_any_bytes_are_written_again_as_they_came(raw: bytes) -> None:
    table = b"\x01aS" + len(raw).to_bytes(4, "big") + raw
    data = len(table).to_bytes(4, "big") + table
    found, _ = decode_table(data, 0)
    assert encode_table(found) == data
    properties = b"\x04\x00" + bytes((len(raw),)) + raw
    assert encode_properties(decode_properties(properties)) == properties


@pytest.mark.parametrize("text", ["a" * 255, "é" * 127, ""])
def test_short_strings_have_255_bytes(text: str) -> None:
    data = encode_short(text)
    assert (data[0], data[1:].decode()) == (len(text.encode()), text)


@pytest.mark.parametrize("text", ["a" * 256, "é" * 128])
def test_longer_ones_are_refused_and_told_in_short(text: str) -> None:
    with pytest.raises(Malformed, match="255") as caught:
        encode_short(text)
    assert len(str(caught.value)) < 200


# --- properties ---------------------------------------------------------------------------------------

#: What pamqp calls a property, where the specification calls it otherwise.
THEIR_NAMES = {"type": "message_type"}
short = st.text(max_size=60)
octets = st.integers(0, 255)
property_sets = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(
            "content_type content_encoding correlation_id reply_to expiration message_id type user_id app_id".split(),
            short,
        ),
        "headers": tables,
        "delivery_mode": octets,
        "priority": octets,
        "timestamp": times,
    },
)


@examples
@given(property_sets)
def test_properties_are_read_as_they_were_written(properties: dict[str, Any]) -> None:
    assert decode_properties(encode_properties(properties)) == properties


@examples
@given(property_sets)
def test_pamqp_reads_our_properties(properties: dict[str, Any]) -> None:
    data = publication(3, "", "q", encode_properties(properties), b"", FRAME_MAX)
    consumed, _, _ = frame.unmarshal(data)
    _, channel, found = frame.unmarshal(data[consumed:])
    assert channel == 3
    assert isinstance(found, header.ContentHeader)
    assert {name: getattr(found.properties, THEIR_NAMES.get(name, name)) for name in properties} == properties


@examples
@given(property_sets)
def test_we_read_the_properties_of_pamqp(properties: dict[str, Any]) -> None:
    try:
        named = {THEIR_NAMES.get(name, name): value for name, value in properties.items()}
        data = frame.marshal(header.ContentHeader(0, 0, commands.Basic.Properties(**named)), 1)
    except (ValueError, TypeError):
        return
    found = decode_properties(data[7 + 12 : -1])
    empty: tuple[object, ...] = ("", {}, 0, None)
    assert {name: value for name, value in found.items() if value not in empty} == {
        name: value for name, value in properties.items() if value not in empty
    }


# --- hostile input ------------------------------------------------------------------------------------


def only_malformed(data: bytes) -> None:
    """Read the bytes in every way there is."""
    for read in (decode_properties, lambda found: decode_table(found, 0), reads):
        error = error_of(Malformed, lambda read=read: read(data))  # type: ignore[misc]
        assert len(str(error)) < 1000


@examples
@given(st.binary(max_size=200))
def test_noise_is_malformed_or_nothing(data: bytes) -> None:
    only_malformed(data)


@examples
@given(property_sets, st.data())
def test_every_truncation_of_properties_is_malformed(properties: dict[str, Any], data: st.DataObject) -> None:
    encoded = encode_properties(properties)
    cut = data.draw(st.integers(2, len(encoded)))
    if cut < len(encoded):
        with pytest.raises(Malformed):
            decode_properties(encoded[:cut])


@examples
@given(tables, st.data())
def test_a_damaged_table_is_malformed_or_another(table: dict[str, Any], data: st.DataObject) -> None:
    encoded = bytearray(encode_table(table))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(octets)
    only_malformed(bytes(encoded))


@examples
@given(st.data())
def test_a_damaged_stream_is_malformed_or_another(data: st.DataObject) -> None:
    stream = bytearray(data.draw(st.sampled_from(captured()))["raw"] + deliver())
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(octets)
    only_malformed(bytes(stream))


@pytest.mark.parametrize(
    "field",
    [
        b"T" + b"\xff" * 8,
        b"T\x7f" + b"\xff" * 7,
        b"S\x00\x00\x00\x09short",
        b"x\x00\x00\x00\x09short",
        b"I\x00\x00",
        b"l\x00",
        b"?\x00",
        b"",
        b"F\x00\x00\x00\x09",
        b"A\xff\xff\xff\xff",
    ],
)
def test_fields_that_cannot_be_are_malformed(field: bytes) -> None:
    table = b"\x01a" + field
    data = len(table).to_bytes(4, "big") + table
    with pytest.raises(Malformed):
        decode_table(data, 0)
    with pytest.raises(Malformed):
        decode_table(data + b"\x00" * 20, 0)


def test_tables_are_read_to_a_depth_that_no_stack_minds() -> None:
    table = b"\x00\x00\x00\x00"
    for _ in range(5000):
        table = (len(table) + 3).to_bytes(4, "big") + b"\x01aF" + table
    with pytest.raises(Malformed, match="too deep"):
        decode_table(table, 0)


@pytest.mark.parametrize(
    "stream",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\x09\x00\x01\x00\x00\x00\x00\xce",
        b"\x08\x00\x00\x00\x00\x00\x00\xcd",
        b"\x01\x00\x00\xff\xff\xff\xff\xce",
        b"\x02\x00\x01\x00\x00\x00\x0e" + b"\x00" * 14 + b"\xce",
        b"\x03\x00\x01\x00\x00\x00\x01x\xce",
        b"\x01\x00\x01\x00\x00\x00\x04\x00\x3c\x00\x3c\xce",
        b"\x01\x00\x01\x00\x00\x00\x02\x00\x3c\xce",
        b"\x01\x00\x01\x00\x00\x00\x04\xff\xff\xff\xff\xce",
    ],
)
def test_streams_that_are_no_amqp_are_malformed(stream: bytes) -> None:
    with pytest.raises(Malformed):
        reads(stream + b"\x00" * 20)


def test_a_body_longer_than_promised_is_malformed() -> None:
    stream = deliver(body=b"body")
    with pytest.raises(Malformed, match="longer"):
        reads(stream.replace(b"\x00\x00\x00\x04body\xce", b"\x00\x00\x00\x05body!\xce"))


# --- frames -------------------------------------------------------------------------------------------


@examples
@given(st.binary(max_size=300), property_sets, st.booleans(), st.integers(1, 400))
def test_a_delivery_is_the_same_however_its_bytes_arrive(
    body: bytes, properties: dict[str, Any], redelivered: bool, size: int
) -> None:
    encoded = encode_properties(properties)
    stream = HEARTBEAT + deliver(encoded, body, redelivered) + HEARTBEAT
    pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
    wanted = Delivered(1, "tag", 7, redelivered, "exchange", "key", encoded, body)
    assert reads(*pieces) == [Heartbeat(), wanted, Heartbeat()]


def test_frames_may_be_split_at_every_byte() -> None:
    stream = b"".join(
        (
            deliver(encode_properties({"headers": {"a": [1]}}), b"first"),
            ack_frame(1, 5, True),
            method_frame(commands.Queue.DeclareOk("q", 3, 1), 1),
            content(method_frame(commands.Basic.Return(312, "NO_ROUTE", "x", "k"), 1), b"\x00\x00", b""),
        )
    )
    whole = [(type(found).__name__, str(found)) for found in reads(stream)]
    assert [name for name, _ in whole] == ["Delivered", "Confirmed", "Method", "Returned"]
    for cut in range(len(stream)):
        found = reads(stream[:cut], stream[cut:])
        assert [type(one).__name__ for one in found] == [name for name, _ in whole]
        assert found[0] == reads(stream)[0]
    assert [type(one).__name__ for one in reads(*(bytes((byte,)) for byte in stream))] == [name for name, _ in whole]


@pytest.mark.parametrize("size", [0, 1, 4087, 4088, 4089, 20_000])
def test_a_body_takes_as_many_frames_as_it_needs(size: int) -> None:
    body = bytes(index & 255 for index in range(size))
    stream = content(method_frame(commands.Basic.Deliver("t", 1, False, "", "q"), 1), b"\x00\x00", body, 4096)
    (found,) = reads(stream, frame_max=4096)
    assert isinstance(found, Delivered)
    assert found.body == body
    with pytest.raises(Malformed, match="agreed") if size > 4000 else pytest.raises(Malformed):
        reads(stream, frame_max=1000) if size > 4000 else reads(stream[:-1] + b"\x00")


def test_two_channels_take_turns() -> None:
    one, two = deliver(body=b"one"), deliver(body=b"two")
    frames = [*split(one), *(b"\x01\x00\x02" + piece[3:] if piece[0] == 1 else piece for piece in split(two))]
    frames[3:] = [piece[:1] + b"\x00\x02" + piece[3:] for piece in frames[3:]]
    found = reads(frames[0], frames[3], frames[1], frames[4], frames[5], frames[2])
    assert [(one.channel, one.body) for one in found if isinstance(one, Delivered)] == [(2, b"two"), (1, b"one")]


def test_confirms_and_returns_say_what_they_are() -> None:
    nack = method_frame(commands.Basic.Nack(9, True, False), 4)
    assert reads(ack_frame(4, 8, False), nack) == [Confirmed(4, 8, False, True), Confirmed(4, 9, True, False)]
    returned = content(method_frame(commands.Basic.Return(312, "NO_ROUTE", "x", "k"), 1), b"\x00\x00", b"b")
    assert reads(returned) == [Returned(1, "NO_ROUTE", "x", "k", b"\x00\x00", b"b")]
    got = content(method_frame(commands.Basic.GetOk(3, True, "x", "k", 17), 1), b"\x00\x00", b"b")
    assert reads(got) == [Delivered(1, "", 3, True, "x", "k", b"\x00\x00", b"b")]


def test_what_we_write_is_what_pamqp_writes() -> None:
    assert ack_frame(2, 1 << 40, True) == frame.marshal(commands.Basic.Ack(1 << 40, True), 2)
    assert requeue_frame(2, 5) == frame.marshal(commands.Basic.Nack(5, False, True), 2)
    assert requeue_frame(2, 0) == frame.marshal(commands.Basic.Nack(0, True, True), 2)
    assert PamqpHeartbeat().marshal() == HEARTBEAT
    published = publication(2, "x", "k", b"\x00\x00", b"body", FRAME_MAX)
    assert published.startswith(frame.marshal(commands.Basic.Publish(0, "x", "k", mandatory=True), 2))
    optional = publication(2, "x", "k", b"\x00\x00", b"body", FRAME_MAX, mandatory=False)
    assert optional.startswith(frame.marshal(commands.Basic.Publish(0, "x", "k"), 2))


def test_headers_that_fill_more_than_a_frame_are_refused() -> None:
    properties = encode_properties({"headers": {"a": "x" * 5000}})
    with pytest.raises(Malformed, match="headers"):
        publication(1, "", "q", properties, b"", 4096)


@pytest.mark.parametrize("close", [commands.Channel.Close, commands.Connection.Close])
def test_a_reason_that_was_cut_within_a_letter_is_told(close: type[Any]) -> None:
    """As RabbitMQ does after 255 bytes."""
    text = "NOT_FOUND - no queue 'éé"
    stream = method_frame(close(404, text, 50, 10), 1).replace(text.encode(), b"NOT_FOUND - no queue '\xc3\xa9\xc3\x00")
    (found,) = reads(stream.replace(b"\xc3\x00\x00", b"\xc3A\x00"))
    assert isinstance(found, Method)
    assert isinstance(found.method, close)
    assert found.method.reply_code == 404
    assert found.method.reply_text.startswith("NOT_FOUND - no queue 'é")


@pytest.mark.parametrize("name", ["größe", "{a}*#", "with space", "x" * 255])
def test_methods_take_every_name(name: str) -> None:
    for method in (
        QueueDeclare(queue=name),
        QueueBind(queue=name, exchange=name, routing_key=name),
        QueuePurge(queue=name),
        ExchangeDeclare(exchange=name),
        Consume(queue=name, consumer_tag="t"),
    ):
        assert encode_short(name) in method_frame(method, 1)


def test_a_name_that_is_too_long_is_malformed() -> None:
    with pytest.raises(Malformed, match="255"):
        method_frame(QueueDeclare(queue="é" * 128), 1)


# --- captured -----------------------------------------------------------------------------------------


def captured() -> list[dict[str, Any]]:
    """Every frame of Celery's connections, both ways, but for the greeting."""
    found: list[dict[str, Any]] = []
    for path in sorted(WIRE.glob("amqp_wire_*.jsonl")):
        for number, line in enumerate(path.read_text().splitlines()):
            row: dict[str, Any] = json.loads(line)
            raw = bytes.fromhex(row["raw_hex"] or "")  # the greeting with a server's name is not kept
            if raw not in (b"", PROTOCOL_HEADER):
                found.append({**row, "raw": raw, "file": path.stem, "number": number})
    return found


#: Of these pamqp writes no copy: it refuses what RabbitMQ says, and writes small numbers in fewer bytes.
UNLIKE = "Channel.Open Channel.OpenOk Connection.Open Connection.OpenOk Connection.StartOk Queue.Declare".split()


def conversations() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    rows: dict[tuple[str, int, str], list[dict[str, Any]]] = {}
    for row in captured():
        rows.setdefault((row["file"], row["connection"], row["direction"]), []).append(row)
    for key, found in rows.items():
        yield " ".join(map(str, key)), found


@pytest.mark.parametrize(
    ("name", "rows"), list(conversations()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_captured_conversations_are_read_whole(name: str, rows: list[dict[str, Any]]) -> None:
    methods = [row for row in rows if row["frame"] not in ("content-header", "content-body", "Basic.Publish")]
    theirs = [row for row in rows if row["direction"] == "S->C"]
    found = reads(*(row["raw"] for row in theirs))
    assert len(found) == len([row for row in methods if row["direction"] == "S->C"])
    for row in methods:
        if row["frame"].split(".")[0] in ("Basic", "Channel", "Connection", "Queue", "Exchange", "Confirm"):
            _, channel, method = frame.unmarshal(row["raw"])
            assert channel == row["channel"]
            assert method.name == row["frame"], name
            if row["frame"] not in UNLIKE:
                assert method_frame(method, channel) == row["raw"]


@pytest.mark.parametrize(
    "row",
    [row for row in captured() if row["frame"] == "content-header"],
    ids=lambda row: f"{row['file']}-{row['number']}",
)
def test_captured_properties_are_read_as_pamqp_does(row: Mapping[str, Any]) -> None:
    _, _, theirs = frame.unmarshal(row["raw"])
    assert isinstance(theirs, header.ContentHeader)
    ours = decode_properties(row["raw"][7 + 12 : -1])
    assert ours == {name: value for name, value in theirs.properties if value is not None and name in ours}
    assert decode_properties(encode_properties(ours)) == ours


def split(stream: bytes) -> list[bytes]:
    """A stream's frames."""
    found: list[bytes] = []
    while stream:
        end = 8 + int.from_bytes(stream[3:7], "big")
        found.append(stream[:end])
        stream = stream[end:]
    return found


def test_every_property_has_a_flag_of_its_own() -> None:
    flags = [flag for _, flag, _ in amqp_codec._PROPERTIES]
    assert len(set(flags)) == len(flags) == 14


@pytest.mark.parametrize(("one", "other"), [(0, False), (1, True), (None, 0), ("1", 1), (0, 0.0)], ids=repr)
def test_a_header_is_not_taken_for_an_equal_one_of_before(one: Any, other: Any) -> None:
    for value in (one, other, one):
        table, _ = decode_table(encode_table({"retries": value, "shadow": value}), 0)
        assert [(type(found), found) for found in table.values()] == [(type(value), value)] * 2
