"""Celery's ``auth`` serializer, both ways. To Celery it is a global setting, so its client is another process."""

import base64
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from aqueue import TaskFailed
from aqueue.broker import DeadLetter
from tests.interop.conftest import SOON, TO_AQUEUE, TO_CELERY, Connect
from tests.interop.workers import (
    PATIENCE,
    QUICK,
    ROOT,
    Site,
    WorkerProcess,
    aqueue_worker,
    celery_worker,
    environment,
    process_environment,
)
from tests.kit.servers import RedisServer
from tests.kit.waiting import until

KEYS: Final = Path(__file__).parents[1] / "wire" / "auth"
CELERY: Final[dict[str, Any]] = {
    "security_key": str(KEYS / "worker.key"),
    "security_certificate": str(KEYS / "worker.pem"),
    "security_cert_store": str(KEYS / "*.pem"),
    "task_serializer": "auth",
    "event_serializer": "auth",
    "accept_content": ["auth"],
    "result_accept_content": ["json"],
}
#: Results are not signed; what is accepted of them is said, as it is for Celery.
AQUEUE: Final[dict[str, Any]] = {
    "auth": str(KEYS),
    "serializer": "auth",
    "accept_content": ("auth",),
    "result_accept_content": ("json",),
}


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Site, WorkerProcess]]:
    """Two workers that accept nothing unsigned; where they are, and ours."""
    folder = tmp_path_factory.mktemp("signed")
    server = RedisServer(folder / "redis")
    site = Site(server, results_db=1)
    try:
        with (
            aqueue_worker(folder, site.broker, site.results, queues=TO_AQUEUE, settings=AQUEUE) as ours,
            celery_worker(folder, site.broker, site.results, "-P", "solo", *QUICK, queues=TO_CELERY, settings=CELERY),
        ):
            yield site, ours
    finally:
        site.traces.close()
        server.stop()


def ask(site: Site, task: str, *arguments: Any) -> dict[str, Any]:
    """Have a Celery client that signs send a task to our worker."""
    words = [json.dumps(argument) for argument in arguments]
    asked = subprocess.run(
        [sys.executable, "-m", "tests.interop.ask", task, TO_AQUEUE, *words],
        cwd=ROOT,
        env=process_environment(environment(site.broker, site.results, "client", CELERY)),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )
    answer: dict[str, Any] = json.loads(asked.stdout)
    return answer


async def dead_letters(site: Site, connect: Connect) -> dict[str, DeadLetter]:
    """By task id."""
    app = await connect(site)
    letters = await app.producer().broker.inspection.dead()
    return {getattr(letter.message, "headers", {}).get("id", ""): letter for letter in letters}


def test_an_aqueue_worker_runs_what_a_celery_client_has_signed(signed: tuple[Site, WorkerProcess]) -> None:
    assert ask(signed[0], "interop.echo", 1, "zwölf", {"three": [4]}) == {"value": [[1, "zwölf", {"three": [4]}], {}]}


def test_a_signing_celery_client_sees_failures_of_an_aqueue_worker(signed: tuple[Site, WorkerProcess]) -> None:
    assert ask(signed[0], "interop.decline", "no money", 402) == {"error": "Declined", "args": ["no money", 402]}


def test_an_aqueue_worker_retries_what_a_celery_client_has_signed(signed: tuple[Site, WorkerProcess]) -> None:
    assert ask(signed[0], "interop.retry_self", 2, 0.1) == {"value": [2, "aqueue"]}


async def test_a_celery_worker_runs_what_an_aqueue_client_has_signed(
    signed: tuple[Site, WorkerProcess], connect: Connect
) -> None:
    app = await connect(signed[0], **AQUEUE)
    result = await app.send_task("interop.echo", [1, "zwölf"], {"three": [4]}, queue=TO_CELERY)
    assert await result.get(SOON) == [[1, "zwölf"], {"three": [4]}]


async def test_a_signing_aqueue_client_sees_failures_of_a_celery_worker(
    signed: tuple[Site, WorkerProcess], connect: Connect
) -> None:
    app = await connect(signed[0], **AQUEUE)
    result = await app.send_task("interop.fail", ["boom"], queue=TO_CELERY)
    with pytest.raises(TaskFailed, match="ValueError: boom"):
        await result.get(SOON)


async def test_a_celery_worker_retries_what_an_aqueue_client_has_signed(
    signed: tuple[Site, WorkerProcess], connect: Connect
) -> None:
    app = await connect(signed[0], **AQUEUE)
    result = await app.send_task("interop.retry_self", [2, 0.1], queue=TO_CELERY)
    assert await result.get(SOON) == [2, "celery"]


async def test_signing_needs_no_word_about_results(signed: tuple[Site, WorkerProcess], connect: Connect) -> None:
    """Results are JSON, whatever is accepted of messages."""
    app = await connect(signed[0], auth=str(KEYS), serializer="auth", accept_content=("auth",))
    result = await app.send_task("interop.add", [2, 3], queue=TO_CELERY)
    assert await result.get(SOON) == 5


async def test_an_aqueue_worker_buries_what_is_not_signed_and_lives(
    signed: tuple[Site, WorkerProcess], connect: Connect
) -> None:
    site, ours = signed
    plain = await connect(site)
    result = await plain.send_task("interop.add", [2, 3], queue=TO_AQUEUE)
    with pytest.raises(TaskFailed, match="not in accept_content"):
        await result.get(SOON)
    assert (await dead_letters(site, connect))[result.id].reason == "content_refused"
    app = await connect(site, **AQUEUE)
    assert await (await app.send_task("interop.add", [2, 3], queue=TO_AQUEUE)).get(SOON) == 5
    assert ours.is_alive


async def test_an_aqueue_worker_buries_what_was_changed_after_it_was_signed(
    signed: tuple[Site, WorkerProcess], connect: Connect, key: str
) -> None:
    site, ours = signed
    app = await connect(site, **AQUEUE, default_priority=9)
    result = await app.send_task("interop.add", [2, 3], queue=key)
    with site.broker_keys() as keys:
        envelope = json.loads(keys.rpop(key))
        signed_body = base64.b64decode(base64.b64decode(envelope["body"]))
        forged = base64.b64encode(signed_body.replace(b"[[2,", b"[[9,").replace(b"[[2 ,", b"[[9,"))
        assert forged != base64.b64decode(envelope["body"])
        keys.lpush(TO_AQUEUE, json.dumps({**envelope, "body": base64.b64encode(forged).decode()}))

    async def buried() -> Any:
        return (await dead_letters(site, connect)).get(result.id)

    assert (await until(buried, "the message is buried")).reason == "bad_signature"
    assert ours.is_alive
