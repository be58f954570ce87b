"""What a worker does with findings at its start, and ``aqueue doctor``."""

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aqueue import AQueue, ConfigurationError, Settings
from aqueue.findings import RULES
from aqueue.worker import Worker
from tests.kit.servers import RedisServer, free_port
from tests.kit.workers import AQUEUE, WorkerProcess

SHOP = """
import os
import time

from aqueue import AQueue, Settings

app = AQueue(
    "shop",
    broker=os.environ.get("BROKER", "sqlite:///shop.db"),
    backend="sqlite:///results.db",
    settings=Settings(
        lease=float(os.environ.get("LEASE", 30)),
        serializer=os.environ.get("SERIALIZER", "json"),
        ignored_checks=("AQ106", "AQ503"),
        send_timeout=1.0,
    ),
)


@app.task
async def add(x: int) -> int:
    return x


if os.environ.get("SLEEPS"):

    @app.task
    async def nap() -> None:
        time.sleep(1)
"""

Doctor = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "shop.py").write_text(SHOP)
    return tmp_path


@pytest.fixture
def doctor(shop: Path) -> Doctor:
    def run(*words: str, app: str = "shop:app", **env: str) -> "subprocess.CompletedProcess[str]":
        command = [AQUEUE, "doctor", app, *words]
        return subprocess.run(
            command, cwd=shop, env={**os.environ, **env}, capture_output=True, text=True, timeout=30, check=False
        )

    return run


def test_nothing_is_found(doctor: Doctor) -> None:
    done = doctor("--strict")
    assert (done.returncode, done.stdout) == (0, f"{len(RULES)} rules, 0 findings\n")
    assert (doctor("--json").stdout, done.stderr) == ("[]\n", "")


def test_warnings_are_an_answer_only_when_they_are_asked_for(doctor: Doctor) -> None:
    done = doctor(SLEEPS="yes")
    assert done.returncode == 0
    assert "warn    AQ407  coroutine task shop.nap calls time.sleep (" in done.stdout
    assert "next: await asyncio.sleep(...)" in done.stdout
    assert doctor("--strict", SLEEPS="yes").returncode == 1


def test_refusals_as_json(doctor: Doctor) -> None:
    done = doctor("--json", SERIALIZER="msgpack", LEASE="1")
    assert done.returncode == 2
    found = json.loads(done.stdout)
    assert [(one["severity"], one["rule"]) for one in found] == [("refuse", "AQ301"), ("warn", "AQ304")]
    assert found[0]["next"] == "add 'msgpack' to Settings.accept_content"


def test_a_worker_of_some_queues(doctor: Doctor) -> None:
    done = doctor("-Q", "pictures,mail", "--strict")
    assert done.returncode == 0
    assert "AQ309  queue celery, to which task shop.add goes" in done.stdout


def test_a_broker_that_is_away(doctor: Doctor) -> None:
    done = doctor(BROKER=f"redis://:hidden@127.0.0.1:{free_port()}/0", SLEEPS="yes")
    assert done.returncode == 3
    assert "AQ001" in done.stdout
    assert "AQ407" in done.stdout
    assert "hidden" not in done.stdout + done.stderr


def test_an_app_that_can_not_be_loaded(doctor: Doctor) -> None:
    done = doctor(app="shop:nothing")
    assert done.returncode == 2
    assert "is no AQueue" in done.stderr


@pytest.fixture
def spawn(shop: Path) -> Iterator[Callable[..., WorkerProcess]]:
    spawned: list[WorkerProcess] = []

    def start(*words: str, **env: str) -> WorkerProcess:
        spawned.append(WorkerProcess(shop, "shop:app", *words, env=env))
        return spawned[-1]

    yield start
    for worker in spawned:
        worker.process.stop()


def test_a_worker_refuses_to_lose_messages(own_redis: RedisServer, spawn: Callable[..., WorkerProcess]) -> None:
    with own_redis.client() as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
    refusing = spawn(BROKER=own_redis.url)
    assert refusing.wait() == 2
    assert "error: AQ101: " in refusing.log
    assert "--force" in refusing.log
    assert "Traceback" not in refusing.log
    forced = spawn("--force", BROKER=own_redis.url).ready()
    assert "ERROR   AQ101: " in forced.log
    with own_redis.client() as client:
        client.config_set("maxmemory-policy", "noeviction")
    assert "AQ101" not in spawn(BROKER=own_redis.url).ready().log


def test_a_worker_starts_with_a_line_for_each_warning(spawn: Callable[..., WorkerProcess]) -> None:
    worker = spawn(LEASE="4").ready()
    assert worker.log.count("AQ") == 1
    assert "WARNING AQ304: a lease lasts 4 s" in worker.log


async def test_a_broker_that_is_away_is_waited_for(
    own_redis: RedisServer, spawn: Callable[..., WorkerProcess], shop: Path
) -> None:
    own_redis.kill()
    worker = spawn(BROKER=own_redis.url).ready()
    assert "is away and was not checked" in worker.log
    own_redis.start()
    async with AQueue("client", broker=own_redis.url, backend=f"sqlite:///{shop / 'results.db'}") as app:
        assert await (await app.send_task("shop.add", (1,))).get(20) == 1


async def test_a_worker_inside_of_a_program_raises_what_is_refused() -> None:
    app = AQueue("shop", broker="memory://", settings=Settings(serializer="msgpack"))
    with pytest.raises(ConfigurationError, match="AQ301"):
        await Worker(app).run()
    app = AQueue("shop", broker="memory://", settings=Settings(serializer="msgpack", ignored_checks=("AQ301",)))
    for worker in (Worker(app), Worker(AQueue("x", broker="memory://"), force=True)):
        worker.stop()
        await worker.run()
