"""arq: a job stays in its queue until it is finished; a key that ends by itself says that somebody runs it."""

import asyncio
import signal
from contextlib import suppress
from typing import Any

from arq import create_pool, func
from arq.connections import RedisSettings
from arq.worker import Worker

from tests.chaos.config import ProducerConfig, WorkerConfig
from tests.chaos.peers.load import Body, produce, told


async def work(config: WorkerConfig) -> None:
    body = Body(config)

    async def run(_: dict[Any, Any], id: str) -> None:
        await body.run(id)

    while True:  # its worker ends on a lost connection, and whoever runs it starts it again
        with suppress(Exception):
            worker = Worker(
                functions=[func(run, name="run", timeout=2 * config.lease, max_tries=50)],
                queue_name=config.queue,
                redis_settings=settings(config),
                max_jobs=config.concurrency,
                handle_signals=False,
                poll_delay=0.1,
            )
            await worker.async_run()
        await asyncio.sleep(0.2)


def settings(config: WorkerConfig | ProducerConfig) -> RedisSettings:
    made = RedisSettings.from_dsn(config.broker)
    made.conn_timeout, made.conn_retries = 2, 50
    return made


async def send_all(config: ProducerConfig) -> None:
    pool = await create_pool(settings(config), default_queue_name=config.queue)
    await produce(config, lambda task, _: pool.enqueue_job("run", task))
    await pool.aclose()


if __name__ == "__main__":
    command, chosen = told()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    asyncio.run(work(chosen) if command == "work" else send_all(chosen))
