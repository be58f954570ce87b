"""A worker process of a run: the real `aqueue.worker.Worker` on the real broker, in its coat."""

import asyncio
import logging
import signal
import sys
from typing import Any

import msgspec

from aqueue import AQueue, Settings
from aqueue import broker as brokers
from aqueue import results as stores
from aqueue.broker import BrokerOptions
from aqueue.results import StoreOptions
from aqueue.url import Url
from aqueue.worker import Worker
from tests.chaos.config import ProducerConfig, WorkerConfig
from tests.chaos.failpoints import Failpoints
from tests.chaos.history import Recorder
from tests.chaos.mutants import plant
from tests.chaos.tasks import Watch, declare
from tests.chaos.wrapper import RecordingBroker, RecordingStore


def make_app(config: WorkerConfig | ProducerConfig, record: Recorder, watch: Watch, failpoints: Failpoints) -> AQueue:
    """The app, with its broker and its store in their coats."""
    broker_factory = brokers.from_url(Url(config.broker))
    store_factory = stores.from_url(Url(config.results))
    coat = plant(config.mutant, failpoints)

    def make_broker(options: BrokerOptions) -> RecordingBroker:
        watch.broker = RecordingBroker(coat(broker_factory(options)), record, failpoints)
        return watch.broker

    def make_store(options: StoreOptions) -> RecordingStore:
        return RecordingStore(store_factory(options), failpoints)

    settings = Settings(
        lease=config.lease,
        send_timeout=config.send_timeout,
        default_queue=config.queue,
        max_deliveries=config.max_deliveries if isinstance(config, WorkerConfig) else 5,
        timeout=60.0,
    )
    app = AQueue("chaos", broker=make_broker, backend=make_store, settings=settings)
    declare(app, config.lease)
    return app


async def work(config: WorkerConfig) -> None:
    record = Recorder(config.folder, config.name)
    failpoints = Failpoints(config.failpoints, record)
    watch = Watch(record, failpoints)
    app = make_app(config, record, watch, failpoints)
    app.add_middleware(watch)
    worker = Worker(app, concurrency=config.concurrency, threads=4, name=config.name, grace=config.grace)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, worker.stop)
    record("SPAWN", value=sys.version.split()[0])
    await worker.run()


def configure_logs() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", stream=sys.stderr)


def main(words: list[str], run: Any = work, kind: type[Any] = WorkerConfig) -> None:
    configure_logs()
    asyncio.run(run(msgspec.json.decode(words[0].encode(), type=kind)))


if __name__ == "__main__":
    main(sys.argv[1:])
