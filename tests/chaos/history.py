"""What happened, as every process wrote it down: one JSON line an event, appended with one write.

All processes of a run are on one host, whose monotonic clock they share; so events of different processes can be
put in order. A process that is killed has written everything that it did before.

=============  ===========================================================================================
RUN            how the run was made: broker, lease, how often a task is tried (by its name)
SPAWN, EXIT    a process begins; ``target`` is gone (``n``: its exit code, below 0 a signal's number)
ENQ            about to send ``id``; then ENQ_OK, ENQ_FAIL (certainly not stored) or ENQ_UNKNOWN
CLAIM          a message came: ``token`` names the claim, ``n`` the deliveries, ``began`` when it was asked for
RENEW          the lease of ``token`` was renewed, ``began`` when that was asked for
LEASE_LOST     the broker said that ``token`` is no longer ours
START          user code begins; then END, RAISE (``final``: no attempt is left) or CANCEL (``why``)
SETTLING       about to settle ``token`` by ``kind``; then SETTLE, ``ok``: True, False (refused), None (no answer)
FAULT          ``kind`` at ``target``, ``phase`` begin or end; one that has no length has only a begin
HEALED         no fault is left
DRAINED        nothing waits any more; without it nothing can be said of what is missing
RESULT, DEAD   what the store, the dead letters hold at the end
LEFT           what is left of the broker's own structures at the end: ``kind``, ``n``
=============  ===========================================================================================
"""

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import msgspec

monotonic: Final = time.monotonic


class Event(msgspec.Struct, frozen=True, omit_defaults=True):
    """One line; see the module's text."""

    t: float
    #: The process: ``w0.2`` is the third one of the first worker.
    p: str
    e: str
    id: str = ""
    #: Which attempt by the task's own count; a copy of a message is named by id and attempt.
    attempt: int = 0
    token: str = ""
    n: int = 0
    began: float = 0.0
    kind: str = ""
    target: str = ""
    phase: str = ""
    why: str = ""
    ok: bool | None = None
    final: bool = False
    value: Any = None

    @property
    def copy(self) -> tuple[str, int]:
        return self.id, self.attempt


class Recorder:
    """Writes the history of one process; every event is on its way to the disk's cache when this returns."""

    def __init__(self, folder: Path | str, process: str) -> None:
        self.process = process
        self.path = Path(folder) / f"{process}.jsonl"
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._encode = msgspec.json.Encoder().encode

    def __call__(self, name: str, **fields: Any) -> None:
        os.write(self._file, self._line(name, fields))

    def many(self, name: str, rows: Iterable[dict[str, Any]]) -> None:
        """Events that happened together."""
        lines = b"".join(self._line(name, fields) for fields in rows)
        if lines:
            os.write(self._file, lines)

    def _line(self, name: str, fields: dict[str, Any]) -> bytes:
        return self._encode(Event(t=monotonic(), p=self.process, e=name, **fields)) + b"\n"

    def close(self) -> None:
        os.close(self._file)


_decode = msgspec.json.Decoder(Event).decode


def read(folder: Path) -> list[Event]:
    """Every process' events, in order of time. A last line that was cut off by a kill is left out."""
    events: list[Event] = []
    for path in sorted(folder.glob("*.jsonl")):
        lines = path.read_bytes().split(b"\n")
        events += [_decode(line) for line in lines[:-1]]
    return sorted(events, key=lambda event: event.t)
