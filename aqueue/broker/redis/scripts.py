"""The Lua scripts beside this file; the head of each says which keys it uses and what it answers."""

from pathlib import Path
from typing import Final

from aqueue.drivers.redis_link import Script
from aqueue.drivers.redis_records import RECORD_LUA

_LUA = Path(__file__).with_name("lua")


def _load(name: str, before: str = "") -> Script:
    return Script(before + (_LUA / f"{name}.lua").read_text())


CLAIM: Final = _load("claim")
PUBLISH: Final = _load("publish")
RENEW: Final = _load("renew")
REVOKE: Final = _load("revoke")
REVOKED: Final = _load("revoked")
SETTLE: Final = _load("settle", before=RECORD_LUA)
TEND: Final = _load("tend")

#: The names of our keys that settle.lua takes, in its order.
SETTLE_KEYS: Final = (
    "leases", "leased", "lost", "seq", "parked", "parked:messages", "dead", "dead:messages", "dead:letters", "nothing"
)  # fmt: skip
EXPLAIN: Final = _load("explain")
RETRY_DEAD: Final = _load("retry_dead")
RECOVER: Final = _load("recover")
RECOVER_UNACKED: Final = _load("recover_unacked")
