"""Broadcasts: each worker has a queue of its own at a fanout exchange, as Celery's ``Broadcast`` declares it.

The exchange has the name that the settings give the queue; ``bcast.<uuid>`` is the worker's own. What a worker
retries or gives back goes to its own queue, not to all once more. The queue is deleted when the worker ends; that of a
killed worker ends by itself.
"""

from collections.abc import Mapping, Sequence
from typing import Final
from uuid import uuid4

from aqueue.broker import OWN_QUEUE, Queue, arguments_of

#: What every worker's own queue begins with.
OWN: Final = OWN_QUEUE
#: Milliseconds that a queue is kept while nobody consumes it: its worker may be reconnecting, or full of long tasks.
EXPIRES: Final = 7_200_000


class Broadcasts:
    """The broadcasts among a broker's queues."""

    def __init__(self, queues: Mapping[str, Queue]) -> None:
        self._queues = queues
        self._any = any(queue.broadcast for queue in queues.values())
        self._known: dict[str, bool] = {}
        #: By the broadcast's name, the queue that is ours.
        self._own: dict[str, str] = {}
        self._names: dict[str, str] = {}

    def __contains__(self, name: str) -> bool:
        """Whether what is sent to a queue goes to every worker."""
        if not self._any:
            return False
        found = self._known.get(name)
        if found is None:
            found = self._known[name] = arguments_of(self._queues, name).broadcast
        return found

    def exchange_of(self, name: str) -> str:
        return arguments_of(self._queues, name).exchange or name

    def consumed(self, queues: Sequence[str]) -> Sequence[str]:
        """The queues to consume: our own for each broadcast."""
        return [self._own_of(name) if name in self else name for name in queues] if self._any else queues

    def _own_of(self, name: str) -> str:
        own = self._own.get(name)
        if own is None:
            own = f"{OWN}{uuid4()}"
            self._names[own] = name
            self._own[name] = own
        return own

    def name_of(self, queue: str) -> str | None:
        """The broadcast that one of our own queues belongs to."""
        return self._names.get(queue)

    def ours(self) -> list[str]:
        return list(self._names)
