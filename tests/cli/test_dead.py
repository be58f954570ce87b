"""``aqueue dead``: finding, showing, replaying, deleting, exporting and importing what has died."""

import asyncio
import base64
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from aqueue import AQueue
from aqueue.broker import Bury
from aqueue.cli.letters import duration
from aqueue.errors import ConfigurationError
from aqueue.protocol import Message
from tests.cli.test_commands import Run, run
from tests.kit.servers import RedisServer

__all__ = ["run"]  # the fixture

BODY = b"[[1, 2], {}, {}]"


def bury(url: str, *deaths: tuple[str, str, str], body: bytes = BODY) -> list[str]:
    """Have messages die: queue, task and reason of each. Their task ids are 0, 1, 2... Returns the letters' ids."""

    async def work() -> list[str]:
        async with AQueue("undertaker", broker=url) as app:
            broker = app.producer().broker
            broker.holder = "undertaker@here"
            for number, (queue, task, reason) in enumerate(deaths):
                headers = {"task": task, "id": f"{number}"}
                await broker.publish([Message(queue=queue, headers=headers, body=body)])
                (delivery,) = await broker.fetch([queue], 1, 5)
                await broker.settle([(delivery, Bury(reason, f"it was {reason}"))])
            return [letter.id for letter in reversed(await broker.inspection.dead())]

    return asyncio.run(work())


def waiting(url: str, queue: str) -> list[Message]:
    async def work() -> list[Message]:
        async with AQueue("looker", broker=url) as app:
            found = await app.producer().broker.inspection.peek(queue, 1000)
            return [one for one in found if isinstance(one, Message)]

    return asyncio.run(work())


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'shop.db'}"


MIXED: Sequence[tuple[str, str, str]] = (
    ("celery", "shop.add", "rejected"),
    ("celery", "shop.mail.send", "rejected"),
    ("pictures", "shop.mail.show", "delivery_limit"),
    ("pictures", "other.add", "unknown_task"),
)


def listed(run: Run, *words: str) -> list[str]:
    """Task ids, the oldest letter first."""
    done = run("dead", "list", "shop:app", "--json", *words)
    assert done.returncode == 0, done.stderr
    return [row["task_id"] for row in reversed(json.loads(done.stdout))]


def test_letters_are_chosen_by_what_they_are(run: Run, url: str) -> None:
    ids = bury(url, *MIXED)
    assert listed(run) == ["0", "1", "2", "3"]
    assert listed(run, "--queue", "pictures") == ["2", "3"]
    assert listed(run, "--reason", "rejected") == ["0", "1"]
    assert listed(run, "--task", "shop.mail.*") == ["1", "2"]
    assert listed(run, "--task", "*.add", "--queue", "celery") == ["0"]
    assert listed(run, "--id", ids[3], "--id", "0") == ["0", "3"]
    assert listed(run, "--newer-than", "1h") == ["0", "1", "2", "3"]
    assert listed(run, "--older-than", "1h") == []
    assert listed(run, "--limit", "1", "--task", "shop.*") == ["2"]


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("1.5s", 1.5), ("5m", 300), ("1h", 3600), ("2d", 172800), ("1w", 604800)]
)
def test_lengths_of_time(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-1h", "1y", "one hour", "1h30m", "nan"])
def test_what_is_no_length_of_time(text: str) -> None:
    with pytest.raises(ConfigurationError, match="no length of time"):
        duration(text)


def test_a_wrong_length_of_time_is_said(run: Run, url: str) -> None:
    done = run("dead", "list", "shop:app", "--older-than", "long")
    assert done.returncode == 2
    assert "30s, 5m, 1h" in done.stderr


def test_replay_by_what_they_are(run: Run, url: str) -> None:
    bury(url, *MIXED)
    foretold = run("dead", "retry", "shop:app", "--task", "shop.mail.*", "--dry-run")
    assert foretold.stdout.splitlines() == [
        "would put back 2",
        "1\tcelery\trejected\tshop.mail.send",
        "1\tpictures\tdelivery_limit\tshop.mail.show",
    ]
    assert listed(run) == ["0", "1", "2", "3"]
    assert run("dead", "retry", "shop:app", "--task", "shop.mail.*").stdout.strip() == "put back 2 of 2"
    assert listed(run) == ["0", "3"]
    assert [one.headers["id"] for one in waiting(url, "celery")] == ["1"]
    assert json.loads(run("dead", "retry", "shop:app", "--all", "--json").stdout) == {"retried": 2}
    assert [one.headers["id"] for one in waiting(url, "pictures")] == ["2", "3"]
    assert run("dead", "retry", "shop:app", "--reason", "rejected").stdout.strip() == "put back 0 of 0"


def test_nothing_said_is_not_everything_meant(run: Run, url: str) -> None:
    bury(url, *MIXED)
    for command in ("retry", "drop"):
        done = run("dead", command, "shop:app")
        assert done.returncode == 2
        assert "--all" in done.stderr
    assert listed(run) == ["0", "1", "2", "3"]


def test_replay_at_a_rate(run: Run, url: str) -> None:
    bury(url, *(("celery", "shop.add", "rejected") for _ in range(5)))
    start = time.monotonic()
    assert run("dead", "retry", "shop:app", "--all", "--rate", "4").stdout.strip() == "put back 5 of 5"
    assert time.monotonic() - start > 1.0  # the fifth waits for the next second
    assert [one.headers["id"] for one in waiting(url, "celery")] == ["0", "1", "2", "3", "4"]


def test_deleting_asks_and_foretells(run: Run, url: str) -> None:
    bury(url, *MIXED)
    asked = run("dead", "drop", "shop:app", "--queue", "celery")
    assert asked.returncode == 2
    assert "--yes" in asked.stderr
    foretold = json.loads(run("dead", "drop", "shop:app", "--queue", "celery", "--dry-run", "--json").stdout)
    assert [row["count"] for row in foretold] == [1, 1]
    assert listed(run) == ["0", "1", "2", "3"]
    assert run("dead", "drop", "shop:app", "--queue", "celery", "--yes").stdout.strip() == "deleted 2 of 2"
    assert listed(run) == ["2", "3"]


def shown(run: Run, id: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("dead", "show", "shop:app", id, "--json").stdout)
    return found


def test_what_died_again_tells_its_earlier_deaths(run: Run, url: str) -> None:
    (first,) = bury(url, ("celery", "shop.add", "rejected"))
    assert "earlier_deaths" not in shown(run, first)
    run("dead", "retry", "shop:app", first)

    async def die_again() -> str:
        async with AQueue("undertaker", broker=url) as app:
            broker = app.producer().broker
            (delivery,) = await broker.fetch(["celery"], 1, 5)
            await broker.settle([(delivery, Bury("delivery_limit", "again"))])
            return (await broker.inspection.dead())[0].id

    second = asyncio.run(die_again())
    found = shown(run, second)
    (death,) = found["earlier_deaths"]
    assert (death["id"], death["reason"], death["worker"]) == (first, "rejected", "undertaker@here")
    assert found["first"] == death["died"] < death["replayed"] < found["died"]
    text = run("dead", "show", "shop:app", second).stdout
    assert "earlier_deaths:" in text
    assert "it was rejected" in text


def test_a_letter_tells_who_lost_it(run: Run, tmp_path: Path, url: str) -> None:
    async def lose_and_bury() -> str:
        async with AQueue("undertaker", broker=url) as app:
            broker = app.producer().broker
            broker.holder = "poor@here"
            broker.lease = 0.1
            await broker.publish([Message(queue="celery", headers={"task": "shop.add", "id": "0"}, body=BODY)])
            (lost,) = await broker.fetch(["celery"], 1, 5)
            await broker.losses.explain([lost.receipt], "signal 9 (SIGKILL)")
            (again,) = await broker.fetch(["celery"], 1, 60)
            await broker.settle([(again, Bury("delivery_limit", "enough"))])
            return (await broker.inspection.dead())[0].id

    found = shown(run, asyncio.run(lose_and_bury()))
    (loss,) = found["losses"]
    assert (loss["worker"], loss["cause"]) == ("poor@here", "signal 9 (SIGKILL)")
    assert found["first"] == loss["claimed"] < loss["lost"] < found["died"]
    assert found["deliveries"] == 2


def test_an_export_holds_everything_and_can_be_imported_elsewhere(
    run: Run, url: str, tmp_path: Path, redis_server: RedisServer, redis_url: str
) -> None:
    bury(url, *MIXED, body=b"\x00\xff bytes")
    done = run("dead", "export", "shop:app", "--output", "dead.jsonl", "--queue", "pictures")
    assert done.stdout.strip() == "wrote 2 to dead.jsonl"
    lines = [json.loads(line) for line in (tmp_path / "dead.jsonl").read_text().splitlines()]
    assert [line["headers"]["id"] for line in lines] == ["2", "3"]
    assert base64.b64decode(lines[0]["body"]) == b"\x00\xff bytes"
    assert lines[0]["letter"]["reason"] == "delivery_limit"
    assert lines[0]["letter"]["worker"] == "undertaker@here"
    printed = run("dead", "export", "shop:app", "--task", "shop.mail.show").stdout
    assert json.loads(printed) == lines[0]
    again = run("dead", "export", "shop:app", "-o", "dead.jsonl")
    assert again.returncode == 2
    assert "not there yet" in again.stderr
    assert listed(run) == ["0", "1", "2", "3"]  # they stay

    sent = run("dead", "import", "dead.jsonl", "--broker", redis_url)
    assert sent.stdout.strip() == "sent 2, left out 0 that nobody can read"
    found = waiting(redis_url, "pictures")
    assert [(one.headers["id"], one.body) for one in found] == [("2", b"\x00\xff bytes"), ("3", b"\x00\xff bytes")]


def test_what_nobody_can_read_is_exported_and_not_imported(
    run: Run, tmp_path: Path, redis_server: RedisServer, redis_url: str
) -> None:
    redis_server.client().lpush("celery", b"\x00\xff garbage")

    async def die() -> None:
        async with AQueue("undertaker", broker=redis_url) as app:
            broker = app.producer().broker
            (delivery,) = await broker.fetch(["celery"], 1, 5)
            await broker.settle([(delivery, Bury("undecodable", "it is garbage"))])

    asyncio.run(die())
    line = run("dead", "export", "--broker", redis_url).stdout
    assert base64.b64decode(json.loads(line)["raw"]) == b"\x00\xff garbage"
    (tmp_path / "dead.jsonl").write_text(line)
    done = run("dead", "import", "dead.jsonl", "--broker", redis_url)
    assert done.returncode == 1
    assert done.stdout.strip() == "sent 0, left out 1 that nobody can read"


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"format": 2, "queue": "q", "letter": {}}', '{"queue": 1}'])
def test_what_is_no_export_is_refused(run: Run, tmp_path: Path, line: str) -> None:
    (tmp_path / "wrong.jsonl").write_text(line + "\n")
    done = run("dead", "import", "shop:app", "wrong.jsonl")
    assert done.returncode == 2
    assert "line 1: " in done.stderr
    assert run("dead", "import", "shop:app", "missing.jsonl").returncode == 2
