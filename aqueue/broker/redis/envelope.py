"""kombu's JSON envelope, the bytes of one element of a Redis list (celery-protocol 2.2).

The order of keys is free; ours is the one kombu writes. Priority is written as Redis' own sense of it:
0 is served first, so aqueue's 9 (most urgent) travels as 0.
"""

import json
import re
from binascii import b2a_base64
from typing import Any

import msgspec

from aqueue.errors import BadMessage
from aqueue.identifiers import new_id
from aqueue.protocol import MAX_PRIORITY, Message, Unreadable
from aqueue.serialization import Limits, check_depth, decode_base64, dumps_headers, loads_json
from aqueue.shapes import is_object


class _Envelope(msgspec.Struct):
    body: str
    headers: dict[str, Any] | None = None
    properties: dict[str, Any] | None = None
    content_type: Any = msgspec.field(name="content-type", default=None)
    content_encoding: Any = msgspec.field(name="content-encoding", default=None)


_decode = msgspec.json.Decoder(_Envelope).decode


def pack(message: Message) -> bytes:
    """The envelope of a message, with a fresh delivery tag."""
    return dumps_headers(
        {
            "body": b2a_base64(message.body, newline=False).decode(),
            "content-encoding": message.content_encoding,
            "content-type": message.content_type,
            "headers": message.headers,
            "properties": {
                **message.properties,
                "delivery_info": {"exchange": message.exchange, "routing_key": message.routing_key or message.queue},
                "priority": MAX_PRIORITY - message.priority,
                "body_encoding": "base64",
                "delivery_tag": new_id(),
            },
        }
    )


def unpack(raw: bytes, queue: str, limits: Limits) -> Message | Unreadable:
    """The message in an envelope found on ``queue``; never raises for what the bytes hold."""
    try:
        if len(raw) > 2 * limits.message + limits.headers:
            raise BadMessage("too_large", f"{len(raw):,} bytes, the limit for a body is {limits.message:,}")
        return _message(_parse(raw, limits), queue, len(raw), limits)
    except BadMessage as error:
        return Unreadable(queue, raw, error, _task_id(raw, limits))


#: A property that kombu writes behind body and headers; for a task message it is the task's id.
_CORRELATION_ID = re.compile(rb'"correlation_id": ?"([^"\\]{1,255})"')


def _task_id(raw: bytes, limits: Limits) -> str | None:
    """Whose message it is, found without reading it all: somebody may wait for that task."""
    found = _CORRELATION_ID.findall(raw, max(0, len(raw) - limits.headers))
    return found[-1].decode(errors="replace") if found else None


def _parse(raw: bytes, limits: Limits) -> _Envelope:
    check_depth(raw, limits.depth)
    try:
        return _decode(raw)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        pass  # what Celery's reader tolerates, or a clearer error
    try:
        return msgspec.convert(loads_json(raw, limits.depth, extended=False), _Envelope)
    except (msgspec.ValidationError, UnicodeError) as error:
        raise BadMessage("undecodable", f"not a message envelope: {error}") from error


def _message(envelope: _Envelope, queue: str, size: int, limits: Limits) -> Message:
    if size - len(envelope.body) > limits.headers and _beside_the_body(envelope, size) > limits.headers:
        raise BadMessage("headers_too_large", f"headers and properties are over {limits.headers:,} bytes")
    headers = envelope.headers or {}
    properties = envelope.properties or {}
    found = properties.get("delivery_info")
    info = found if is_object(found) else {}
    exchange = info.get("exchange")
    routing_key = info.get("routing_key")
    if not isinstance(envelope.content_type, str):
        raise BadMessage("content_refused", f"content type is {str(envelope.content_type)[:80]!r}, not a string")
    if not isinstance(envelope.content_encoding, str | None):
        raise BadMessage("bad_encoding", f"content encoding is {str(envelope.content_encoding)[:80]!r}, not a string")
    return Message(
        queue=queue,
        headers=headers,
        body=_body(envelope.body, properties.get("body_encoding")),
        content_type=envelope.content_type,
        content_encoding=envelope.content_encoding,
        properties=properties,
        priority=_priority(properties.get("priority")),
        exchange=exchange if isinstance(exchange, str) else "",
        routing_key=routing_key if isinstance(routing_key, str) else "",
        redelivered=headers.get("redelivered") is True or info.get("redelivered") is True,
    )


def _beside_the_body(envelope: _Envelope, size: int) -> int:
    """Bytes of everything but the body, which may hold escapes, as kombu writes them, or UTF-8."""
    rest = {name: getattr(envelope, name) for name in _Envelope.__struct_fields__ if name != "body"}
    return max(size - len(json.dumps(envelope.body)) + len('""'), len(dumps_headers(rest)))


def _body(body: str, encoding: Any) -> bytes:
    if encoding == "base64":
        return decode_base64(body)
    if encoding in (None, "", "utf-8"):
        return body.encode("utf-8", "surrogatepass")
    raise BadMessage("bad_encoding", f"unknown body_encoding {str(encoding)[:80]!r}")


def _priority(wire: Any) -> int:
    if wire is None:
        return MAX_PRIORITY
    if type(wire) is not int:
        raise BadMessage("bad_header", f"priority is {str(wire)[:80]!r}, not an integer")
    return MAX_PRIORITY - min(max(wire, 0), MAX_PRIORITY)
