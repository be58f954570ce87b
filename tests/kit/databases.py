"""Real SQL databases for tests: in folders of their own, on free loopback ports, gone when they stop."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import psycopg2
import pymysql
import pytest

from tests.kit.certificates import make_certificates
from tests.kit.servers import Process, free_port, require, wait_for

#: No secret: what the servers are made with.
USER: Final = "aqueue"
PASSWORD: Final = "p%40ss%2Fw%25rd"
_PASSWORD_PLAIN: Final = "p@ss/w%rd"
#: Seconds a server may take to start on a busy machine.
_PATIENCE: Final = 60.0


class DatabaseServer:
    """What all have in common. Tests that run as root start it as the user of the system's package."""

    #: The password, as nobody may see it.
    secret = _PASSWORD_PLAIN
    #: The system user, as which no server runs unless tests run as root.
    account: str

    def __init__(self, *, tls: bool = False) -> None:
        self.port = free_port()
        # Not below pytest's folder, where only the user who runs the tests may look.
        self.folder = Path(tempfile.mkdtemp(prefix="aqueue-database-"))
        self._as: dict[str, Any] = {"cwd": self.folder}
        if os.geteuid() == 0:
            self._as |= {"user": self.account, "group": self.account, "extra_groups": []}
            shutil.chown(self.folder, self.account, self.account)
        #: With TLS: the certificate of the authority, of the server, and its key.
        self.certificates = make_certificates(self.folder) if tls else {}
        for path in self.certificates.values():
            path.chmod(0o600)
            if os.geteuid() == 0:
                shutil.chown(path, self.account, self.account)
        self._process: Process | None = None
        try:
            self.start()
        except BaseException:
            self.stop()
            raise

    def start(self) -> None:
        with (self.folder / "server.log").open("ab") as log:
            self._process = Process(self.command(), stdout=log, stderr=log, **self._as)
        wait_for(self.answers, f"{self.account} on port {self.port}", _PATIENCE)

    def command(self) -> list[str]:
        raise NotImplementedError

    def connect(self) -> Any:
        """A connection of a blocking driver."""
        raise NotImplementedError

    def answers(self) -> bool:
        assert self._process is not None
        if self._process.child.poll() is not None:
            pytest.fail(f"{self.account} has ended:\n{(self.folder / 'server.log').read_text()[-3000:]}")
        try:
            self.connect().close()
        except (psycopg2.Error, pymysql.Error):
            return False
        return True

    def run(self, command: Sequence[str], **options: Any) -> None:
        done = subprocess.run(command, capture_output=True, text=True, check=False, **self._as, **options)
        if done.returncode:
            pytest.fail(f"{command[0]}: {done.stdout[-2000:]}{done.stderr[-2000:]}")

    def kill(self) -> None:
        """End it at once, with everything that it has started, as a machine that goes down."""
        assert self._process is not None
        self._process.signal(signal.SIGQUIT)
        self._process.child.wait()

    def stop(self) -> None:
        if self._process is not None and self._process.child.poll() is None:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


class PostgresServer(DatabaseServer):
    """A cluster made by initdb, without the care for data that tests don't need."""

    account = "postgres"

    def __init__(self, *, tls: bool = False) -> None:
        self._bin = Path(require("initdb", "postgresql")).parent
        super().__init__(tls=tls)

    def command(self) -> list[str]:
        data = self.folder / "data"
        if not data.exists():
            secret = self.folder / "secret"
            secret.write_text(_PASSWORD_PLAIN)
            secret.chmod(0o644)
            self.run(
                [
                    str(self._bin / "initdb"), "-D", str(data), "-U", USER, "--auth=scram-sha-256",
                    f"--pwfile={secret}", "--no-sync", "--encoding=UTF8", "--locale=C",
                ]
            )  # fmt: skip
        settings: dict[str, object] = {
            "listen_addresses": "127.0.0.1", "port": self.port, "unix_socket_directories": "", "fsync": "off",
            "full_page_writes": "off", "shared_buffers": "16MB",
        }  # fmt: skip
        if self.certificates:
            cert, key = self.certificates["cert-file"], self.certificates["key-file"]
            settings |= {"ssl": "on", "ssl_cert_file": cert, "ssl_key_file": key}
        options = [text for name, value in settings.items() for text in ("-c", f"{name}={value}")]
        return [str(self._bin / "postgres"), "-D", str(data), *options]

    def connect(self) -> Any:
        return psycopg2.connect(
            host="127.0.0.1", port=self.port, user=USER, password=_PASSWORD_PLAIN, dbname="postgres", connect_timeout=5
        )

    def empty(self) -> None:
        connection = self.connect()
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
        connection.close()

    @property
    def url(self) -> str:
        return f"db+postgresql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/postgres"


class MariaDbServer(DatabaseServer):
    """A MariaDB with a data folder made by its own script."""

    account = "mysql"

    def __init__(self, *, tls: bool = False) -> None:
        self._install = require("mariadb-install-db", "mariadb-server")
        self._program = require("mariadbd", "mariadb-server")
        super().__init__(tls=tls)

    def command(self) -> list[str]:
        data, first = self.folder / "data", self.folder / "first.sql"
        if not data.exists():
            first.write_text(  # a statement a line
                f"CREATE DATABASE IF NOT EXISTS results;\n"
                f"CREATE USER IF NOT EXISTS {USER}@'127.0.0.1' IDENTIFIED BY '{_PASSWORD_PLAIN}';\n"
                f"GRANT ALL ON results.* TO {USER}@'127.0.0.1';\n"
            )
            first.chmod(0o644)
            make = [self._install, "--no-defaults", f"--datadir={data}", "--skip-test-db"]
            self.run([*make, "--auth-root-authentication-method=normal"])
        return [
            self._program, "--no-defaults", f"--datadir={data}", f"--port={self.port}", "--bind-address=127.0.0.1",
            f"--socket={self.folder}/socket", f"--pid-file={self.folder}/pid", f"--init-file={first}",
            "--innodb-flush-log-at-trx-commit=0", "--innodb-buffer-pool-size=16M", "--skip-name-resolve",
            *(f"--ssl-{name.split('-')[0]}={path}" for name, path in self.certificates.items()),
        ]  # fmt: skip

    def connect(self) -> Any:
        return pymysql.connect(
            host="127.0.0.1", port=self.port, user=USER, password=_PASSWORD_PLAIN, database="results", connect_timeout=5
        )

    def empty(self) -> None:
        connection = self.connect()
        with connection.cursor() as cursor:
            cursor.execute("SHOW FULL TABLES")
            for name, kind in cursor.fetchall():
                cursor.execute(f"DROP {'SEQUENCE' if kind == 'SEQUENCE' else 'TABLE'} {name}")
        connection.close()

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()

    @property
    def url(self) -> str:
        return f"db+mysql://{USER}:{PASSWORD}@127.0.0.1:{self.port}/results"
