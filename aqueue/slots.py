"""How much a worker may run at once, and what it should claim for that."""

from collections.abc import Iterable, Mapping, Sequence

from aqueue.task import Kind


class Slots:
    """Free slots for each kind of task.

    A queue doesn't say which kinds it holds, so a claim reckons with the kinds that each queue brought last:
    it asks for no more than fits if every message is of the kind with the fewest free slots, and leaves out
    queues whose kind is full. What doesn't fit after all goes back to the front. So tasks that keep threads
    busy for long hold up no coroutines, given a queue of their own.

    One claim takes half of a kind's slots at most: while these run, the broker works on the next claim. Not so
    (``whole``) where the broker pushes messages by itself while there is demand.
    """

    def __init__(self, sizes: Mapping[Kind, int], *, whole: bool = False) -> None:
        self.sizes = dict(sizes)
        self._free = dict(sizes)
        self._most = {kind: size if whole else max(1, size // 2) for kind, size in sizes.items()}
        self._met: dict[str, frozenset[Kind]] = {}
        self.total = sum(sizes.values())

    def demand(self, queues: Iterable[str]) -> tuple[Sequence[str], int]:
        """The queues to claim from, and how many messages; no queues when nothing more can start."""
        room = {queue: self._room(queue) for queue in queues}
        open_queues = [queue for queue in room if room[queue]]
        return open_queues, min((room[queue] for queue in open_queues), default=0)

    def _room(self, queue: str) -> int:
        met = self._met.get(queue)
        return max(map(self._claimable, self._free)) if met is None else min(map(self._claimable, met))

    def _claimable(self, kind: Kind) -> int:
        return min(self._free[kind], self._most[kind])

    def meet(self, queue: str, kinds: frozenset[Kind]) -> None:
        """Remember the kinds that a claim from this queue brought."""
        self._met[queue] = kinds

    def take(self, kind: Kind) -> bool:
        """Take a slot; False when none is free."""
        if not self._free[kind]:
            return False
        self._free[kind] -= 1
        return True

    def give(self, kind: Kind) -> None:
        self._free[kind] += 1
