"""Faults at a stage of the road and a count, which come again as times don't: ``claimed:kill9@17``.

=============  =====================================================================================
claim_sent     the broker has given messages, and this process doesn't know it yet
claimed        it knows
started        user code is about to run
body_done      user code has ended, and nobody knows it yet
settle         about to settle
result_done    the result is stored (where that is a step of its own), the message is not settled
settle_sent    settled, and the answer is not read
retry          the next attempt is sent; on RabbitMQ the first is not settled yet
reap           lost messages are being taken back
publish_sent   stored, and the sender doesn't know it yet
=============  =====================================================================================

Actions: ``kill9``, ``exit`` (at once, code 3), ``stop`` (frozen for so many seconds: ``started:stop=0.8@3``).
"""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

import msgspec

from tests.chaos.history import Recorder

STAGES: Final = (
    "claim_sent", "claimed", "started", "body_done", "settle", "result_done", "settle_sent", "retry", "reap",
    "publish_sent",
)  # fmt: skip
ACTIONS: Final = ("kill9", "exit", "stop")
_FORM: Final = re.compile(r"(\w+):(\w+)(?:=([\d.]+))?@(\d+)")


class Failpoint(msgspec.Struct, frozen=True):
    """``action`` at the ``count``-th time that ``stage`` is reached."""

    stage: str
    action: str
    count: int
    #: Seconds, of a stop.
    length: float = 0.0

    @classmethod
    def parse(cls, text: str) -> "Failpoint":
        """Raises ValueError."""
        found = _FORM.fullmatch(text)
        if found is None or found[1] not in STAGES or found[2] not in ACTIONS:
            raise ValueError(f"no failpoint: {text!r}; it is stage:action@count, see the module's text")
        return cls(found[1], found[2], int(found[4]), float(found[3] or 0))

    def __str__(self) -> str:
        length = f"={self.length:g}" if self.length else ""
        return f"{self.stage}:{self.action}{length}@{self.count}"


class Failpoints:
    """Those of one process, and how often it has reached each stage."""

    def __init__(self, texts: Sequence[str], record: Recorder) -> None:
        self._points = [Failpoint.parse(text) for text in texts]
        self._record = record
        self._reached: dict[str, int] = {}

    def hit(self, stage: str, times: int = 1) -> None:
        """The stage was reached by so many messages at once."""
        before = self._reached.get(stage, 0)
        self._reached[stage] = before + times
        for point in self._points:
            if point.stage == stage and before < point.count <= before + times:
                self._act(point)

    def _act(self, point: Failpoint) -> None:
        process = self._record.process
        match point.action:
            case "stop":
                self._record("FAULT", kind="stop", target=process, phase="begin", why=str(point))
                _freeze(point.length)
                self._record("FAULT", kind="stop", target=process, phase="end")
            case "exit":
                self._record("EXIT", target=process, n=3)
                os._exit(3)
            case _:
                self._record("EXIT", target=process, n=-9)
                os.kill(os.getpid(), signal.SIGKILL)


def _freeze(seconds: float) -> None:
    """Stand still, with all threads, until another process has us go on."""
    code = f"import os, time; time.sleep({seconds}); os.kill({os.getpid()}, 18)"
    subprocess.Popen([sys.executable, "-S", "-c", code])
    os.kill(os.getpid(), signal.SIGSTOP)
