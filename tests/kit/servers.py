"""Real servers for tests: started on free loopback ports with their own folders, stopped by their own id."""

import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import boto3
import pytest
import redis
from pymemcache.client.base import Client as MemcachedClient


def free_port() -> int:
    """A port that nobody listens on, below those that the system gives to outgoing connections meanwhile."""
    while True:
        port = random.SystemRandom().randrange(10240, 32000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _elsewhere() -> list[Path]:
    """Where Debian keeps servers that are no commands of everybody."""
    return [Path("/usr/sbin"), *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]


def require(program: str, package: str) -> str:
    """The path of a server program. Missing: skipped at home, failed in CI, with what to do."""
    found = shutil.which(program) or shutil.which(program, path=os.pathsep.join(map(str, _elsewhere())))
    if found is None:
        text = f"{program} is missing: apt-get install {package} (or run `make test`, which does it)"
        if os.environ.get("CI") or os.environ.get("AQUEUE_REQUIRE_SERVERS"):
            pytest.fail(text)
        pytest.skip(text)
    return found


def wait_for(condition: Callable[[], Any], what: str, timeout: float = 10.0) -> Any:
    """Poll until the condition holds; fails after ``timeout`` seconds."""
    ends = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() > ends:
            pytest.fail(f"{what}: not within {timeout:g} s")
        time.sleep(0.01)
    return value


class Process:
    """A child process, ended by its own id."""

    def __init__(self, command: list[str], **options: Any) -> None:
        self.child = subprocess.Popen(command, **options)

    def signal(self, number: int) -> None:
        self.child.send_signal(number)

    def freeze(self) -> None:
        """Stop it, with all its threads, before this returns; SIGCONT has it go on."""
        self.child.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.child.pid, os.WSTOPPED)

    def children(self) -> list[int]:
        """The processes that it has started, and that still live."""
        return _children(self.child.pid)

    def kill(self) -> None:
        """As ``kill -9``, of it and of all that it has started; none of them can start another meanwhile."""
        family = [self.child.pid]
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
            family += _children(pid)
        for pid in family:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.child.wait()

    def stop(self, timeout: float = 10.0) -> int:
        """Ask it to end, and make it."""
        if self.child.poll() is None:
            self.child.terminate()
            try:
                self.child.wait(timeout)
            except subprocess.TimeoutExpired:
                self.kill()
        return self.child.returncode


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


class _OneProcess:
    """A server that is one process of ours."""

    _process: Process | None = None

    def pause(self) -> None:
        """Freeze the server: connections stay, nothing answers."""
        assert self._process is not None
        self._process.freeze()

    def go_on(self) -> None:
        assert self._process is not None
        self._process.signal(signal.SIGCONT)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()

    def stop(self) -> None:
        if self._process is not None and self._process.child.poll() is None:
            self._process.signal(signal.SIGCONT)
            self._process.stop()


class RedisServer(_OneProcess):
    """A redis-server, or a Sentinel, of our own."""

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        port: int | None = None,
        tls: dict[str, Path] | None = None,
        password: str = "",
    ) -> None:
        self.port = port or free_port()
        self.folder = folder
        self._tls = tls
        self._password = password
        self._arguments = arguments
        folder.mkdir(parents=True, exist_ok=True)
        self.start()

    def start(self) -> None:
        program = require("redis-server", "redis-server")
        listen = ["--port", str(self.port)]
        if self._tls:
            listen = ["--port", "0", "--tls-port", str(self.port), "--tls-auth-clients", "no"]
            for name, path in self._tls.items():
                listen += [f"--tls-{name}", str(path)]
        command = [
            program, *listen, "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", "", "--appendonly", "yes",
            "--appendfsync", "no", "--enable-debug-command", "local", *self._arguments,
        ]  # fmt: skip
        if self._password:
            command += ["--requirepass", self._password]
        log = (self.folder / "redis.log").open("ab")
        self._process = Process(command, stdout=log, stderr=log)
        log.close()
        wait_for(self.answers, f"redis-server on port {self.port}")

    def answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except redis.ConnectionError:
            return False

    def client(self, db: int = 0) -> redis.Redis:
        options: dict[str, Any] = {"ssl": True, "ssl_cert_reqs": "none"} if self._tls else {}
        if self._password:
            options["password"] = self._password
        return redis.Redis(port=self.port, db=db, socket_timeout=5, socket_connect_timeout=5, **options)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"


def answers(port: int) -> bool:
    """Whether somebody listens."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class MemcachedServer(_OneProcess):
    """A memcached of our own; what it holds is gone with it."""

    def __init__(self, *arguments: str) -> None:
        self.port = free_port()
        self._arguments = arguments
        self.start()

    def start(self) -> None:
        program = require("memcached", "memcached")
        command = [program, "-l", "127.0.0.1", "-p", str(self.port), "-U", "0", "-m", "64", *self._arguments]
        if os.getuid() == 0:
            command += ["-u", "nobody"]
        self._process = Process(command)
        wait_for(lambda: answers(self.port), f"memcached on port {self.port}")

    def client(self) -> MemcachedClient:
        return MemcachedClient(("127.0.0.1", self.port), timeout=5, connect_timeout=5)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"cache+memcached://{self.host}/"


class S3Server:
    """An emulator of S3, in a process of its own; what it holds is gone with it."""

    ACCESS_KEY = "tester"
    SECRET_KEY = "s3cr3t/of+tests"
    REGION = "eu-west-1"

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._log = folder / "s3.log"
        self._process: Process | None = None
        folder.mkdir(parents=True, exist_ok=True)
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(self.port)]
            self._process = Process(command, stdout=log, stderr=log)
        wait_for(lambda: answers(self.port), f"the S3 emulator on port {self.port}", timeout=30.0)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> Any:
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            region_name=self.REGION,
            aws_access_key_id=self.ACCESS_KEY,
            aws_secret_access_key=self.SECRET_KEY,
        )

    def make_bucket(self, name: str) -> None:
        self.client().create_bucket(Bucket=name, CreateBucketConfiguration={"LocationConstraint": self.REGION})

    def url(self, bucket: str, base_path: str = "") -> str:
        secret = quote(self.SECRET_KEY, safe="")
        return (
            f"s3://{bucket}/{base_path}?endpoint_url={self.endpoint}&region={self.REGION}"
            f"&access_key_id={self.ACCESS_KEY}&secret_access_key={secret}"
        )

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()

    def stop(self) -> None:
        if self._process is not None:
            self._process.stop()
