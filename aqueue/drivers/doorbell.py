"""Waking other processes on this machine: named pipes in a folder, one for each that listens.

Who has changed something rings: a byte into each pipe. A listener's event loop sleeps on its own pipe, so
nobody polls. A pipe whose listener died is found by the next ring, and removed.
"""

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress
from errno import ENXIO
from pathlib import Path

from aqueue.identifiers import new_id

_READ_SIZE = 4096


class Doorbell:
    """All listeners of one folder and one topic, which is the start of the pipes' names."""

    def __init__(self, folder: Path, topic: str) -> None:
        self._folder = folder
        self._topic = topic

    def ring(self) -> None:
        """Wake every listener. Never blocks and never fails: a listener also looks by itself, rarely."""
        with suppress(OSError):
            for entry in os.scandir(self._folder):
                if entry.name.startswith(self._topic):
                    _ring(entry.path)

    def listen(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have the running event loop call ``callback`` at each ring; returns how to stop.

        On systems without named pipes nothing ever rings.
        """
        if not hasattr(os, "mkfifo"):
            return lambda: None
        loop = asyncio.get_running_loop()
        pipe, path = self._open()

        def rung() -> None:
            with suppress(BlockingIOError):
                while len(os.read(pipe, _READ_SIZE)) == _READ_SIZE:
                    pass
            callback()

        def stop() -> None:
            loop.remove_reader(pipe)
            path.unlink(missing_ok=True)
            os.close(pipe)

        loop.add_reader(pipe, rung)
        return stop

    def _open(self) -> tuple[int, Path]:
        """A pipe gets its name when it is open: before that a ring would take it for a dead listener's."""
        self._folder.mkdir(mode=0o700, exist_ok=True)
        name = f"{self._topic}-{new_id()}"
        unnamed, path = self._folder / f"new-{name}", self._folder / name
        os.mkfifo(unnamed, 0o600)
        # For reading and writing: with a writer of its own the pipe never reports an end.
        pipe = os.open(unnamed, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        unnamed.rename(path)
        return pipe, path


def _ring(path: str) -> None:
    try:
        pipe = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == ENXIO:  # nobody has it open
            with suppress(OSError):
                Path(path).unlink()
        return
    try:
        os.write(pipe, b"\0")
    except OSError:
        pass  # full: it is ringing already
    finally:
        os.close(pipe)
