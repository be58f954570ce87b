"""Celery's remote control messages (celery-protocol section 8), as far as they are obeyed here. Pure: no I/O, no clock.

A control message is broadcast to every worker. Ours obey ``revoke`` and ``terminate``, and leave every other command
alone. What they broadcast themselves is Celery's ``revoke`` with two arguments more, ``reason`` and ``keep`` (seconds),
which Celery's workers pass over.
"""

import logging
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final

import msgspec

from aqueue.errors import BadMessage
from aqueue.protocol import MAX_ID_LENGTH, Message, Unreadable, is_name
from aqueue.saferepr import printable
from aqueue.serialization import Serializer, is_finite_number
from aqueue.shapes import is_list

logger = logging.getLogger("aqueue.control")

#: The fanout exchange of control messages.
EXCHANGE: Final = "celery.pidbox"
#: Ids in one message of ours.
_MOST_IDS: Final = 1000
#: Characters.
_LONGEST_REASON: Final = 200
#: Seconds that a revocation may be kept: a hundred years.
LONGEST_KEPT: Final = 100 * 366 * 86400.0


class Revocation(msgspec.Struct, frozen=True):
    """That a task shall not run (any more)."""

    #: Why, for the task's result.
    reason: str
    #: End it when it runs already; else it is only kept from beginning.
    terminate: bool
    #: Seconds that it lasts from now.
    keep: float


#: By task id.
Revoked = Mapping[str, Revocation]


class _Command(msgspec.Struct):
    method: str
    arguments: dict[str, Any] | None = None
    destination: list[str] | None = None
    pattern: str | None = None
    matcher: str | None = None


class Pidbox:
    """Writes and reads control messages. ``keep``: seconds that a revocation lasts whose message doesn't say it."""

    def __init__(self, serializer: Serializer, write: str = "json", keep: float = 86400.0) -> None:
        self._serializer = serializer
        self._write = write
        self._keep = keep
        #: Messages that nobody could read.
        self.malformed = 0

    def revoke(self, ids: Sequence[str], revocation: Revocation) -> list[Message]:
        """What tells every worker, ours and Celery's. Raises EncodeError."""
        arguments = {
            "terminate": revocation.terminate,
            "signal": "SIGTERM",
            "reason": revocation.reason,
            "keep": revocation.keep,
        }
        return [
            self._broadcast("revoke", {"task_id": list(ids[start : start + _MOST_IDS]), **arguments})
            for start in range(0, len(ids), _MOST_IDS)
        ]

    def _broadcast(self, method: str, arguments: dict[str, Any]) -> Message:
        command = {"method": method, "arguments": arguments, "destination": None, "pattern": None, "matcher": None}
        body = self._serializer.dumps(command, self._write)
        return Message(
            queue="",
            headers={"clock": 0, "expires": 0},
            body=body.data,
            content_type=body.content_type,
            content_encoding=body.content_encoding,
            properties={"delivery_mode": 1},
            exchange=EXCHANGE,
        )

    def read(self, message: Message | Unreadable, node: str) -> Revoked:
        """What a message revokes for the worker ``node``; nothing for other commands, and for what can't be read."""
        try:
            if isinstance(message, Unreadable):
                raise message.error
            return self._obey(self._command(message), node)
        except BadMessage as error:
            self.malformed += 1
            log = logger.warning if self.malformed == 1 else logger.debug
            log("a control message is ignored, the %dth that can't be read: %s", self.malformed, error)
            return {}

    def _command(self, message: Message) -> _Command:
        if len(message.body) > self._serializer.limits.message:
            raise BadMessage("too_large", f"a control message of {len(message.body):,} bytes")
        body = self._serializer.loads(message.body, message.content_type, message.content_encoding)
        try:
            return msgspec.convert(body, _Command)
        except (msgspec.ValidationError, UnicodeError) as error:
            raise BadMessage("bad_body", printable(error)) from error

    def _obey(self, command: _Command, node: str) -> Revoked:
        if not _is_for(command, node):
            return {}
        if command.method not in ("revoke", "terminate"):
            logger.debug("control command %s is not obeyed by this version", printable(command.method, 60))
            return {}
        arguments = command.arguments or {}
        terminate = command.method == "terminate" or bool(arguments.get("terminate"))
        reason = arguments.get("reason")
        if not isinstance(reason, str) or not reason:
            reason = "terminated" if terminate else "revoked"
        keep = arguments.get("keep")
        kept = min(keep, LONGEST_KEPT) if is_finite_number(keep) and keep > 0 else self._keep
        revocation = Revocation(printable(reason, _LONGEST_REASON), terminate, kept)
        return dict.fromkeys(_ids(arguments.get("task_id")), revocation)


def _ids(told: Any) -> list[str]:
    ids: list[Any] = list(told) if is_list(told) else [told]
    if not all(is_name(one, MAX_ID_LENGTH) for one in ids):
        raise BadMessage("bad_id", f"task_id of a revoke is {printable(told, 80)}")
    return ids


def _is_for(command: _Command, node: str) -> bool:
    """Whether a command is for this worker; patterns are globs here, as no stranger's regular expression is run."""
    if command.destination:
        return node in command.destination
    if command.pattern and command.matcher:
        return command.matcher == "glob" and fnmatchcase(node, command.pattern)
    return True
