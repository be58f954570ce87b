"""The functions that both fleets run, under the same names: `tests.interop.celery_app` and `.aqueue_app`.

A task that has to wait waits for a flag, a key that the test sets when it has seen what it wanted to see. What
tasks leave for the test to read lies in Redis too, see `traces`.
"""

import os
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

import redis

#: The database, on the broker's server, where tasks leave their traces.
TRACES: Final = 5
#: Which kind of process this is: ``celery``, ``aqueue``; set by who starts it.
WHO: Final = "INTEROP_WHO"
#: Seconds after which a task that waits for a flag gives up.
_PATIENCE: Final = 60.0


class Declined(Exception):
    """An exception of the application's own, with more than a text."""

    def __init__(self, reason: Any, code: int) -> None:
        super().__init__(reason, code)
        self.reason = reason
        self.code = code


class Shop:
    """A class with an exception inside of it."""

    class Closed(Exception):
        pass


@cache
def traces(port: int) -> Any:
    """Where tasks leave their traces, on the server with this port."""
    return redis.Redis(port=port, db=TRACES, socket_timeout=10, decode_responses=True)


def who() -> str:
    return os.environ.get(WHO, "in-process")


# --- plain functions -------------------------------------------------------------------------------------------------


def give(value: Any) -> Any:
    """What came in, and so in both directions through every encoder."""
    return value


def echo(*args: Any, **kwargs: Any) -> Any:
    return [list(args), kwargs]


def kinds(*values: Any) -> list[str]:
    """What a worker has made of its arguments."""
    return [type(value).__name__ for value in values]


def measure(text: str) -> int:
    return len(text)


def fail(text: str) -> None:
    raise ValueError(text)


def fail_with_two(first: str, second: int) -> None:
    raise KeyError(first, second)


def decline(reason: str, code: int) -> None:
    raise Declined(reason, code)


def decline_in_detail(details: Any) -> None:
    """Raise an exception whose argument is a document, as those of form validators are."""
    raise Declined(details, 400)


def fail_as_closed(text: str) -> None:
    raise Shop.Closed(text)


def fail_strangely(text: str) -> None:
    """Raise what no other process can import."""

    class Strange(Exception):
        pass

    raise Strange(text)


def fail_with_an_object() -> None:
    """Raise an exception that holds what no serializer can write."""
    raise ValueError("with", Path)


def give_what_can_not_be_stored() -> Any:
    return Path("/")


def wait_for_flag(port: int, flag: str) -> str:
    """Say that it runs, then wait until the flag is up."""
    found = traces(port)
    found.incr(f"runs:{flag}")
    ends = time.monotonic() + _PATIENCE
    while not found.exists(f"flag:{flag}"):
        if time.monotonic() > ends:
            raise TimeoutError(f"nobody put up {flag}")
        time.sleep(0.02)
    return who()


def count(port: int, key: str) -> str:
    """Count this run, by its key and by who did it."""
    found = traces(port)
    found.incr(f"runs:{key}")
    found.rpush(f"who:{key}", who())
    found.incr(f"by:{who()}")
    return who()


def count_slowly(port: int, key: str) -> str:
    """`count` with enough work that a backlog lasts."""
    time.sleep(0.01)
    return count(port, key)


def note(port: int, key: str, label: str) -> None:
    """Append to a list, which so shows the order of runs."""
    traces(port).rpush(f"notes:{key}", label)


def stamp(port: int, key: str) -> float:
    """Tell when it ran, by the server's clock, which all share."""
    found = traces(port)
    seconds, microseconds = found.time()
    found.incr(f"runs:{key}")
    return float(seconds + microseconds / 1e6)


# --- with Celery's ``self`` ------------------------------------------------------------------------------------------


def request(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What the worker tells a task of its message."""
    found = self.request
    info = found.delivery_info
    return {
        "id": found.id,
        "task": found.task,
        "args": list(found.args),
        "kwargs": found.kwargs,
        "retries": found.retries,
        "root_id": found.root_id,
        "parent_id": found.parent_id,
        "headers": found.headers,
        "expires": found.expires,
        "timelimit": found.timelimit,
        "correlation_id": found.correlation_id,
        "routing_key": info["routing_key"],
        "priority": info["priority"],
        "has_origin": bool(found.origin),
        "by": who(),
    }


def request_after_retry(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """`request`, told by the second attempt."""
    if not self.request.retries:
        raise self.retry(countdown=0.1)
    return request(self, *args, **kwargs)


def progress(self: Any, port: int, flag: str) -> str:
    """Tell of progress, then wait for the flag."""
    self.update_state(state="PROGRESS", meta={"done": 1, "total": 2})
    return wait_for_flag(port, flag)


def retry_self(self: Any, times: int, countdown: float, port: int = 0, key: str = "") -> list[Any]:
    """Celery's way to try again; gives the number of retries."""
    if port:
        traces(port).rpush(f"attempts:{key}", f"{self.request.retries} {who()}")
    if self.request.retries < times:
        raise self.retry(exc=ConnectionError(f"try {self.request.retries}"), countdown=countdown, max_retries=5)
    return [self.request.retries, who()]


def retry_too_often(self: Any) -> None:
    """Ask for more than is allowed, without naming a cause."""
    raise self.retry(countdown=0, max_retries=1)


PLAIN: Final[dict[str, Callable[..., Any]]] = {
    "interop.give": give,
    "interop.echo": echo,
    "interop.kinds": kinds,
    "interop.measure": measure,
    "interop.fail": fail,
    "interop.fail_with_two": fail_with_two,
    "interop.decline": decline,
    "interop.decline_in_detail": decline_in_detail,
    "interop.fail_as_closed": fail_as_closed,
    "interop.fail_strangely": fail_strangely,
    "interop.fail_with_an_object": fail_with_an_object,
    "interop.give_what_can_not_be_stored": give_what_can_not_be_stored,
    "interop.wait_for_flag": wait_for_flag,
    "interop.count": count,
    "interop.count_slowly": count_slowly,
    "interop.note": note,
    "interop.stamp": stamp,
}

BOUND: Final[dict[str, Callable[..., Any]]] = {
    "interop.request": request,
    "interop.request_after_retry": request_after_retry,
    "interop.progress": progress,
    "interop.retry_self": retry_self,
    "interop.retry_too_often": retry_too_often,
}
