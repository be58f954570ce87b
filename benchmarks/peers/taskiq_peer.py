"""taskiq on a Redis stream or RabbitMQ. Commands: send N, sends N, latency N."""

import asyncio
import os

import uvloop
from taskiq_aio_pika import AioPikaBroker, Queue, QueueType
from taskiq_redis import RedisAsyncResultBackend, RedisStreamBroker

from benchmarks.peers.timing import main, rate, round_trips


def on_rabbitmq(url: str) -> AioPikaBroker:
    """With a classic queue, as everybody has it, and as many messages at hand as it runs at once."""
    return AioPikaBroker(url, qos=100).with_queues(Queue(type=QueueType.CLASSIC))


url = os.environ["BROKER"]
broker = (on_rabbitmq(url) if url.startswith("amqp") else RedisStreamBroker(url)).with_result_backend(
    RedisAsyncResultBackend(os.environ["RESULTS"], result_ex_time=86400)
)


@broker.task(task_name="nop")
async def nop() -> None: ...


@broker.task(task_name="thread_nop")
def thread_nop() -> None: ...


async def send(count: int, task: str = "nop") -> None:
    kiq = {"nop": nop, "thread_nop": thread_nop}[task].kiq
    await broker.startup()
    for _ in range(0, count, 100):
        await asyncio.gather(*[kiq() for _ in range(100)])
    await broker.shutdown()


async def sends(count: int) -> None:
    await broker.startup()
    await rate(nop.kiq, count, 100)
    await broker.shutdown()


async def latency(count: int) -> None:
    await broker.startup()

    async def one() -> None:
        await (await nop.kiq()).wait_result(check_interval=0.0005, timeout=10)

    await round_trips(one, count)
    await broker.shutdown()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        main(runner.run, send=send, sends=sends, latency=latency)
