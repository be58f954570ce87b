"""Dead letters on RabbitMQ: one durable queue, ``aqueue.dead``, for everything that died in a virtual host.

A letter is the message as it was, with a header that says why. Queues whose ``x-dead-letter-exchange`` is ``""`` and
``x-dead-letter-routing-key`` is ``aqueue.dead`` have what the server itself gives up put there, too: then the
server's own ``x-death`` tells why.
"""

import time
from datetime import datetime, timezone
from typing import Any, Final
from uuid import uuid4

import msgspec

from aqueue.broker import Bury, DeadLetter, Delivery
from aqueue.broker.amqp.messages import LETTER, RAW_PROPERTIES, ROOMY, count_of, memory, pack, unpack
from aqueue.broker.amqp.topology import DEAD
from aqueue.broker.history import decode, encode
from aqueue.drivers.amqp_codec import Delivered, Malformed, decode_properties, encode_properties
from aqueue.drivers.amqp_publisher import Publication
from aqueue.protocol import Message
from aqueue.shapes import is_list, is_object

#: Of what the server buried, until it is looked at again.
_NO_ID: Final = "-"


def letter(delivery: Delivery, verdict: Bury, worker: str, delivered: Delivered) -> Publication:
    """A delivery as a dead letter. ``delivered`` is what came, for messages that nobody can read."""
    id = uuid4().hex[:12]
    head = {
        "id": id,
        "queue": delivery.message.queue,
        "reason": verdict.reason,
        "detail": verdict.detail,
        "died": datetime.now(timezone.utc).isoformat(),
        "deliveries": delivery.deliveries,
        "worker": worker,
        "history": (encode(delivery.history) or b"").decode(),
    }
    if isinstance(delivery.message, Message):
        readable = pack(delivery.message, routing_key=DEAD, headers={LETTER: head})
        if len(readable.properties) <= ROOMY:
            return readable
        own, body = pack(delivery.message).properties, delivery.message.body
    else:
        own, body = delivered.properties, delivered.body
    if len(own) > ROOMY:
        properties = encode_properties({"headers": {LETTER: head, RAW_PROPERTIES: len(own)}, "delivery_mode": 2})
        return Publication("", DEAD, properties, own + body, "")
    properties = encode_properties({"headers": {LETTER: head, RAW_PROPERTIES: own}, "delivery_mode": 2})
    return Publication("", DEAD, properties, body, "")


def read_letter(delivered: Delivered) -> DeadLetter:
    """A message of the dead letters' queue."""
    head, properties, body = _open(delivered)
    queue = str(head.get("queue"))
    original = msgspec.structs.replace(delivered, redelivered=False, properties=properties, body=body)
    message = unpack(original, queue).message
    return DeadLetter(
        id=str(head.get("id")),
        reason=str(head.get("reason")),
        detail=str(head.get("detail")),
        died=_time(head.get("died")),
        deliveries=count_of(head.get("deliveries")),
        worker=str(head.get("worker")),
        message=message,
        history=decode(str(head.get("history") or "")),
    )


def original_of(letter: DeadLetter, delivered: Delivered) -> Publication:
    """What goes back to the letter's queue."""
    if isinstance(letter.message, Message):
        again = pack(letter.message, headers=memory(0, letter.after_replay(time.time())))
        return again if len(again.properties) <= ROOMY else pack(letter.message)
    _, properties, body = _open(delivered)
    return Publication("", letter.message.queue, properties, body, "")


def _open(delivered: Delivered) -> tuple[dict[str, Any], bytes, bytes]:
    """Why it died, and the properties and the body that the message had."""
    try:
        properties = decode_properties(delivered.properties)
    except Malformed:  # the server buried it: nobody else could
        return _head_of_the_server({}), delivered.properties, delivered.body
    headers: dict[str, Any] = properties.get("headers") or {}
    head = headers.pop(LETTER, None)
    raw = headers.pop(RAW_PROPERTIES, None)
    if not is_object(head):
        head = _head_of_the_server(headers)
    if type(raw) is int and 0 < raw <= len(delivered.body):
        return head, delivered.body[:raw], delivered.body[raw:]
    return head, raw if isinstance(raw, bytes) else encode_properties(properties), delivered.body


def _head_of_the_server(headers: dict[str, Any]) -> dict[str, Any]:
    deaths = headers.get("x-death")
    last: Any = deaths[0] if is_list(deaths) and deaths and is_object(deaths[0]) else {}
    reason = str(last.get("reason", "unknown"))
    return {
        "id": str(headers.get("id") or _NO_ID),
        "queue": str(last.get("queue", DEAD)),
        "reason": f"server_{reason}",
        "detail": f"RabbitMQ gave it up: {reason}",
        "died": last.get("time"),
        "deliveries": headers.get("x-delivery-count"),
        "worker": "",
    }


def _time(value: Any) -> datetime:
    if isinstance(value, datetime):
        return value
    try:
        return datetime.fromisoformat(str(value))
    except ValueError:
        return datetime.fromtimestamp(0, timezone.utc)
