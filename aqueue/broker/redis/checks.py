"""Whether a Redis server is fit to be a broker."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from redis.exceptions import ResponseError

from aqueue.broker.redis.keys import Keys
from aqueue.drivers import redis_checks
from aqueue.drivers.redis_link import RedisLink
from aqueue.findings import PATIENCE, Finding, Use

#: Seconds that a Celery worker may hold a message.
_HELD_LONG: Final = 3600


async def check(link: RedisLink, keys: Keys, use: Use, lease: float) -> list[Finding]:
    """Raises LinkLost, redis' errors."""
    known = await redis_checks.facts(link)
    found = await redis_checks.common(link, known, keys.ours("nothing")[0])
    if known is not None:
        found += await _durability(link, known)
    if any(finding.rule in ("AQ103", "AQ104") for finding in found):
        return found
    if not use.default_priority and await link.call("EXISTS", f"{keys.prefix}_kombu.binding.celery.pidbox"):
        found.append(_urgency(link))
    if use.contents:
        found += await _contents(link, keys, lease)
    return found


async def _durability(link: RedisLink, known: Mapping[str, str]) -> list[Finding]:
    found: list[Finding] = []
    shown = link.address.shown
    policy = redis_checks.evicts(known)
    if policy:
        what = (
            f"{shown} throws keys away when its memory is full ({policy}): messages are lost, or what belongs to them"
        )
        found.append(Finding("AQ101", what, "CONFIG SET maxmemory-policy noeviction, and write it to redis.conf"))
    kept = await redis_checks.saves(link, known)
    if kept in ("snapshots", "nothing"):
        lost = "the queues" if kept == "nothing" else "what came since its last snapshot"
        what = f"{shown} has no append-only file: a crash loses {lost}"
        found.append(Finding("AQ102", what, "CONFIG SET appendonly yes, and write it to redis.conf"))
    return found


def _urgency(link: RedisLink) -> Finding:
    return Finding(
        "AQ108",
        f"Celery workers use {link.address.shown}, too, and what Celery clients send without a priority is more urgent "
        "there than ours",
        "Settings(default_priority=9) puts ours among theirs",
    )


async def _contents(link: RedisLink, keys: Keys, lease: float) -> list[Finding]:
    seconds = int((await link.call("TIME"))[0])
    now = seconds * 1000
    leases, parked = keys.ours("leases", "parked")
    ended = await link.call("ZCOUNT", leases, "-inf", now - round((2 * lease + PATIENCE) * 1000))
    overdue = await link.call("ZCOUNT", parked, "-inf", now - round(PATIENCE * 1000))
    try:
        unacked = await link.call("ZCOUNT", f"{keys.prefix}unacked_index", "-inf", seconds - _HELD_LONG)
    except ResponseError:
        unacked = 0
    return [*_left(link.address.shown, ended, overdue, unacked)]


def _left(shown: str, ended: Any, overdue: Any, unacked: Any) -> Iterator[Finding]:
    if ended:
        what = f"{ended} messages on {shown} are held by workers that let their leases end, and nobody takes them back"
        yield Finding("AQ605", what, "start a worker, or `aqueue recover`")
    if overdue:
        what = f"{overdue} messages on {shown} are past their time, and nobody moves them to their queues"
        yield Finding("AQ606", what, "start a worker of aqueue's on this server: any moves them all")
    if unacked:
        what = f"{unacked} messages on {shown} were fetched by Celery workers over an hour ago and are not done"
        yield Finding("AQ607", what, "when those workers are gone for good: `aqueue recover --celery`")
