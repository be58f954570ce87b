"""The least that a worker must do for a task on Redis, with no framework around it.

The same scripts as aqueue's broker (fenced claim and settle, result stored and published), the same
envelope, one asyncio task and one timeout for each message; no registry, no options, no retries, no checks.
Prints how far a framework could get on this machine::

    python benchmarks/floor.py redis://localhost:6379/0 20000
"""

import asyncio
import base64
import json
import sys
import time
from typing import Any
from uuid import uuid4

import msgspec
import redis.asyncio
import uvloop

from aqueue.broker.redis.scripts import CLAIM, SETTLE, SETTLE_KEYS

BATCH = 500
encode = msgspec.json.encode
decode = msgspec.json.Decoder().decode


def envelope(task_id: str) -> bytes:
    body = base64.b64encode(b"[[], {}, {}]").decode()
    return json.dumps(
        {
            "body": body,
            "content-encoding": "utf-8",
            "content-type": "application/json",
            "headers": {
                "lang": "py", "task": "floor.nop", "id": task_id, "shadow": None, "eta": None, "expires": None,
                "group": None, "group_index": None, "retries": 0, "timelimit": [None, None], "root_id": task_id,
                "parent_id": None, "argsrepr": "()", "kwargsrepr": "{}", "origin": "gen1@host", "ignore_result": False,
                "replaced_task_nesting": 0, "stamped_headers": None, "stamps": {},
            },
            "properties": {
                "correlation_id": task_id, "reply_to": str(uuid4()), "delivery_mode": 2,
                "delivery_info": {"exchange": "", "routing_key": "floor"}, "priority": 0, "body_encoding": "base64",
                "delivery_tag": str(uuid4()),
            },
        }
    ).encode()  # fmt: skip


async def nop() -> None:
    return None


async def run_one(call: list[Any], receipt: bytes, task_id: str, done: list[Any]) -> None:
    loop = asyncio.get_running_loop()
    running = asyncio.current_task()
    assert running is not None
    timer = loop.call_later(3600, running.cancel)
    try:
        args, kwargs, _ = call
        await nop(*args, **kwargs)
    finally:
        timer.cancel()
    document = encode({"status": "SUCCESS", "result": None, "traceback": None, "children": [],
                       "date_done": "2026-01-01T00:00:00+00:00", "task_id": task_id})  # fmt: skip
    done.extend((receipt, "ack", "", f"celery-task-meta-{task_id}", document, 86_400_000, 0))


async def main(url: str, count: int) -> None:
    client = redis.asyncio.from_url(url)
    await client.delete("floor")
    async with client.pipeline(transaction=False) as pipe:
        for _ in range(count):
            pipe.lpush("floor", envelope(str(uuid4())))
        await pipe.execute()
    claim, settle = client.register_script(CLAIM.source), client.register_script(SETTLE.source)
    keys = [f"aqueue:{name}" for name in ("seq", "leases", "leased", "lost")]
    settle_keys = [f"aqueue:{name}" for name in SETTLE_KEYS]
    finished = 0
    settling: asyncio.Task[Any] | None = None
    start = time.perf_counter()
    while finished < count:
        reply = await claim(keys=[*keys, "floor"], args=[BATCH, 30_000, "floor"])
        done: list[Any] = []
        tasks = []
        for i in range(2, len(reply), 3):
            message = decode(reply[i + 2])
            call = decode(base64.b64decode(message["body"]))
            tasks.append(asyncio.create_task(run_one(call, reply[i], message["headers"]["id"], done)))
        await asyncio.wait(tasks)
        finished += len(tasks)
        if settling is not None:
            await settling
        settling = asyncio.create_task(settle(keys=settle_keys, args=[len(tasks), *done]))
    if settling is not None:
        await settling
    print(f"{count / (time.perf_counter() - start):.0f}")
    await client.aclose()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main(sys.argv[1], int(sys.argv[2])))
