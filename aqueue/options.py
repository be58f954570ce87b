"""How one call is sent. Options never mix with the task's own arguments; later ones win over earlier."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, Final, TypedDict

from aqueue.attempts import REMEMBERED
from aqueue.errors import InvalidArguments
from aqueue.protocol import KNOWN_HEADERS, MAX_ID_LENGTH, MAX_PRIORITY, is_name
from aqueue.saferepr import printable
from aqueue.serialization import dumps_headers, is_finite_number
from aqueue.shapes import is_mapping


class Options(TypedDict, total=False):
    """Times are in seconds."""

    queue: str
    #: 0 to 9, higher is more urgent.
    priority: int
    #: Run no sooner than in so many seconds.
    countdown: float
    #: Run no sooner than then; without a zone it is UTC.
    eta: datetime
    #: Don't start later than this: a time, or seconds from now.
    expires: datetime | float
    #: End the run after so long.
    timeout: float
    #: Warn the task after so long, so that it can clean up.
    soft_timeout: float
    #: The same id is the same task: sent twice, it is stored once.
    task_id: str
    #: Travel with the message and are seen in ``Context.headers``.
    headers: Mapping[str, Any]
    ignore_result: bool
    serializer: str
    compression: str
    #: The name shown in logs and monitors instead of the task's.
    shadow: str
    #: Route by the broker's bindings instead of to a queue.
    exchange: str
    routing_key: str
    #: Shown in logs and monitors instead of the arguments, which may be secret.
    argsrepr: str
    kwargsrepr: str


#: Of a call that says nothing; one object, so that such calls are known by it.
NO_OPTIONS: Final = Options()
_KNOWN: Final = frozenset(Options.__annotations__)
_MAX_QUEUE_LENGTH: Final = 255


def check(options: Options) -> Options:
    """The options, if they make sense. Raises InvalidArguments naming the one that doesn't."""
    for name in options:
        if name not in _KNOWN:
            raise InvalidArguments(f"unknown option {name!r}; there are {', '.join(sorted(_KNOWN))}")
    if "queue" in options:
        check_queue(options["queue"])
    priority: object = options.get("priority", 0)
    if type(priority) is not int or not 0 <= priority <= MAX_PRIORITY:
        raise InvalidArguments(
            f"priority is an integer from 0 to {MAX_PRIORITY}, higher is more urgent; got {priority!r}"
        )
    given: Mapping[str, Any] = options
    for name in ("countdown", "timeout", "soft_timeout"):
        seconds = given.get(name, 0)
        if not is_seconds(seconds):
            raise InvalidArguments(f"{name} is a number of seconds, 0 or more; got {seconds!r}")
    if "countdown" in options and "eta" in options:
        raise InvalidArguments("countdown and eta say the same thing; give one of them")
    _check_times(given)
    task_id: object = options.get("task_id", "id")
    if not is_name(task_id, MAX_ID_LENGTH):
        raise InvalidArguments(f"task_id is 1 to {MAX_ID_LENGTH} printable characters; got {task_id!r:.80}")
    if "headers" in options:
        _check_headers(options["headers"])
    return options


def check_cancel(ids: Sequence[str], reason: str, keep: float) -> None:
    """Raises InvalidArguments for what can't be cancelled so."""
    for task_id in ids:
        if not is_name(task_id, MAX_ID_LENGTH):
            raise InvalidArguments(f"a task's id is 1 to {MAX_ID_LENGTH} printable characters; got {task_id!r:.80}")
    if not reason or type(reason) is not str:
        raise InvalidArguments(f"reason is a text, for whoever asks for the result; got {reason!r:.80}")
    if not is_seconds(keep) or not keep:
        raise InvalidArguments(f"keep is a number of seconds over 0; got {keep!r:.80}")


def merged(*layers: Options) -> Options:
    """Options of which the later win over the earlier."""
    found: Options = {}
    for layer in layers:
        if "countdown" in layer:
            found.pop("eta", None)
        elif "eta" in layer:
            found.pop("countdown", None)
        found.update(layer)
    return found


#: A hundred years; more is a mistake, and past what clocks can say.
_MAX_SECONDS: Final = 100 * 366 * 86400


def is_seconds(value: object) -> bool:
    """Whether it is a number of seconds, 0 or more, that a clock can say."""
    return is_finite_number(value) and 0 <= value <= _MAX_SECONDS


def _check_headers(headers: object) -> None:
    if not is_mapping(headers) or not all(isinstance(name, str) for name in headers):
        raise InvalidArguments(f"headers is a mapping from names to values; got {headers!r:.80}")
    taken = (KNOWN_HEADERS | REMEMBERED).intersection(headers)
    if taken:
        raise InvalidArguments(f"headers may not replace the message's own: {', '.join(sorted(taken))}")
    for name, value in headers.items():
        try:
            dumps_headers({name: value})
        except Exception as error:
            raise InvalidArguments(f"headers: {name!r} has no JSON form: {printable(error)}") from error


def _check_times(options: Mapping[str, Any]) -> None:
    if "eta" in options and not isinstance(options["eta"], datetime):
        raise InvalidArguments(f"eta is a datetime; got {options['eta']!r:.80}")
    expires = options.get("expires", 0)
    if not isinstance(expires, datetime) and not (is_finite_number(expires) and is_seconds(abs(expires))):
        raise InvalidArguments(f"expires is a datetime or a number of seconds from now; got {expires!r:.80}")


def check_queue(name: object) -> str:
    """A queue's name, if it can be one on every broker. Raises InvalidArguments."""
    if not is_name(name, _MAX_QUEUE_LENGTH) or " " in name:
        raise InvalidArguments(
            f"a queue's name is 1 to {_MAX_QUEUE_LENGTH} printable characters without spaces; got {name!r:.80}"
        )
    if name.startswith(("aqueue:", "_kombu.")) or name in ("unacked", "unacked_index", "unacked_mutex"):
        raise InvalidArguments(f"queue name {name!r} is taken by the broker's own keys")
    return name
