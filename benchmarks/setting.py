"""What a measurement runs on: servers of its own, an environment for each peer, workers as processes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import redis

from benchmarks.rabbitmq_floor import Link, frames, messages, publish
from tests.kit.rabbitmq import RabbitServer

ROOT = Path(__file__).parent.parent
PLACE = ROOT / ".bench"


class Server:
    """A Redis on a free loopback port, without persistence, as benchmarks of queues use it."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        PLACE.mkdir(exist_ok=True)
        self._process = subprocess.Popen(
            ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(PLACE)],
            stdout=subprocess.DEVNULL,
        )
        self.client = redis.Redis(port=self.port, socket_timeout=30)
        wait(self._answers, "redis-server answers")

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except redis.ConnectionError:
            return False

    def empty(self) -> None:
        self.client.flushall()

    def fill(self, peer: "Peer", task: str) -> None:
        """Send as many calls as a run of this peer takes."""
        peer.run(self, "send", peer.count, task)

    def left(self, peer: "Peer") -> int:
        """How many of them are not finished yet."""
        return peer.left(self.client, peer.count)

    @property
    def version(self) -> str:
        return str(self.client.info("server")["redis_version"])

    @property
    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            "BROKER": f"redis://127.0.0.1:{self.port}/0",
            "RESULTS": f"redis://127.0.0.1:{self.port}/1",
            "PYTHONPATH": str(ROOT),
        }

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()


class OnRabbitMQ(Server):
    """RabbitMQ for the messages, the same Redis for the results."""

    def __init__(self, server: Server, node: RabbitServer) -> None:
        self.client = server.client
        self.port = server.port
        self.node = node

    @property
    def environment(self) -> dict[str, str]:
        # The virtual host / as all clients read it.
        return {**super().environment, "BROKER": f"amqp://guest:guest@127.0.0.1:{self.node.port}/%2F"}

    @property
    def version(self) -> str:
        return self.node.ctl("version").strip()

    def empty(self) -> None:
        super().empty()
        with Link(self.node.port) as link:
            for queue in self.node.ctl("list_queues", "--no-table-headers", "name").splitlines():
                link.delete(queue)

    def fill(self, peer: "Peer", task: str) -> None:
        super().fill(peer, task)
        self.client.flushall()  # aqueue records what it sends: from here on each key is a result

    def left(self, peer: "Peer") -> int:
        return _results(self.client, peer.count)


class OnRpc(OnRabbitMQ):
    """RabbitMQ for the messages and, by ``rpc://``, for the results.

    Full queues are the same for everybody here: calls as aqueue sends them, whose results wait in a queue of their own
    until they are counted.
    """

    def __init__(self, server: Server, node: RabbitServer) -> None:
        super().__init__(server, node)
        self._link = Link(node.port)
        #: Where the results go: named and declared as Celery does it.
        self._replies = str(uuid4())

    @property
    def environment(self) -> dict[str, str]:
        return {**super().environment, "RESULTS": "rpc://"}

    def fill(self, peer: "Peer", task: str) -> None:
        with Link(self.node.port) as link:
            link.declare("celery", durable=True)
            link.declare(self._replies, durable=True, auto_delete=True, arguments={"x-expires": 86_400_000})
            calls = messages(peer.count, "celery", task=task, reply_to=self._replies)
            publish(link, frames(calls))

    def left(self, peer: "Peer") -> int:
        return peer.count - self._link.ready(self._replies)


def wait(condition: Callable[[], Any], what: str, timeout: float = 60.0, every: float = 0.01) -> None:
    ends = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > ends:
            raise TimeoutError(f"{what}: not within {timeout:g} s")
        time.sleep(every)


@dataclass(frozen=True)
class Peer:
    """A task queue to measure. ``left`` says how many of the tasks sent on Redis are not finished yet."""

    name: str
    #: What pip installs into its environment; nothing for what is in ours.
    packages: Sequence[str]
    worker: Sequence[str]
    left: Callable[["redis.Redis", int], int]
    #: How many tasks a run takes, so that it lasts a few seconds.
    count: int
    #: Its worker for plain functions in threads.
    thread_worker: Sequence[str] = field(default=())
    #: Whether it can wait for a result.
    has_round_trips: bool = True
    #: What it runs on besides Redis: ``rabbitmq`` with results in Redis, ``rpc`` with results by RabbitMQ, too.
    also_on: Sequence[str] = ()
    #: A round trip on RabbitMQ that does more, or less, at a send: what it is called, and the command for it.
    round_trip_variant: tuple[str, str] | None = None

    @property
    def module(self) -> str:
        return f"benchmarks.peers.{self.name}_peer"

    @property
    def bin(self) -> Path:
        return PLACE / self.name / "bin" if self.packages else Path(sys.executable).parent

    def prepare(self) -> None:
        """Make its environment, once."""
        stamp = PLACE / self.name / ".installed"
        wanted = " ".join(self.packages)
        if not self.packages or (stamp.exists() and stamp.read_text() == wanted):
            return
        print(f"installing {wanted}", file=sys.stderr)
        shutil.rmtree(stamp.parent, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(stamp.parent)], check=True)
        pip = [str(self.bin / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *self.packages], check=True)
        stamp.write_text(wanted)

    def version(self) -> str:
        code = (
            f"import importlib.metadata as m; print(m.version({(self.packages or ['aqueue'])[0].partition('[')[0]!r}))"
        )
        return self._output([str(self.bin / "python"), "-c", code], dict(os.environ)).strip()

    def run(self, server: Server, command: str, count: int, *words: str) -> dict[str, float]:
        """One of the commands of its file; what it prints."""
        line = [str(self.bin / "python"), "-m", self.module, command, str(count), *words]
        printed = self._output(line, server.environment)
        return json.loads(printed) if printed.strip() else {}

    def _output(self, command: list[str], environment: dict[str, str]) -> str:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        return done.stdout

    @contextmanager
    def working(self, server: Server, *arguments: str, threads: bool = False) -> Iterator["subprocess.Popen[bytes]"]:
        """Its worker, as a process."""
        line = [word.replace("MODULE", self.module) for word in (self.thread_worker if threads else self.worker)]
        log = (PLACE / f"{self.name}.log").open("wb")
        worker = subprocess.Popen(
            [str(self.bin / line[0]), *line[1:], *arguments],
            cwd=ROOT,
            env=server.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        log.close()
        try:
            yield worker
        finally:
            _end(worker)


def _end(worker: "subprocess.Popen[bytes]") -> None:
    """The worker and what it has started, by the session it was given."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(worker.pid, number)
        except ProcessLookupError:
            return
        try:
            worker.wait(10)
        except subprocess.TimeoutExpired:
            continue


def _results(client: "redis.Redis", count: int) -> int:
    """For those that write a key for each finished task into database 1."""
    keyspace = client.info("keyspace")
    return count - int(keyspace.get("db1", {}).get("keys", 0))


def _aqueue(client: "redis.Redis", count: int) -> int:
    return int(client.llen("celery\x06\x169")) + int(client.zcard("aqueue:leases"))


PEERS = (
    Peer(
        "aqueue",
        (),
        ("aqueue", "worker", "MODULE:app", "-l", "warning", "-c", "1000"),
        _aqueue,
        40_000,
        ("aqueue", "worker", "MODULE:app", "-l", "warning", "--threads", "16"),
        also_on=("rabbitmq", "rpc"),
        round_trip_variant=("aqueue, sends not recorded", "latency_unrecorded"),
    ),
    Peer(
        "celery",
        ("celery[redis]",),
        ("celery", "-A", "MODULE", "worker", "-P", "solo", "-l", "WARNING"),
        _results,
        4_000,
        ("celery", "-A", "MODULE", "worker", "-P", "threads", "-c", "16", "-l", "WARNING"),
        also_on=("rabbitmq", "rpc"),
    ),
    Peer(
        "taskiq",
        ("taskiq", "taskiq-redis", "taskiq-aio-pika", "uvloop", "hiredis"),
        ("taskiq", "worker", "MODULE:broker", "--workers", "1", "--log-level", "WARNING", "--no-configure-logging"),
        _results,
        8_000,
        also_on=("rabbitmq",),
    ),
    Peer(
        "arq",
        ("arq", "uvloop"),
        ("arq", "MODULE.WorkerSettings"),
        lambda client, _: int(client.zcard("arq:queue")),
        5_000,
    ),
    Peer(
        "saq",
        ("saq[redis]", "uvloop", "hiredis", "typing_extensions"),
        ("saq", "MODULE.settings"),
        lambda client, _: int(client.llen("saq:default:queued")) + int(client.llen("saq:default:active")),
        6_000,
        has_round_trips=False,
    ),
    Peer(
        "dramatiq",
        ("dramatiq[redis,rabbitmq]",),
        ("dramatiq", "MODULE", "-p", "1", "-t", "8"),
        _results,
        4_000,
        also_on=("rabbitmq",),
        round_trip_variant=("dramatiq, sends confirmed", "latency_confirmed"),
    ),
)
