"""Worker processes of both kinds, and where a fleet's data lie."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import urlsplit

import amqp
import pytest
import redis

from tests.interop import tasks
from tests.kit.servers import Process, RedisServer

ROOT: Final = Path(__file__).parents[2]
#: Seconds a worker may take to start, or to end, on a busy machine.
PATIENCE: Final = 30.0
#: Lines of a worker's log shown when a test fails.
_SHOWN: Final = 150


@dataclass(frozen=True)
class Site:
    """A Redis server with results and traces; the broker is its database 0, or RabbitMQ."""

    server: RedisServer
    results_db: int = 0
    #: A virtual host of RabbitMQ.
    rabbit: str = ""
    #: Where results go instead.
    store: str = ""

    @property
    def port(self) -> int:
        return self.server.port

    @property
    def broker(self) -> str:
        return self.rabbit or f"redis://127.0.0.1:{self.port}/0"

    @property
    def results(self) -> str:
        return self.store or f"redis://127.0.0.1:{self.port}/{self.results_db}"

    @property
    def traces(self) -> Any:
        """What tasks have left for the tests to read."""
        return tasks.traces(self.port)

    @contextmanager
    def broker_keys(self) -> Iterator[Any]:
        assert not self.rabbit, "RabbitMQ has no keys"
        with redis.Redis(port=self.port, db=0, socket_timeout=10) as client:
            yield client

    @contextmanager
    def result_keys(self) -> Iterator[Any]:
        with redis.Redis(port=self.port, db=self.results_db, socket_timeout=10) as client:
            yield client

    @contextmanager
    def rabbit_channel(self) -> Iterator[Any]:
        """To look into the virtual host; it ends with its connection."""
        place = urlsplit(self.rabbit)
        with amqp.Connection(f"{place.hostname}:{place.port}", virtual_host=place.path[1:]) as connection:
            yield connection.channel()

    def waiting_in_rabbit(self, queue: str) -> int:
        """Messages in nobody's hands."""
        with self.rabbit_channel() as channel:
            return int(channel.queue_declare(queue, passive=True).message_count)

    def runs(self, key: str) -> int:
        """How often a task with this key has run."""
        return int(self.traces.get(f"runs:{key}") or 0)

    def put_up(self, flag: str) -> None:
        """Let the tasks go on that wait for this flag."""
        self.traces.set(f"flag:{flag}", 1)


class WorkerProcess:
    """A worker in a session of its own, so that it can be ended with all of its children; its log is kept."""

    #: Those that run now: their logs are shown when a test fails.
    running: Final[list["WorkerProcess"]] = []

    def __init__(
        self, title: str, command: Sequence[str], log: Path, ready: str, env: dict[str, str], cwd: Path = ROOT
    ) -> None:
        self.title = title
        self._log = log
        with log.open("wb") as out:
            self._process = Process(
                [sys.executable, *command],
                cwd=cwd,
                env=process_environment(env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.running.append(self)
        self._wait_until_ready(ready)

    @property
    def pid(self) -> int:
        return self._process.child.pid

    @property
    def worker_pids(self) -> list[int]:
        """Of the processes that it has started."""
        return self._process.children()

    @property
    def is_alive(self) -> bool:
        return self._process.child.poll() is None

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    @property
    def last_lines(self) -> str:
        return "\n".join(self.log.splitlines()[-_SHOWN:])

    def _wait_until_ready(self, ready: str) -> None:
        ends = time.monotonic() + PATIENCE
        while ready not in self.log:
            if not self.is_alive or time.monotonic() > ends:
                self.end()
                pytest.fail(f"{self.title} has not started:\n{self.last_lines}")
            time.sleep(0.02)

    def terminate(self) -> None:
        """Ask it to end, as a deployment does."""
        self._process.signal(signal.SIGTERM)

    def wait(self, timeout: float = PATIENCE) -> int:
        """The exit code, when it has ended."""
        return self._process.child.wait(timeout)

    def kill(self) -> None:
        """As ``kill -9`` of the worker and its children at once."""
        self._process.kill()
        self._kill_session()
        self._forget()

    def end(self) -> int:
        """Ask it to end, and see to it that nothing of it is left."""
        code = self._process.stop(PATIENCE)
        self._kill_session()
        self._forget()
        return code

    def _kill_session(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def _forget(self) -> None:
        if self in self.running:
            self.running.remove(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()


def process_environment(env: Mapping[str, str]) -> dict[str, str]:
    """Ours and ``env``; what can be imported here can be imported there."""
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    return {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": path, **env}


def environment(broker: str, results: str, who: str, settings: dict[str, Any]) -> dict[str, str]:
    """What `celery_app` and `aqueue_app` read."""
    return {
        "INTEROP_BROKER": broker,
        "INTEROP_RESULTS": results,
        "INTEROP_SETTINGS": json.dumps(settings),
        tasks.WHO: who,
        "C_FORCE_ROOT": "1",  # tests in containers run as root, and some workers accept pickle
    }


def celery_worker(
    folder: Path,
    broker: str,
    results: str,
    *arguments: str,
    queues: str,
    name: str = "celery-worker",
    settings: dict[str, Any] | None = None,
) -> WorkerProcess:
    """``celery -A tests.interop.celery_app worker``; ready when it says so."""
    command = [
        "-m",
        "celery",
        "-A",
        "tests.interop.celery_app",
        "worker",
        "-Q",
        queues,
        "-n",
        f"{name}@%h",
        "-l",
        "info",
    ]
    env = environment(broker, results, "celery", settings or {})
    return WorkerProcess(name, [*command, *arguments], folder / f"{name}.log", " ready.", env)


#: For tests that start a Celery worker of their own: nothing that they need takes a second.
QUICK: Final = ("--without-mingle", "--without-gossip", "--without-heartbeat")


def aqueue_worker(
    folder: Path,
    broker: str,
    results: str,
    *arguments: str,
    queues: str,
    name: str = "aqueue-worker",
    settings: dict[str, Any] | None = None,
) -> WorkerProcess:
    """``aqueue worker tests.interop.aqueue_app``; ready when it says so."""
    command = ["-m", "aqueue", "worker", "tests.interop.aqueue_app:app", "-Q", queues, "-n", name]
    env = environment(broker, results, "aqueue", settings or {})
    return WorkerProcess(name, [*command, *arguments], folder / f"{name}.log", " is ready", env)


def aqueue_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of ``aqueue`` to its end."""
    return subprocess.run(
        [sys.executable, "-m", "aqueue", *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
        cwd=ROOT,
        env=process_environment({}),
    )
