"""The measurements, one function each."""

import asyncio
import json
import os
import signal
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from aqueue import broker as brokers
from aqueue.broker import BrokerOptions, Release
from aqueue.broker.redis.envelope import pack
from aqueue.protocol import Message
from aqueue.url import Url
from benchmarks import rabbitmq_floor
from benchmarks.setting import PLACE, ROOT, OnRabbitMQ, Peer, Server, wait
from tests.kit.servers import Process


def throughput(server: Server, peer: Peer, *, task: str = "nop", threads: bool = False) -> float:
    """Tasks a second of one worker on a full queue, results stored, from the first tenth to the last task."""
    server.empty()
    server.fill(peer, task)
    with peer.working(server, threads=threads):
        return _drain(lambda: server.left(peer), peer.count)


def _drain(left: Callable[[], int], count: int) -> float:
    wait(lambda: left() <= 0.9 * count, "a tenth is done", 120, every=0.002)
    begun, start = left(), time.perf_counter()
    if begun <= 0:
        raise RuntimeError("nothing was left to measure: what is counted was there before, or the run is too short")
    wait(lambda: left() <= 0, "everything is done", 300, every=0.002)
    return begun / (time.perf_counter() - start)


def floor(server: Server, count: int = 30_000) -> float:
    """The same Redis work with no framework."""
    server.empty()
    command = [sys.executable, str(ROOT / "benchmarks" / "floor.py"), server.environment["BROKER"], str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=server.environment)
    return float(done.stdout)


def latency(server: Server, peer: Peer, command: str = "latency", count: int = 1000) -> dict[str, float]:
    """Milliseconds from send to the result in hand, one after the other, on an idle worker."""
    server.empty()
    with peer.working(server):
        return peer.run(server, command, count)


def sends(server: Server, peer: Peer, count: int) -> float:
    """Awaited sends a second, concurrent where the peer can."""
    server.empty()
    return peer.run(server, "sends", count)["rate"]


def floor_of_rabbitmq_sends(server: OnRabbitMQ, count: int = 20_000) -> float:
    """Confirmed publications a second, sent and counted with no framework."""
    server.empty()
    prepared = rabbitmq_floor.frames(rabbitmq_floor.messages(count, "celery"))
    with rabbitmq_floor.Link(server.node.port) as link:
        link.declare("celery", durable=True)
        return rabbitmq_floor.publish(link, prepared)


def floor_of_rabbitmq(server: OnRabbitMQ, count: int = 20_000) -> float:
    """Deliveries a second, acknowledged and counted with no framework: nothing is run, no result is stored."""
    floor_of_rabbitmq_sends(server, count)
    with rabbitmq_floor.Link(server.node.port) as link:
        return rabbitmq_floor.consume(link, "celery", count)


def codec(server: OnRabbitMQ, count: int = 20_000) -> dict[str, dict[str, float]]:
    """Our link to RabbitMQ beside aiormq's, see codec.py."""
    server.empty()
    command = [sys.executable, "-m", "benchmarks.codec", server.environment["BROKER"], str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=server.environment)
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return found


def sqlite_throughput(server: Server, peer: Peer, count: int = 20_000) -> float:
    """Tasks a second on a SQLite file, results stored in it."""
    with tempfile.TemporaryDirectory(dir=PLACE) as folder:
        file = Path(folder) / "queue.db"
        on_file = _On(server, {"BROKER": f"sqlite:///{file}"})
        peer.run(on_file, "send", count)
        with sqlite3.connect(file) as connection, peer.working(on_file):
            return _drain(lambda: connection.execute("SELECT count(*) FROM messages").fetchone()[0], count)


class _On(Server):
    """The same server, with another environment for clients and workers."""

    def __init__(self, server: Server, changes: dict[str, str]) -> None:
        self.client = server.client
        self.port = server.port
        self._changes = changes

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, **self._changes}


def asleep(server: Server, peer: Peer) -> dict[str, float]:
    """30,000 coroutines that sleep 5 s, 10,000 at once: part of the ideal rate, and kB each."""
    server.empty()
    with peer.working(server, "-c", "10000") as worker:
        wait(lambda: server.client.exists("_kombu.binding.celery"), "the worker is ready")
        time.sleep(1)
        process = worker_process(worker.pid)
        idle = resident(process)
        os.kill(process, signal.SIGSTOP)  # all is sent before the clock starts
        peer.run(server, "nap", 30_000)
        start = time.perf_counter()
        os.kill(process, signal.SIGCONT)
        wait(lambda: server.client.zcard("aqueue:leases") >= 9_990, "all slots are taken", every=0.01)
        full = resident(process)
        wait(lambda: peer.left(server.client, 30_000) == 0, "all have slept", 60)
        took = time.perf_counter() - start
    return {"of_ideal": 15.0 / took, "kilobytes_each": (full - idle) / 10_000}


def worker_process(supervisor: int) -> int:
    """The process under ``aqueue worker`` in which tasks run."""
    (pid,) = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    return int(pid)


def resident(pid: int) -> float:
    """Resident memory of a process, in kB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return float(line.split()[1])
    raise RuntimeError(f"no VmRSS of {pid}")


def idle(server: Server, peer: Peer, seconds: float = 20.0) -> dict[str, float]:
    """An idle worker: resident megabytes, commands to Redis a second (those inside scripts counted, too)."""
    server.empty()
    with peer.working(server) as worker:
        time.sleep(4)

        def commands() -> int:
            return int(server.client.info("stats")["total_commands_processed"])

        before = commands()
        time.sleep(seconds)
        return {
            "megabytes": resident(worker_process(worker.pid)) / 1024,
            "supervisor": resident(worker.pid) / 1024,
            "commands": (commands() - before - 1) / seconds,
        }


_RECOVERED = """
import asyncio, os, time
from aqueue import AQueue, Settings

app = AQueue("recovery", broker=os.environ["BROKER"], settings=Settings(lease=float(os.environ["LEASE"])))

@app.task
async def hold() -> None:
    with open("began", "a") as file:
        file.write(f"{time.monotonic()}\\n")
    await asyncio.sleep(3600)
"""


def recovery(server: Server, lease: float) -> float:
    """Seconds from the kill of a worker, supervisor and all, until its task has begun on another one."""
    server.empty()
    with tempfile.TemporaryDirectory(dir=PLACE) as folder:
        place = Path(folder)
        (place / "recovery.py").write_text(_RECOVERED)
        environment = {**server.environment, "LEASE": str(lease)}
        program = str(Path(sys.executable).with_name("aqueue"))

        def start() -> Process:
            command = [program, "worker", "recovery:app", "-l", "error"]
            return Process(command, cwd=place, env=environment, stderr=subprocess.DEVNULL)

        def began() -> list[float]:
            file = place / "began"
            return [float(line) for line in file.read_text().split()] if file.exists() else []

        doomed = start()
        subprocess.run([program, "send", "recovery:app", "recovery.hold"], cwd=place, env=environment, check=True)
        wait(lambda: len(began()) == 1, "the task runs")
        heir = start()
        time.sleep(3)
        killed = time.monotonic()
        doomed.kill()
        wait(lambda: len(began()) == 2, "the task runs elsewhere", 120)
        heir.kill()
        return began()[1] - killed


def import_time(runs: int = 30) -> dict[str, float]:
    """Milliseconds that imports take, over a bare interpreter; compiled, as an installed package is."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    times: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(runs):
        for code in ("pass", "import asyncio", "import aqueue"):
            start = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)
            times[code].append((time.perf_counter() - start) * 1000)
    bare, asyncio_alone, aqueue = map(statistics.median, times.values())
    return {"import": aqueue - bare, "asyncio": asyncio_alone - bare}


def depth(server: Server) -> float:
    """Fetch rate with a million messages waiting, as a part of that with a thousand; both in turn."""
    server.empty()
    raw = pack(Message(queue="deep", headers={"task": "t", "id": "1"}, body=b"[[], {}, {}]"))
    for queue, waiting in (("shallow", 1_000), ("deep", 1_000_000)):
        for _ in range(waiting // 1000):
            server.client.lpush(f"{queue}\x06\x169", *[raw] * 1000)
    times = asyncio.run(_fetch_times(server, ("shallow", "deep")))
    return times["shallow"] / times["deep"]


async def _fetch_times(server: Server, queues: Sequence[str]) -> dict[str, float]:
    times: defaultdict[str, list[float]] = defaultdict(list)
    made: Any = brokers.from_url(Url(server.environment["BROKER"]))(BrokerOptions())
    async with made as broker:
        for _ in range(300):
            for queue in queues:
                start = time.perf_counter()
                found = await broker.fetch([queue], 100, 0)
                times[queue].append(time.perf_counter() - start)
                await broker.settle([(delivery, Release()) for delivery in found])
    return {queue: statistics.median(found) for queue, found in times.items()}
