"""A worker on RabbitMQ while the server, the link or its rights break: nothing is lost, and it goes on."""

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from typing import Any
from uuid import uuid4

import amqp
import pytest
import pytest_asyncio
from msgspec.structs import replace

from aqueue import AQueue, Context, Settings
from aqueue.broker import Queue
from aqueue.errors import EnqueueFailed, EnqueueUnknown
from tests.kit.busy import hold, length_for
from tests.kit.proxy import Proxy
from tests.kit.rabbitmq import RabbitServer, queue_counts
from tests.kit.waiting import until
from tests.worker.conftest import running

#: Seconds; everything that a test waits for is bound by these.
TIMES = Settings(lease=3.0, send_timeout=3.0, timeout=60.0, max_deliveries=20)
#: What a worker may take to consume again.
BACK = 10.0


@pytest.fixture(scope="module")
def broken_rabbit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """A RabbitMQ that these tests break, one after the other; each leaves it well."""
    server = RabbitServer(tmp_path_factory.mktemp("broken-rabbitmq"))
    yield server
    server.stop()


@pytest.fixture
def proxy(broken_rabbit: RabbitServer) -> Iterator[Proxy]:
    """Named before ``start``, so that the worker ends first."""
    made = Proxy(broken_rabbit.port)
    yield made
    made.close()


class Counting:
    """An app whose task writes down who ran, and a sender that writes down what became of each send."""

    def __init__(self, worker_url: str, sender_url: str, queue: str, **settings: Any) -> None:
        chosen = replace(TIMES, default_queue=queue, **settings)
        self.queue = queue
        self.app = AQueue("faults", broker=worker_url, backend="memory://", settings=chosen)
        self.sender = AQueue("sender", broker=sender_url, backend="memory://", settings=chosen)
        #: Number of the task, and how often it ran to its end.
        self.ran: Counter[int] = Counter()
        self.stored: set[int] = set()
        self.failed: dict[int, EnqueueFailed] = {}
        self.unknown: dict[int, EnqueueUnknown] = {}
        self.slowest = 0.0
        self._numbers = iter(range(1_000_000))
        self._stop = asyncio.Event()

        @self.app.task(name="count", ignore_result=True)
        async def count(number: int) -> None:
            await asyncio.sleep(0.02)
            self.ran[number] += 1

    async def send(self) -> int:
        """One task; what became of it is written down."""
        number = next(self._numbers)
        start = time.monotonic()
        try:
            await self.sender.send_task("count", (number,), ignore_result=True)
            self.stored.add(number)
        except EnqueueFailed as error:
            self.failed[number] = error
        except EnqueueUnknown as error:
            self.unknown[number] = error
        self.slowest = max(self.slowest, time.monotonic() - start)
        return number

    async def keep_sending(self) -> None:
        while not self._stop.is_set():
            await self.send()
            await asyncio.sleep(0.005)

    def stop_sending(self) -> None:
        self._stop.set()

    async def works(self, what: str, timeout: float = BACK) -> None:
        """Until a task sent from now on has run."""
        start = time.monotonic()
        while time.monotonic() - start < timeout:
            number = await self.send()
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    while not self.ran[number]:
                        await asyncio.sleep(0.01)
                    return
        pytest.fail(f"{what}: no task runs within {timeout:g} s")

    async def nothing_is_lost(self) -> None:
        self.stop_sending()
        await until(lambda: not self.stored - self.ran.keys(), "all that was stored has run", 20)
        assert not self.failed.keys() & self.ran.keys(), "told that nothing was stored"
        assert self.slowest < TIMES.send_timeout * 1.3 + 0.5
        for error in (*self.failed.values(), *self.unknown.values()):
            assert "127.0.0.1" in str(error) or "within" in str(error) or "unroutable" in str(error), error
            assert "guest:guest" not in str(error)


Start = Callable[..., Any]


@pytest_asyncio.fixture
async def start(broken_rabbit: RabbitServer, queue: str) -> AsyncIterator[Start]:
    """A worker under a load of a few hundred tasks, of which some are on their way all the time."""
    async with AsyncExitStack() as stack:

        async def begin(worker_url: str = "", sender_url: str = "", **settings: Any) -> Counting:
            url = broken_rabbit.url
            counting = Counting(worker_url or url, sender_url or url, queue, **settings)
            await stack.enter_async_context(counting.sender)
            await stack.enter_async_context(running(counting.app, concurrency=10))
            for _ in range(200):
                await counting.send()
            sending = asyncio.create_task(counting.keep_sending())
            stack.push_async_callback(asyncio.wait, [sending])
            stack.callback(counting.stop_sending)
            await until(lambda: len(counting.ran) > 20, "tasks run")
            return counting

        yield begin


async def ctl(server: RabbitServer, *arguments: str) -> str:
    return await asyncio.to_thread(server.ctl, *arguments)


def delete(server: RabbitServer, queue: str) -> None:
    with amqp.Connection(f"127.0.0.1:{server.port}") as connection:
        connection.channel().queue_delete(queue)


# --- the server ---------------------------------------------------------------------------------------


async def test_a_server_that_is_stopped_and_started(start: Start, broken_rabbit: RabbitServer) -> None:
    counting = await start()
    await ctl(broken_rabbit, "stop_app")
    await until(lambda: counting.failed, "a send says that the server is away")
    assert "no connection" in str(next(iter(counting.failed.values())))
    await ctl(broken_rabbit, "start_app")
    await counting.works("after start_app")
    await counting.nothing_is_lost()


async def test_a_server_that_is_killed_has_what_was_confirmed(start: Start, broken_rabbit: RabbitServer) -> None:
    counting = await start()
    await asyncio.to_thread(broken_rabbit.kill)
    await until(lambda: counting.failed, "a send says that the server is away")
    await asyncio.to_thread(broken_rabbit.start)
    await counting.works("after the server was killed")
    await counting.nothing_is_lost()


async def test_connections_that_the_server_closes(start: Start, broken_rabbit: RabbitServer) -> None:
    counting = await start()
    for _ in range(3):
        await ctl(broken_rabbit, "close_all_connections", "a test")
        await counting.works("after close_all_connections")
    await counting.nothing_is_lost()


@pytest.mark.parametrize(
    ("alarm", "calm"),
    [
        (("set_vm_memory_high_watermark", "0.00001"), ("set_vm_memory_high_watermark", "0.6")),
        (("set_disk_free_limit", "999999999999999"), ("set_disk_free_limit", "1000000")),
    ],
    ids=["memory", "disk"],
)
async def test_an_alarm_stops_sends_and_nothing_else(
    start: Start, broken_rabbit: RabbitServer, alarm: tuple[str, ...], calm: tuple[str, ...]
) -> None:
    counting = await start()
    try:
        await ctl(broken_rabbit, *alarm)
        await until(lambda: counting.failed, "a send says that nothing is taken now", 15)
        assert "takes no messages now" in str(list(counting.failed.values())[-1])
        await until(lambda: not counting.stored - counting.ran.keys(), "what is there is worked off all the same")
    finally:
        await ctl(broken_rabbit, *calm)
    await counting.works("after the alarm")
    await counting.nothing_is_lost()


# --- the link -----------------------------------------------------------------------------------------


async def test_a_link_that_is_cut(proxy: Proxy, start: Start) -> None:
    url = f"amqp://guest:guest@127.0.0.1:{proxy.port}//"
    counting = await start(url, url)
    for _ in range(5):
        proxy.cut()
        await asyncio.sleep(0.3)
    proxy.refuse()
    await until(lambda: counting.failed, "a send says that there is no connection")
    proxy.heal()
    await counting.works("after the link was cut")
    await counting.nothing_is_lost()


async def test_a_link_that_goes_silent(proxy: Proxy, start: Start) -> None:
    url = f"amqp://guest:guest@127.0.0.1:{proxy.port}//?heartbeat=2&connection_timeout=1"
    counting = await start(url, url)
    proxy.silence()
    await until(lambda: counting.failed and counting.unknown, "sends say so", 15)
    proxy.heal()
    await counting.works("after the silence")
    await counting.nothing_is_lost()


async def test_a_worker_finds_out_by_itself_that_its_link_is_silent(
    broken_rabbit: RabbitServer, proxy: Proxy, start: Start
) -> None:
    """Its link stays half-open; a new one works."""
    counting = await start(f"amqp://guest:guest@127.0.0.1:{proxy.port}//?heartbeat=2&connection_timeout=1")
    proxy.silence()
    before = proxy.connections
    await until(lambda: proxy.connections > before, "it tries another connection", 3 * 2 + 2)
    proxy.heal()
    await counting.works("on another connection")
    await counting.nothing_is_lost()


async def test_a_task_that_blocks_the_loop_keeps_its_message(broken_rabbit: RabbitServer, queue: str) -> None:
    """For longer than the server waits for a heartbeat, which is twice what was agreed."""
    settings = replace(TIMES, default_queue=queue, lease=6.0)
    app = AQueue("blocks", broker=f"{broken_rabbit.url}?heartbeat=2", backend="memory://", settings=settings)
    runs: list[tuple[int, int]] = []

    @app.task
    async def block(ctx: Context, number: int) -> None:
        runs.append((number, ctx.deliveries))
        time.sleep(8.0)
        if number == 0:
            await block.send(1)

    async with app:
        result = await block.send(0)  # before anything blocks the loop that waits for the confirm
        async with running(app, concurrency=1):
            await until(lambda: len(runs) == 2, "the next one runs", 30)
            await result.get(timeout=20)
            await until(lambda: not sum(queue_counts(broken_rabbit)[queue]), "both are acknowledged", 20)
    assert runs == [(0, 1), (1, 1)]


async def test_a_task_that_holds_the_interpreter_keeps_its_message(broken_rabbit: RabbitServer, queue: str) -> None:
    """For longer than its lease: nobody in the process can renew it, or answer the server, meanwhile."""
    settings = replace(TIMES, default_queue=queue, lease=1.0)
    app = AQueue("holds", broker=broken_rabbit.url, backend="memory://", settings=settings)
    runs: list[int] = []
    length = length_for(4.0)

    @app.task
    async def hold_on(ctx: Context) -> None:
        runs.append(ctx.deliveries)
        hold(length)

    async with app:
        result = await hold_on.send()
        async with running(app, concurrency=2):
            await result.get(timeout=60)
            await until(lambda: not sum(queue_counts(broken_rabbit)[queue]), "it is acknowledged", 20)
    assert runs == [1]


# --- queues and rights --------------------------------------------------------------------------------


async def test_a_queue_that_is_deleted_is_made_again(start: Start, broken_rabbit: RabbitServer) -> None:
    """What was in it is gone, as whoever deletes a queue means; what is sent from then on is not."""
    counting = await start()
    counting.stop_sending()
    await asyncio.to_thread(delete, broken_rabbit, counting.queue)
    deleted = set(counting.stored)
    await counting.works("after the queue was deleted")
    counting.stored -= deleted - counting.ran.keys()
    for _ in range(50):
        await counting.send()
    await counting.nothing_is_lost()


@pytest.mark.parametrize("right", ["everything", "reading", "writing"])
async def test_rights_that_are_taken_and_given_back(
    start: Start, broken_rabbit: RabbitServer, right: str, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"user-{uuid4().hex[:8]}"
    await ctl(broken_rabbit, "add_user", name, "canary-password")
    await ctl(broken_rabbit, "set_permissions", name, ".*", ".*", ".*")
    url = f"amqp://{name}:canary-password@127.0.0.1:{broken_rabbit.port}//"
    counting = await start(url, url)
    if right == "everything":
        await ctl(broken_rabbit, "clear_permissions", name)
    else:
        rights = (".*", ".*", "^$") if right == "reading" else (".*", "^$", ".*")
        await ctl(broken_rabbit, "set_permissions", name, *rights)
    await ctl(broken_rabbit, "close_all_connections", "rights are looked at again")
    if right == "reading":
        await until(lambda: "the broker is away" in caplog.text, "the worker says so", 10)
    else:
        await until(lambda: counting.failed, "sends say so", 10)
        assert any("ACCESS_REFUSED" in str(error) or "access" in str(error) for error in counting.failed.values())
    await ctl(broken_rabbit, "set_permissions", name, ".*", ".*", ".*")
    await counting.works("after the rights were given back")
    await counting.nothing_is_lost()
    assert "canary" not in caplog.text
    await ctl(broken_rabbit, "delete_user", name)


async def test_a_user_that_is_deleted_under_a_worker(
    start: Start, broken_rabbit: RabbitServer, caplog: pytest.LogCaptureFixture
) -> None:
    name = f"user-{uuid4().hex[:8]}"
    await ctl(broken_rabbit, "add_user", name, "canary-password")
    await ctl(broken_rabbit, "set_permissions", name, ".*", ".*", ".*")
    counting = await start(f"amqp://{name}:canary-password@127.0.0.1:{broken_rabbit.port}//")
    await ctl(broken_rabbit, "delete_user", name)
    await until(lambda: "the broker is away" in caplog.text, "the worker says so", 10)
    await ctl(broken_rabbit, "add_user", name, "canary-password")
    await ctl(broken_rabbit, "set_permissions", name, ".*", ".*", ".*")
    await counting.works("after the user is back")
    await counting.nothing_is_lost()
    assert "canary" not in caplog.text
    await ctl(broken_rabbit, "delete_user", name)


# --- without a fault ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["classic", "quorum"])
async def test_a_healthy_worker_counts_no_loss(broken_rabbit: RabbitServer, queue: str, kind: str) -> None:
    """Whatever it claims of which queue: a message counted as lost too often would be buried."""
    settings = replace(TIMES, queues={f"{queue}*": Queue(arguments={"x-queue-type": kind})})
    app = AQueue("healthy", broker=broken_rabbit.url, backend="memory://", settings=settings)
    deliveries: list[int] = []

    @app.task(queue=queue, ignore_result=True)
    async def on_the_loop(ctx: Context) -> None:
        deliveries.append(ctx.deliveries)
        await asyncio.sleep(0.01)

    @app.task(queue=f"{queue}-threads", ignore_result=True)
    def in_a_thread(ctx: Context) -> None:
        deliveries.append(ctx.deliveries)
        time.sleep(0.01)

    async with app, running(app, concurrency=7, threads=2):
        for _ in range(20):
            await app.send_many([task.s() for _ in range(10) for task in (on_the_loop, in_a_thread)])
            await asyncio.sleep(0.03)
        await until(lambda: len(deliveries) >= 400, "all have run", 30)
    assert Counter(deliveries) == {1: 400}
