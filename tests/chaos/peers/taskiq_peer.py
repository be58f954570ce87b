"""taskiq on a Redis stream, where it acknowledges; a stream's message is claimed from a worker that is gone."""

import asyncio
import signal
from contextlib import suppress

from taskiq.api import run_receiver_task
from taskiq_redis import RedisStreamBroker

from tests.chaos.config import ProducerConfig, WorkerConfig
from tests.chaos.peers.load import GIVEN_UP_AFTER, Body, produce, told


def broker(config: WorkerConfig | ProducerConfig) -> RedisStreamBroker:
    return RedisStreamBroker(
        config.broker,
        queue_name=config.queue,
        idle_timeout=int(1000 * GIVEN_UP_AFTER * config.lease),
        unacknowledged_lock_timeout=config.lease,
        socket_timeout=5.0,
    )


async def work(config: WorkerConfig) -> None:
    made, body = broker(config), Body(config)

    @made.task(task_name="run")
    async def run(id: str) -> None:
        await body.run(id)

    made.is_worker_process = True
    while True:  # its worker process ends on an error, and its manager starts it again
        with suppress(Exception):
            await made.startup()
            await run_receiver_task(made, max_async_tasks=config.concurrency, run_startup=False)
        await asyncio.sleep(0.2)


async def send_all(config: ProducerConfig) -> None:
    made = broker(config)

    @made.task(task_name="run")
    async def run(id: str) -> None: ...

    await made.startup()
    await produce(config, lambda task, _: run.kiq(task))
    await made.shutdown()


if __name__ == "__main__":
    command, chosen = told()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    asyncio.run(work(chosen) if command == "work" else send_all(chosen))
