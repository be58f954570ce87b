"""Workers as processes: started as people start them, killed as machines kill them."""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.kit.servers import Process, wait_for

#: The console script beside the interpreter that runs the tests.
AQUEUE = str(Path(sys.executable).with_name("aqueue"))


class WorkerProcess:
    """``aqueue worker`` in a process of its own; its log is shown when a test fails."""

    def __init__(self, folder: Path, app: str, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.log_file = folder / f"worker-{len(list(folder.glob('worker-*.log')))}.log"
        with self.log_file.open("wb") as log:
            self.process = Process(
                [AQUEUE, "worker", app, "-n", self.log_file.stem, *arguments],
                cwd=folder,
                env={**os.environ, **(env or {})},
                stdout=log,
                stderr=log,
            )

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def ready(self) -> "WorkerProcess":
        wait_for(lambda: "is ready" in self.log or self.ended(), f"the worker is ready:\n{self.log}", 20)
        if self.ended():
            pytest.fail(f"the worker ended:\n{self.log}")
        return self

    def ended(self) -> bool:
        return self.process.child.poll() is not None

    def terminate(self) -> None:
        self.process.signal(signal.SIGTERM)

    def interrupt(self) -> None:
        self.process.signal(signal.SIGINT)

    def worker_pid(self) -> int:
        """The one worker process under the supervisor."""
        (pid,) = wait_for(self.process.children, "a worker process")
        return int(pid)

    def kill(self) -> None:
        """As a machine that goes down: supervisor and worker at once."""
        self.process.kill()

    def wait(self, timeout: float = 15.0) -> int:
        """The exit code."""
        wait_for(self.ended, f"the worker ends:\n{self.log}", timeout)
        return self.process.child.returncode
