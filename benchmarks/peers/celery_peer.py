"""Celery. Commands: send N, sends N, latency N."""

import json
import os
import time

from celery import Celery

from benchmarks.peers.timing import main, report

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
    nop.delay()
    start = time.perf_counter()
    for _ in range(count):
        nop.delay()
    print(json.dumps({"rate": count / (time.perf_counter() - start)}))


def latency(count: int) -> None:
    times = []
    for number in range(count + 50):
        start = time.perf_counter()
        nop.delay().get(timeout=10)
        if number >= 50:
            times.append((time.perf_counter() - start) * 1000)
    report(times)


if __name__ == "__main__":
    main(lambda _: None, send=send, sends=sends, latency=latency)
