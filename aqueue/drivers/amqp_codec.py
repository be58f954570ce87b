"""AMQP 0-9-1 on the wire: frames, field tables, message properties. Pure: no I/O.

Method frames that are rare (opening, declaring) are left to pamqp, the codec beneath aio-pika. The five that
every message needs are read and written here, field tables too: pamqp copies what is left of its input for each
field, and takes 50 to 60 us for the frames of a task where this takes 20 to 25 (``benchmarks/codec.py``).
"""

import struct
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime, timezone
from decimal import Decimal
from typing import Any, Final

import msgspec
from pamqp import commands
from pamqp.frame import marshal, unmarshal

from aqueue.protocol import KNOWN_HEADERS
from aqueue.shapes import is_list, is_object

_METHOD: Final = 1
_HEADER: Final = 2
_BODY: Final = 3
_HEARTBEAT: Final = 8
_END: Final = b"\xce"
#: A frame around its payload.
_OVERHEAD: Final = 8
#: Bytes of a content header before its properties.
_HEADER_HEAD: Final = 12
HEARTBEAT: Final = b"\x08\x00\x00\x00\x00\x00\x00\xce"
PROTOCOL_HEADER: Final = b"AMQP\x00\x00\x09\x01"

_PUBLISH: Final = b"\x00\x3c\x00\x28\x00\x00"
_DELIVER: Final = b"\x00\x3c\x00\x3c"
_RETURN: Final = b"\x00\x3c\x00\x32"
_GET_OK: Final = b"\x00\x3c\x00\x47"
_ACK: Final = b"\x00\x3c\x00\x50"
_NACK: Final = b"\x00\x3c\x00\x78"

#: Why the server closes something is a text that it cuts after 255 bytes, maybe within a letter.
_CLOSES: Final = {b"\x00\x0a\x00\x32": commands.Connection.Close, b"\x00\x14\x00\x28": commands.Channel.Close}

_frame_head = struct.Struct(">BHI")
_content_head = struct.Struct(">HHQH")
_tag = struct.Struct(">Q")
_pack_long = struct.Struct(">I").pack
_unpack_long = struct.Struct(">I").unpack_from


class Malformed(ValueError):
    """Bytes that are no AMQP, or a value that AMQP can't carry."""


# --- field tables ------------------------------------------------------------------------------------


#: Tables in tables in tables: no more than this, whoever wrote them.
_DEEPEST: Final = 64
_OCTETS: Final = [bytes((number,)) for number in range(256)]


def encode_table(table: Mapping[str, Any], depth: int = 0) -> bytes:
    """A field table with its length. Raises Malformed."""
    if depth > _DEEPEST:
        raise Malformed(f"more than {_DEEPEST} tables and lists in each other")
    parts: list[bytes] = []
    for key, value in table.items():
        last = _LAST_FIELDS.get(key)
        if last is not None and last[0] is value:
            parts.append(last[1])
            continue
        name = _KEYS.get(key) or encode_short(key)
        if value.__class__ is str:  # nearly all there is
            text = value.encode() if value.isascii() else _bytes_of(value)
            field = b"".join((name, b"S", _pack_long(len(text)), text))
        else:
            field = name + _encode(value, depth)
        if last is not None and value.__class__ in _UNCHANGING:
            _LAST_FIELDS[key] = (value, field)
        parts.append(field)
    data = b"".join(parts)
    return _pack_long(len(data)) + data


def encode_short(text: str) -> bytes:
    """A short string: at most 255 bytes of UTF-8. Raises Malformed."""
    data = text.encode() if text.isascii() else _bytes_of(text)
    if len(data) > 255:
        raise Malformed(f"{text[:40]!r}... is {len(data)} bytes; names and keys of AMQP have 255 at most")
    return _OCTETS[len(data)] + data


def _bytes_of(text: str) -> bytes:
    """UTF-8; what was read from other bytes is written as those again."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        pass
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass")


_KEYS: Final = {key: encode_short(key) for key in KNOWN_HEADERS}
_NAMES: Final = {key.encode(): key for key in KNOWN_HEADERS}
#: Those that have another value in each call.
_OF_ONE_CALL: Final = frozenset(("id", "root_id", "parent_id", "argsrepr", "kwargsrepr"))
#: By header, the last value and its field: what all calls of a task have in common is one and the same object.
_LAST_FIELDS: Final[dict[str, tuple[Any, bytes]]] = {
    key: (None, encode_short(key) + b"V") for key in KNOWN_HEADERS - _OF_ONE_CALL
}
_UNCHANGING: Final = frozenset((str, int, bool, type(None)))


def _encode(value: Any, depth: int) -> bytes:
    encoder = _ENCODERS.get(value.__class__)
    if encoder is not None:
        return encoder(value)
    if is_object(value):
        return b"F" + encode_table(value, depth + 1) if value else b"F\x00\x00\x00\x00"
    if is_list(value):
        return _encode_list(value, depth + 1)
    for base in (str, bool, int, float, bytes, datetime, Decimal):  # of their subclasses: enums, numpy's numbers
        if isinstance(value, base):
            return _ENCODERS[base](value)
    raise Malformed(f"AMQP can't carry {type(value).__name__} in a header")


def _encode_str(value: str) -> bytes:
    data = _bytes_of(value)
    return b"S" + _pack_long(len(data)) + data


def _encode_int(value: int) -> bytes:
    if -0x80000000 <= value <= 0x7FFFFFFF:
        return b"I" + value.to_bytes(4, "big", signed=True)
    if -0x8000000000000000 <= value <= 0x7FFFFFFFFFFFFFFF:
        return b"l" + value.to_bytes(8, "big", signed=True)
    raise Malformed("AMQP can't carry an integer of more than 64 bits in a header")


def _encode_list(value: Any, depth: int) -> bytes:
    if depth > _DEEPEST:
        raise Malformed(f"more than {_DEEPEST} tables and lists in each other")
    data = b"".join([b"V" if one is None else _encode(one, depth) for one in value])
    return b"A" + _pack_long(len(data)) + data


def _encode_decimal(value: Decimal) -> bytes:
    _, digits, exponent = value.as_tuple()
    scale = -exponent if isinstance(exponent, int) else -1
    number = int(value.scaleb(scale)) if 0 <= scale <= 255 else 1 << 31
    if len(digits) > 10 or not -0x80000000 <= number <= 0x7FFFFFFF:
        raise Malformed(f"AMQP can't carry the decimal {str(value)[:40]} in a header")
    return b"D" + bytes((scale,)) + number.to_bytes(4, "big", signed=True)


def _encode_time(value: datetime) -> bytes:
    aware = value if value.tzinfo is not None else value.replace(tzinfo=timezone.utc)
    return b"T" + _tag.pack(max(0, int(aware.timestamp())))


def _encode_octet(value: int) -> bytes:
    return _OCTETS[value]


_ENCODERS: Final[dict[type, Callable[[Any], bytes]]] = {
    str: _encode_str,
    type(None): lambda _: b"V",
    bool: lambda value: b"t\x01" if value else b"t\x00",
    int: _encode_int,
    float: lambda value: b"d" + struct.pack(">d", value),
    bytes: lambda value: b"x" + _pack_long(len(value)) + value,
    Decimal: _encode_decimal,
    datetime: _encode_time,
}


def decode_table(data: bytes, at: int, depth: int = 0) -> tuple[dict[str, Any], int]:
    """The table at a position, and the position behind it. Raises Malformed."""
    try:
        end = at + 4 + _unpack_long(data, at)[0]
        at += 4
        if end > len(data) or depth > _DEEPEST:
            raise Malformed("a field table is longer than its frame, or too deep")
        table: dict[str, Any] = {}
        while at < end:
            start = at + 1
            at = start + data[at]
            name = data[start:at]
            key = _NAMES.get(name) or name.decode("utf-8", "surrogatepass")
            kind = data[at]
            if kind == 0x53:  # S; it and V are nearly all there is
                start = at + 5
                at = start + _unpack_long(data, at + 1)[0]
                table[key] = data[start:at].decode("utf-8", "surrogateescape")
            elif kind == 0x56:
                table[key] = None
                at += 1
            else:
                table[key], at = _decode(data, at, depth)
    except Malformed:
        raise
    except (struct.error, IndexError, ValueError, OverflowError, OSError) as error:
        raise Malformed(f"a field table can't be read: {error}") from None
    if at != end:
        raise Malformed("a field is longer than its table")
    return table, at


def _decode(data: bytes, at: int, depth: int) -> tuple[Any, int]:
    kind = data[at]
    at += 1
    if kind == 0x53:  # S
        end = at + 4 + _unpack_long(data, at)[0]
        return data[at + 4 : end].decode("utf-8", "surrogateescape"), end
    if kind == 0x56:  # V
        return None, at
    if kind == 0x49:  # I
        return int.from_bytes(data[at : at + 4], "big", signed=True), at + 4
    if kind == 0x46:  # F
        return decode_table(data, at, depth + 1)
    if kind == 0x41:  # A
        return _decode_list(data, at, depth + 1)
    fixed = _FIXED.get(kind)
    if fixed is not None:
        value, convert = fixed
        found = value.unpack_from(data, at)
        return convert(*found), at + value.size
    if kind == 0x78:  # x
        end = at + 4 + _unpack_long(data, at)[0]
        return data[at + 4 : end], end
    raise Malformed(f"a field of unknown type {chr(kind)!r}")


def _decode_list(data: bytes, at: int, depth: int) -> tuple[list[Any], int]:
    end = at + 4 + _unpack_long(data, at)[0]
    at += 4
    if end > len(data) or depth > _DEEPEST:
        raise Malformed("a list is longer than its frame, or too deep")
    found: list[Any] = []
    while at < end:
        value, at = _decode(data, at, depth)
        found.append(value)
    if at != end:
        raise Malformed("a field is longer than its list")
    return found, at


#: Of the year 9999.
_LAST_SECOND: Final = 253402300799


def _time(seconds: int) -> datetime:
    if seconds > _LAST_SECOND:  # some clients write milliseconds
        return datetime.fromtimestamp(seconds / 1000, timezone.utc)
    return datetime.fromtimestamp(seconds, timezone.utc)


def _decimal(scale: int, number: int) -> Decimal:
    return Decimal(number).scaleb(-scale)


def _same(value: Any) -> Any:
    return value


#: Fields of one size: ``I`` and ``L`` as RabbitMQ and py-amqp mean them (celery-protocol 3.1).
_FIXED: Final[dict[int, tuple[struct.Struct, Callable[..., Any]]]] = {
    ord("t"): (struct.Struct(">B"), bool),
    ord("b"): (struct.Struct(">b"), _same),
    ord("B"): (struct.Struct(">B"), _same),
    ord("s"): (struct.Struct(">h"), _same),
    ord("u"): (struct.Struct(">H"), _same),
    ord("i"): (struct.Struct(">I"), _same),
    ord("l"): (struct.Struct(">q"), _same),
    ord("L"): (struct.Struct(">q"), _same),
    ord("f"): (struct.Struct(">f"), _same),
    ord("d"): (struct.Struct(">d"), _same),
    ord("T"): (_tag, _time),
    ord("D"): (struct.Struct(">Bi"), _decimal),
}

# --- properties --------------------------------------------------------------------------------------

#: Name, flag, encoder; all but four are short strings.
_PROPERTIES: Final[tuple[tuple[str, int, Callable[[Any], bytes]], ...]] = (
    ("content_type", 0x8000, encode_short),
    ("content_encoding", 0x4000, encode_short),
    ("headers", 0x2000, encode_table),
    ("delivery_mode", 0x1000, _encode_octet),
    ("priority", 0x0800, _encode_octet),
    ("correlation_id", 0x0400, encode_short),
    ("reply_to", 0x0200, encode_short),
    ("expiration", 0x0100, encode_short),
    ("message_id", 0x0080, encode_short),
    ("timestamp", 0x0040, lambda value: _encode_time(value)[1:]),
    ("type", 0x0020, encode_short),
    ("user_id", 0x0010, encode_short),
    ("app_id", 0x0008, encode_short),
    ("cluster_id", 0x0004, encode_short),
)


def encode_properties(properties: Mapping[str, Any]) -> bytes:
    """Flags and values, for `publication`. Raises Malformed."""
    flags = 0
    parts = [b""]
    for name, flag, encode in _PROPERTIES:
        value = properties.get(name)
        if value is not None:
            flags |= flag
            parts.append(encode(value))
    parts[0] = flags.to_bytes(2, "big")
    return b"".join(parts)


def decode_properties(data: bytes) -> dict[str, Any]:
    """What `encode_properties` wrote, or any other client. Raises Malformed."""
    found: dict[str, Any] = {}
    try:
        flags = int.from_bytes(data[:2], "big")
        at = 2
        for name, flag, _ in _PROPERTIES:
            if not flags & flag:
                continue
            if name == "headers":
                found[name], at = decode_table(data, at)
            elif name in ("delivery_mode", "priority"):
                found[name] = data[at]
                at += 1
            elif name == "timestamp":
                found[name] = _time(_tag.unpack_from(data, at)[0])
                at += 8
            else:
                end = at + 1 + data[at]
                found[name] = data[at + 1 : end].decode("utf-8", "surrogateescape")
                at = end
        if at > len(data):
            raise Malformed("they are shorter than they say")
    except (struct.error, IndexError, OverflowError, OSError, ValueError) as error:
        raise Malformed(f"the properties can't be read: {error}") from None
    return found


# --- frames out --------------------------------------------------------------------------------------


def method_frame(method: Any, channel: int) -> bytes:
    """A method of pamqp's. Raises Malformed."""
    try:
        return marshal(method, channel)
    except (ValueError, TypeError, struct.error) as error:
        raise Malformed(str(error)) from None


def publication(
    channel: int,
    exchange: str,
    routing_key: str,
    properties: bytes,
    body: bytes,
    frame_max: int,
    *,
    mandatory: bool = True,
) -> bytes:
    """``basic.publish`` with its content. ``mandatory``: it comes back when no queue takes it. Raises Malformed."""
    room = frame_max - _OVERHEAD
    size = len(properties) + _HEADER_HEAD
    if size > room:
        raise Malformed(f"the headers are {size:,} bytes; one frame of this server takes {frame_max:,}")
    method = b"".join((_PUBLISH, encode_short(exchange), encode_short(routing_key), _OCTETS[mandatory]))
    pack = _frame_head.pack
    parts = [pack(_METHOD, channel, len(method)), method, _END]
    parts += (pack(_HEADER, channel, size), b"\x00\x3c\x00\x00", _tag.pack(len(body)), properties, _END)
    if 0 < len(body) <= room:
        parts += (pack(_BODY, channel, len(body)), body, _END)
    else:
        parts += [_frame(_BODY, channel, body[start : start + room]) for start in range(0, len(body), room)]
    return b"".join(parts)


def ack_frame(channel: int, tag: int, multiple: bool) -> bytes:
    return _frame(_METHOD, channel, _ACK + _tag.pack(tag) + (b"\x01" if multiple else b"\x00"))


def requeue_frame(channel: int, tag: int) -> bytes:
    """``basic.nack`` of one delivery, back to its queue; tag 0: of all that are left."""
    return _frame(_METHOD, channel, _NACK + _tag.pack(tag) + (b"\x02" if tag else b"\x03"))


def _frame(kind: int, channel: int, payload: bytes) -> bytes:
    return _frame_head.pack(kind, channel, len(payload)) + payload + _END


# --- frames in ---------------------------------------------------------------------------------------


class Delivered(msgspec.Struct):
    """``basic.deliver`` with its content, or a message fetched with ``basic.get``. ``properties`` are still encoded."""

    channel: int
    consumer_tag: str
    tag: int
    redelivered: bool
    exchange: str
    routing_key: str
    properties: bytes = b""
    body: bytes = b""


class Returned(msgspec.Struct):
    """``basic.return``: a publication that no queue took."""

    channel: int
    reason: str
    exchange: str
    routing_key: str
    properties: bytes = b""
    body: bytes = b""


class Confirmed(msgspec.Struct):
    """``basic.ack`` or ``basic.nack`` of the server: it has a publication, or refuses it."""

    channel: int
    tag: int
    multiple: bool
    stored: bool


class Method(msgspec.Struct):
    """Any other method, as pamqp's class."""

    channel: int
    method: Any


class Heartbeat(msgspec.Struct):
    """The server lives."""


Incoming = Delivered | Returned | Confirmed | Method | Heartbeat


class FrameReader:
    """Bytes in, messages and methods out, in the order they came."""

    def __init__(self, frame_max: int) -> None:
        #: The longest frame the server may send, in bytes.
        self.frame_max = frame_max
        self._rest = b""
        #: By channel, what awaits the rest of its content: the message, bytes still to come, bytes that came.
        self._partial: dict[int, tuple[Delivered | Returned, int, list[bytes]]] = {}

    def feed(self, data: bytes) -> Iterator[Incoming]:
        """What these bytes complete. Raises Malformed; then the connection is beyond repair."""
        if self._rest:
            data = self._rest + data
        at, length = 0, len(data)
        while length - at >= _OVERHEAD:
            kind, channel, size = _frame_head.unpack_from(data, at)
            end = at + 7 + size
            if size + _OVERHEAD > self.frame_max:
                raise Malformed(f"a frame of {size:,} bytes; agreed were {self.frame_max:,}")
            if end >= length:
                break
            if data[end] != 0xCE:
                raise Malformed("a frame without its end")
            found = self._frame(kind, channel, data[at + 7 : end])
            at = end + 1
            if found is not None:
                yield found
        self._rest = data[at:]

    def _frame(self, kind: int, channel: int, payload: bytes) -> Incoming | None:
        if kind == _BODY:
            return self._body(channel, payload)
        if kind == _HEADER:
            return self._header(channel, payload)
        if kind == _METHOD:
            return self._method(channel, payload)
        if kind == _HEARTBEAT:
            return Heartbeat()
        raise Malformed(f"a frame of unknown type {kind}")

    def _method(self, channel: int, payload: bytes) -> Incoming | None:
        method = payload[:4]
        try:
            if method == _DELIVER:
                consumer_tag, at = _short(payload, 4)
                tag = _tag.unpack_from(payload, at)[0]
                message = Delivered(channel, consumer_tag, tag, payload[at + 8] == 1, *_route(payload, at + 9))
                self._partial[channel] = (message, -1, [])
                return None
            if method in (_ACK, _NACK):
                tag = _tag.unpack_from(payload, 4)[0]
                return Confirmed(channel, tag, bool(payload[12] & 1), method == _ACK)
            if method == _GET_OK:
                tag = _tag.unpack_from(payload, 4)[0]
                message = Delivered(channel, "", tag, payload[12] == 1, *_route(payload, 13))
                self._partial[channel] = (message, -1, [])
                return None
            if method == _RETURN:
                reason, at = _short(payload, 6)
                self._partial[channel] = (Returned(channel, reason, *_route(payload, at)), -1, [])
                return None
            if method in _CLOSES:
                code = int.from_bytes(payload[4:6], "big")
                return Method(channel, _CLOSES[method](code, _short(payload, 6)[0], 0, 0))
        except (struct.error, IndexError) as error:
            raise Malformed(f"a method can't be read: {error}") from None
        return Method(channel, _unmarshal(channel, payload))

    def _header(self, channel: int, payload: bytes) -> Incoming | None:
        if channel not in self._partial or len(payload) < _HEADER_HEAD + 2:
            raise Malformed("a content header without its method")
        message, _, parts = self._partial[channel]
        size = _tag.unpack_from(payload, 4)[0]
        message.properties = payload[_HEADER_HEAD:]
        if size == 0:
            del self._partial[channel]
            return message
        self._partial[channel] = (message, size, parts)
        return None

    def _body(self, channel: int, payload: bytes) -> Incoming | None:
        if channel not in self._partial:
            raise Malformed("a body without its header")
        message, left, parts = self._partial[channel]
        left -= len(payload)
        if left < 0:
            raise Malformed("a body longer than its header says")
        parts.append(payload)
        if left:
            self._partial[channel] = (message, left, parts)
            return None
        del self._partial[channel]
        message.body = parts[0] if len(parts) == 1 else b"".join(parts)
        return message


def _short(payload: bytes, at: int) -> tuple[str, int]:
    end = at + 1 + payload[at]
    if end > len(payload):
        raise IndexError("a short string is longer than its frame")
    return payload[at + 1 : end].decode("utf-8", "surrogateescape"), end


def _route(payload: bytes, at: int) -> tuple[str, str]:
    """An exchange, and a routing key behind it."""
    exchange, at = _short(payload, at)
    return exchange, _short(payload, at)[0]


def _unmarshal(channel: int, payload: bytes) -> Any:
    try:
        return unmarshal(_frame(_METHOD, channel, payload))[2]
    except Exception as error:  # noqa: BLE001 - pamqp raises what it happens to meet
        raise Malformed(f"a method can't be read: {error}") from None
