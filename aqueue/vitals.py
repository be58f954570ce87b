"""What a worker process and its supervisor know of each other: a little memory that both have mapped.

The worker writes without a system call and without waiting, also thousands of times a second; the supervisor reads
when it likes, also while the worker stands still, and after its end. So the supervisor can renew the leases of a worker
whose interpreter is busy, and knows what a dead one held. Only the standard library is needed here: the supervisor has
nothing else.
"""

import mmap
import os
import struct
import tempfile
from typing import Final

#: Times are of ``time.monotonic``, one clock for all processes of a machine.
_TIME: Final = struct.Struct("d")
_COUNT: Final = struct.Struct("Q")
_LENGTH: Final = struct.Struct("H")

_TICK, _BEAT, _DEADLINE, _READY, _STALLS, _ENDED = range(0, 48, 8)
#: Where the text of a stall is, and how long it may be.
_STALL: Final = 64
_TABLE: Final = 512
#: Bytes of one receipt, its length included; a queue's name is 255 characters at most.
_SLOT: Final = 320
_LONGEST: Final = _SLOT - _LENGTH.size
#: Lengths as they are written: this is done for every message.
_LENGTHS: Final = [_LENGTH.pack(length) for length in range(_LONGEST + 1)]
_NOTHING: Final = _LENGTHS[0]


class Vitals:
    """See the module's text. Made by the supervisor with `create`, opened by the worker with `open`."""

    def __init__(self, descriptor: int, size: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, size)
        self._all = range(_TABLE, size, _SLOT)
        self._free = list(self._all)
        #: Receipt to where it stands; of the process that writes.
        self._places: dict[str, int] = {}

    @classmethod
    def create(cls, slots: int) -> "Vitals":
        """Memory for so many receipts; the descriptor is for the child to inherit."""
        size = _TABLE + slots * _SLOT
        with tempfile.TemporaryFile() as file:
            file.truncate(size)
            descriptor = os.dup(file.fileno())
        return cls(descriptor, size)

    @classmethod
    def open(cls, descriptor: int) -> "Vitals":
        return cls(descriptor, os.fstat(descriptor).st_size)

    def close(self) -> None:
        self._memory.close()
        os.close(self.descriptor)

    # --- times and counts ---

    @property
    def tick(self) -> float:
        """When the worker's event loop last turned; 0 before it has."""
        return self._time(_TICK)

    @tick.setter
    def tick(self, time: float) -> None:
        _TIME.pack_into(self._memory, _TICK, time)

    @property
    def beat(self) -> float:
        """When the worker last renewed its leases by itself."""
        return self._time(_BEAT)

    @beat.setter
    def beat(self, time: float) -> None:
        _TIME.pack_into(self._memory, _BEAT, time)

    @property
    def deadline(self) -> float:
        """When the first of the running tasks must have ended; 0: no task has to."""
        return self._time(_DEADLINE)

    @deadline.setter
    def deadline(self, time: float) -> None:
        _TIME.pack_into(self._memory, _DEADLINE, time)

    @property
    def ready(self) -> bool:
        """Whether the worker claims."""
        return self._count(_READY) == 1

    @ready.setter
    def ready(self, ready: bool) -> None:
        _COUNT.pack_into(self._memory, _READY, int(ready))

    @property
    def stalls(self) -> int:
        """How often the worker itself has seen its loop blocked."""
        return self._count(_STALLS)

    @property
    def ended(self) -> int:
        """Runs that have ended."""
        return self._count(_ENDED)

    @ended.setter
    def ended(self, count: int) -> None:
        _COUNT.pack_into(self._memory, _ENDED, count)

    @property
    def stall(self) -> str:
        """What blocked the loop last: the task, the file, the line."""
        return self._text(_STALL)

    def stalled(self, where: str) -> None:
        """The loop is blocked, once more."""
        data = where.encode(errors="replace")[: _TABLE - _STALL - _LENGTH.size]
        self._write(_STALL, data)
        _COUNT.pack_into(self._memory, _STALLS, self.stalls + 1)

    def _time(self, offset: int) -> float:
        time: float = _TIME.unpack_from(self._memory, offset)[0]
        return time

    def _count(self, offset: int) -> int:
        count: int = _COUNT.unpack_from(self._memory, offset)[0]
        return count

    # --- receipts ---

    def hold(self, receipt: str) -> None:
        """The worker holds this. What has no room is left out: it is still renewed by the worker itself."""
        data = receipt.encode()
        if self._free and len(data) <= _LONGEST:
            place = self._places[receipt] = self._free.pop()
            self._memory[place : place + _LENGTH.size + len(data)] = _LENGTHS[len(data)] + data

    def drop(self, receipt: str) -> None:
        """The worker does not hold it any more."""
        place = self._places.pop(receipt, None)
        if place is not None:
            self._memory[place : place + _LENGTH.size] = _NOTHING
            self._free.append(place)

    def receipts(self) -> list[str]:
        """All that the worker holds, as far as there was room."""
        found = [self._text(place) for place in self._all]
        return [receipt for receipt in found if receipt]

    def _write(self, offset: int, data: bytes) -> None:
        """The bytes before their length: a reader never sees an end that is not there."""
        start = offset + _LENGTH.size
        _LENGTH.pack_into(self._memory, offset, 0)
        self._memory[start : start + len(data)] = data
        _LENGTH.pack_into(self._memory, offset, len(data))

    def _text(self, offset: int) -> str:
        length: int = _LENGTH.unpack_from(self._memory, offset)[0]
        start = offset + _LENGTH.size
        return self._memory[start : start + length].decode(errors="replace")
