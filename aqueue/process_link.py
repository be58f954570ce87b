"""What a worker and its child processes tell each other, and how it travels: pickles, each after its length.

::

    worker ── Setup, Call, Warn, End, Told, Exit ──────────> child
    worker <── Ready, Returned, Raised, State, Logged ────── child

Values of the task's own are pickled apart, as bytes inside these, so that a value which can't be rebuilt is a
failure of its task and of nothing else. Both ends run the same code, as the same user.
"""

import pickle
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from aqueue.protocol import Request

_LENGTH: Final = struct.Struct("!Q")
#: Bytes of one value that a child may hand back.
MAX_VALUE: Final = 256 * 1024 * 1024


class Setup(msgspec.Struct, frozen=True, kw_only=True):
    """The first thing that a child is told."""

    #: What `multiprocessing.spawn.prepare` takes: paths, arguments, and the script if tasks are defined in it.
    preparation: Mapping[str, Any]
    #: Modules to import before the first call.
    modules: Sequence[str]
    #: Of the worker's root logger.
    log_level: int


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """Run a task. Calls of one child are numbered; the next one comes after the answer to the last."""

    number: int
    module: str
    qualname: str
    #: What stands before the caller's arguments.
    takes_context: bool
    bind: bool
    #: Without its body and its arguments.
    request: Request
    deliveries: int
    receipt: str
    max_attempts: int
    worker: str
    #: A pickle of args and kwargs.
    arguments: bytes
    #: Bytes that the process may have; None for no limit.
    memory: int | None


class Warn(msgspec.Struct, frozen=True):
    """The soft limit (seconds) has passed."""

    number: int
    seconds: float


class End(msgspec.Struct, frozen=True):
    """The call is to end."""

    number: int
    reason: str


class Told(msgspec.Struct, frozen=True):
    """A `State` is stored, or why it is not."""

    number: int
    error: Exception | None


class Exit(msgspec.Struct, frozen=True):
    """There will be no more calls."""


class Ready(msgspec.Struct, frozen=True):
    """All is imported, as far as it can be."""


class Returned(msgspec.Struct, frozen=True):
    """How a call ended: ``value`` is a pickle, or None with ``problem`` saying why there is none."""

    value: bytes | None
    problem: str = ""


class Raised(msgspec.Struct, frozen=True, kw_only=True):
    """How a call ended: ``error`` is a pickle, or None for an exception that can't be pickled."""

    error: bytes | None
    module: str
    type: str
    text: str
    traceback: str
    #: The process should not be used again.
    worn: bool


class State(msgspec.Struct, frozen=True):
    """A state of the task's own to be stored; ``meta`` is a pickle."""

    number: int
    state: str
    meta: bytes


class Logged(msgspec.Struct, frozen=True):
    """A log record, as `logging.makeLogRecord` takes it."""

    record: dict[str, Any]


def pack(message: msgspec.Struct) -> bytes:
    """A message as bytes, ready to be sent."""
    data = pickle.dumps(message)
    return _LENGTH.pack(len(data)) + data


class Unpacker:
    """Messages out of bytes as they come."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[Any]:
        """The messages that are complete with this."""
        self._buffer += data
        found: list[Any] = []
        while len(self._buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer)
            end = _LENGTH.size + length
            if len(self._buffer) < end:
                break
            found.append(pickle.loads(self._buffer[_LENGTH.size : end]))  # noqa: S301 - our own other end
            del self._buffer[:end]
        return found
