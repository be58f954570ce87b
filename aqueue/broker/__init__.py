"""What aqueue asks of a broker: four verbs, each on a batch, and five promises.

A broker carries messages. It never reads an argument, a task name or a retry count; bytes that are no
message come out of `Broker.fetch` as `Unreadable`, and the worker decides their end.

The promises, tested by one suite that every broker runs (``tests/conformance/``):

1. `publish` returns when the server holds the messages, or raises. It never says yes to what was lost.
2. A fetched delivery is nobody else's until it is settled or its lease ends; fetch and lease are one step.
3. When a lease ends the message comes back with `Delivery.deliveries` one higher, counted by the server.
4. `settle` is atomic for each delivery, or errs to a duplicate, never to a loss.
5. Settling what is no longer ours does nothing, and is reported.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from fnmatch import fnmatchcase
from importlib import import_module
from types import TracebackType
from typing import Any, Final, Protocol, Self, TypeVar

import msgspec

from aqueue.broker.control import Control
from aqueue.broker.history import KEPT, NO_HISTORY, Death, History
from aqueue.errors import ConfigurationError
from aqueue.pidbox import Pidbox
from aqueue.protocol import Message, Record, Unreadable
from aqueue.serialization import Limits, Serializer
from aqueue.url import RABBITMQ_SCHEMES, REDIS_SCHEMES, Url

T = TypeVar("T")


class Delivery(msgspec.Struct, frozen=True):
    """A message in our hands.

    ``receipt`` names this claim of it, and no other: the fencing token. Where the server numbers its claims it is
    the number, or the number before a colon, see `token_of`. ``deliveries`` is 1 for the first delivery; it grows
    only when a holder lost its lease, not when it gave the message back. ``history`` tells of those holders.
    """

    message: Message | Unreadable
    receipt: str
    deliveries: int = 1
    history: History = NO_HISTORY


def token_of(receipt: str) -> int | None:
    """The number of a claim, larger than that of every earlier claim on this broker; None where it has none."""
    number = receipt.partition(":")[0]
    return int(number) if number.isdecimal() else None


class Ack(msgspec.Struct, frozen=True):
    """Done. ``publish`` leaves in the same step, where the server can do that; so does ``record``."""

    publish: Sequence[Message] = ()
    record: Record | None = None


class Release(msgspec.Struct, frozen=True):
    """Give the very same bytes back, uncounted.

    At once they go to the front, or behind everything with ``last``; with ``delay`` (seconds) they are
    parked first.
    """

    delay: float = 0.0
    last: bool = False


class Bury(msgspec.Struct, frozen=True):
    """Put the message among the dead letters, its bytes untouched.

    ``reason`` is a short stable code, ``detail`` a sentence for people.
    """

    reason: str
    detail: str = ""
    record: Record | None = None


Verdict = Ack | Release | Bury


def settling_order(verdicts: Sequence[tuple[Delivery, Verdict]]) -> list[tuple[Delivery, Verdict]]:
    """The order to carry verdicts out: what is released goes to the front one by one, so the last goes first."""
    released = [pair for pair in reversed(verdicts) if isinstance(pair[1], Release)]
    return released + [pair for pair in verdicts if not isinstance(pair[1], Release)]


async def or_hand_back(claim: Coroutine[Any, Any, T], hand_back: Callable[[T], Awaitable[object]]) -> T:
    """What was claimed. Cancelled meanwhile, it is handed back before this ends, so that nothing overtakes it."""
    claiming = asyncio.create_task(claim)
    try:
        return await asyncio.shield(claiming)
    except asyncio.CancelledError:
        if not claiming.cancelled():
            with suppress(Exception):  # the leases of what can't be handed back will end
                await hand_back(await claiming)
        raise


def in_turn(queues: Sequence[str], turn: int) -> Sequence[str]:
    """The queues with another one first each turn, so that none starves its neighbours."""
    first = turn % len(queues)
    return (*queues[first:], *queues[:first])


class Queue(msgspec.Struct, frozen=True, kw_only=True):
    """How a queue is declared on RabbitMQ, where workers and clients of a fleet must say the same.

    The default is Celery's: a durable classic queue, bound by its name to a direct exchange of its name. On other
    brokers a queue has nothing to declare. Raises ConfigurationError.
    """

    #: The exchange it is bound to; None: one of its own name.
    exchange: str | None = None
    #: ``direct``, ``topic`` or ``fanout``.
    exchange_type: str = "direct"
    #: The binding's key; None: the queue's name.
    routing_key: str | None = None
    #: ``x-max-priority``: up to which priority a classic queue keeps messages apart.
    max_priority: int | None = None
    #: Further arguments, such as ``{"x-queue-type": "quorum", "x-delivery-limit": 10}``.
    arguments: Mapping[str, Any] = msgspec.field(default_factory=dict[str, Any])
    #: Every worker that consumes it runs every message: Celery's ``Broadcast``, by a fanout exchange of this name.
    broadcast: bool = False

    def __post_init__(self) -> None:
        if self.exchange_type not in ("direct", "topic", "fanout", "headers"):
            raise ConfigurationError(f"an exchange is direct, topic, fanout or headers; got {self.exchange_type!r}")
        if self.max_priority is not None and not 0 < self.max_priority <= MAX_PRIORITY_LEVELS:
            raise ConfigurationError(f"max_priority is 1 to {MAX_PRIORITY_LEVELS}, got {self.max_priority!r}")
        if self.broadcast and (self.exchange_type != "direct" or self.routing_key is not None or self.is_quorum):
            raise ConfigurationError("a broadcast has a fanout exchange and a classic queue of each worker's own")

    @property
    def all_arguments(self) -> Mapping[str, Any]:
        """The arguments of the declaration."""
        if self.max_priority is None:
            return self.arguments
        return {"x-max-priority": self.max_priority, **self.arguments}

    @property
    def is_quorum(self) -> bool:
        """Whether it is replicated; a fleet that has one sends by the ladder of delays."""
        return self.arguments.get("x-queue-type") == "quorum"


#: How the names of queues begin that are one worker's own, for what is broadcast.
OWN_QUEUE: Final = "bcast."
#: What RabbitMQ allows.
MAX_PRIORITY_LEVELS: Final = 255


def arguments_of(queues: Mapping[str, Queue], name: str) -> Queue:
    """What the settings say of a queue: by its name, else by the first glob that fits."""
    found = queues.get(name)
    if found is None:
        found = next((queue for glob, queue in queues.items() if fnmatchcase(name, glob)), None)
    return found if found is not None else Queue()


class BrokerOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What an app tells its broker, whatever the broker is."""

    #: Seconds a claim lasts without being extended; the same for every worker of a queue.
    lease: float = 30.0
    #: Seconds before a message is ready again after its first, second... loss; the last counts for all further ones.
    #: They are meant for a lease of 30 s, and shorter in proportion where the lease is shorter.
    lost_backoff: Sequence[float] = (0.0, 5.0, 30.0, 120.0)
    #: Seconds any command may take, connecting included.
    timeout: float = 5.0
    limits: Limits = msgspec.field(default_factory=Limits)
    #: Queues (globs) whose future messages are sent with their ETA at once, for Celery workers to hold.
    eta_queues: Sequence[str] = ()
    #: Name or glob to how a queue is declared.
    queues: Mapping[str, Queue] = msgspec.field(default_factory=dict[str, Queue])
    #: ``quorum`` or ``classic``: what RabbitMQ's ladder of delays is made of where it isn't there yet.
    delayed_queue_type: str = "quorum"
    #: Writes and reads the control messages of a Celery fleet.
    pidbox: Pidbox = msgspec.field(default_factory=lambda: Pidbox(Serializer()))

    def pauses(self) -> list[float]:
        """`lost_backoff` for this lease."""
        return [pause * min(1.0, self.lease / _USUAL_LEASE) for pause in self.lost_backoff] or [0.0]

    def pause_after(self, losses: int) -> float:
        """Seconds before a message that was lost so often is ready again."""
        pauses = self.pauses()
        return pauses[min(losses, len(pauses)) - 1]


#: Seconds; what `BrokerOptions.lost_backoff` is meant for.
_USUAL_LEASE: Final = 30.0


class Broker(Protocol):
    """One broker, seen from one event loop."""

    #: The server pushes messages while credit for them is open, so a claim had better be for all free slots.
    pushes: bool
    #: Batches of sends that may be under way at once.
    sends_at_once: int

    #: Seconds; see `BrokerOptions.lease`.
    lease: float
    #: Who claims, shown to people: ``worker@host``.
    holder: str

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    async def publish(self, messages: Sequence[Message]) -> None:
        """Store all messages.

        Raises EnqueueFailed, which says whether it is about all or some of them, or EnqueueUnknown.
        """
        ...

    async def fetch(self, queues: Sequence[str], limit: int, wait: float) -> Sequence[Delivery]:
        """Claim up to ``limit`` messages, waiting up to ``wait`` seconds for the first.

        The most urgent come first, within a level the oldest. May be cancelled at any time: what it had
        claimed by then goes back uncounted. Raises BrokerUnavailable.
        """
        ...

    def extend(self, deliveries: Collection[Delivery]) -> Sequence[Delivery]:
        """Renew leases; returns those that are no longer ours.

        Blocking, for use in a thread of its own: it keeps its own connection, so that a busy event loop
        can't stop it. Raises BrokerUnavailable.
        """
        ...

    def present(self, presence: "Presence", seconds: float) -> None:
        """Have `Inspection.workers` show this worker for so long; 0: no more.

        Blocking, for the same thread as `extend`. Does nothing on RabbitMQ, which has no place for it. Raises
        BrokerUnavailable.
        """
        ...

    async def settle(self, verdicts: Sequence[tuple[Delivery, Verdict]]) -> Sequence[Delivery]:
        """Carry out verdicts; returns the deliveries that were no longer ours. Raises BrokerUnavailable."""
        ...

    async def let_go(self, delivery: Delivery) -> bool:
        """Settle it as done, before its task has begun; True once the server has said that it will not come again.

        False: it was not ours any more. Raises BrokerUnavailable when the answer is missing: it may come again, or not.
        """
        ...

    async def waiting(self, queues: Sequence[str]) -> bool:
        """Whether messages of these queues could be claimed now. Raises BrokerUnavailable."""
        ...

    def reconnect(self) -> None:
        """Give up what `fetch` listens on; it makes it anew. For a watchdog: on RabbitMQ claims end with it."""
        ...

    def now(self) -> float:
        """The broker's clock, as unix time; it alone decides what is due and what has expired."""
        ...

    def keeps(self, place: object) -> bool:
        """Whether records of the result store at this place may travel with messages and verdicts.

        ``place`` is `aqueue.results.ResultStore.place`.
        """
        ...

    @property
    def losses(self) -> "Losses":
        """What keeps lost messages few, and their losses explained."""
        ...

    @property
    def control(self) -> Control:
        """Telling workers what to do with tasks that were sent before."""
        ...

    @property
    def inspection(self) -> "Inspection":
        """What only people need."""
        ...


class Losses(Protocol):
    """Beside the road of a message: what a worker does for those that its like has lost, or may lose."""

    async def explain(self, receipts: Collection[str], cause: str) -> None:
        """Say why the holder of these claims is gone, in a few words, such as ``signal 9 (SIGKILL)``.

        For whoever outlives the holder. It makes no difference whether the leases have ended already. Claims that
        were settled, or whose message has been settled or buried since, are left alone. RabbitMQ doesn't tell who
        held a message, so there nothing is done. Raises BrokerUnavailable.
        """
        ...

    async def give_back_untaken(self) -> None:
        """Give back, uncounted, what the server has pushed and no fetch has taken; no more comes until the next fetch.

        Only servers that push have anything to do. Raises BrokerUnavailable.
        """
        ...


# --- for people --------------------------------------------------------------------------------------


class QueueDepth(msgspec.Struct, frozen=True):
    """How many messages of a queue are in which place."""

    queue: str
    #: Waiting to be claimed.
    ready: int
    #: In the hands of a worker; None where the server doesn't tell.
    leased: int | None
    #: Waiting for their time; None where the server doesn't tell.
    parked: int | None
    dead: int


class Presence(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker says of itself now and then. Times are unix times."""

    worker: str
    pid: int
    started: float
    told: float
    queues: Sequence[str]
    #: Runs at once, by kind: how many may, and how many do.
    slots: Mapping[str, int]
    running: int
    #: Runs that have ended since the start.
    ended: int
    #: How often its event loop was blocked, for how many seconds in all, and by what last.
    stalls: int
    stalled_seconds: float
    stall: str


class DeadLetter(msgspec.Struct, frozen=True):
    """A message nobody could or wanted to run, kept until a person decides."""

    id: str
    reason: str
    detail: str
    died: datetime
    deliveries: int
    #: The worker that buried it.
    worker: str
    message: Message | Unreadable
    #: The holders that lost it, and its earlier deaths.
    history: History = NO_HISTORY

    @property
    def raw(self) -> bytes:
        """The bytes as they came: the whole element where it was unreadable, else the body."""
        return self.message.raw if isinstance(self.message, Unreadable) else self.message.body

    def after_replay(self, now: float) -> History:
        """What is remembered of the message once it is replayed, at ``now`` (unix time): this death, no losses."""
        death = Death(
            self.id,
            self.reason,
            self.detail,
            self.died.timestamp(),
            now,
            self.deliveries,
            self.worker,
            self.history.losses,
        )
        return History(deaths=(*self.history.deaths, death)[-KEPT:])


class Sifted(msgspec.Struct, frozen=True):
    """The ids of dead letters to put back, and of those to delete; all others stay."""

    retry: Sequence[str] = ()
    drop: Sequence[str] = ()


#: Is shown dead letters, and says what becomes of them.
Visit = Callable[[Sequence[DeadLetter]], Awaitable[Sifted]]


class Recovered(msgspec.Struct, frozen=True):
    """What `Inspection.recover` gave back to the queues."""

    #: From workers of ours that are gone.
    leased: int = 0
    #: Waiting for their time; Celery workers hold them from now on.
    parked: int = 0
    #: From Celery workers that are gone.
    unacked: int = 0
    #: Left alone because they could not be read, or their holder may still live.
    left: int = 0


class Inspection(Protocol):
    """Looking into a broker and putting things right; for the command line, never for a worker."""

    async def queues(self, known: Sequence[str] = ()) -> Sequence[QueueDepth]:
        """Every queue that holds anything, by name; of a server that can't list its queues, those ``known``."""
        ...

    async def workers(self) -> Sequence[Presence]:
        """Workers that were heard of lately, by name; none on RabbitMQ, which keeps no such list."""
        ...

    async def peek(self, queue: str, limit: int) -> Sequence[Message | Unreadable]:
        """The next messages of a queue, without claiming them. Raises ConfigurationError where that can't be."""
        ...

    async def purge(self, queue: str) -> int:
        """Delete what is ready in a queue, and parked where the server can tell; returns how many.

        What is leased stays.
        """
        ...

    async def dead(
        self, queue: str | None = None, limit: int = 100, where: Callable[[DeadLetter], bool] | None = None
    ) -> Sequence[DeadLetter]:
        """Dead letters, the newest first: those of a queue, and those for which ``where`` is true."""
        ...

    async def find_dead(self, id: str) -> DeadLetter | None: ...

    async def sift_dead(self, visit: Visit, page: int = 500) -> tuple[int, int]:
        """Show all dead letters, the oldest first, ``page`` at a time, and do what is said of each page.

        Returns how many were put back and how many deleted. No more than a page is in memory. What dies meanwhile is
        left for the next time; on RabbitMQ others don't see meanwhile what was shown and stays.
        """
        ...

    async def retry_dead(self, ids: Sequence[str]) -> int:
        """Put dead letters back at the end of their queues, with a fresh delivery count.

        Each is moved in one step, or (RabbitMQ) sent before it is deleted; its history remembers the death.
        """
        ...

    async def drop_dead(self, ids: Sequence[str]) -> int: ...

    async def recover(self, *, older_than: float, celery: bool, parked: bool) -> Recovered:
        """Give back what workers that are gone for good have left.

        Messages of ours whose lease has ended; with ``parked`` also those waiting for their time, with
        ``celery`` what Celery workers fetched more than ``older_than`` seconds ago.
        """
        ...


# --- from a URL --------------------------------------------------------------------------------------

_REDIS = "aqueue.broker.redis:RedisBroker"
_AMQP = "aqueue.broker.amqp:AmqpBroker"
_BROKERS: Final = {
    "memory": "aqueue.broker.memory:MemoryBroker",
    "sqlite": "aqueue.broker.sqlite:SqliteBroker",
    **dict.fromkeys(REDIS_SCHEMES, _REDIS),
    **dict.fromkeys(RABBITMQ_SCHEMES, _AMQP),
}

#: Makes a broker for the event loop it is called on.
BrokerFactory = Callable[[BrokerOptions], Broker]


def from_url(url: Url) -> BrokerFactory:
    """How to make brokers for a URL; the driver is imported here. Raises ConfigurationError."""
    if url.scheme not in _BROKERS:
        raise ConfigurationError(f"no broker for {url.scheme}:// in {url}; there are {', '.join(sorted(_BROKERS))}")
    module, name = _BROKERS[url.scheme].split(":")
    factory: Any = getattr(import_module(module), name)
    made: BrokerFactory = factory.factory(url)
    return made
