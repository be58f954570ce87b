"""dramatiq on Redis. Commands: send N, sends N, latency N."""

import json
import os
import time

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from benchmarks.peers.timing import main, report

broker = RedisBroker(url=os.environ["BROKER"])
broker.add_middleware(
    Results(backend=RedisBackend(url=os.environ["RESULTS"]), store_results=True, result_ttl=86_400_000)
)
dramatiq.set_broker(broker)


@dramatiq.actor
def nop() -> None: ...


@dramatiq.actor
def thread_nop() -> None: ...


def send(count: int, task: str = "nop") -> None:
    actor = {"nop": nop, "thread_nop": thread_nop}[task]
    for _ in range(count):
        actor.send()


def sends(count: int) -> None:
    start = time.perf_counter()
    for _ in range(count):
        nop.send()
    print(json.dumps({"rate": count / (time.perf_counter() - start)}))


def latency(count: int) -> None:
    times = []
    for number in range(count + 50):
        start = time.perf_counter()
        nop.send().get_result(block=True, timeout=10_000)
        if number >= 50:
            times.append((time.perf_counter() - start) * 1000)
    report(times)


if __name__ == "__main__":
    main(lambda _: None, send=send, sends=sends, latency=latency)
