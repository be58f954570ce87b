"""dramatiq on Redis or RabbitMQ. Commands: send N, sends N, latency N, latency_confirmed N."""

import os

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker
from dramatiq.brokers.redis import RedisBroker
from dramatiq.results import Results
from dramatiq.results.backends import RedisBackend

from benchmarks.peers.timing import blocking_rate, blocking_round_trips, main

url = os.environ["BROKER"]
broker = RabbitmqBroker(url=url) if url.startswith("amqp") else RedisBroker(url=url)
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
    broker.confirm_delivery = True  # on RabbitMQ it would not wait for the server
    blocking_rate(nop.send, count)


def latency(count: int) -> None:
    blocking_round_trips(lambda: nop.send().get_result(block=True, timeout=10_000), count)


def latency_confirmed(count: int) -> None:
    broker.confirm_delivery = True
    latency(count)


if __name__ == "__main__":
    main(lambda _: None, send=send, sends=sends, latency=latency, latency_confirmed=latency_confirmed)
