"""Celery task messages to and from `Request` (celery-protocol section 1). Pure: no I/O, no clock.

::

    Message   what a broker carries: headers, an encoded body, properties; it never reads them
    Request   a message understood: task name, id, arguments, limits, family

`decode` reads protocol 2, protocol 1 and the oddities that Celery tolerates; whatever can't be read
raises BadMessage with a reason code, so that the worker can bury the message and go on. `task_message`
writes protocol 2 with every header of section 1.3. `retry_message` sends a message's own bytes again.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any, Final, TypeGuard

import msgspec

from aqueue.attempts import ERRORS, REMEMBERED, SNOOZES, snoozes_of
from aqueue.compression import compress, decompress
from aqueue.errors import BadMessage, MessageTooLarge
from aqueue.saferepr import printable
from aqueue.serialization import JSON, Serializer, dumps_headers, is_finite_number
from aqueue.shapes import is_list, is_object

MAX_ID_LENGTH: Final = 255
MAX_NAME_LENGTH: Final = 255
MAX_PRIORITY: Final = 9
#: Beyond it a `retries` header is a mistake or an attack, not a count.
MAX_RETRIES: Final = 1_000_000

#: Headers of section 1.3; every other key is the application's own.
KNOWN_HEADERS: Final = frozenset(
    "lang task id shadow eta expires group group_index retries timelimit root_id parent_id argsrepr kwargsrepr "
    "origin ignore_result replaced_task_nesting stamped_headers stamps compression meth redelivered".split()
)


class Record(msgspec.Struct, frozen=True):
    """One entry of a result store: a key, its value, and its life in seconds (None: no end).

    A broker that keeps results on its own server takes records along with its own work, see
    `aqueue.broker.Broker.keeps`.
    """

    key: str
    value: bytes
    ttl: float | None


def is_success(document: bytes) -> bool:
    """Whether an encoded result document says SUCCESS; its state comes first, in JSON and in msgpack."""
    if document.startswith(b"{"):
        return document.startswith((b'{"status": "SUCCESS"', b'{"status":"SUCCESS"'))
    head = 3 if document.startswith(b"\xde") else 1  # msgpack's map of more than 15 keys, or of fewer
    return document.startswith(b"\xa6status\xa7SUCCESS", head)


class Message(msgspec.Struct, kw_only=True):
    """What a broker carries.

    ``priority`` is aqueue's: 0 to 9, higher is more urgent; each broker translates it to its wire.
    ``delay`` is in seconds from now, by the broker's clock. With ``exchange`` set the message is routed
    by the broker's bindings with ``routing_key``, otherwise it goes straight to ``queue``.
    ``announce`` is written together with the message if its key is absent; when the key exists the task
    was sent before and the message is dropped.
    """

    queue: str
    headers: dict[str, Any]
    body: bytes
    content_type: str = JSON
    content_encoding: str | None = "utf-8"
    properties: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    priority: int = 0
    delay: float = 0.0
    exchange: str = ""
    routing_key: str = ""
    redelivered: bool = False
    announce: Record | None = None


class Unreadable(msgspec.Struct, frozen=True):
    """Bytes found on a queue that are no message at all, or one of which too little can be read."""

    queue: str
    raw: bytes
    error: BadMessage
    #: Whose result says so.
    task_id: str | None = None


class Embed(msgspec.Struct, kw_only=True, frozen=True):
    """What follows a task (section 1.4): signature dicts, ``chain`` with the next step last."""

    callbacks: list[dict[str, Any]] | None = None
    errbacks: list[dict[str, Any]] | None = None
    chain: list[dict[str, Any]] | None = None
    chord: dict[str, Any] | None = None


NOTHING_FOLLOWS: Final = Embed()


class Request(msgspec.Struct, kw_only=True):
    """A task message understood. Limits are in seconds, times are aware datetimes."""

    id: str
    task: str
    args: list[Any]
    kwargs: dict[str, Any]
    embed: Embed
    message: Message
    retries: int
    root_id: str
    eta: datetime | None = None
    expires: datetime | None = None
    time_limit: float | None = None
    soft_time_limit: float | None = None
    parent_id: str | None = None
    group: str | None = None
    group_index: int | None = None
    ignore_result: bool | None = None
    shadow: str | None = None

    @property
    def headers(self) -> dict[str, Any]:
        """The application's own headers."""
        headers = self.message.headers.items()
        return {key: value for key, value in headers if key not in KNOWN_HEADERS and key not in REMEMBERED}


# --- reading ----------------------------------------------------------------------------------------


class _Headers(msgspec.Struct):
    """The headers that decide something, with the types of section 1.3; others are left alone."""

    task: str
    id: str
    retries: int | None = 0
    eta: str | None = None
    expires: str | None = None
    timelimit: tuple[float | None, float | None] | None = None
    root_id: str | None = None
    parent_id: str | None = None
    group: str | None = None
    group_index: int | None = None
    ignore_result: bool | None = None
    shadow: str | None = None


def decode(message: Message, serializer: Serializer) -> Request:
    """Read a task message of protocol 2, 1 or the hybrid of both. Raises BadMessage."""
    headers = message.headers
    body = _body(message, serializer)
    if "task" not in headers:
        return _from_protocol_1(message, body)
    if is_object(body):
        if "args" not in body:
            raise BadMessage("bad_body", "the body is an object without 'args'")
        return _from_protocol_1(message, {**body, **headers})
    if not is_list(body) or len(body) != 3:
        raise BadMessage("bad_body", f"the body is {_shape(body)}, not [args, kwargs, embed]")
    args, kwargs, embed = body
    return _request(message, headers, args, kwargs, embed)


def _body(message: Message, serializer: Serializer) -> Any:
    data = message.body
    if len(data) > serializer.limits.message:
        raise BadMessage("too_large", f"{len(data):,} bytes, the limit is {serializer.limits.message:,}")
    compression = message.headers.get("compression")
    if compression is not None:
        if not isinstance(compression, str):
            raise BadMessage("bad_header", f"compression is {_shape(compression)}")
        data = decompress(data, compression, serializer.limits.decompressed)
    return serializer.loads(data, message.content_type, message.content_encoding)


def _from_protocol_1(message: Message, body: Any) -> Request:
    """Section 1.7. For a hybrid the caller has laid the headers over the body."""
    if not is_object(body) or "task" not in body:
        raise BadMessage("bad_body", f"no 'task' header, and the body is {_shape(body)} without 'task'")
    if body.get("taskset") is not None:
        body = {**body, "group": body["taskset"]}
    embed = {key: body.get(key) for key in ("callbacks", "errbacks", "chain", "chord")}
    return _request(message, body, body.get("args") or [], body.get("kwargs") or {}, embed)


def _request(message: Message, headers: Mapping[str, Any], args: Any, kwargs: Any, embed: Any) -> Request:
    if not is_object(kwargs):
        raise BadMessage("bad_body", f"kwargs is {_shape(kwargs)}, not an object")
    head = _head(headers)
    hard, soft = head.timelimit or (None, None)
    return Request(
        id=head.id,
        task=head.task,
        args=_as_list(args),
        kwargs=kwargs,
        embed=NOTHING_FOLLOWS if not embed else _embed(embed),
        message=message,
        retries=head.retries or 0,
        root_id=head.root_id or head.id,
        eta=None if head.eta is None else _time(head.eta, "eta"),
        expires=None if head.expires is None else _time(head.expires, "expires"),
        time_limit=hard,
        soft_time_limit=soft,
        parent_id=head.parent_id,
        group=head.group,
        group_index=head.group_index,
        ignore_result=head.ignore_result,
        shadow=head.shadow,
    )


def _as_list(args: Any) -> list[Any]:
    """An object is iterated, as Celery does it: its keys become the arguments."""
    if not is_list(args) and not is_object(args):
        raise BadMessage("bad_body", f"args is {_shape(args)}, not a list")
    return list(args)


def _head(headers: Mapping[str, Any]) -> _Headers:
    try:
        head = msgspec.convert(headers, _Headers)
    except (msgspec.ValidationError, UnicodeError):  # lone surrogates
        head = _tolerated(headers)
    for reason, what, value, longest in (
        ("bad_id", "the task id", head.id, MAX_ID_LENGTH),
        ("bad_name", "the task name", head.task, MAX_NAME_LENGTH),
    ):
        if not is_name(value, longest):
            raise BadMessage(reason, f"{what} is {_shape(value)}; expected 1 to {longest} printable characters")
    if head.retries and not 0 < head.retries <= MAX_RETRIES:
        head.retries = _clamped(head.retries)
    if head.timelimit is not None and head.timelimit != (None, None):
        head.timelimit = _time_limits(head.timelimit)
    return head


def is_name(value: object, longest: int) -> TypeGuard[str]:
    """Whether it can be an id or a name: 1 to ``longest`` printable characters."""
    return isinstance(value, str) and 0 < len(value) <= longest and value.isprintable()


def _tolerated(headers: Mapping[str, Any]) -> _Headers:
    """Once more, with what Celery lets pass; else say which header is wrong."""
    found = dict(headers)
    retries = found.get("retries")
    if isinstance(retries, str) and retries.isdecimal() and len(retries) <= 6:
        found["retries"] = int(retries)
    for name, reason in (("id", "bad_id"), ("task", "bad_name"), ("eta", "bad_eta"), ("expires", "bad_expires")):
        required = name in ("id", "task")
        if not isinstance(found.get(name), str) and (required or found.get(name) is not None):
            raise BadMessage(reason, f"{name} is {_shape(found.get(name))}, not a string")
    try:
        return msgspec.convert(found, _Headers)
    except (msgspec.ValidationError, UnicodeError) as error:
        raise BadMessage("bad_header", printable(error)) from error


def _clamped(retries: int) -> int:
    if retries > MAX_RETRIES:
        raise BadMessage("bad_header", f"retries is {printable(retries, 60)}, over {MAX_RETRIES:,}")
    return 0


def _time_limits(limits: tuple[float | None, float | None]) -> tuple[float | None, float | None]:
    """``(hard, soft)`` in seconds, hard first; 0 is none."""
    for limit in limits:
        if limit is not None and not (is_finite_number(limit) and limit >= 0):
            raise BadMessage("bad_header", f"timelimit holds {_shape(limit)}, not a number of seconds")
    return limits[0] or None, limits[1] or None


def _embed(found: Any) -> Embed:
    if not is_object(found):
        raise BadMessage("bad_body", f"embed is {_shape(found)}, not an object")
    if not any(found.values()):
        return NOTHING_FOLLOWS
    try:
        return msgspec.convert(found, Embed)
    except (msgspec.ValidationError, UnicodeError) as error:
        raise BadMessage("bad_canvas", printable(error)) from error


def _time(value: str, name: str) -> datetime:
    """An ISO-8601 text; without an offset it is UTC, as every worker reads it (section 1.5)."""
    try:
        time = datetime.fromisoformat(value)
        return (time.replace(tzinfo=timezone.utc) if time.tzinfo is None else time).astimezone(timezone.utc)
    except (ValueError, OverflowError) as error:
        raise BadMessage(f"bad_{name}", f"not an ISO-8601 time: {printable(error)}") from error


def _shape(value: Any) -> str:
    """A short text for error messages; never the whole value, which may be huge."""
    if isinstance(value, str):
        return f"the string {printable(value, 60)!r}"
    if is_list(value) or is_object(value):
        return f"{'an object' if is_object(value) else 'a list'} of {len(value)}"
    return f"{type(value).__name__} {printable(value, 60)}" if value is not None else "null"


# --- writing ----------------------------------------------------------------------------------------


class Template(msgspec.Struct, kw_only=True, frozen=True):
    """What all messages of one task sent with one set of options have in common."""

    task: str
    queue: str
    serializer: str
    compression: str | None = None
    priority: int = 0
    exchange: str = ""
    routing_key: str = ""
    #: Every header of section 1.3; those of a single call are filled in by `task_message`.
    headers: dict[str, Any]
    #: Bytes of these headers.
    size: int


def template(
    task: str,
    *,
    queue: str,
    serializer: str,
    origin: str,
    compression: str | None = None,
    priority: int = 0,
    exchange: str = "",
    routing_key: str = "",
    time_limit: float | None = None,
    soft_time_limit: float | None = None,
    ignore_result: bool | None = False,
    shadow: str | None = None,
    headers: Mapping[str, Any] | None = None,
) -> Template:
    """Make a template; ``headers`` are the application's own, ``ignore_result`` None leaves it to the worker."""
    every = {
        "lang": "py",
        "task": task,
        "id": None,
        "shadow": shadow,
        "eta": None,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": (time_limit, soft_time_limit),
        "root_id": None,
        "parent_id": None,
        "argsrepr": None,
        "kwargsrepr": None,
        "origin": origin,
        "ignore_result": ignore_result,
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": None,
        **(headers or {}),
    }
    return Template(
        task=task,
        queue=queue,
        serializer=serializer,
        compression=compression,
        priority=priority,
        exchange=exchange,
        routing_key=routing_key,
        headers=every,
        size=len(dumps_headers(every)),
    )


class Call(msgspec.Struct, kw_only=True, frozen=True):
    """What belongs to a single call."""

    id: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    argsrepr: str
    kwargsrepr: str
    reply_to: str
    root_id: str
    parent_id: str | None = None
    delay: float = 0.0
    eta: datetime | None = None
    expires: datetime | None = None
    #: Seconds until `expires` at the time of sending; becomes the `expiration` property.
    expires_in: float | None = None


def task_message(common: Template, call: Call, serializer: Serializer) -> Message:
    """A protocol 2 message. Raises EncodeError, MessageTooLarge, ConfigurationError."""
    body = serializer.dumps_call(call.args, call.kwargs, _NO_EMBED, common.serializer)
    data = body.data
    headers = common.headers.copy()
    headers["id"] = call.id
    headers["eta"] = call.eta and call.eta.isoformat()
    headers["expires"] = call.expires and call.expires.isoformat()
    headers["root_id"] = call.root_id
    headers["parent_id"] = call.parent_id
    headers["argsrepr"] = call.argsrepr
    headers["kwargsrepr"] = call.kwargsrepr
    headers["timelimit"] = list(headers["timelimit"])
    headers["stamps"] = {}
    room = serializer.limits.headers * 15 // 16  # the rest is left to the broker's own properties
    if common.size + _MAX_ESCAPE * (len(call.argsrepr) + len(call.kwargsrepr)) > room:
        _check_headers(headers, common.task, room)
    if common.compression is not None:
        data, headers["compression"] = compress(data, common.compression)
    serializer.check_size(len(data), f"the message for task {common.task}")
    properties: dict[str, Any] = {"correlation_id": call.id, "reply_to": call.reply_to, "delivery_mode": 2}
    if call.expires_in is not None:
        properties["expiration"] = str(max(0, int(call.expires_in * 1000)))
    return Message(
        queue=common.queue,
        headers=headers,
        body=data,
        content_type=body.content_type,
        content_encoding=body.content_encoding,
        properties=properties,
        priority=common.priority,
        delay=call.delay,
        exchange=common.exchange,
        routing_key=common.routing_key,
    )


#: Bytes of JSON that a character takes at most.
_MAX_ESCAPE: Final = 6


def _check_headers(headers: dict[str, Any], task: str, room: int) -> None:
    size = len(dumps_headers(headers))
    if size > room:
        raise MessageTooLarge(
            f"the headers of the message for task {task} are {size:,} bytes, the limit is {room:,}; "
            "pass what is large as an argument"
        )


_NO_EMBED: Final = {"callbacks": None, "errbacks": None, "chain": None, "chord": None}


def retry_message(request: Request, delay: float, now: float, errors: Sequence[Mapping[str, Any]] = ()) -> Message:
    """The same message once more: one retry further, its body untouched (section 6.3).

    ``delay`` is in seconds, ``now`` the broker's clock as unix time; ``errors`` is what `aqueue.attempts` remembers
    of the attempts so far. A protocol 1 message gets headers and so becomes the hybrid of section 1.7.
    """
    again: dict[str, Any] = {"retries": request.retries + 1, "parent_id": request.id}
    if errors:
        again[ERRORS] = errors
    return _once_more(request, delay, now, again)


def snooze_message(request: Request, delay: float, now: float) -> Message:
    """The same message once more, as the same attempt; like `retry_message`."""
    again = {"retries": request.retries, SNOOZES: snoozes_of(request.message.headers) + 1}
    return _once_more(request, delay, now, again)


def _once_more(request: Request, delay: float, now: float, changed: Mapping[str, Any]) -> Message:
    message = request.message
    eta = datetime.fromtimestamp(now, timezone.utc) + timedelta(seconds=delay) if delay > 0 else None
    headers = {
        key: value
        for key, value in (message.headers if "task" in message.headers else _headers_of(request)).items()
        if key != "redelivered" and not key.startswith(("x-death", "x-first-death-", "x-last-death-"))
    }
    headers["eta"] = eta and eta.isoformat()
    headers.update(changed)
    return msgspec.structs.replace(message, headers=headers, delay=delay, redelivered=False, announce=None)


def _headers_of(request: Request) -> dict[str, Any]:
    return {
        **request.message.headers,
        "lang": "py",
        "task": request.task,
        "id": request.id,
        "expires": request.expires and request.expires.isoformat(),
        "group": request.group,
        "group_index": request.group_index,
        "timelimit": [request.time_limit, request.soft_time_limit],
        "root_id": request.root_id,
    }
