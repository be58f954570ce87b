"""aqueue, as a user would run it. Commands: send N, sends N, latency N, latency_unrecorded N."""

import asyncio
import os

import uvloop

from aqueue import AQueue, Settings
from benchmarks.peers.timing import main, rate, round_trips

broker = os.environ["BROKER"]
app = AQueue("bench", broker=broker, backend=os.environ["RESULTS"] if broker.startswith("amqp") else broker)


@app.task(name="nop")
async def nop() -> None: ...


@app.task(name="thread_nop")
def thread_nop() -> None: ...


@app.task(name="nap")
async def nap(seconds: float) -> None:
    await asyncio.sleep(seconds)


async def send(count: int, task: str = "nop") -> None:
    async with app:
        for _ in range(0, count, 1000):
            await app.send_many([app.tasks[task].s()] * min(1000, count))


async def nap_all(count: int) -> None:
    async with app:
        for _ in range(0, count, 1000):
            await app.send_many([nap.s(5.0)] * 1000)


async def sends(count: int) -> None:
    async with app:
        # On RabbitMQ the others' sends touch no store; ours would record each task whose result is wanted as sent.
        sent = nop.options(ignore_result=True) if broker.startswith("amqp") else nop
        await sent.send()
        await rate(sent.send, count, 1000)


async def latency(count: int, sender: AQueue = app) -> None:
    async with sender:

        async def one() -> None:
            await (await sender.send_task("nop")).get(timeout=10)

        await round_trips(one, count)


async def latency_unrecorded(count: int) -> None:
    """As the others do it on RabbitMQ: that a task was sent is written nowhere."""
    settings = Settings(track_sent=False)
    await latency(count, AQueue("unrecorded", broker=broker, backend=os.environ["RESULTS"], settings=settings))


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        main(runner.run, send=send, sends=sends, latency=latency, latency_unrecorded=latency_unrecorded, nap=nap_all)
