"""Dead letters for the command line: which are meant, how they are shown, how they are written to a file."""

import base64
import binascii
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from typing import Any, Final

import msgspec

from aqueue.broker import DeadLetter
from aqueue.broker.history import Death, Loss
from aqueue.errors import ConfigurationError
from aqueue.protocol import Message, Unreadable

_UNITS: Final = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}
#: Of what an export is; a reader refuses what it does not know.
_FORMAT: Final = 1


def duration(text: str) -> float:
    """Seconds from ``90``, ``90s``, ``5m``, ``1h``, ``2d`` or ``1w``. Raises ConfigurationError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw]?)", text)
    if found is None:
        raise ConfigurationError(f"{text!r} is no length of time; write 90, 30s, 5m, 1h, 2d or 1w")
    return float(found[1]) * _UNITS[found[2]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which letters are meant: those for which all that is said is true."""

    #: Of letters or of tasks.
    ids: Sequence[str] = ()
    queue: str = ""
    reason: str = ""
    #: A name with ``*`` and ``?``.
    task: str = ""
    #: Seconds since they died.
    older_than: float | None = None
    newer_than: float | None = None
    now: float = field(default_factory=time.time)

    @property
    def is_everything(self) -> bool:
        said = (self.ids, self.queue, self.reason, self.task)
        return not any(said) and self.older_than is None and self.newer_than is None

    def __call__(self, letter: DeadLetter) -> bool:
        age = self.now - letter.died.timestamp()
        return (
            (not self.ids or letter.id in self.ids or header(letter, "id") in self.ids)
            and self.queue in ("", letter.message.queue)
            and self.reason in ("", letter.reason)
            and (not self.task or fnmatchcase(str(header(letter, "task")), self.task))
            and (self.older_than is None or age >= self.older_than)
            and (self.newer_than is None or age < self.newer_than)
        )


def header(letter: DeadLetter, name: str) -> Any:
    """A header of the message; nothing when it can't be read."""
    return "" if isinstance(letter.message, Unreadable) else letter.message.headers.get(name, "")


class Tally:
    """How many letters there were, by queue, reason and task."""

    def __init__(self) -> None:
        self.groups: Counter[tuple[str, str, str]] = Counter()

    def add(self, letters: Sequence[DeadLetter]) -> None:
        self.groups.update((one.message.queue, one.reason, str(header(one, "task"))) for one in letters)

    @property
    def total(self) -> int:
        return self.groups.total()


# --- shown ---------------------------------------------------------------------------------------------------


def document(letter: DeadLetter) -> dict[str, Any]:
    """Everything about a letter, for people and programs."""
    found: dict[str, Any] = {
        "id": letter.id,
        "queue": letter.message.queue,
        "reason": letter.reason,
        "detail": letter.detail,
        "first": _first(letter),
        "died": letter.died.isoformat(),
        "deliveries": letter.deliveries,
        "worker": letter.worker,
    }
    if letter.history.losses:
        found["losses"] = [_loss(loss) for loss in letter.history.losses]
    if letter.history.deaths:
        found["earlier_deaths"] = [_death(death) for death in letter.history.deaths]
    if not isinstance(letter.message, Unreadable):
        found["content_type"] = letter.message.content_type
        found["headers"] = letter.message.headers
        found["properties"] = letter.message.properties
    try:
        found["body"] = letter.raw.decode()
    except UnicodeDecodeError:
        found["body_base64"] = base64.b64encode(letter.raw).decode()
    return found


def _first(letter: DeadLetter) -> str:
    """When it is first known to have been in anybody's hands."""
    times = [loss.claimed or loss.lost for death in letter.history.deaths for loss in death.losses]
    times += [death.died for death in letter.history.deaths]
    times += [loss.claimed or loss.lost for loss in letter.history.losses]
    return _time(min([*times, letter.died.timestamp()]))


def _loss(loss: Loss) -> dict[str, Any]:
    claimed = None if loss.claimed is None else _time(loss.claimed)
    return {"worker": loss.worker, "claimed": claimed, "lost": _time(loss.lost), "cause": loss.cause}


def _death(death: Death) -> dict[str, Any]:
    return {
        "id": death.id,
        "reason": death.reason,
        "detail": death.detail,
        "died": _time(death.died),
        "replayed": _time(death.replayed),
        "deliveries": death.deliveries,
        "worker": death.worker,
        "losses": [_loss(loss) for loss in death.losses],
    }


def _time(unix: float) -> str:
    return datetime.fromtimestamp(unix, timezone.utc).isoformat()


# --- in files ------------------------------------------------------------------------------------------------


class _Line(msgspec.Struct, kw_only=True):
    """A letter as one line of JSON. A message that nobody can read has ``raw`` alone. Bytes are base64."""

    format: int = _FORMAT
    letter: dict[str, Any]
    queue: str
    headers: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    properties: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    content_type: str = ""
    content_encoding: str | None = None
    priority: int = 0
    body: str | None = None
    raw: str | None = None


_LETTER: Final = ("id", "reason", "detail", "first", "died", "deliveries", "worker", "losses", "earlier_deaths")


def exported(letter: DeadLetter) -> bytes:
    """A line for a file."""
    told = {name: value for name, value in document(letter).items() if name in _LETTER}
    data = base64.b64encode(letter.raw).decode()
    message = letter.message
    if isinstance(message, Unreadable):
        line = _Line(letter=told, queue=message.queue, raw=data)
    else:
        line = _Line(
            letter=told,
            queue=message.queue,
            headers=message.headers,
            properties=message.properties,
            content_type=message.content_type,
            content_encoding=message.content_encoding,
            priority=message.priority,
            body=data,
        )
    return msgspec.json.encode(line, enc_hook=repr) + b"\n"


def imported(line: bytes) -> Message | None:
    """The message of a line; None when nobody can read it. Raises ConfigurationError for what is no such line."""
    try:
        found = msgspec.json.decode(line, type=_Line)
        if found.format != _FORMAT:
            raise ConfigurationError(f"written by a newer aqueue (its format is {found.format})")
        if found.body is None:
            return None
        return Message(
            queue=found.queue,
            headers=found.headers,
            body=base64.b64decode(found.body, validate=True),
            content_type=found.content_type,
            content_encoding=found.content_encoding,
            properties=found.properties,
            priority=found.priority,
        )
    except (msgspec.DecodeError, binascii.Error, UnicodeError, RecursionError) as error:
        raise ConfigurationError(f"no line of an export: {error}") from None
