"""Rules about servers and what lies in their queues, on real servers with the very fault."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import amqp
import pytest

from aqueue import AQueue, Queue, Reject, Settings
from aqueue.broker.amqp import checks as amqp_checks
from aqueue.checks import everything
from aqueue.drivers import redis_checks, sqlite_checks
from aqueue.findings import Finding
from tests.checks.test_app import FINE, SLOTS
from tests.kit.rabbitmq import RabbitServer
from tests.kit.servers import RedisServer, free_port
from tests.kit.waiting import until
from tests.worker.conftest import running

#: The version that a test runs against is no matter of the test.
ANY_VERSION = ("AQ106", "AQ125")


def app_on(broker: str, backend: str | None = None, **settings: Any) -> AQueue:
    defaults: dict[str, Any] = {"timeout": 60.0, "ignored_checks": ANY_VERSION}
    app = AQueue("shop", broker=broker, backend=backend, settings=Settings(**{**defaults, **settings}))

    @app.task(name="shop.add")
    async def add(x: int) -> int:
        return x

    return app


async def examined(app: AQueue, queues: Sequence[str] = ()) -> list[Finding]:
    return await everything(app, queues or app.queues(), SLOTS, FINE)


async def rules(app: AQueue, queues: Sequence[str] = ()) -> list[str]:
    return [finding.rule for finding in await examined(app, queues)]


@pytest.fixture
def memory(tmp_path: Path) -> str:
    """A result store without faults."""
    return f"sqlite:///{tmp_path / 'results.db'}"


# --- Redis ---------------------------------------------------------------------------------------------------


async def test_a_redis_that_is_fit(redis_url: str) -> None:
    assert await rules(app_on(redis_url)) == []


async def test_a_redis_that_is_not_fit(own_redis: RedisServer, memory: str) -> None:
    app = app_on(own_redis.url, memory)
    with own_redis.client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        (found,) = await examined(app)
        assert (found.rule, found.severity) == ("AQ101", "refuse")
        assert "(allkeys-lru)" in found.what
        assert await rules(app_on(f"sqlite:///{own_redis.folder}/q.db", own_redis.url)) == ["AQ109"]
        client.config_set("maxmemory-policy", "noeviction")

        client.config_set("appendonly", "no")
        (found,) = await examined(app)
        assert (found.rule, found.severity) == ("AQ102", "warn")
        assert "a crash loses the queues" in found.what
        client.config_set("save", "3600 1")
        assert "since its last snapshot" in (await examined(app))[0].what
        client.config_set("appendonly", "yes")

        client.config_set("maxmemory", client.info()["used_memory"] + 100_000)
        assert await rules(app) == ["AQ110"]
        client.config_set("maxmemory", 0)

        client.sadd("_kombu.binding.celery.pidbox", "x")
        assert await rules(app) == ["AQ108"]
        assert await rules(app_on(own_redis.url, memory, default_priority=9)) == []
    own_redis.kill()  # it would save first


async def test_a_replica_is_refused(own_redis: RedisServer, redis_server: RedisServer, memory: str) -> None:
    with own_redis.client() as client:
        client.replicaof("127.0.0.1", redis_server.port)
        assert await rules(app_on(own_redis.url, memory)) == ["AQ103"]
        assert await rules(app_on(f"sqlite:///{own_redis.folder}/q.db", own_redis.url)) == ["AQ103"]


@pytest.mark.parametrize(
    ("rights", "wanted"),
    [
        (["+@all", "-@scripting", "allkeys"], ["AQ104"]),
        (["+@all", "~celery*"], ["AQ104"]),
        (["+@all", "-info", "allkeys"], ["AQ003"]),
        (["+@all", "-config", "allkeys"], []),
    ],
)
async def test_a_user_without_the_rights(
    own_redis: RedisServer, memory: str, rights: list[str], wanted: list[str]
) -> None:
    with own_redis.client() as client:
        client.execute_command("ACL", "SETUSER", "limited", "on", ">secret", "allchannels", *rights)
    app = app_on(f"redis://limited:secret@127.0.0.1:{own_redis.port}/0", memory)
    found = await examined(app)
    assert [finding.rule for finding in found] == wanted
    assert all("ACL SETUSER limited" in finding.step and "secret" not in str(finding) for finding in found)


async def test_clocks_that_differ(redis_url: str, memory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's clock is an hour slow."""
    slow = SimpleNamespace(time=lambda: time.time() - 3600)
    monkeypatch.setattr(redis_checks, "time", slow)
    (found,) = await examined(app_on(redis_url, memory))
    assert found.rule == "AQ107"
    assert "3600 s ahead of this machine's" in found.what


@pytest.mark.parametrize(
    ("known", "wanted"),
    [
        ({"redis_version": "6.0.16"}, ["AQ105"]),
        ({"redis_version": "6.2.19"}, ["AQ106"]),
        ({"redis_version": "6.2.20"}, []),
        ({"redis_version": "7.0.15"}, ["AQ106"]),
        ({"redis_version": "8.2.1"}, ["AQ106"]),
        ({"redis_version": "8.2.2"}, []),
        ({"redis_version": "8.4.0"}, []),
        ({"redis_version": "9.0.0"}, []),
        ({"redis_version": "7.2.4", "server_name": "valkey", "valkey_version": "8.0.5"}, ["AQ106"]),
        ({"redis_version": "7.2.4", "server_name": "valkey", "valkey_version": "8.1.4"}, []),
        ({"redis_version": "of a cloud"}, []),
        ({}, []),
    ],
)
def test_versions_with_known_holes(known: dict[str, str], wanted: list[str]) -> None:
    assert [finding.rule for finding in redis_checks.version("redis://host", known)] == wanted


async def test_what_nobody_moves_on_redis(redis_server: RedisServer, redis_url: str, memory: str) -> None:
    now = time.time()
    with redis_server.client() as client:
        client.zadd("aqueue:leases", {"1:celery": (now - 3600) * 1000, "2:celery": (now - 61) * 1000})
        client.zadd("aqueue:parked", {"3:celery": (now - 61) * 1000, "4:celery": (now + 60) * 1000})
        client.zadd("unacked_index", {"tag": now - 7200, "tag2": now})
    found = await examined(app_on(redis_url, memory))
    assert [(finding.rule, finding.what.split()[0]) for finding in found] == [
        ("AQ605", "1"),
        ("AQ606", "1"),
        ("AQ607", "1"),
    ]


# --- RabbitMQ ------------------------------------------------------------------------------------------------


@pytest.fixture
def channel(rabbit_server: RabbitServer) -> Iterator[amqp.Channel]:
    with amqp.Connection(f"127.0.0.1:{rabbit_server.port}") as connection:
        yield connection.channel()


async def test_a_rabbitmq_that_is_fit_and_a_queue_that_is_not_there(
    rabbit_url: str, memory: str, queue: str, channel: amqp.Channel
) -> None:
    app = app_on(rabbit_url, memory, default_queue=queue, queues={queue: Queue(max_priority=5)})
    assert await rules(app) == []
    with pytest.raises(amqp.NotFound):
        channel.queue_declare(queue, passive=True)


async def test_a_queue_with_other_arguments(rabbit_url: str, memory: str, queue: str, channel: amqp.Channel) -> None:
    channel.queue_declare(queue, durable=True, auto_delete=False, arguments={"x-max-priority": 3})
    (found,) = await examined(app_on(rabbit_url, memory, default_queue=queue))
    assert (found.rule, found.severity) == ("AQ121", "warn")
    assert f"queue {queue} is there" in found.what
    assert "x-max-priority" in found.what
    assert await rules(app_on(rabbit_url, memory, default_queue=queue, queues={queue: Queue(max_priority=3)})) == []


@pytest.mark.parametrize(
    ("wanted", "settings", "arguments"),
    [
        ("AQ122", {}, {"x-queue-type": "quorum", "x-delivery-limit": 10}),
        ("AQ123", {}, {"x-consumer-timeout": 30_000}),
        ("AQ124", {"timeout": 1801.0}, {}),
    ],
)
async def test_what_settings_ask_of_rabbitmq(
    rabbit_url: str, memory: str, queue: str, wanted: str, settings: dict[str, Any], arguments: dict[str, Any]
) -> None:
    queues = {queue: Queue(arguments=arguments)}
    app = app_on(rabbit_url, memory, default_queue=queue, queues=queues, **settings)
    assert await rules(app) == [wanted]


def test_old_and_new_versions_of_rabbitmq() -> None:
    def told(version: str, product: str = "RabbitMQ") -> list[str]:
        server = {"product": product, "version": version}
        return [one.rule for one in amqp_checks.too_old("amqp://host", server, amqp_checks.version_of(server))]

    assert [told("3.9.29"), told("3.10.8"), told("4.1.0-rc.1"), told("odd"), told("1.0", "other")] == [
        ["AQ125"], [], [], [], [],
    ]  # fmt: skip
    quorum = Queue(arguments={"x-queue-type": "quorum"})
    assert [finding.rule for finding in amqp_checks.given_up("q", quorum, (4, 0, 1))] == ["AQ122"]
    assert [*amqp_checks.given_up("q", quorum, (3, 13))] == []


# --- SQLite --------------------------------------------------------------------------------------------------

MOUNTS = """\
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
35 21 0:31 / /srv/shared rw,relatime shared:2 - nfs4 server:/export rw
36 35 0:32 / /srv/shared/local\\040disk rw - xfs /dev/sdb rw
37 21 0:33 / /mnt/ssh rw master:3 propagate_from:1 - fuse.sshfs user@host:/ rw
"""


def test_a_file_on_a_network_file_system() -> None:
    def found(path: str) -> list[str]:
        return [finding.rule for finding in sqlite_checks.network(Path(path), MOUNTS)]

    assert found("/var/lib/shop.db") == []
    assert found("/srv/shared/shop.db") == ["AQ141"]
    assert found("/srv/shared/local disk/shop.db") == []
    assert found("/mnt/ssh/x/shop.db") == ["AQ141"]
    assert found("/srv/sharedness/shop.db") == []


def test_a_disk_that_is_nearly_full() -> None:
    def found(free: int, size: int) -> list[str]:
        return [finding.rule for finding in sqlite_checks.space(Path("/x.db"), free, size)]

    giga = 1024**3
    assert [found(giga, 10 * giga), found(giga // 20, 100 * giga), found(giga // 20, giga)] == [[], ["AQ142"], []]


async def test_what_nobody_moves_in_a_file(tmp_path: Path) -> None:
    app = app_on(f"sqlite:///{tmp_path / 'q.db'}")
    async with app:
        for _ in range(3):
            await app.send_task("shop.add", (1,))
        await app.send_task("shop.add", (1,), countdown=3600)
        broker: Any = app.producer().broker
        await broker.fetch(["celery"], 2, 1)
        assert await rules(app) == []
        later = "UPDATE messages SET lease_ends = lease_ends - 200, due = due - 4000"
        await broker._file.run(lambda connection: connection.execute(later))
        found = await examined(app)
    assert [(finding.rule, finding.what.split()[0]) for finding in found] == [("AQ605", "2"), ("AQ606", "1")]


# --- what lies in the queues ---------------------------------------------------------------------------------


async def test_names_that_nobody_serves_and_what_nobody_can_read(
    redis_server: RedisServer, redis_url: str, memory: str
) -> None:
    app = app_on(redis_url, memory)
    async with app:
        await app.send_task("shop.add", (1,))
        await app.send_task("shop.gone", (1,))
        await app.send_task("shop.gone", (1,))
        await app.send_task("other.work", queue="others")
        with redis_server.client() as client:
            client.lpush("celery", b"junk")
        found = await examined(app)
    assert [(finding.rule, finding.what.split(":")[-1].strip()) for finding in found] == [
        ("AQ601", "shop.gone (2)"),
        ("AQ603", "1 of the next 4 messages in queue celery are none that can be read"),
        ("AQ604", "1 messages wait in queue others, which this app does not name"),
    ]


@pytest.mark.parametrize("server", ["redis", "rabbit"])
async def test_dead_letters_are_counted(server: str, request: pytest.FixtureRequest, memory: str, queue: str) -> None:
    app = app_on(request.getfixturevalue(f"{server}_url"), memory, default_queue=queue)

    @app.task(name="shop.refuse")
    async def refuse() -> None:
        raise Reject("not today")

    async with app, running(app):
        await (await refuse.send()).fetch()
        with pytest.raises(Exception, match="not today"):
            await (await refuse.send()).get(10)
        dead = await until(lambda: examined(app), "the letter is there: its result came first")
    assert [finding.rule for finding in dead] == ["AQ602"]
    assert f"queue {queue} has" in dead[0].what


# --- servers that are away -----------------------------------------------------------------------------------


async def test_what_can_not_be_reached_is_told_and_the_rest_is_checked(memory: str) -> None:
    away = f"redis://:hidden@127.0.0.1:{free_port()}/0"
    app = app_on(away, memory, send_timeout=0.5, lease=1.0)
    assert await rules(app) == ["AQ001", "AQ304"]
    for store in (away, f"db+postgresql://user:hidden@127.0.0.1:{free_port()}/x"):
        (found,) = await examined(app_on(memory, store, send_timeout=0.5))
        assert found.rule == "AQ002"
        assert "hidden" not in str(found)
