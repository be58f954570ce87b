"""Elements of a Redis list made by hand, what becomes of them on the way in, and a watch on the time that takes."""

import base64
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from aqueue.broker.redis.envelope import unpack
from aqueue.errors import BadMessage
from aqueue.protocol import Message, Request, decode
from aqueue.serialization import Limits, Serializer

#: Put for a part of an element, it leaves that part out.
ABSENT = object()


def element(body: Any = None, *, headers: Any = None, properties: dict[str, Any] | None = None, **top: Any) -> bytes:
    """An element as kombu writes it, but for what the test says of it.

    ``body`` is bytes, a text to be taken as it is, or a value for JSON. ``headers`` and ``properties`` are laid
    over the usual ones, ``content_type``, ``content_encoding`` and the like replace what stands at the top.
    """
    found: dict[str, Any] = {
        "body": _body([[2, 3], {}, {}] if body is None else body),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": _laid_over({"lang": "py", "task": "proj.tasks.add", "id": "1"}, headers or {}),
        "properties": _laid_over(
            {
                "correlation_id": "1",
                "delivery_info": {"exchange": "", "routing_key": "celery"},
                "priority": 0,
                "body_encoding": "base64",
                "delivery_tag": "tag",
            },
            properties or {},
        ),
    }
    return json.dumps(_laid_over(found, {name.replace("_", "-"): value for name, value in top.items()})).encode()


def _body(body: Any) -> str:
    if isinstance(body, str):
        return body
    return base64.b64encode(body if isinstance(body, bytes) else json.dumps(body).encode()).decode()


def _laid_over(lower: dict[str, Any], upper: Any) -> Any:
    if not isinstance(upper, dict):
        return upper
    return {name: value for name, value in {**lower, **upper}.items() if value is not ABSENT}


def read(raw: bytes, serializer: Serializer | None = None, limits: Limits | None = None) -> Request:
    """The request in an element. Raises the BadMessage that says why there is none."""
    serializer = serializer or Serializer(limits=limits or Limits())
    with quickly(1.0):
        message = unpack(raw, "celery", serializer.limits)
        if isinstance(message, Message):
            return decode(message, serializer)
    assert message.raw == raw, "the bytes are kept as they came"
    assert message.queue == "celery"
    raise message.error


def message_of(raw: bytes) -> Message:
    """The message in an element that is one."""
    found = unpack(raw, "celery", Limits())
    assert isinstance(found, Message), found
    return found


E = TypeVar("E", bound=BaseException)


def error_of(kind: type[E], action: Callable[[], object]) -> E | None:
    """The error of a kind that an action ends with; None when it ends well. Any other error goes on."""
    try:
        action()
    except kind as error:
        return error
    return None


def refusal(raw: bytes, serializer: Serializer | None = None, limits: Limits | None = None) -> BadMessage | None:
    """Why an element can't be read; None when it can. Any other error than BadMessage fails the test."""
    error = error_of(BadMessage, lambda: read(raw, serializer, limits))
    assert len(str(error)) < 1000, f"{len(str(error)):,} characters of a message's own in the reason"
    return error


def reason(raw: bytes, serializer: Serializer | None = None, limits: Limits | None = None) -> str | None:
    """The code under which an element that can't be read is buried; None when it can be read."""
    error = refusal(raw, serializer, limits)
    return None if error is None else error.reason


@contextmanager
def quickly(seconds: float = 0.5) -> Iterator[None]:
    """Fails when what is inside takes more than so much of the processor's time."""
    started = time.process_time()
    try:
        yield
    finally:
        taken = time.process_time() - started
        assert taken < seconds, f"took {taken:.2f} s of processor time, {seconds:g} s are enough"


def nested(depth: int, innermost: Any = 1) -> Any:
    """A value inside so many lists."""
    for _ in range(depth):
        innermost = [innermost]
    return innermost
