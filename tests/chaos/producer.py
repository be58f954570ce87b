"""A producer process of a run: sends by the clock, and writes down what it was told of each send."""

import asyncio
import random
import sys

from aqueue import AQueue
from aqueue.errors import BrokerUnavailable, EnqueueFailed, EnqueueUnknown
from tests.chaos.config import ProducerConfig
from tests.chaos.failpoints import Failpoints
from tests.chaos.history import Recorder
from tests.chaos.tasks import Watch
from tests.chaos.worker import main, make_app

#: Sends under way at once; behind these the clock waits.
_AT_ONCE = 64


class Producer:
    def __init__(self, config: ProducerConfig, record: Recorder, app: AQueue) -> None:
        self._config = config
        self._record = record
        self._app = app
        self._random = random.Random(f"{config.seed} {config.name}")
        self._under_way: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        names, shares = zip(*self._config.mix.items(), strict=True)
        for n in range(int(self._config.rate * self._config.seconds)):
            if loop.time() > began + self._config.seconds + 5.0:
                break
            await asyncio.sleep(max(0.0, began + n / self._config.rate - loop.time()))
            task = asyncio.create_task(self._send(self._random.choices(names, shares)[0], n))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)
            if len(self._under_way) >= _AT_ONCE:
                await asyncio.wait(self._under_way, return_when=asyncio.FIRST_COMPLETED)
        if self._under_way:
            await asyncio.wait(self._under_way)

    async def _send(self, name: str, n: int) -> None:
        id = f"{name}-{self._config.name}-{n}"
        for _ in range(5):
            answer = await self._try(name, id, n)
            if answer == "ENQ_OK" or not self._config.repeats:
                break

    async def _try(self, name: str, id: str, n: int) -> str:
        self._record("ENQ", id=id)
        countdown = 0.3 + self._random.random() if name == "later" else 0.0
        try:
            await self._app.send_task(name, (n,), task_id=id, countdown=countdown)
        except EnqueueFailed as error:
            answer, why = "ENQ_FAIL", str(error)
        except (EnqueueUnknown, BrokerUnavailable) as error:
            answer, why = "ENQ_UNKNOWN", str(error)
        else:
            answer, why = "ENQ_OK", ""
        self._record(answer, id=id, why=why)
        return answer


async def produce(config: ProducerConfig) -> None:
    record = Recorder(config.folder, config.name)
    failpoints = Failpoints(config.failpoints, record)
    app = make_app(config, record, Watch(record, failpoints), failpoints)
    record("SPAWN")
    async with app:
        await Producer(config, record, app).run()


if __name__ == "__main__":
    main(sys.argv[1:], produce, ProducerConfig)
