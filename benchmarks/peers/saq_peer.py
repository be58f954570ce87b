"""SAQ on Redis. Commands: send N, sends N.

No round trips: its waits, `apply` and `refresh(until_complete=...)`, miss the end of jobs that are quicker than
their subscription."""

import asyncio
import os
from typing import Any

import uvloop
from saq import Queue

from benchmarks.peers.timing import main, rate

queue = Queue.from_url(os.environ["BROKER"])


async def nop(ctx: Any) -> None: ...


settings = {"queue": queue, "functions": [nop], "concurrency": 100}


async def send(count: int, task: str = "nop") -> None:
    await queue.connect()
    for _ in range(0, count, 100):
        await asyncio.gather(*[queue.enqueue(task, ttl=86400) for _ in range(100)])
    await queue.disconnect()


async def sends(count: int) -> None:
    await queue.connect()
    await rate(lambda: queue.enqueue("nop", ttl=86400), count, 100)
    await queue.disconnect()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        main(runner.run, send=send, sends=sends)
