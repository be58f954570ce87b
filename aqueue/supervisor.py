"""The parent of worker processes: small, and it imports nothing of the user's.

::

    aqueue worker ──> supervisor ──┬── worker process: loop, threads, user code
                                   └── worker process ...

It starts ``--workers`` processes, starts again what has died and says why it died, and ends what hangs: a loop that has
not turned for ``--max-stall`` seconds, or that a task has blocked past its time limit. While a worker can't renew its
leases, because a task holds the interpreter or the process is frozen, the supervisor does (`aqueue.standby`). With
``--max-tasks`` and ``--max-memory`` it replaces processes in time, the new one first.

What it knows of a worker is in memory that both share (`aqueue.vitals`); a socket, which the system closes when either
ends, tells a worker that it is alone: then it claims nothing more and ends when its tasks have.
"""

import json
import os
import random
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from types import FrameType
from typing import Any, Final

from aqueue.backoff import pause
from aqueue.processes import how_it_ended, oom_kills, resident
from aqueue.vitals import Vitals

#: Seconds between two looks at the workers; less where leases are short: so many looks in the time of one.
_LOOK: Final = 0.5
_LOOKS_A_LEASE: Final = 10
#: Seconds after which a loop stands still, for the supervisor; the worker itself says so earlier, if it can.
_STILL: Final = 5.0
#: Seconds that a task which blocks its loop gets past its time limit.
_PAST_LIMIT: Final = 5.0
#: Seconds that a worker gets, beyond its grace, to end.
_FAREWELL: Final = 15.0
#: A worker that has lived so long (seconds) has not died at its start.
_LIVED: Final = 60.0
#: Receipts that a worker may hold for each of its slots: running, to be settled, just claimed.
_RECEIPTS_A_SLOT: Final = 4
#: Leases are renewed here when the worker is late by this part of their length.
_LATE: Final = 0.45
#: Folders in which no code of the user's lies.
_SKIPPED: Final = frozenset(("node_modules", "site-packages", "__pycache__"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What ``aqueue worker`` was told."""

    app: str
    queues: str = ""
    concurrency: int = 100
    threads: int = 16
    #: 0: one for each CPU.
    processes: int = 0
    loglevel: str = "info"
    log_format: str = "human"
    name: str = "worker"
    grace: float = 25.0
    workers: int = 1
    #: Tasks after which a worker process is replaced; 0: never.
    max_tasks: int = 0
    #: Bytes of resident memory above which it is; 0: never.
    max_memory: int = 0
    max_stall: float = 300.0
    reload: bool = False
    #: Start whatever the checks refuse.
    force: bool = False
    #: Of a worker process: whether it says what it runs.
    banner: bool = True
    #: Of a worker process: descriptors of `Vitals` and of the socket to the supervisor; -1: it has none.
    vitals: int = -1
    lifeline: int = -1

    def words(self) -> list[str]:
        """As arguments of a program, ``name=value``, readable in ``ps``; what is as by default is left out."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return [f"{field.name}={values[field.name]}" for field in fields(self) if values[field.name] != field.default]

    @classmethod
    def parse(cls, words: Sequence[str]) -> "Options":
        """The other way round."""
        types = {field.name: field.type for field in fields(cls)}
        given = dict(word.split("=", 1) for word in words)
        return cls(**{name: _value(types[name], text) for name, text in given.items()})


def _value(kind: Any, text: str) -> Any:
    return text == "True" if kind is bool else kind(text)


class Child:
    """One worker process."""

    def __init__(self, number: int, options: Options) -> None:
        self.number = number
        self.started = time.monotonic()
        #: A random part of one tenth more for each process, so that they are not all replaced at once.
        self.more = 1 + random.random() / 10
        slots = options.concurrency + options.threads + (options.processes or os.cpu_count() or 1)
        self.vitals = Vitals.create(_RECEIPTS_A_SLOT * slots)
        self.lifeline, theirs = socket.socketpair()
        self.lifeline.setblocking(False)
        words = replace(options, vitals=self.vitals.descriptor, lifeline=theirs.fileno()).words()
        # A session of its own: Ctrl-C at the terminal is for the supervisor, which passes it on once.
        self.process = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, "-m", "aqueue.cli.serve", *words],
            pass_fds=(self.vitals.descriptor, theirs.fileno()),
            start_new_session=True,
        )
        theirs.close()
        #: Whether it was ever ready.
        self.was_ready = False
        #: Asked to end, and when (``time.monotonic``); 0: not yet.
        self.asked_to_end = 0.0
        #: Why it was killed, when it was killed from here.
        self.killed_because = ""
        #: `Vitals.tick` of a loop of which it was said that it stands still.
        self.told_still = 0.0
        #: What it says of itself: broker and lease.
        self.hello: dict[str, Any] = {}
        self._heard = b""
        self._standby: Any = None
        #: When its leases were last renewed from here.
        self._renewed = 0.0

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def still(self) -> float:
        """For how many seconds its loop has not turned; 0.0 before it has for the first time."""
        tick = self.vitals.tick
        return max(0.0, time.monotonic() - tick) if tick else 0.0

    def signal(self, number: int) -> None:
        if self.process.poll() is None:
            self.process.send_signal(number)

    def end(self) -> None:
        """Ask it to end; asked again, it hurries."""
        self.asked_to_end = self.asked_to_end or time.monotonic()
        self.signal(signal.SIGTERM)

    def kill(self, because: str) -> None:
        self.killed_because = self.killed_because or because
        self.signal(signal.SIGKILL)

    def memory(self) -> int:
        """Resident bytes; 0 where the system doesn't tell."""
        return resident(self.pid)

    def hear(self) -> None:
        """Read what it says of itself: lines of JSON."""
        try:
            self._heard += self.lifeline.recv(65536)
        except OSError:
            return
        *lines, self._heard = self._heard.split(b"\n")
        for line in lines:
            self.hello |= json.loads(line)

    def renew_if_late(self) -> None:
        """Renew its leases when it does not do so itself."""
        lease, now = self.hello.get("lease"), time.monotonic()
        if lease and self.vitals.beat and now - max(self.vitals.beat, self._renewed) > _LATE * lease:
            self._renewed = now
            if self._standby is None:
                self._standby = import_module("aqueue.standby").Standby(self.hello)
            self._standby.renew(self.vitals.receipts())

    def tell(self, **what: Any) -> None:
        """One line of JSON to it; who is gone, or doesn't listen, misses it."""
        with suppress(OSError):
            self.lifeline.send(json.dumps(what).encode() + b"\n")

    def close(self) -> None:
        if self._standby is not None:
            self._standby.close()
        self.lifeline.close()
        self.vitals.close()

    def how_it_ended(self, out_of_memory: bool) -> str:
        return self.killed_because or how_it_ended(self.process.returncode, out_of_memory)


class Supervisor:
    """See the module's text. `run` returns the exit code."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.children: list[Child] = []
        #: When to start a worker again, by its number, and how often in a row it died at its start.
        self._due: dict[int, float] = {}
        self._failures: dict[int, int] = {}
        #: What the last process of a number held when it died, and how it died; told to the next.
        self._losses: dict[int, dict[str, Any]] = {}
        self._log = Log(options)
        self._oom_kills = oom_kills()
        #: Whether any worker was ever ready.
        self._worked = False
        self._stopping = False
        self._exit_code = 0
        self._sources = Sources(Path.cwd()) if options.reload else None

    def run(self) -> int:
        """Supervise until told to stop, by SIGTERM or Ctrl-C; a second one hurries."""
        waking, woken = socket.socketpair()
        waking.setblocking(False)
        woken.setblocking(False)
        signal.set_wakeup_fd(woken.fileno(), warn_on_full_buffer=False)
        for awaited in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(awaited, _noticed)
        for number in range(self.options.workers):
            self._start(number, banner=number == 0)
        with selectors.DefaultSelector() as selector:
            selector.register(waking, selectors.EVENT_READ)
            while self.children or (self._due and not self._stopping):
                if selector.select(self._pause()):
                    for number in waking.recv(4096):
                        self._signalled(number)
                self._look()
        return self._exit_code

    # --- told ---

    def _signalled(self, number: int) -> None:
        if number in (signal.SIGTERM, signal.SIGINT):
            self._stop()
        elif number == signal.SIGHUP and not self._stopping:
            self._log("INFO", "replacing all worker processes (SIGHUP)")
            self._replace(list(self.children))

    def _stop(self) -> None:
        self._stopping = True
        self._due.clear()
        for child in self.children:
            child.end()

    # --- looking ---

    def _pause(self) -> float:
        leases: list[float] = [child.hello["lease"] for child in self.children if child.hello]
        return min([_LOOK, *(lease / _LOOKS_A_LEASE for lease in leases)])

    def _look(self) -> None:
        for child in list(self.children):
            child.hear()
            child.was_ready = child.was_ready or child.vitals.ready
            self._worked = self._worked or child.was_ready
            if child.process.poll() is not None:
                self._ended(child)
            else:
                self._check(child)
        now = time.monotonic()
        for number in [number for number, due in self._due.items() if due <= now]:
            del self._due[number]
            self._start(number)
        if self._sources is not None and not self._stopping and self._sources.changed():
            self._log("INFO", "the code has changed, starting again")
            for child in self.children:
                child.end()

    def _check(self, child: Child) -> None:
        child.renew_if_late()
        self._check_loop(child)
        now = time.monotonic()
        if child.asked_to_end:
            if now - child.asked_to_end > self.options.grace + _FAREWELL:
                self._log("ERROR", f"{_named(child)} does not end; it is killed")
                child.kill("did not end when told to")
        elif self._is_used_up(child):
            self._replace([child])

    def _check_loop(self, child: Child) -> None:
        still = child.still
        if still < _STILL:
            return
        deadline = child.vitals.deadline
        if still > self.options.max_stall:
            self._kill(child, f"its event loop stood still for {still:.0f} s")
        elif deadline and time.monotonic() > deadline + _PAST_LIMIT:
            self._kill(child, "a task blocked its event loop past the task's time limit")
        elif child.told_still != child.vitals.tick:
            child.told_still = child.vitals.tick
            self._log("WARNING", f"the event loop of {_named(child)} has stood still for {still:.0f} s; its stacks:")
            child.signal(signal.SIGUSR2)  # faulthandler writes them, whoever holds the interpreter

    def _kill(self, child: Child, because: str) -> None:
        if not child.killed_because:
            what = child.vitals.stall
            self._log("ERROR", f"{_named(child)} is killed: {because}{f' ({what})' if what else ''}")
            child.kill(because)

    def _is_used_up(self, child: Child) -> bool:
        tasks, memory = self.options.max_tasks, self.options.max_memory
        if tasks and child.vitals.ended >= tasks * child.more:
            self._log("INFO", f"{_named(child)} has run {child.vitals.ended} tasks; it is replaced")
            return True
        if memory and child.memory() > memory * child.more:
            self._log("INFO", f"{_named(child)} takes {child.memory() >> 20} MiB; it is replaced")
            return True
        return False

    # --- starting and ending ---

    def _start(self, number: int, *, banner: bool = False) -> None:
        options = self.options
        name = options.name if options.workers == 1 else _numbered(options.name, number + 1)
        child = Child(number, replace(options, name=name, banner=banner, workers=1, reload=False))
        loss = self._losses.pop(number, None)
        if loss is not None:
            child.tell(**loss)
        self.children.append(child)

    def _replace(self, children: Sequence[Child]) -> None:
        """The new ones first, so that there is no gap."""
        for child in children:
            self._start(child.number)
            child.end()

    def _ended(self, child: Child) -> None:
        self.children.remove(child)
        code = child.process.returncode
        kills, self._oom_kills = self._oom_kills, oom_kills()
        how = child.how_it_ended(self._oom_kills > kills)
        held = child.vitals.receipts() if code else []
        child.close()
        if self._stopping:
            before_it_began = code == -signal.SIGTERM and not child.was_ready
            self._exit_code = self._exit_code or int(bool(code) and not before_it_began)
        elif any(other.number == child.number for other in self.children):
            self._log("INFO" if code == 0 else "ERROR", f"{_named(child)} has made way for the next: {how}")
        elif code and not self._worked and self._sources is None:
            self._exit_code = code if code > 0 else 1  # it has said why
            self._stop()
        else:
            self._start_again(child, how if code else "", held)

    def _start_again(self, child: Child, how: str, held: Sequence[str]) -> None:
        """``how`` it died; empty when it ended by itself, as it was told to."""
        lived = time.monotonic() - child.started
        failures = self._failures.get(child.number, 0) + 1 if how and lived < _LIVED else int(bool(how))
        self._failures[child.number] = failures
        wait = pause(failures, first=0.05, longest=30.0) if how else 0.0
        if how:
            self._losses[child.number] = {"lost": held, "cause": how}
            self._log(
                "ERROR",
                f"{_named(child)} has died after {lived:.0f} s: {how}; it held {len(held)} tasks. "
                f"Another one starts in {wait:.1f} s",
            )
        self._due[child.number] = time.monotonic() + wait


class Log:
    """Lines like those of the worker processes, without what they need for that."""

    def __init__(self, options: Options) -> None:
        levels = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
        self._shown = levels[levels.index(options.loglevel.upper()) :]
        self._json = options.log_format == "json"

    def __call__(self, level: str, text: str) -> None:
        if level not in self._shown:
            return
        now = time.time()
        if self._json:
            clock = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now * 1000) % 1000:03d}Z"
            line = json.dumps({"time": clock, "level": level, "logger": "aqueue.supervisor", "message": text})
        else:
            clock = time.strftime("%H:%M:%S", time.localtime(now)) + f".{int(now * 1000) % 1000:03d}"
            line = f"{clock} {level:7} {text}"
        sys.stderr.write(line + "\n")
        sys.stderr.flush()


class Sources:
    """The Python files below a folder, and whether they have changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._seen = self._times()

    def changed(self) -> bool:
        """Whether they have since the last call."""
        before, self._seen = self._seen, self._times()
        return before != self._seen

    def _times(self) -> dict[str, float]:
        return dict(_modified(str(self._folder)))


def _modified(folder: str) -> Iterator[tuple[str, float]]:
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        if entry.name.startswith(".") or entry.name in _SKIPPED:
            continue
        if entry.is_dir(follow_symlinks=False):
            if not os.path.exists(os.path.join(entry.path, "pyvenv.cfg")):  # noqa: PTH110, PTH118 - many, each time
                yield from _modified(entry.path)
        elif entry.name.endswith(".py"):
            try:
                yield entry.path, entry.stat().st_mtime
            except OSError:  # gone meanwhile
                continue


def _noticed(number: int, frame: FrameType | None) -> None:
    """The number has been written to the waking socket."""


def _named(child: Child) -> str:
    return f"worker process {child.number + 1} (pid {child.pid})"


def _numbered(name: str, number: int) -> str:
    """``worker`` to ``worker-2``, ``worker@%h`` to ``worker-2@%h``."""
    local, at, host = name.partition("@")
    return f"{local}-{number}{at}{host}"


def main(words: Sequence[str]) -> int:
    """Supervise, by words that `Options.words` has made."""
    return Supervisor(Options.parse(words)).run()
