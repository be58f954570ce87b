"""Planted bugs, by which the checker is proved: with each of them its verdict must turn red.

None of them is in the product: a coat around the broker, or a script of Redis patched in a worker of a run.

===  ===================================================================================
M1   a claim takes the message away and leases nothing (Redis)
M2   a settle doesn't look whether the claim is the newest (Redis)
M3   leases are not renewed
M4   messages are settled before they are run
M5   a lease is taken back at first sight, and the server's clock has jumped (Redis)
M6   a retry is sent first and settled second, with nothing that tells the copies apart
M7   parked messages are taken out by one step and put on their list by another (Redis)
M8   losses are not counted
M9   a send doesn't wait for its confirmation
M10  a cancelled command's reply is given to the next (Redis)
===  ===================================================================================

M11, a chord that counts, has to wait for chords.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from hashlib import sha1
from typing import Any, Final, Self

import msgspec

from aqueue.broker import Ack, BrokerOptions, Delivery, Verdict
from aqueue.broker import sqlite as sqlite_broker
from aqueue.broker.amqp import AmqpBroker
from aqueue.broker.redis import claims as redis_claims
from aqueue.broker.redis.scripts import CLAIM, SETTLE, TEND
from aqueue.drivers.redis_link import RedisLink, Script
from aqueue.errors import BrokerUnavailable
from aqueue.protocol import Message
from tests.chaos.failpoints import Failpoints

Coat = Callable[[Any], Any]


def plant(mutant: str, failpoints: Failpoints) -> Coat:
    """Plant a bug in this process; what to put around its brokers. Always: the failpoints inside of them."""
    _reach_inside(failpoints)
    if not mutant:
        return lambda broker: broker
    planted = MUTANTS[mutant](failpoints)
    return planted or (lambda broker: broker)


class Around:
    """A broker with one bug; everything else is the real one's."""

    def __init__(self, inner: Any) -> None:
        self.__dict__["inner"] = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.inner, name, value)

    async def __aenter__(self) -> Self:
        await self.inner.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.inner.__aexit__(*error)


def put_in_place(owner: Any, name: str, new: Any) -> None:
    """Of this process alone, which is none of the tests' own."""
    if not hasattr(owner, name):
        raise AttributeError(f"{owner} has no {name}: it was renamed, and this must follow")
    setattr(owner, name, new)


def rewrite(script: Script, old: str, new: str) -> None:
    """Patch a script; raises ValueError when it has no such line any more."""
    if old not in script.source:
        raise ValueError(f"a script has no {old!r} any more, and this must follow")
    script.source = script.source.replace(old, new)
    script.digest = sha1(script.source.encode(), usedforsecurity=False).hexdigest()


# --- failpoints inside of brokers ---------------------------------------------------------------------


class _TookBack(logging.Handler):
    """Redis takes back in one script; what can break is what comes after it, and that is when it tells of it."""

    def __init__(self, failpoints: Failpoints) -> None:
        super().__init__()
        self._failpoints = failpoints

    def emit(self, record: logging.LogRecord) -> None:
        if str(record.msg).startswith("took back"):
            self._failpoints.hit("reap")


def _reach_inside(failpoints: Failpoints) -> None:
    take_back = sqlite_broker._take_back
    send = AmqpBroker._send

    def sqlite_reap(connection: Any, now: float, options: BrokerOptions) -> None:
        before = connection.total_changes
        take_back(connection, now, options)
        if connection.total_changes > before:
            failpoints.hit("reap")

    async def amqp_retry(broker: AmqpBroker, verdicts: Sequence[tuple[Delivery, Verdict]]) -> None:
        await send(broker, verdicts)
        failpoints.hit("retry", sum(isinstance(verdict, Ack) for _, verdict in verdicts))

    put_in_place(sqlite_broker, "_take_back", sqlite_reap)
    logging.getLogger("aqueue.broker").addHandler(_TookBack(failpoints))
    put_in_place(AmqpBroker, "_send", amqp_retry)


# --- the bugs -----------------------------------------------------------------------------------------


def _m1(_: Failpoints) -> None:
    rewrite(CLAIM, "redis.pcall('HSET', KEYS[3], unpack(leased))", "1")
    rewrite(CLAIM, "redis.pcall('ZADD', KEYS[2], unpack(lease))", "1")


def _m2(_: Failpoints) -> None:
    rewrite(SETTLE, "if not redis.call('ZSCORE', KEYS[1], receipt) then", "if false then")


def _m3(_: Failpoints) -> Coat:
    class NoRenewal(Around):
        def extend(self, deliveries: Collection[Delivery]) -> Sequence[Delivery]:
            return ()

    return NoRenewal


def _m4(_: Failpoints) -> Coat:
    class SettledFirst(Around):
        async def fetch(self, queues: Sequence[str], limit: int, wait: float) -> Sequence[Delivery]:
            found: Sequence[Delivery] = await self.inner.fetch(queues, limit, wait)
            if found:
                await self.inner.settle([(one, Ack()) for one in found])
            return found

        async def settle(self, verdicts: Sequence[tuple[Delivery, Verdict]]) -> Sequence[Delivery]:
            for _, verdict in verdicts:
                if isinstance(verdict, Ack) and verdict.publish:
                    await self.inner.publish(verdict.publish)
            return ()

        def extend(self, deliveries: Collection[Delivery]) -> Sequence[Delivery]:
            return ()

    return SettledFirst


#: How far M5's server clock has jumped, in ms: further than any lease of a run.
_JUMP: Final = 60_000


def _m5(_: Failpoints) -> None:
    rewrite(TEND, "local now = clock[1] * 1000", f"local now = {_JUMP} + clock[1] * 1000")
    rewrite(TEND, "if seen_long_ago(ended[i], ended[i + 1]) then", "if true then")


def _m6(failpoints: Failpoints) -> Coat:
    class SentFirst(Around):
        async def settle(self, verdicts: Sequence[tuple[Delivery, Verdict]]) -> Sequence[Delivery]:
            bare: list[tuple[Delivery, Verdict]] = []
            for delivery, verdict in verdicts:
                if isinstance(verdict, Ack) and verdict.publish:
                    await self.inner.publish(verdict.publish)
                    failpoints.hit("retry")
                bare.append((delivery, Ack(record=verdict.record) if isinstance(verdict, Ack) else verdict))
            refused: Sequence[Delivery] = await self.inner.settle(bare)
            return refused

    return SentFirst


def _m7(failpoints: Failpoints) -> None:
    line = "redis.pcall('LPUSH', string.match(id, '^%d+:(.*)$'), bytes)"
    rewrite(TEND, line, "redis.pcall('RPUSH', 'moving', string.match(id, '^%d+:(.*)$'), bytes)")
    tend = redis_claims.Claims._tend

    async def in_two_steps(claims: redis_claims.Claims) -> float:
        pause = await tend(claims)
        moved = await claims._link.call("LRANGE", "moving", 0, -1)
        await claims._link.call("DEL", "moving")
        if moved:
            failpoints.hit("reap")
        for i in range(0, len(moved), 2):
            await claims._link.call("LPUSH", moved[i], moved[i + 1])
        claims._lists_changed.set()
        return pause

    put_in_place(redis_claims.Claims, "_tend", in_two_steps)


def _m8(_: Failpoints) -> Coat:
    class NotCounting(Around):
        async def fetch(self, queues: Sequence[str], limit: int, wait: float) -> Sequence[Delivery]:
            found: Sequence[Delivery] = await self.inner.fetch(queues, limit, wait)
            return [msgspec.structs.replace(one, deliveries=1) for one in found]

    return NotCounting


def _m9(_: Failpoints) -> Coat:
    under_way: set[asyncio.Task[None]] = set()

    class NotWaiting(Around):
        async def publish(self, messages: Sequence[Message]) -> None:
            async def try_it() -> None:
                try:
                    await self.inner.publish(messages)
                except BrokerUnavailable:
                    return

            task = asyncio.create_task(try_it())
            under_way.add(task)
            task.add_done_callback(under_way.discard)

    return NotWaiting


def _m10(_: Failpoints) -> None:
    submit = RedisLink._submit

    def forgetful(link: RedisLink, commands: Any, due: float) -> list["asyncio.Future[Any]"]:
        replies = submit(link, commands, due)
        for reply in replies:
            reply.add_done_callback(lambda reply: _forget(link, reply))
        return replies

    def _forget(link: RedisLink, reply: "asyncio.Future[Any]") -> None:
        if reply.cancelled():
            kept = [one for one in link._pending if one.reply is not reply]
            link._pending.clear()
            link._pending.extend(kept)

    put_in_place(RedisLink, "_submit", forgetful)


MUTANTS: Final[dict[str, Callable[[Failpoints], Coat | None]]] = {
    "M1": _m1, "M2": _m2, "M3": _m3, "M4": _m4, "M5": _m5, "M6": _m6, "M7": _m7, "M8": _m8, "M9": _m9, "M10": _m10,
}  # fmt: skip
