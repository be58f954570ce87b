"""kombu's consumer on Redis, acknowledging after the work, eight messages at once."""

import asyncio
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import import_module
from typing import Any

from tests.chaos.config import ProducerConfig, WorkerConfig
from tests.chaos.peers.load import GIVEN_UP_AFTER, Body, produce, told

#: It has no types.
kombu: Any = import_module("kombu")


def connection(config: WorkerConfig | ProducerConfig) -> Any:
    options = {
        "visibility_timeout": GIVEN_UP_AFTER * config.lease,
        "socket_timeout": 2.0,
        "socket_connect_timeout": 2.0,
        "socket_keepalive": True,
        "health_check_interval": 5,
    }
    return kombu.Connection(config.broker, transport_options=options)


class Working:
    """One thread reads and acknowledges; the others run tasks."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config
        self._body = Body(config)
        self._done: list[Any] = []
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: self._stopping.set())

    def run(self) -> None:
        with ThreadPoolExecutor(self._config.concurrency) as self._threads:
            while not self._stopping.is_set():
                try:
                    self._consume()
                except Exception as error:  # as Celery does: connect again
                    print("again after", repr(error), flush=True)
                    with self._lock:
                        self._done.clear()
                    time.sleep(0.2)

    def _consume(self) -> None:
        with connection(self._config) as link:
            consumer = kombu.Consumer(link, [kombu.Queue(self._config.queue)], callbacks=[self._take], accept=["json"])
            consumer.qos(prefetch_count=self._config.concurrency)
            with consumer:
                while not self._stopping.is_set():
                    with suppress(socket.timeout):
                        link.drain_events(timeout=0.05)
                    self._acknowledge()

    def _take(self, body: Any, message: Any) -> None:
        self._threads.submit(self._perform, body["id"], message)

    def _perform(self, id: str, message: Any) -> None:
        time.sleep(self._body.begin(id))
        self._body.end(id)
        with self._lock:
            self._done.append(message)

    def _acknowledge(self) -> None:
        with self._lock:
            done, self._done = self._done, []
        for message in done:
            message.ack()


async def send_all(config: ProducerConfig) -> None:
    threads = threading.local()

    def publish(id: str) -> None:
        if not hasattr(threads, "producer"):
            threads.producer = connection(config).Producer()
        try:
            threads.producer.publish(
                {"id": id}, routing_key=config.queue, declare=[kombu.Queue(config.queue)], retry=False
            )
        except BaseException:
            del threads.producer
            raise

    with ThreadPoolExecutor(4) as pool:
        loop = asyncio.get_running_loop()
        await produce(config, lambda task, _: loop.run_in_executor(pool, publish, task))


if __name__ == "__main__":
    command, chosen = told()
    if command == "work":
        Working(chosen).run()
    else:
        asyncio.run(send_all(chosen))
