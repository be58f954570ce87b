"""A RabbitMQ of our own: a private node with its own name, port mapper, folder and port."""

import os
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import amqp

from tests.kit.servers import Process, free_port, require, wait_for

#: What a new node gets: quick to start, few schedulers, no other listeners.
_CONFIG = """\
listeners.tcp.1 = 127.0.0.1:{port}
loopback_users = none
log.file = rabbit.log
log.file.level = info
collect_statistics_interval = 60000
disk_free_limit.absolute = 1MB
vm_memory_high_watermark.relative = 0.6
heartbeat = 60
"""

_TLS = """\
listeners.ssl.1 = 127.0.0.1:{port}
ssl_options.cacertfile = {ca_cert_file}
ssl_options.certfile = {cert_file}
ssl_options.keyfile = {key_file}
ssl_options.verify = verify_none
"""


class RabbitServer:
    """A rabbitmq-server, started on a free loopback port; `ctl` runs rabbitmqctl on it."""

    def __init__(self, folder: Path, tls: dict[str, Path] | None = None) -> None:
        self.port = free_port()
        self.tls_port = free_port() if tls else 0
        self.folder = folder
        self._process: Process | None = None
        folder.mkdir(parents=True, exist_ok=True)
        node = f"aq{uuid4().hex[:8]}@localhost"
        config = _CONFIG.format(port=self.port)
        if tls:
            config += _TLS.format(port=self.tls_port, **{name.replace("-", "_"): path for name, path in tls.items()})
        (folder / "rabbitmq.conf").write_text(config)
        (folder / "enabled_plugins").write_text("[].\n")
        #: RabbitMQ's tools ask for no more than this: the node's name, its folders, its port mapper.
        self.env = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RABBITMQ_")},
            "HOME": str(folder),
            "ERL_EPMD_PORT": str(free_port()),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": node,
            "RABBITMQ_DIST_PORT": str(free_port()),
            "RABBITMQ_BASE": str(folder),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled_plugins"),
            "RABBITMQ_MNESIA_BASE": str(folder / "mnesia"),
            "RABBITMQ_LOG_BASE": str(folder / "log"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(folder / "generated"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "+S 2:2 +sbwt none",
        }
        self.start()

    def start(self) -> None:
        with (self.folder / "console.log").open("ab") as log:
            self._process = Process(
                [str(_tool("rabbitmq-server"))], env=self.env, stdout=log, stderr=log, cwd=self.folder
            )
        wait_for(self.answers, f"rabbitmq-server on port {self.port} (see {self.folder})", 60)

    def answers(self) -> bool:
        """Whether a client would be greeted."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=2) as probe:
                probe.settimeout(5)
                probe.sendall(b"AMQP\x00\x00\x09\x01")
                return probe.recv(1) == b"\x01"
        except OSError:
            return False

    def ctl(self, *arguments: str) -> str:
        """Run rabbitmqctl; its output."""
        command = [str(_tool("rabbitmqctl")), "--quiet", *arguments]
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        if done.returncode:
            raise AssertionError(f"rabbitmqctl {' '.join(arguments)}: {done.stdout}{done.stderr}")
        return done.stdout

    def virtual_host(self, name: str) -> str:
        """Make one that ``guest`` may use; its URL."""
        everything = '<<".*">>'
        self.ctl(
            "eval",
            f'rabbit_vhost:add(<<"{name}">>, <<"tests">>), rabbit_auth_backend_internal:set_permissions('
            f'<<"guest">>, <<"{name}">>, {everything}, {everything}, {everything}, <<"tests">>).',
        )
        return f"amqp://guest:guest@127.0.0.1:{self.port}/{name}"

    def forget_the_dead(self) -> None:
        """Empty the dead letters' queue."""
        with amqp.Connection(f"127.0.0.1:{self.port}") as connection:
            channel = connection.channel()
            with suppress(amqp.NotFound):
                channel.queue_purge("aqueue.dead")

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    def pause(self) -> None:
        """Freeze the server: connections stay, nothing answers."""
        os.kill(self._node_pid(), 19)

    def go_on(self) -> None:
        os.kill(self._node_pid(), 18)

    def kill(self) -> None:
        """As ``kill -9`` of the server itself; the script around it ends with it."""
        assert self._process is not None
        os.kill(self._node_pid(), 9)
        self._process.child.wait(20)

    def stop(self) -> None:
        if self._process is not None and self._process.child.poll() is None:
            self.kill()
        self._stop_port_mapper()

    def _node_pid(self) -> int:
        return int((self.folder / "pid").read_text())

    def _stop_port_mapper(self) -> None:
        for _ in range(20):  # it refuses while it still knows the node
            done = subprocess.run(["epmd", "-kill"], env=self.env, capture_output=True, timeout=10, check=False)
            if b"Killed" in done.stdout or b"Cannot connect" in done.stdout + done.stderr:
                return
            time.sleep(0.1)


def _tool(name: str) -> Path:
    """The tool itself, below the package's wrapper, which insists on being one user's."""
    require(name, "rabbitmq-server")
    found = Path("/usr/lib/rabbitmq/bin") / name
    return found if found.exists() else Path(require(name, "rabbitmq-server"))


def queue_counts(server: RabbitServer) -> dict[str, tuple[int, int]]:
    """Of each queue: ready and unacknowledged messages."""
    rows: dict[str, tuple[int, int]] = {}
    columns = ("name", "messages_ready", "messages_unacknowledged")
    for line in server.ctl("list_queues", "--no-table-headers", *columns).splitlines():
        name, ready, unacked = line.split("\t")
        rows[name] = (int(ready), int(unacked))
    return rows
