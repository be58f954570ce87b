"""arq. Commands: send N, sends N, latency N."""

import asyncio
import os
from typing import Any

import uvloop
from arq import create_pool
from arq.connections import RedisSettings

from benchmarks.peers.timing import main, rate, round_trips

SETTINGS = RedisSettings.from_dsn(os.environ["BROKER"])


async def nop(ctx: dict[str, Any]) -> None: ...


class WorkerSettings:
    functions = (nop,)
    redis_settings = SETTINGS
    max_jobs = 100
    poll_delay = 0.001


async def send(count: int, task: str = "nop") -> None:
    pool = await create_pool(SETTINGS)
    for _ in range(0, count, 100):
        await asyncio.gather(*[pool.enqueue_job(task) for _ in range(100)])
    await pool.aclose()


async def sends(count: int) -> None:
    pool = await create_pool(SETTINGS)
    await rate(lambda: pool.enqueue_job("nop"), count, 100)
    await pool.aclose()


async def latency(count: int) -> None:
    pool = await create_pool(SETTINGS)

    async def one() -> None:
        job = await pool.enqueue_job("nop")
        assert job is not None
        await job.result(timeout=10, poll_delay=0.0005)

    await round_trips(one, count)
    await pool.aclose()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        main(runner.run, send=send, sends=sends, latency=latency)
