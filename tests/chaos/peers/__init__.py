"""Baselines: other queues under the same plans, each in an environment of its own below ``.bench``.

A peer is a module with two commands, ``work`` and ``produce``, that take the same JSON as ours and write the same
histories, as far as they can: ENQ and ENQ_OK, START and END.
"""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

_PLACE: Final = Path(__file__).parent.parent.parent.parent / ".bench"


class Peer(msgspec.Struct, frozen=True):
    """See the module's text."""

    name: str
    #: What pip installs; nothing for what is among the tests' own.
    packages: Sequence[str] = ()

    @property
    def module(self) -> str:
        return f"tests.chaos.peers.{self.name}_peer"

    @property
    def python(self) -> str:
        return str(self._folder / "bin" / "python") if self.packages else sys.executable

    @property
    def _folder(self) -> Path:
        return _PLACE / f"chaos-{self.name}"

    def prepare(self) -> None:
        """Make its environment, once."""
        stamp, wanted = self._folder / ".installed", " ".join(self.packages)
        if not self.packages or (stamp.exists() and stamp.read_text() == wanted):
            return
        shutil.rmtree(self._folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(self._folder)], check=True)
        pip = [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, *self.packages], check=True)
        stamp.write_text(wanted)


#: kombu is a plain consumer that acknowledges after the work; it is what Celery's workers are made of.
PEERS: Final = {
    "kombu": Peer("kombu"),
    "taskiq": Peer("taskiq", ("taskiq", "taskiq-redis", "msgspec")),
    "arq": Peer("arq", ("arq", "msgspec")),
}
