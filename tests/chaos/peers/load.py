"""What all peers have in common: the clock of a producer, the body of a task, what is written down."""

import asyncio
import random
import sys
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec

from tests.chaos.config import ProducerConfig, WorkerConfig
from tests.chaos.failpoints import Failpoints
from tests.chaos.history import Recorder

#: Seconds after which they give up a worker, as ours does after its lease and a half; in leases.
GIVEN_UP_AFTER: Final = 2.0
#: Stages that a peer's own code can reach; others are reached at the start of a task.
_OWN: Final = ("started", "body_done", "publish_sent")
Send = Callable[[str, int], Awaitable[object]]


class Body:
    """Tasks of a peer's worker."""

    def __init__(self, config: WorkerConfig) -> None:
        self._nap = 1.6 * config.lease
        self._record = Recorder(config.folder, config.name)
        points = [
            text if text.partition(":")[0] in _OWN else f"started:{text.partition(':')[2]}"
            for text in config.failpoints
        ]
        self._failpoints = Failpoints(points, self._record)
        self._record("SPAWN")

    def begin(self, id: str) -> float:
        """How long (seconds) the task takes."""
        self._record("START", id=id, attempt=1)
        self._failpoints.hit("started")
        return self._nap if id.startswith("nap") else 0.002

    def end(self, id: str) -> None:
        self._record("END", id=id, attempt=1)
        self._failpoints.hit("body_done")

    async def run(self, id: str) -> None:
        await asyncio.sleep(self.begin(id))
        self.end(id)


async def produce(config: ProducerConfig, send: Send) -> None:
    """Send by the clock; what raises is not confirmed."""
    record = Recorder(config.folder, config.name)
    failpoints = Failpoints(config.failpoints, record)
    dice = random.Random(f"{config.seed} {config.name}")
    names, shares = zip(*config.mix.items(), strict=True)
    loop = asyncio.get_running_loop()
    began = loop.time()
    under_way: set[asyncio.Task[None]] = set()

    async def one(id: str, n: int) -> None:
        record("ENQ", id=id)
        try:
            async with asyncio.timeout(config.send_timeout):
                await send(id, n)
        except Exception as error:
            record("ENQ_UNKNOWN", id=id, why=repr(error))
        else:
            failpoints.hit("publish_sent")
            record("ENQ_OK", id=id)

    for n in range(int(config.rate * config.seconds)):
        if loop.time() > began + config.seconds + 5.0:
            break
        await asyncio.sleep(max(0.0, began + n / config.rate - loop.time()))
        name = dice.choices(names, shares)[0]
        task = asyncio.create_task(one(f"{name}-{config.name}-{n}", n))
        under_way.add(task)
        task.add_done_callback(under_way.discard)
        if len(under_way) >= 64:
            await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
    if under_way:
        await asyncio.wait(under_way)


def told() -> tuple[str, Any]:
    """The command and its configuration, from the words of the process."""
    command, text = sys.argv[1], sys.argv[2].encode()
    kind: Any = WorkerConfig if command == "work" else ProducerConfig
    return command, msgspec.json.decode(text, type=kind)
