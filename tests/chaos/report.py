"""The table of runs: a row for each broker or peer, between two marks in docs/guarantees.md."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from tests.chaos.checker import Verdict

BEGIN: Final = "<!-- runs: written by make chaos -->"
END: Final = "<!-- end of runs -->"
_HEAD: Final = (
    "| who | on | runs | faults | sent | confirmed | lost | ran twice: explained, not | at once | stale refused "
    "| settled twice | dead | undetermined | p99 recovery, s |"
)


class Row(msgspec.Struct):
    """What several runs came to."""

    who: str
    broker: str
    verdicts: list[Verdict] = msgspec.field(default_factory=list[Verdict])

    def total(self, name: str) -> int:
        return round(sum(max(0.0, verdict.counts[name]) for verdict in self.verdicts))

    @property
    def is_peer(self) -> bool:
        return not self.who.startswith("aqueue")

    @property
    def line(self) -> str:
        undetermined = sum(verdict.word == "undetermined" for verdict in self.verdicts)
        recovery = max((verdict.counts["p99_recovery"] for verdict in self.verdicts), default=0.0)
        twice = f"{self.total('dup_explained'):,}, {self.total('dup_unexplained'):,}"
        own = ["", "", "", ""]
        if not self.is_peer:
            own = [f"{self.total(name):,}" for name in ("stale_refused", "settled_twice", "dead")] + [f"{recovery:.1f}"]
        cells = [
            self.who,
            self.broker,
            str(len(self.verdicts)),
            *(f"{self.total(name):,}" for name in ("faults", "enq", "ok", "lost")),
            twice,
            f"{self.total('overlap'):,}",
            *own[:3],
            str(undetermined),
            own[3],
        ]
        return f"| {' | '.join(cells)} |"


def table(rows: Iterable[Row], notes: Sequence[str]) -> str:
    rule = "|" + " --- |" * (_HEAD.count("|") - 1)
    return "\n".join([*notes, "", _HEAD, rule, *(row.line for row in rows)])


def write(path: Path, text: str) -> None:
    """Put a table between the marks. Raises ValueError when they are not there."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path} has no {BEGIN} ... {END}")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
