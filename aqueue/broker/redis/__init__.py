"""The Redis broker: kombu's lists, with leases of our own beside them (celery-protocol section 2).

Messages wait in kombu's lists, so that Celery workers and clients share queues with ours::

    <queue>                     list    step 0, the most urgent
    <queue>\\x06\\x16<step>       list    steps 3, 6, 9
    _kombu.binding.<exchange>   set     bindings; _kombu.binding_permanent.<exchange> likewise

What is ours is private to aqueue; the head of every script says how it uses the keys::

    aqueue:seq                  string  the last number given out; it only grows
    aqueue:leases               zset    receipt -> end of the lease, in ms of the server's clock
    aqueue:leased               hash    receipt -> holder \\n claimed at (ms) \\n the bytes as they came;
                                        holder \\t cause once somebody has said why the holder is gone
    aqueue:suspects             hash    receipt -> a lease seen ended, and since when
    aqueue:lost                 hash    sha1 of the bytes -> how often they were lost, by whom, and how they died before
    aqueue:parked, :messages    zset, hash    id -> due (ms); id -> bytes
    aqueue:worker:<name>        string  what a worker says of itself, as JSON; it ends soon after the worker
    aqueue:dead, :messages, :letters          id -> died (ms); id -> bytes; id -> why, as JSON

    aqueue:revoked, :why, :version            cancelled tasks, see `aqueue.broker.redis.control`

A receipt is ``<number>:<list>``, so it names the place to go back to. Bytes go back as they came.
"""

import logging
from collections.abc import Collection, Sequence
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, Self

import msgspec
from redis.exceptions import NoScriptError, RedisError, ResponseError

from aqueue.broker import Ack, BrokerFactory, BrokerOptions, Bury, Delivery, Presence, Release, Verdict, settling_order
from aqueue.broker.redis import checks
from aqueue.broker.redis.claims import Claims
from aqueue.broker.redis.control import RedisControl
from aqueue.broker.redis.envelope import pack
from aqueue.broker.redis.inspection import RedisInspection
from aqueue.broker.redis.keys import Keys, matching_queues
from aqueue.broker.redis.losses import RedisLosses
from aqueue.broker.redis.scripts import PUBLISH, RENEW, SETTLE, SETTLE_KEYS
from aqueue.drivers.redis_address import RedisAddress, ThreadConnection
from aqueue.drivers.redis_link import LinkLost, RedisLink, Value, raising
from aqueue.drivers.redis_records import record_arguments
from aqueue.errors import BrokerUnavailable, EnqueueFailed, EnqueueUnknown
from aqueue.findings import Finding, Use
from aqueue.protocol import Message
from aqueue.url import Url

logger = logging.getLogger("aqueue.broker")


class RedisBroker:
    """A `aqueue.broker.Broker` on Redis 6.2 or newer.

    Two connections: one for sending and settling, one on which a worker claims and waits. `extend` opens
    a third, in the thread that calls it.
    """

    pushes = False
    sends_at_once = 1

    def __init__(self, address: RedisAddress, options: BrokerOptions) -> None:
        self.lease = options.lease
        self.holder = ""
        self._options = options
        self._keys = Keys(address.key_prefix)
        self._link = RedisLink(address, options.timeout)
        self._claims = Claims(address, self._keys, options)
        self._renewing: ThreadConnection | None = None
        #: Queues whose bindings were written since the link came up.
        self._declared: set[str] = set()
        self._link.on_open.append(self._opened)
        self.control = RedisControl(self._link, self._keys, options, lambda: self.holder)

    @classmethod
    def factory(cls, url: Url) -> BrokerFactory:
        address = RedisAddress.parse(url)
        return lambda options: cls(address, options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._claims.close()
        await self._link.close()
        if self._renewing is not None:
            self._renewing.disconnect()
            self._renewing = None

    @property
    def losses(self) -> RedisLosses:
        return RedisLosses(self._link, self._keys)

    @property
    def inspection(self) -> RedisInspection:
        return RedisInspection(self._link, self._keys, self._options.limits)

    async def check(self, use: Use) -> Sequence[Finding]:
        with raising(BrokerUnavailable):
            return await checks.check(self._link, self._keys, use, self.lease)

    def now(self) -> float:
        return self._claims.clock.now()

    def _opened(self) -> None:
        self._declared.clear()
        (time,) = self._link.send(("TIME",))
        time.add_done_callback(self._claims.clock.told)

    def keeps(self, place: object) -> bool:
        return isinstance(place, RedisAddress) and place.same_database(self._link.address)

    # --- sending ---

    async def publish(self, messages: Sequence[Message]) -> None:
        try:
            await self._declare({message.queue for message in messages if not message.exchange})
            lists, args, owners = await self._publication(messages)
            keys = self._keys.ours("seq", "parked", "parked:messages")
            refused: list[Any] = await self._link.run(PUBLISH, keys, (len(lists), *lists, *args))
        except LinkLost as lost:
            if lost.sent:
                raise EnqueueUnknown(f"{lost}; the messages may be stored or not") from None
            raise EnqueueFailed(str(lost)) from None
        except ResponseError as error:
            raise EnqueueFailed(f"{self._link.address.shown} refused to store the messages: {error}") from None
        if refused:
            reasons: dict[int, str] = {
                owners[refused[i] - 1]: refused[i + 1].decode() for i in range(0, len(refused), 2)
            }
            raise EnqueueFailed(f"not stored: {'; '.join(sorted(set(reasons.values())))}", refused=reasons)

    async def _publication(self, messages: Sequence[Message]) -> tuple[list[str], list[Value], list[int]]:
        """Arguments for publish.lua: list names, six values a copy, and the message each copy is of."""
        numbers: dict[str, int] = {}
        args: list[Value] = []
        owners: list[int] = []
        for position, message in enumerate(messages):
            raw = pack(message)
            for name in await self._lists(message):
                number = numbers.setdefault(name, len(numbers) + 1)
                args += (number, self._delay(message), raw, *record_arguments(message.announce))
                owners.append(position)
        return list(numbers), args, owners

    async def _lists(self, message: Message) -> list[str]:
        if not message.exchange:
            return [self._keys.list_of(message.queue, message.priority)]
        bindings = await self._link.call("SMEMBERS", self._keys.binding(message.exchange))
        queues = matching_queues(bindings, message.routing_key)
        if not queues:
            raise EnqueueFailed(
                f"unroutable: exchange {message.exchange!r} has no queue bound for {message.routing_key!r}"
            )
        return [self._keys.list_of(queue, message.priority) for queue in queues]

    def _delay(self, message: Message) -> int:
        if message.delay <= 0 or any(fnmatchcase(message.queue, glob) for glob in self._options.eta_queues):
            return 0
        return max(1, round(message.delay * 1000))

    async def _declare(self, queues: set[str]) -> None:
        """Write the bindings by which kombu finds a queue, once for each link (section 2.4)."""
        for queue in queues - self._declared:
            member = self._keys.binding_member(queue)
            await self._link.call("SADD", self._keys.binding(queue), member)
            await self._link.call("SADD", self._keys.permanent_binding(queue), member)
            self._declared.add(queue)

    # --- working ---

    async def fetch(self, queues: Sequence[str], limit: int, wait: float) -> Sequence[Delivery]:
        with raising(BrokerUnavailable):
            await self._declare(set(queues))
            return await self._claims.fetch(queues, limit, wait, self.holder)

    async def settle(self, verdicts: Sequence[tuple[Delivery, Verdict]]) -> Sequence[Delivery]:
        ordered = settling_order(verdicts)
        args: list[Value] = [len(ordered)]
        for delivery, verdict in ordered:
            args += self._verdict(delivery, verdict)
        keys = self._keys.ours(*SETTLE_KEYS)
        with raising(BrokerUnavailable):
            refused: list[bytes] = await self._link.run(SETTLE, keys, args)
        if not refused:
            return ()
        return self._refused(verdicts, {refused[i].decode(): refused[i + 1] for i in range(0, len(refused), 2)})

    def _refused(self, verdicts: Sequence[tuple[Delivery, Verdict]], reasons: dict[str, bytes]) -> Sequence[Delivery]:
        for receipt, reason in reasons.items():
            if reason:  # an error of the server's; the message is still leased and comes back by itself
                logger.error("could not settle %s: %s", receipt, reason.decode(errors="replace"))
        return [delivery for delivery, _ in verdicts if delivery.receipt in reasons]

    def _verdict(self, delivery: Delivery, verdict: Verdict) -> list[Value]:
        match verdict:
            case Release(delay=delay, last=last):
                argument = max(1, round(delay * 1000)) if delay > 0 else -1 if last else 0
                return [delivery.receipt, "release", argument, *record_arguments(None), 0]
            case Bury(record=record):
                return [delivery.receipt, "bury", self._letter(delivery, verdict), *record_arguments(record), 0]
            case Ack(publish=messages, record=record):
                args: list[Value] = [delivery.receipt, "ack", "", *record_arguments(record), len(messages)]
                for message in messages:
                    name = self._keys.list_of(message.queue, message.priority)
                    args += (name, self._delay(message), pack(message))
                return args

    def _letter(self, delivery: Delivery, verdict: Bury) -> bytes:
        return msgspec.json.encode(
            {
                "queue": delivery.message.queue,
                "reason": verdict.reason,
                "detail": verdict.detail,
                "deliveries": delivery.deliveries,
                "worker": self.holder,
                "list": delivery.receipt.partition(":")[2],
                "history": delivery.history,
            }
        )

    async def let_go(self, delivery: Delivery) -> bool:
        return not await self.settle([(delivery, Ack())])

    async def waiting(self, queues: Sequence[str]) -> bool:
        with raising(BrokerUnavailable):
            return bool(await self._link.call("EXISTS", *self._keys.lists(queues)))

    def reconnect(self) -> None:
        self._claims.reconnect()

    def extend(self, deliveries: Collection[Delivery]) -> Sequence[Delivery]:
        held = {delivery.receipt: delivery for delivery in deliveries}
        keys = self._keys.ours("leases", "nothing")
        command = (len(keys), *keys, round(self.lease * 1000), *held)
        try:
            gone = self._in_the_thread("EVALSHA", RENEW.digest, *command)
        except NoScriptError:
            gone = self._in_the_thread("EVAL", RENEW.source, *command)
        return [held[receipt.decode()] for receipt in gone]

    def present(self, presence: Presence, seconds: float) -> None:
        (key,) = self._keys.ours(f"worker:{presence.worker}")
        if seconds:
            self._in_the_thread("SET", key, msgspec.json.encode(presence), "PX", round(seconds * 1000))
        else:
            self._in_the_thread("DEL", key)

    def _in_the_thread(self, *command: Any) -> Any:
        """Raises NoScriptError, BrokerUnavailable."""
        try:
            if self._renewing is None:
                self._renewing = self._link.address.thread_connection(self._options.timeout)
            self._renewing.send_command(*command)
            return self._renewing.read_response()
        except NoScriptError:
            raise
        except (RedisError, OSError) as error:
            renewing, self._renewing = self._renewing, None
            if renewing is not None:
                renewing.disconnect()
            raise BrokerUnavailable(f"could not renew leases: {error}") from None
