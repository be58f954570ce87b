"""Messages to AMQP's properties and back (celery-protocol 1.2, 3.3).

Four headers are ours, and are never seen above the broker::

    aqueue-deliveries   int     holders that lost the message, where the server doesn't count them
    aqueue-history      str     when it came back, and how it died before, as JSON (see `aqueue.broker.history`)
    aqueue-dead         table   why a dead letter died, see `aqueue.broker.amqp.dead`
    aqueue-properties   bytes   of a dead letter whose own properties nobody can read; or an integer: they are so many
                                bytes, and stand before its body

``expiration`` is not sent: the server would drop what has expired without a word, while a worker that reads the
``expires`` header says REVOKED. ``user_id`` is not sent on: the server refuses another's.
"""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from aqueue.broker.history import NO_HISTORY, History, decode, encode
from aqueue.drivers.amqp_codec import Delivered, Malformed, decode_properties, encode_properties, encode_short
from aqueue.drivers.amqp_publisher import Publication
from aqueue.errors import BadMessage
from aqueue.protocol import MAX_PRIORITY, Message, Unreadable

LOST: Final = "aqueue-deliveries"
HISTORY: Final = "aqueue-history"
LETTER: Final = "aqueue-dead"
RAW_PROPERTIES: Final = "aqueue-properties"
#: By which a quorum queue counts (section 3.6).
_SERVER_COUNT: Final = "x-delivery-count"
#: What the server writes when it moves a message. Sent again, it would take the message for one that goes in circles.
_DEATH: Final = ("x-death", "x-first-death-", "x-last-death-")
#: Characters of a name that needs no closer look: each is four bytes at most, and a name has 255.
_SURELY_SHORT: Final = 63
#: Bytes of properties beside which there is surely room for headers of ours: all must go into one frame.
ROOMY: Final = 60_000
#: Properties that travel as they came; all are text.
_CARRIED: Final = ("correlation_id", "reply_to", "message_id", "type", "app_id")


def pack(
    message: Message, *, exchange: str = "", routing_key: str = "", headers: Mapping[str, Any] | None = None
) -> Publication:
    """A message for an exchange, or straight to its queue. Raises Malformed for what AMQP can't carry."""
    for name in (exchange, routing_key or message.queue):
        if len(name) > _SURELY_SHORT:
            encode_short(name)
    given = message.properties
    properties: dict[str, Any] = {name: given[name] for name in _CARRIED if isinstance(given.get(name), str)}
    transient = given.get("delivery_mode") == 1
    properties |= {
        "content_type": message.content_type,
        "content_encoding": message.content_encoding,
        "headers": {**message.headers, **headers} if headers else message.headers,
        "delivery_mode": 1 if transient else 2,
        "priority": message.priority,
    }
    return Publication(
        exchange,
        routing_key or message.queue,
        encode_properties(properties),
        message.body,
        properties.get("correlation_id", ""),
    )


class Unpacked(msgspec.Struct, frozen=True):
    """``lost``: how many holders have lost it. ``counted``: the server, or a header, says so for certain.

    ``came_back``: a holder lost this very copy.
    """

    message: Message | Unreadable
    lost: int
    counted: bool
    came_back: bool
    history: History = NO_HISTORY


def memory(lost: int, history: History) -> dict[str, Any]:
    """The headers by which a message that is sent again remembers its losses."""
    told = encode(history)
    return {**({LOST: lost} if lost else {}), **({} if told is None else {HISTORY: told.decode()})}


def unpack(delivered: Delivered, queue: str) -> Unpacked:
    """What came from a queue."""
    try:
        properties = decode_properties(delivered.properties)
    except Malformed as error:
        unreadable = Unreadable(queue, delivered.body, BadMessage("undecodable", str(error)))
        return Unpacked(unreadable, int(delivered.redelivered), not delivered.redelivered, delivered.redelivered)
    headers: dict[str, Any] = properties.pop("headers", None) or {}
    lost = count_of(headers.pop(LOST, 0))
    by_server = count_of(headers.pop(_SERVER_COUNT, 0))
    told = headers.pop(HISTORY, None)
    if _DEATH[0] in headers:
        for name in [name for name in headers if name.startswith(_DEATH)]:
            del headers[name]
    message = Message(
        queue=queue,
        headers=headers,
        body=delivered.body,
        content_type=properties.pop("content_type", ""),
        content_encoding=properties.pop("content_encoding", None),
        priority=min(properties.pop("priority", 0), MAX_PRIORITY),
        properties=properties,
        redelivered=delivered.redelivered,
    )
    uncounted = delivered.redelivered and not by_server
    history = decode(told) if isinstance(told, str) else NO_HISTORY
    return Unpacked(message, lost + by_server + uncounted, not uncounted, by_server > 0 or uncounted, history)


def priority_of(properties: bytes) -> int:
    """The priority alone, without reading the headers; 0 where it can't be found."""
    flags = int.from_bytes(properties[:2], "big")
    if not flags & 0x0800:
        return 0
    at = 2
    try:
        for flag in (0x8000, 0x4000):
            if flags & flag:
                at += 1 + properties[at]
        if flags & 0x2000:
            at += 4 + int.from_bytes(properties[at : at + 4], "big")
        return properties[at + bool(flags & 0x1000)]
    except IndexError:
        return 0


def count_of(value: Any) -> int:
    """A count in a header; 0 for what is none."""
    return value if type(value) is int and 0 <= value <= 1_000_000 else 0
