"""Result records on Redis: one Lua rule for who may overwrite what, used by the broker and the store."""

from pathlib import Path
from typing import Final

from aqueue.drivers.redis_link import Script, Value
from aqueue.protocol import Record

_LUA = Path(__file__).with_name("lua")

#: Lua functions that other scripts put before their own text.
RECORD_LUA: Final = (_LUA / "record.lua").read_text()
PUT: Final = Script(RECORD_LUA + (_LUA / "put.lua").read_text())


def record_arguments(record: Record | None) -> tuple[Value, Value, Value]:
    """Key, value and ttl (ms, '' for none) as scripts take them; the key is '' for no record."""
    if record is None:
        return "", "", ""
    return record.key, record.value, "" if record.ttl is None else max(1, round(record.ttl * 1000))
