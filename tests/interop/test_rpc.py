"""Results that are sent to whoever sent the task (``rpc://``, celery-protocol 4.9), in both directions."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

import pytest
import pytest_asyncio

from aqueue import AQueue, TaskFailed
from aqueue.results import RemoteError
from tests.interop import celery_app
from tests.interop.conftest import SOON, Connect
from tests.interop.tasks import Declined
from tests.interop.workers import QUICK, Site, aqueue_worker, celery_worker
from tests.kit.rabbitmq import RabbitServer
from tests.kit.servers import RedisServer
from tests.kit.waiting import until

WIRE: Final = Path(__file__).parents[1] / "wire"
TO_CELERY: Final = "to-celery"
TO_AQUEUE: Final = "to-aqueue"
BOTH: Final = "both"
UNICODE: Final = "Grüße, мир, 世界"
_HOST: Final = "rpc"


class Caller:
    """A Celery client in a thread of its own: its queue for results is the thread's that sends."""

    def __init__(self, site: Site, **conf: Any) -> None:
        self._app = celery_app.make(site.broker, site.results, **conf)
        self._thread = ThreadPoolExecutor(1)

    async def do(self, function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def send(self, task: str, *args: Any, **options: Any) -> Any:
        return await self.do(partial(self._app.send_task, task, args, **options))

    async def get(self, result: Any) -> Any:
        return await self.do(partial(result.get, timeout=SOON))

    async def state(self, result: Any) -> Any:
        return await self.do(lambda: result.state)

    async def close(self) -> None:
        await self.do(self._close)
        self._thread.shutdown()

    def _close(self) -> None:
        consumer = self._app.backend.result_consumer
        if consumer._consumer is not None:
            consumer.stop()
        self._app.close()


@pytest.fixture(scope="module")
def place(rabbit_server: RabbitServer, tmp_path_factory: pytest.TempPathFactory, celery_pools: None) -> Iterator[Site]:
    """A virtual host with a worker of each kind; Redis has nothing but the tasks' traces."""
    folder = tmp_path_factory.mktemp("rpc")
    server = RedisServer(folder / "redis")
    site = Site(server, rabbit=rabbit_server.virtual_host(_HOST), store="rpc://")
    try:
        with (
            aqueue_worker(
                folder,
                site.broker,
                site.results,
                queues=f"{TO_AQUEUE},{BOTH}",
                settings={"track_started": True},
            ),
            celery_worker(folder, site.broker, site.results, "-c", "2", *QUICK, queues=f"{TO_CELERY},{BOTH}"),
        ):
            yield site
    finally:
        site.traces.close()
        server.stop()


MakeCaller = Callable[[], Caller]


@pytest_asyncio.fixture
async def celery_callers(place: Site) -> AsyncIterator[MakeCaller]:
    made: list[Caller] = []

    def make() -> Caller:
        made.append(Caller(place))
        return made[-1]

    yield make
    for caller in made:
        await caller.close()


@pytest.fixture
def caller(celery_callers: MakeCaller) -> Caller:
    return celery_callers()


@pytest_asyncio.fixture
async def app(place: Site, connect: Connect) -> AQueue:
    return await connect(place)


# --- values and failures ---------------------------------------------------------------------------------------------


async def test_a_celery_client_is_sent_the_results_of_an_aqueue_worker(caller: Caller) -> None:
    result = await caller.send("interop.echo", 1, UNICODE, {"three": [3.5, None]}, queue=TO_AQUEUE)
    assert await caller.get(result) == [[1, UNICODE, {"three": [3.5, None]}], {}]
    assert await caller.state(result) == "SUCCESS"
    with pytest.raises(Declined) as caught:
        await caller.get(await caller.send("interop.decline", "no money", 402, queue=TO_AQUEUE))
    assert caught.value.code == 402


async def test_an_aqueue_client_is_sent_the_results_of_a_celery_worker(app: AQueue) -> None:
    result = await app.send_task("interop.echo", [1, UNICODE, {"three": [3.5, None]}], queue=TO_CELERY)
    assert await result.get(SOON) == [[1, UNICODE, {"three": [3.5, None]}], {}]
    assert await result.state() == "SUCCESS"
    failing = await app.send_task("interop.decline", ["no money", 402], queue=TO_CELERY)
    with pytest.raises(TaskFailed, match="Declined") as caught:
        await failing.get(SOON)
    assert caught.value.traceback is not None
    assert "raise Declined(reason, code)" in caught.value.traceback


async def test_results_that_nobody_waited_for_are_read_later(
    caller: Caller, app: AQueue, place: Site, key: str
) -> None:
    theirs = await caller.send("interop.count", place.port, f"{key}-c", queue=TO_AQUEUE)
    ours = await app.send_task("interop.count", [place.port, f"{key}-a"], queue=TO_CELERY)
    await until(lambda: place.runs(f"{key}-c") and place.runs(f"{key}-a"), "both have run")
    assert await caller.get(theirs) == "aqueue"
    assert await ours.get(SOON) == "celery"
    assert await ours.get(SOON) == "celery"


# --- states ----------------------------------------------------------------------------------------------------------


async def test_a_celery_client_sees_the_progress_of_an_aqueue_task(caller: Caller, place: Site, key: str) -> None:
    result = await caller.send("interop.progress", place.port, key, queue=TO_AQUEUE)
    await until(partial(is_in_state, caller, result, "PROGRESS"), "state PROGRESS")
    place.put_up(key)
    assert await caller.get(result) == "aqueue"


async def test_a_celery_client_sees_the_retry_of_an_aqueue_task(caller: Caller) -> None:
    result = await caller.send("interop.retry_self", 1, 1, queue=TO_AQUEUE)
    await until(partial(is_in_state, caller, result, "RETRY"), "state RETRY")
    assert await caller.get(result) == [1, "aqueue"]


async def is_in_state(caller: Caller, result: Any, state: str) -> bool:
    return bool(await caller.state(result) == state)


async def test_an_aqueue_client_sees_the_states_of_a_celery_task(app: AQueue, place: Site, key: str) -> None:
    result = await app.send_task("interop.progress", [place.port, key], queue=TO_CELERY)

    async def is_told() -> bool:
        return await result.state() == "PROGRESS"

    await until(is_told, "state PROGRESS")
    assert await result.info() == {"done": 1, "total": 2}
    assert not await result.ready()
    place.put_up(key)
    assert await result.get(SOON) == "celery"
    retried = await app.send_task("interop.retry_self", [1, 1], queue=TO_CELERY)

    async def is_retried() -> bool:
        return await retried.state() == "RETRY"

    await until(is_retried, "state RETRY")
    assert isinstance(await retried.info(), RemoteError)
    assert await retried.get(SOON) == [1, "celery"]


class Mailbox:
    """A queue for results, read message by message."""

    def __init__(self, channel: Any) -> None:
        self.name = str(uuid4())
        self._channel = channel
        channel.queue_declare(self.name, durable=True, auto_delete=False)

    def next(self) -> Any:
        return self._channel.basic_get(self.name, no_ack=True)

    async def until_final(self) -> list[Any]:
        found: list[Any] = []
        while not found or json.loads(found[-1].body)["status"] not in ("SUCCESS", "FAILURE"):
            found.append(await until(self.next, "one more state"))
        return found


@pytest.fixture
def mailbox(place: Site) -> Iterator[Mailbox]:
    with place.rabbit_channel() as channel:
        box = Mailbox(channel)
        yield box
        channel.queue_delete(box.name)


@pytest.mark.parametrize(
    ("task", "args", "states"),
    [
        ("interop.add", [2, 3], ["STARTED", "SUCCESS"]),
        ("interop.fail", ["boom"], ["STARTED", "FAILURE"]),
        ("interop.progress", ["port", "key"], ["STARTED", "PROGRESS", "SUCCESS"]),
        ("interop.retry_self", [2, 1], ["STARTED", "RETRY", "STARTED", "RETRY", "STARTED", "SUCCESS"]),
    ],
)
async def test_both_kinds_of_workers_send_the_same_messages_in_the_same_order(
    caller: Caller, place: Site, mailbox: Mailbox, key: str, task: str, args: list[Any], states: list[str]
) -> None:
    place.put_up(key)
    args = [{"port": place.port, "key": key}.get(arg, arg) if isinstance(arg, str) else arg for arg in args]
    shapes: list[list[Any]] = []
    for queue in (TO_CELERY, TO_AQUEUE):
        sent = await caller.send(task, *args, queue=queue, reply_to=mailbox.name)
        messages = await mailbox.until_final()
        documents = [json.loads(message.body) for message in messages]
        assert [document["status"] for document in documents] == states
        assert {document["task_id"] for document in documents} == {sent.id}
        assert {message.properties["correlation_id"] for message in messages} == {sent.id}
        shapes.append([shape(message) for message in messages])
    assert shapes[1] == shapes[0]


def shape(message: Any) -> Any:
    """What is the same for every task: the properties but the id, and the keys of the document.

    Ours tell of earlier attempts, too, which Celery clients pass over.
    """
    properties = {name: value for name, value in message.properties.items() if name != "correlation_id"}
    return {"priority": 0, **properties}, sorted(json.loads(message.body).keys() - {"attempts"})


# --- many clients ----------------------------------------------------------------------------------------------------


async def test_each_of_several_clients_gets_its_own_results_and_no_others(
    celery_callers: MakeCaller, connect: Connect, place: Site
) -> None:
    callers = [celery_callers() for _ in range(3)]
    apps = [await connect(place) for _ in range(3)]

    async def by_celery(number: int) -> list[Any]:
        sent = [await callers[number].send("interop.give", f"c{number}-{i}", queue=BOTH) for i in range(20)]
        return [await callers[number].get(result) for result in sent]

    async def by_aqueue(number: int) -> list[Any]:
        give = apps[number].tasks["interop.give"].options(queue=BOTH)
        sent = await apps[number].send_many([give.s(f"a{number}-{i}") for i in range(20)])
        return [await result.get(SOON) for result in sent]

    found = await asyncio.gather(*map(by_celery, range(3)), *map(by_aqueue, range(3)))
    assert found == [[f"{who}{number}-{i}" for i in range(20)] for who in "ca" for number in range(3)]


async def test_a_task_that_changes_hands_between_its_attempts_answers_its_sender(caller: Caller, app: AQueue) -> None:
    theirs = [await caller.send("interop.retry_self", 4, 0, queue=BOTH) for _ in range(10)]
    ours = [await app.send_task("interop.retry_self", [4, 0], queue=BOTH) for _ in range(10)]
    assert [(await caller.get(result))[0] for result in theirs] == [4] * 10
    assert [(await result.get(SOON))[0] for result in ours] == [4] * 10


# --- nobody there ----------------------------------------------------------------------------------------------------


async def test_a_client_that_is_gone_leaves_no_queue_and_troubles_no_worker(
    place: Site, rabbit_server: RabbitServer, connect: Connect, key: str
) -> None:
    before = await queues(rabbit_server)
    callers = [Caller(place) for _ in range(2)]
    apps = [await connect(place) for _ in range(2)]
    for queue in (TO_AQUEUE, TO_CELERY):
        for caller in callers:
            await caller.get(await caller.send("interop.add", 2, 3, queue=queue))
        for app in apps:
            await (await app.send_task("interop.add", [2, 3], queue=queue)).get(SOON)
    for queue in (TO_AQUEUE, TO_CELERY):
        for caller in callers:
            await caller.send("interop.wait_for_flag", place.port, key, queue=queue)
        for app in apps:
            await app.send_task("interop.wait_for_flag", [place.port, key], queue=queue)
    assert len(await queues(rabbit_server) - before) == 4
    for caller in callers:
        await caller.close()
    for app in apps:
        await app.close()
    assert await queues(rabbit_server) == before
    place.put_up(key)
    await until(lambda: place.runs(key) == 8, "those whose clients are gone have run")
    app = await connect(place)
    for queue in (TO_AQUEUE, TO_CELERY):
        assert await (await app.send_task("interop.add", [2, 3], queue=queue)).get(SOON) == 5


async def queues(server: RabbitServer) -> set[str]:
    listed = await asyncio.to_thread(server.ctl, "list_queues", "-p", _HOST, "--no-table-headers", "name")
    return set(listed.split())


async def test_nothing_is_sent_for_a_result_that_nobody_wants(caller: Caller, place: Site, mailbox: Mailbox) -> None:
    for queue in (TO_AQUEUE, TO_CELERY):
        await caller.send("interop.fail", "boom", queue=queue, reply_to=mailbox.name, ignore_result=True)
        after = await caller.send("interop.add", 2, 3, queue=queue, reply_to=mailbox.name)
        found = {message.properties["correlation_id"] for message in await mailbox.until_final()}
        assert found == {after.id}
