"""Who comes first makes the queues: what either side declares on RabbitMQ the other finds as it would have made it."""

import asyncio
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from tests.interop.conftest import SOON, Connect, ended, working
from tests.interop.workers import QUICK, Site, WorkerProcess, celery_worker
from tests.kit.rabbitmq import RabbitServer
from tests.kit.servers import RedisServer

WIRE: Final = Path(__file__).parents[1] / "wire"
#: Every kind that a fleet may have.
QUEUES: Final[dict[str, dict[str, Any]]] = {
    "plain": {},
    "urgent": {"max_priority": 9},
    "lasting": {"exchange_type": "topic", "arguments": {"x-queue-type": "quorum"}},
    "feed": {"exchange": "news", "exchange_type": "topic", "routing_key": "feed.#"},
    "loud": {"exchange": "shouts", "exchange_type": "fanout"},
}
LEVELS: Final = 28
_COLUMNS: Final = {
    "exchanges": "name type durable auto_delete internal arguments",
    "queues": "name durable auto_delete exclusive arguments",
    "bindings": "source_name source_kind destination_name destination_kind routing_key arguments",
}

Row = tuple[tuple[str, Any], ...]
Declared = dict[str, set[Row]]


def rows(found: list[dict[str, Any]], columns: str) -> set[Row]:
    return {tuple((name, as_text(row[name])) for name in columns.split()) for row in found}


def as_text(value: Any) -> str:
    """rabbitmqctl writes arguments as triples: a name, a type, a value."""
    found = {name: argument for name, _, argument in value} if isinstance(value, list) else value
    return json.dumps(found, sort_keys=True)


async def declared(server: RabbitServer, virtual_host: str) -> Declared:
    """Everything in a virtual host, but what RabbitMQ brings along."""
    listed = await asyncio.gather(
        *(
            asyncio.to_thread(server.ctl, f"list_{kind}", "-p", virtual_host, "--formatter", "json", *columns.split())
            for kind, columns in _COLUMNS.items()
        )
    )
    found = {kind: json.loads(text) for kind, text in zip(_COLUMNS, listed, strict=True)}
    return {kind: rows(found[kind], columns) for kind, columns in _COLUMNS.items()}


def captured(name: str) -> Declared:
    """The same, as a Celery fleet had made it."""
    document: dict[str, Any] = json.loads((WIRE / f"{name}.json").read_text())
    return {
        kind: rows(next(document[title] for title in document if f"list_{kind} " in title), columns)
        for kind, columns in _COLUMNS.items()
    }


def about(found: Declared, *names: str) -> Declared:
    """What concerns these names; bindings are those between them. That each queue has its own is RabbitMQ's doing."""
    wanted = set(map(as_text, names))

    def concerns(row: Mapping[str, str]) -> bool:
        return {row[name] for name in ("name", "source_name", "destination_name") if name in row} <= wanted

    return {kind: {row for row in found[kind] if concerns(dict(row))} for kind in found}


#: A client that is told nothing of ``feed`` and ``loud`` makes exchanges of their names, whoever's client it is.
OWN: Final = ("plain", "urgent", "lasting", "news", "shouts")
LADDER: Final = ("celery_delayed_delivery", *(f"celery_delayed_{level}" for level in range(LEVELS)))


@pytest.fixture
def empty(rabbit_server: RabbitServer, redis_server: RedisServer, redis_url: str, key: str) -> Iterator[Site]:
    """A virtual host of the test's own."""
    site = Site(redis_server, results_db=1, rabbit=rabbit_server.virtual_host(key))
    yield site
    site.traces.close()


@contextmanager
def celery_on(site: Site, folder: Path) -> Iterator[WorkerProcess]:
    with celery_worker(
        folder, site.broker, site.results, "-P", "solo", *QUICK, queues=",".join(QUEUES), settings={"queues": QUEUES}
    ) as worker:
        yield worker
        assert "PRECONDITION_FAILED" not in worker.log
        worker.kill()  # to end takes it seconds


async def send_everywhere(client: Any, connect: Connect, site: Site) -> None:
    """Both clients, ours also without a word on the queues, use every queue."""
    told = await connect(site, queues=QUEUES)
    untold = await connect(site)
    results: list[Any] = []
    for queue in QUEUES:
        results.append(client.send_task("interop.add", [2, 3], queue=queue))
        results += [await app.send_task("interop.add", [2, 3], queue=queue) for app in (told, untold)]
        results.append(await told.send_task("interop.add", [2, 3], queue=queue, countdown=1))
    results.append(client.send_task("interop.add", [2, 3], queue="lasting", countdown=1))
    for result in results:
        assert (await result.get(SOON) if hasattr(result, "fetch") else await ended(result)) == 5


async def test_what_aqueue_has_declared_is_what_celery_would_declare_and_takes(
    empty: Site,
    rabbit_server: RabbitServer,
    connect: Connect,
    celery_client: Callable[..., Any],
    key: str,
    tmp_path: Path,
) -> None:
    app = await connect(empty, queues=QUEUES)
    for queue in QUEUES:
        await app.send_task("interop.add", [2, 3], queue=queue)
    async with working(await connect(empty, queues=QUEUES), *QUEUES):
        late = await app.send_task("interop.add", [2, 3], queue="plain", countdown=1)
        assert await late.get(SOON) == 5
    before = await declared(rabbit_server, key)
    with celery_on(empty, tmp_path):
        await send_everywhere(celery_client(empty, queues=QUEUES), connect, empty)
        after = await declared(rabbit_server, key)
    for kind in before:
        assert before[kind] <= after[kind]
    for kind in ("queues", "exchanges"):
        assert about(before, *OWN)[kind] == about(after, *OWN)[kind]
    assert about(before, *LADDER) == about(after, *LADDER) == about(captured("amqp_delayed_topology"), *LADDER)
    plain = about(before, "plain")
    theirs = about(captured("amqp_topology"), "other")
    assert plain == {
        kind: {tuple((name, value.replace("other", "plain")) for name, value in row) for row in theirs[kind]}
        for kind in theirs
    }


async def test_what_celery_has_declared_is_used_as_it_is(
    empty: Site,
    rabbit_server: RabbitServer,
    connect: Connect,
    celery_client: Callable[..., Any],
    key: str,
    tmp_path: Path,
) -> None:
    with celery_on(empty, tmp_path):
        before = await declared(rabbit_server, key)
        await send_everywhere(celery_client(empty, queues=QUEUES), connect, empty)
    async with working(await connect(empty), *QUEUES):
        theirs = celery_client(empty, queues=QUEUES).send_task("interop.add", [2, 3], queue="lasting")
        assert await ended(theirs) == 5
    after = await declared(rabbit_server, key)
    assert about(after, *LADDER) == about(before, *LADDER)
    for kind in ("queues", "exchanges"):
        assert about(after, *OWN)[kind] == about(before, *OWN)[kind]
