"""What lies in the queues."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from aqueue.app import AQueue
from aqueue.broker import QueueDepth
from aqueue.errors import ConfigurationError
from aqueue.findings import Finding
from aqueue.protocol import Message, Unreadable
from aqueue.saferepr import printable

#: Messages of a queue that are looked at.
_LOOKED_AT: Final = 100
#: Names in one line.
_NAMED: Final = 5


async def contents_findings(app: AQueue, queues: Sequence[str]) -> list[Finding]:
    """``queues`` are those that the app is about. Raises BrokerUnavailable."""
    inspection = app.producer().broker.inspection
    found: list[Finding] = []
    for depth in await inspection.queues(queues):
        found += _depth(depth, queues)
        if not depth.ready or depth.queue not in queues:
            continue
        try:
            found += _messages(depth.queue, await inspection.peek(depth.queue, _LOOKED_AT), app.tasks)
        except ConfigurationError:  # RabbitMQ shows a message only by delivering it
            continue
    return found


def _depth(depth: QueueDepth, queues: Sequence[str]) -> Iterator[Finding]:
    if depth.dead:
        what = f"queue {depth.queue} has {depth.dead} dead letters"
        yield Finding("AQ602", what, f"aqueue dead list -Q {depth.queue}; then retry or drop them")
    if depth.ready and depth.queue not in queues:
        what = f"{depth.ready} messages wait in queue {depth.queue}, which this app does not name"
        yield Finding("AQ604", what, "is it another program's? Else serve it: aqueue worker -Q")


def _messages(queue: str, messages: Sequence[Message | Unreadable], tasks: Mapping[str, object]) -> Iterator[Finding]:
    unreadable = sum(isinstance(message, Unreadable) for message in messages)
    if unreadable:
        what = f"{unreadable} of the next {len(messages)} messages in queue {queue} are none that can be read"
        yield Finding("AQ603", what, "find out who writes there; a worker will bury them, byte for byte")
    names = Counter(
        name
        for message in messages
        if isinstance(message, Message) and isinstance(name := message.headers.get("task"), str) and name not in tasks
    )
    if names:
        shown = ", ".join(f"{printable(name, 80)} ({count})" for name, count in names.most_common(_NAMED))
        of = f"{names.total()} of the next {len(messages)} messages in queue {queue}"
        what = f"{of} are for tasks that this app doesn't have: {shown}"
        yield Finding("AQ601", what, "deploy a worker that has them, before unknown_grace is over and they are buried")
