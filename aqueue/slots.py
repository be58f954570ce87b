"""How much a worker may run at once, and how much it should claim."""

from collections.abc import Iterable, Mapping

from aqueue.task import Kind


class Slots:
    """Free slots for each kind of task.

    A queue doesn't say which kinds it holds. A claim asks for as many messages as fit whichever of the
    kinds they turn out to be that were met last; what doesn't fit goes back to the front at once.
    """

    def __init__(self, sizes: Mapping[Kind, int]) -> None:
        self._free = dict(sizes)
        self._met: set[Kind] = set()
        self.total = sum(sizes.values())

    def demand(self) -> int:
        """How many messages to claim."""
        return min((self._free[kind] for kind in self._met), default=max(self._free.values()))

    def meet(self, kinds: Iterable[Kind]) -> None:
        """Remember the kinds of what was claimed last."""
        self._met = set(kinds)

    def take(self, kind: Kind) -> bool:
        """Take a slot; False when none is free."""
        if not self._free[kind]:
            return False
        self._free[kind] -= 1
        return True

    def give(self, kind: Kind) -> None:
        self._free[kind] += 1
