"""Where a run takes place: a broker, the ways to it, the faults that can happen to it, what is left in it."""

import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final, Protocol
from uuid import uuid4

import amqp
import redis

from tests.kit.proxy import Proxy
from tests.kit.rabbitmq import RabbitServer
from tests.kit.servers import RedisServer, wait_for

#: What no log may show.
CANARY: Final = "c4nary-s3cret"


class Ground(Protocol):
    """See the module's text. ``begin`` and ``end`` carry a fault out and undo it; instant ones have no end."""

    kind: str
    queue: str
    #: The broker and the result store, as workers and as producers reach them.
    workers_url: str
    producers_url: str
    results_url: str
    #: Past every proxy.
    url: str

    def begin(self, fault: str, target: str, length: float) -> None: ...

    def end(self, fault: str, target: str) -> None: ...

    def waiting(self) -> int:
        """Messages that have not come to their end: ready, parked, leased where that can be told at once."""
        ...

    def held(self) -> int:
        """Messages with workers that `waiting` doesn't count."""
        ...

    def left(self) -> dict[str, int]:
        """What is left of the broker's structures."""
        ...

    def close(self) -> None: ...


class SqliteGround:
    """One file."""

    kind = "sqlite"
    queue = "chaos"

    def __init__(self, folder: Path) -> None:
        self._path = folder / "queue.db"
        self.url = self.workers_url = self.producers_url = self.results_url = f"sqlite:///{self._path}"
        self._lock: sqlite3.Connection | None = None

    def begin(self, fault: str, target: str, length: float) -> None:
        assert fault == "lock", fault
        with suppress(sqlite3.OperationalError):  # busy for longer than the connection waits: no fault then
            self._lock = sqlite3.connect(self._path, timeout=1.0, isolation_level=None)
            self._lock.execute("BEGIN IMMEDIATE")

    def end(self, fault: str, target: str) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def waiting(self) -> int:
        if not self._path.exists():
            return 0
        with closing(sqlite3.connect(self._path, timeout=10.0)) as file, suppress(sqlite3.OperationalError):
            return int(file.execute("SELECT count(*) FROM messages").fetchone()[0])
        return 1

    def held(self) -> int:
        return 0

    def left(self) -> dict[str, int]:
        with closing(sqlite3.connect(self._path, timeout=10.0)) as file:
            damaged = file.execute("PRAGMA integrity_check").fetchone() != ("ok",)
        return {"messages": self.waiting(), "damaged pages": int(damaged)}

    def close(self) -> None:
        self.end("lock", "")


class _Linked:
    """What servers on the network have in common: proxies, one for workers, one for producers."""

    def __init__(self, port: int) -> None:
        self.proxies = {"workers": Proxy(port), "producers": Proxy(port)}

    def begin(self, fault: str, target: str, length: float) -> None:
        proxy = self.proxies.get(target)
        match fault:
            case _ if proxy is None:
                with suppress(redis.RedisError):  # it is busy with what came before: no fault then
                    self.happen(fault, length)
            case "reset":
                proxy.cut()
            case "cut":
                proxy.cut_mid_frame("client")
            case "silence":
                proxy.silence()
            case "refuse":
                proxy.refuse()
            case "delay":
                proxy.delay = 0.1
            case _:
                raise ValueError(fault)

    def end(self, fault: str, target: str) -> None:
        proxy = self.proxies.get(target)
        if proxy is None:
            self.undo(fault)
        else:
            proxy.delay = 0.0
            proxy.heal()

    def happen(self, fault: str, length: float) -> None:
        """A fault of the server's own."""
        raise ValueError(fault)

    def undo(self, fault: str) -> None: ...

    def close(self) -> None:
        for proxy in self.proxies.values():
            proxy.close()


class RedisGround(_Linked):
    """A Redis of its own, with an append-only file and a password."""

    kind = "redis"
    queue = "chaos"

    def __init__(self, folder: Path) -> None:
        self.server = RedisServer(folder / "redis", password=CANARY)
        super().__init__(self.server.port)
        self.url = _redis_url(self.server.port)
        self.workers_url = _redis_url(self.proxies["workers"].port)
        self.producers_url = _redis_url(self.proxies["producers"].port)
        self.results_url = ""

    def happen(self, fault: str, length: float) -> None:
        client: Any = self.server.client()
        match fault:
            case "client_kill":
                client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
            case "client_pause":
                client.execute_command("CLIENT", "PAUSE", str(round(1000 * length)), "ALL")
            case "script_flush":
                client.script_flush()
            case "debug_sleep":
                threading.Thread(target=self._sleep, args=(length,), name="debug-sleep", daemon=True).start()
            case "restart":
                self.server.kill()
                self.server.start()
            case "pause":
                self.server.pause()
            case "memory":
                client.config_set("maxmemory", "1mb")
            case _:
                super().happen(fault, length)
        client.close()

    def _sleep(self, length: float) -> None:
        client: Any = self.server.client()
        with suppress(redis.RedisError), closing(client):
            client.execute_command("DEBUG", "SLEEP", f"{length:.2f}")

    def undo(self, fault: str) -> None:
        match fault:
            case "pause":
                self.server.go_on()
            case "memory":
                with closing(self.server.client()) as client:
                    client.config_set("maxmemory", "0")
            case _:
                super().undo(fault)

    def waiting(self) -> int:
        with closing(self.server.client()) as client:
            lists = [client.llen(name) for name in client.scan_iter(f"{self.queue}*")]
            return sum(map(int, lists)) + int(client.zcard("aqueue:leases")) + int(client.zcard("aqueue:parked"))

    def held(self) -> int:
        return 0

    def left(self) -> dict[str, int]:
        with closing(self.server.client()) as client:
            sizes = {
                "leases": client.zcard("aqueue:leases"),
                "leased bytes": client.hlen("aqueue:leased"),
                "suspects": client.hlen("aqueue:suspects"),
                "losses": client.hlen("aqueue:lost"),
                "parked": client.zcard("aqueue:parked"),
                "parked bytes": client.hlen("aqueue:parked:messages"),
            }
            kept = [key for key in client.scan_iter("celery-task-meta-*") if client.ttl(key) < 0]
        return {**{name: int(size) for name, size in sizes.items()}, "results without an end": len(kept)}

    def close(self) -> None:
        super().close()
        self.server.stop()


def _redis_url(port: int) -> str:
    return f"redis://:{CANARY}@127.0.0.1:{port}/0"


class RabbitHost:
    """A virtual host of a RabbitMQ, with a user whose password is a canary."""

    def __init__(self, server: RabbitServer) -> None:
        self.server = server
        self.name = f"chaos-{uuid4().hex[:6]}"
        host, secret, everything = f'<<"{self.name}">>', f'<<"{CANARY}">>', '<<".*">>'
        server.ctl(
            "eval",
            f'rabbit_vhost:add({host}, <<"tests">>), rabbit_auth_backend_internal:add_user({host}, {secret}, '
            f'<<"tests">>), rabbit_auth_backend_internal:set_permissions({host}, {host}, {everything}, {everything}, '
            f'{everything}, <<"tests">>).',
        )

    def url(self, port: int) -> str:
        return f"amqp://{self.name}:{CANARY}@127.0.0.1:{port}/{self.name}"


class RabbitGround(_Linked):
    """A queue of its own in a virtual host; results are in a SQLite file."""

    kind = "rabbitmq"

    def __init__(self, folder: Path, host: RabbitHost) -> None:
        super().__init__(host.server.port)
        self.server = host.server
        self.queue = f"q-{uuid4().hex[:8]}"
        self._host = host
        self.url = host.url(self.server.port)
        self.workers_url = host.url(self.proxies["workers"].port)
        self.producers_url = host.url(self.proxies["producers"].port)
        self.results_url = f"sqlite:///{folder / 'results.db'}"

    def happen(self, fault: str, length: float) -> None:
        match fault:
            case "close_connections":
                self.server.ctl("close_all_connections", "chaos", "-p", self._host.name)
            case "restart":
                self.server.kill()
                self.server.start()
            case "stop_app":
                self.server.ctl("stop_app")
                self.server.ctl("start_app")
                wait_for(self.server.answers, "rabbitmq-server is back", 60)
            case "pause":
                self.server.pause()
            case "alarm":
                self.server.ctl("set_vm_memory_high_watermark", "0.00001")
            case _:
                super().happen(fault, length)

    def undo(self, fault: str) -> None:
        match fault:
            case "pause":
                self.server.go_on()
            case "alarm":
                self.server.ctl("set_vm_memory_high_watermark", "0.6")
            case _:
                super().undo(fault)

    def waiting(self) -> int:
        """Those that are ready; what workers hold takes a second to ask for."""
        return sum(self.left().values())

    def held(self) -> int:
        counts = self.server.ctl("list_queues", "-p", self._host.name, "--no-table-headers", "name", "messages")
        rows = [line.split("\t") for line in counts.splitlines() if "\t" in line]
        return sum(int(number or 0) for name, number in rows if name == self.queue)

    def left(self) -> dict[str, int]:
        with amqp.Connection(
            f"127.0.0.1:{self.server.port}", userid=self._host.name, password=CANARY, virtual_host=self._host.name
        ) as connection:
            ladder = [f"celery_delayed_{level}" for level in range(28)]
            return {f"queue {name}": _ready(connection, name) for name in (self.queue, *ladder)}


def _ready(connection: amqp.Connection, queue: str) -> int:
    channel = connection.channel()
    try:
        return int(channel.queue_declare(queue, passive=True).message_count)
    except amqp.NotFound:
        return 0
    finally:
        channel.close()


#: Makes the ground of a run in a folder.
MakeGround = Callable[[Path], Ground]
