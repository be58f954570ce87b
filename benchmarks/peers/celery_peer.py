"""Celery. Commands: send N, sends N, latency N."""

import os

from celery import Celery

from benchmarks.peers.timing import blocking_rate, blocking_round_trips, main

app = Celery("bench", broker=os.environ["BROKER"], backend=os.environ["RESULTS"])
app.conf.update(worker_hijack_root_logger=False, broker_connection_retry_on_startup=True)


@app.task(name="nop")
def nop() -> None: ...


@app.task(name="thread_nop")
def thread_nop() -> None: ...


def send(count: int, task: str = "nop") -> None:
    with app.pool.acquire() as connection, app.amqp.Producer(connection) as producer:
        for _ in range(count):
            app.tasks[task].apply_async(producer=producer)


def sends(count: int) -> None:
    app.conf.broker_transport_options = {"confirm_publish": True}  # on RabbitMQ it would not wait for the server
    nop.delay()
    blocking_rate(nop.delay, count)


def latency(count: int) -> None:
    blocking_round_trips(lambda: nop.delay().get(timeout=10), count)


if __name__ == "__main__":
    main(lambda _: None, send=send, sends=sends, latency=latency)
