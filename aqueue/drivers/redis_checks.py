"""Whether a Redis server is fit for queues and results: what INFO tells, its clock, a script that does nothing."""

import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from redis.exceptions import ReadOnlyError, ResponseError

from aqueue.drivers.redis_link import RedisLink, Script
from aqueue.findings import Finding

#: Seconds between two clocks that are no matter.
_CLOCKS: Final = 5.0
#: Of ``maxmemory``, from which on it is told.
_FULL: Final = 0.9
_OLDEST: Final = (6, 2)
#: The first version of each line without the holes in Lua up to CVE-2025-49844; a line that is not here has none.
_MENDED: Final[Mapping[str, Sequence[tuple[int, ...]]]] = {
    "redis": ((6, 2, 20), (7, 2, 11), (7, 4, 6), (8, 0, 4), (8, 2, 2)),
    "valkey": ((7, 2, 11), (8, 0, 6), (8, 1, 4)),
}
#: Touches every key that it is given, and changes none.
_PROBE: Final = Script("for _, key in ipairs(KEYS) do redis.call('EXISTS', key) redis.call('DEL', key) end return 1")


async def facts(link: RedisLink) -> dict[str, str] | None:
    """What INFO tells; None where it is denied. Raises LinkLost."""
    try:
        text: bytes = await link.call("INFO")
    except ResponseError:
        return None
    return parse_info(text.decode(errors="replace"))


def parse_info(text: str) -> dict[str, str]:
    lines = (line.strip().partition(":") for line in text.splitlines() if not line.startswith("#"))
    return {name: value for name, _, value in lines if name}


async def common(link: RedisLink, known: Mapping[str, str] | None, probed: str) -> list[Finding]:
    """What holds for queues and results. ``probed`` is a key of ours that never exists. Raises LinkLost."""
    shown = link.address.shown
    if known is None:
        step = f"ACL SETUSER {_user(link)} +info, so that it can be checked"
        return [Finding("AQ003", f"{shown} does not tell about itself", step), *await _scripts(link, probed)]
    found = [*version(shown, known), *memory(shown, known)]
    if known.get("role") == "slave":
        step = "name the master, or the Sentinels, in the URL"
        return [*found, Finding("AQ103", f"{shown} is a replica: it can't be written to", step)]
    return [*found, *await _clock(link), *await _scripts(link, probed)]


def version(shown: str, known: Mapping[str, str]) -> Iterator[Finding]:
    server = known.get("server_name", "redis")
    text = known.get(f"{server}_version", known.get("redis_version", ""))
    try:
        number = tuple(map(int, text.split(".")))
    except ValueError:
        return
    if number < _OLDEST:
        yield Finding("AQ105", f"{shown} is {server} {text}", "upgrade it to 6.2 or newer, best to one that is kept up")
        return
    mended = _MENDED.get(server, ())
    line = next((fixed for fixed in mended if fixed[:2] == number[:2]), None)
    if (line is None and mended and number < mended[-1]) or (line is not None and number < line):
        yield Finding(
            "AQ106",
            f"{shown} is {server} {text}: who may run scripts can take it over (CVE-2025-49844 and earlier)",
            f"upgrade to {', '.join('.'.join(map(str, fixed)) for fixed in mended)} or newer; where the system's "
            "package is mended under its old number, put AQ106 into Settings.ignored_checks",
        )


def memory(shown: str, known: Mapping[str, str]) -> Iterator[Finding]:
    used, most = (int(known.get(name, 0)) for name in ("used_memory", "maxmemory"))
    if most and used > most * _FULL:
        yield Finding(
            "AQ110",
            f"{shown} uses {used / most:.0%} of its memory; when it is full, sends are refused",
            "raise maxmemory, or find out what grows: `aqueue queues`, `redis-cli --bigkeys`",
        )


async def _clock(link: RedisLink) -> list[Finding]:
    sent = time.time()
    seconds, microseconds = map(int, await link.call("TIME"))
    ahead = seconds + microseconds / 1e6 - (sent + time.time()) / 2
    if abs(ahead) <= _CLOCKS:
        return []
    side = "ahead of" if ahead > 0 else "behind"
    what = f"the clock of {link.address.shown} is {abs(ahead):.0f} s {side} this machine's"
    return [Finding("AQ107", what, "have both set by NTP: ETAs and expiry are written by one and read by the other")]


async def _scripts(link: RedisLink, probed: str) -> list[Finding]:
    try:
        await link.run(_PROBE, [probed])
    except ReadOnlyError:
        return []
    except ResponseError as error:
        step = f"ACL SETUSER {_user(link)} +@all -@admin -@dangerous +info ~*, or what your rules say in its place"
        return [Finding("AQ104", f"{link.address.shown} denies what every task needs: {error}", step)]
    return []


def _user(link: RedisLink) -> str:
    return link.address.username or "default"


def evicts(known: Mapping[str, str]) -> str:
    """The policy by which keys are thrown away when memory is full; "" when none are."""
    policy = known.get("maxmemory_policy", "noeviction")
    return "" if policy == "noeviction" else policy


async def saves(link: RedisLink, known: Mapping[str, str]) -> str:
    """How the server keeps its data: ``aof``, ``snapshots``, ``nothing``; "" when it doesn't tell. Raises LinkLost."""
    if known.get("aof_enabled") != "0":
        return "aof" if "aof_enabled" in known else ""
    try:
        reply: dict[bytes, bytes] = await link.call("CONFIG", "GET", "save")
    except ResponseError:
        return ""
    return "snapshots" if any(reply.values()) else "nothing"
