"""The machine and the process in which a worker runs."""

import os
import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from importlib.util import find_spec
from typing import Final, Self

import msgspec

from aqueue.findings import Finding
from aqueue.task import Kind
from aqueue.url import mask

#: Files that a worker has open besides those of its tasks, and for each task at once.
_FILES: Final = 64
_FILES_OF_A_TASK: Final = 2
_THREADS: Final = 32
_TOO_EARLY: Final = datetime(2020, 1, 1, tzinfo=timezone.utc).timestamp()
_SECRET: Final = re.compile(r"\w://[^/\s:@]*:[^@\s]+@")


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What a process may use."""

    user: int
    #: Open files; None: as many as it likes. ``threads`` likewise.
    files: int | None
    threads: int | None
    uvloop: bool
    #: Unix time.
    now: float
    words: Sequence[str] = ()

    @classmethod
    def here(cls) -> Self:
        return cls(
            user=os.geteuid(),
            files=_limit(resource.RLIMIT_NOFILE),
            threads=_limit(resource.RLIMIT_NPROC),
            uvloop=find_spec("uvloop") is not None,
            now=time.time(),
            words=tuple(sys.argv),
        )


def _limit(kind: int) -> int | None:
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft


def machine_findings(machine: Machine, slots: Mapping[Kind, int]) -> Iterator[Finding]:
    """``slots`` is how many tasks of each kind may run at once."""
    yield from _limits(machine, slots)
    if machine.user == 0:
        yield Finding("AQ503", "this process is root, and so is what a task runs", "run it as a user of its own")
    if not machine.uvloop:
        yield Finding("AQ504", "uvloop is not installed: every task takes longer", "pip install uvloop")
    if machine.now < _TOO_EARLY:
        year = datetime.fromtimestamp(machine.now, timezone.utc).year
        step = "have it set by NTP: ETAs, expiry and the life of results go by it"
        yield Finding("AQ505", f"this machine's clock says {year}", step)
    for word in machine.words:
        if _SECRET.search(word):
            what = f"a password is on the command line ({mask(word)}), where every user of the machine can read it"
            yield Finding("AQ306", what, "put the URL into AQUEUE_BROKER_URL, or into a file that the app reads")


def _limits(machine: Machine, slots: Mapping[Kind, int]) -> Iterator[Finding]:
    files = _FILES + _FILES_OF_A_TASK * sum(slots.values())
    if machine.files is not None and machine.files < files:
        what = f"this process may open {machine.files} files; {sum(slots.values())} tasks at once may need {files}"
        yield Finding("AQ501", what, f"ulimit -n {files}, LimitNOFILE= of the service, or a lower --concurrency")
    threads = _THREADS + slots.get("thread", 0) + slots.get("process", 0)
    if machine.threads is not None and machine.threads < threads and machine.user != 0:  # which holds for no root
        what = f"this user may have {machine.threads} processes and threads; this worker alone may need {threads}"
        yield Finding(
            "AQ502", what, "raise ulimit -u, or LimitNPROC= of the service, or lower --threads and --processes"
        )
