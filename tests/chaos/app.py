"""The app that ``aqueue worker`` serves in a supervised run: servers by their URLs, no coats, watched tasks."""

import os

import msgspec

from aqueue import AQueue, Settings
from tests.chaos.config import WorkerConfig
from tests.chaos.failpoints import Failpoints
from tests.chaos.history import Recorder
from tests.chaos.tasks import Watch, declare


def _make(config: WorkerConfig) -> AQueue:
    settings = Settings(
        lease=config.lease,
        send_timeout=config.send_timeout,
        default_queue=config.queue,
        max_deliveries=config.max_deliveries,
        timeout=60.0,
    )
    app = AQueue("chaos", broker=config.broker, backend=config.results, settings=settings)
    declare(app, config.lease)
    record = Recorder(config.folder, f"{config.name}-{os.getpid()}")
    record("SPAWN")
    app.add_middleware(Watch(record, Failpoints(config.failpoints, record)))
    return app


app = _make(msgspec.json.decode(os.environ["CHAOS_WORKER"].encode(), type=WorkerConfig))
