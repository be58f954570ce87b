"""``make soak``: tasks by the million, with failures, retries and timeouts; what grows is told.

One worker as people start it (``aqueue worker``), one sender that keeps a backlog. From the end of the warm-up on, the
memory of every process of the worker is measured; at the end, what is left on the server, and tasks, threads and
descriptors of the worker.
"""

import argparse
import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import msgspec

from aqueue import AQueue, Settings
from aqueue.broker import Broker
from tests.chaos.conftest import SHARED
from tests.chaos.ground import Ground, RabbitGround, RabbitHost, RedisGround, SqliteGround
from tests.kit.rabbitmq import RabbitServer
from tests.kit.workers import WorkerProcess

_APP: Final = """
import asyncio, os, threading
from aqueue import AQueue, Retry, Settings

settings = Settings(default_queue=os.environ["QUEUE"], result_expires=60.0)
app = AQueue("soak", broker=os.environ["BROKER"], backend=os.environ["RESULTS"], settings=settings)

@app.task(name="quick")
async def quick(n: int) -> int:
    return n

@app.task(name="thread")
def thread(n: int) -> int:
    return n

@app.task(name="fail")
async def fail(n: int) -> None:
    raise ValueError(n)

@app.task(name="flaky", retry=Retry(attempts=3, backoff=0.1))
async def flaky(n: int) -> int:
    if n % 3:
        raise ConnectionError(n)
    return n

@app.task(name="late", timeout=0.05)
async def late(n: int) -> None:
    await asyncio.sleep(5)

@app.task(name="counts")
async def counts() -> dict[str, int]:
    return {
        "tasks": len(asyncio.all_tasks()),
        "threads": threading.active_count(),
        "descriptors": len(os.listdir("/proc/self/fd")),
    }
"""
#: Of a hundred tasks.
_MIX: Final = ("quick",) * 80 + ("thread",) * 10 + ("fail",) * 4 + ("flaky",) * 5 + ("late",)
_BATCH: Final = 500
#: Messages that wait at most.
_BACKLOG: Final = 5_000


class Sample(msgspec.Struct, frozen=True):
    """At ``at`` seconds: resident memory (bytes) of the worker's processes, and what it says of itself."""

    at: float
    memory: int
    tasks: int
    threads: int
    descriptors: int


class Soak:
    def __init__(self, ground: Ground, folder: Path, count: int, seconds: float, warm_up: float) -> None:
        self._ground = ground
        self._folder = folder
        self._count = count
        self._seconds = seconds
        self._warm_up = warm_up
        self.sent = 0
        self.samples: list[Sample] = []

    async def run(self) -> None:
        """Until everything has been sent and done, or the time is over."""
        (self._folder / "soak.py").write_text(_APP)
        ground = self._ground
        results = ground.results_url or ground.url
        env = {"BROKER": ground.url, "RESULTS": results, "QUEUE": ground.queue}
        worker = WorkerProcess(self._folder, "soak:app", "-c", "100", "--threads", "4", "-l", "critical", env=env)
        try:
            settings = Settings(default_queue=ground.queue, result_expires=60.0)
            async with AQueue("sender", broker=ground.url, backend=results, settings=settings) as app:
                await self._keep_busy(app, worker.process.child.pid)
                await self._drain(app.producer().broker)
                await self._sample(app, worker.process.child.pid)
        finally:
            worker.process.stop(30.0)

    async def _keep_busy(self, app: AQueue, pid: int) -> None:
        began = looked = time.monotonic()
        while self.sent < self._count and time.monotonic() - began < self._seconds:
            if await app.producer().broker.waiting([self._ground.queue]) < _BACKLOG:
                names = [_MIX[(self.sent + n) % len(_MIX)] for n in range(_BATCH)]
                await asyncio.gather(*(app.send_task(name, (self.sent + n,)) for n, name in enumerate(names)))
                self.sent += _BATCH
            else:
                await asyncio.sleep(0.02)
            if time.monotonic() - looked > max(1.0, self._seconds / 60):
                looked = time.monotonic()
                await self._sample(app, pid)

    async def _sample(self, app: AQueue, pid: int) -> None:
        asked = await app.send_task("counts", priority=9)
        told = await asked.get(60)
        at = time.monotonic()
        self.samples.append(Sample(at, sum(map(_memory, _family(pid))), **told))

    async def _drain(self, broker: Broker) -> None:
        ends = time.monotonic() + 120.0
        while await asyncio.to_thread(self._ground.waiting) and time.monotonic() < ends:
            await asyncio.sleep(0.2)

    def report(self) -> tuple[str, bool]:
        """Lines for people, and whether nothing has grown."""
        first = self.samples[0].at
        warm = [sample for sample in self.samples if sample.at - first >= self._warm_up] or self.samples
        grown = warm[-1].memory / warm[0].memory - 1
        left = {what: number for what, number in self._ground.left().items() if number}
        ends = {name: (getattr(warm[0], name), getattr(warm[-1], name)) for name in ("threads", "descriptors")}
        after = ", ".join(f"{name} {before}, {now}" for name, (before, now) in ends.items())
        most = max(sample.memory for sample in warm) / 1e6
        text = (
            f"{self._ground.kind}: {self.sent:,} tasks in {self.samples[-1].at - first:.0f} s\n"
            f"  memory after the warm-up {warm[0].memory / 1e6:.1f} MB, at the end {warm[-1].memory / 1e6:.1f} MB "
            f"({grown:+.1%}), at most {most:.1f} MB\n"
            f"  tasks {warm[0].tasks}, {warm[-1].tasks}, {after}\n"
            f"  left on the server: {left or 'nothing'}"
        )
        well = grown < 0.1 and not left and all(now <= before + 5 for before, now in ends.values())
        return text, well


def _family(pid: int) -> list[int]:
    """A process and those that it has started."""
    found = [pid]
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += _family(int(child))
    return found


def _memory(pid: int) -> int:
    """Resident memory, in bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _soak(kind: str, folder: Path, chosen: argparse.Namespace) -> bool:
    server = RabbitServer(folder / "rabbitmq") if kind == "rabbitmq" else None
    ground: Ground
    if server is not None:
        ground = RabbitGround(folder, RabbitHost(server))
    else:
        ground = SqliteGround(folder) if kind == "sqlite" else RedisGround(folder)
    try:
        soak = Soak(ground, folder, chosen.tasks, chosen.seconds, chosen.warm_up)
        asyncio.run(soak.run())
        text, well = soak.report()
        print(text, flush=True)
    finally:
        ground.close()
        if server is not None:
            server.stop()
    return well


def main() -> int:
    parser = argparse.ArgumentParser(prog="make soak", description=__doc__)
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=1800.0, help="at most, for each broker")
    parser.add_argument("--warm-up", type=float, default=60.0, help="seconds after which memory is compared")
    parser.add_argument("--brokers", default=",".join(SHARED))
    chosen = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # no process of a run outlives it
    well = True
    for kind in chosen.brokers.split(","):
        with TemporaryDirectory(prefix="aqueue-soak-") as folder:
            well = _soak(kind, Path(folder), chosen) and well
    return int(not well)


if __name__ == "__main__":
    sys.exit(main())
