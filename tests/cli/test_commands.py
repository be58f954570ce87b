"""Each command as people type it: what it prints, its exit code, the next step in its errors."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kit.servers import RedisServer, free_port
from tests.kit.workers import AQUEUE, WorkerProcess

SHOP = """
import os
from aqueue import AQueue, Reject, Retry, Settings

app = AQueue("shop", broker=os.environ.get("BROKER", "sqlite:///shop.db"), settings=Settings(send_timeout=1.0))

@app.task
async def add(x: int, y: int = 0) -> int:
    return x + y

@app.task(queue="pictures", timeout=5, retry=Retry(attempts=3))
def thumbnail(path: str) -> str:
    return path

@app.task
async def fail(text: str) -> None:
    raise ValueError(text)

@app.task
async def refuse() -> None:
    raise Reject("not today")
"""

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    (tmp_path / "shop.py").write_text(SHOP)

    def run(
        *words: str, env: dict[str, str] | None = None, stdin: str | None = None
    ) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [AQUEUE, *words],
            cwd=tmp_path,
            env={**{key: value for key, value in os.environ.items() if key != "AQUEUE_APP"}, **(env or {})},
            capture_output=True,
            text=True,
            timeout=30,
            input=stdin or "",
            check=False,
        )

    return run


def test_help_lists_the_commands(run: Run) -> None:
    done = run("--help")
    assert done.returncode == 0
    for command in ("worker", "send", "result", "cancel", "queues", "tasks", "purge", "recover", "dead"):
        assert command in done.stdout


def test_version(run: Run) -> None:
    assert run("--version").stdout.strip().count(".") == 2


def test_from_send_to_result(run: Run, tmp_path: Path) -> None:
    sent = run("send", "shop:app", "shop.add", "2", "y=40")
    assert sent.returncode == 0
    task_id = sent.stdout.strip()
    assert run("result", "shop:app", task_id).stdout.strip() == "PENDING"
    assert run("queues", "shop:app").stdout.split() == ["celery", "1", "0", "0", "0"]
    worker = WorkerProcess(tmp_path, "shop:app").ready()
    waited = run("result", "shop:app", task_id, "--wait", "--timeout", "10")
    assert (waited.returncode, waited.stdout.strip()) == (0, "SUCCESS  42")
    told = json.loads(run("result", "shop:app", task_id, "--json").stdout)
    assert (told["id"], told["state"], told["result"]) == (task_id, "SUCCESS", 42)
    assert run("send", "shop:app", "shop.add", "1", "--wait").stdout.strip() == "1"
    failed = run("send", "shop:app", "shop.fail", "no luck", "--wait")
    assert failed.returncode == 1
    assert "ValueError: no luck" in failed.stderr
    worker.terminate()
    assert worker.wait() == 0


def test_what_is_cancelled_does_not_run(run: Run, tmp_path: Path) -> None:
    waiting = run("send", "shop:app", "shop.add", "20", "22").stdout.strip()
    done = run("cancel", "shop:app", waiting, "--reason", "typed in error", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [{"id": waiting, "cancelled": "requested"}]
    worker = WorkerProcess(tmp_path, "shop:app").ready()
    found = run("result", "shop:app", waiting, "--wait", "--timeout", "20")
    assert found.returncode == 1
    assert "typed in error" in found.stdout
    again = run("cancel", "shop:app", waiting, "unheard-of", "--waiting")
    assert again.returncode == 1
    assert again.stdout.splitlines() == [f"{waiting}\tfinished", "unheard-of\trequested"]
    worker.terminate()
    assert worker.wait() == 0


def test_a_failure_is_shown_with_its_traceback(run: Run, tmp_path: Path) -> None:
    task_id = run("send", "shop:app", "shop.fail", "no luck").stdout.strip()
    worker = WorkerProcess(tmp_path, "shop:app").ready()
    shown = run("result", "shop:app", task_id, "--wait")
    assert shown.returncode == 1
    assert "FAILURE  ValueError: no luck" in shown.stdout
    assert "shop.py" in shown.stdout
    told = json.loads(run("result", "shop:app", task_id, "--json").stdout)
    assert told["error"] == {"type": "ValueError", "message": "no luck"}
    worker.terminate()
    worker.wait()


def test_dead_letters_from_list_to_drop(run: Run, tmp_path: Path) -> None:
    for _ in range(3):
        run("send", "shop:app", "shop.refuse")
    worker = WorkerProcess(tmp_path, "shop:app").ready()
    assert run("send", "shop:app", "shop.refuse", "--wait").returncode == 1
    worker.terminate()
    worker.wait()
    letters = json.loads(run("dead", "list", "shop:app", "--json").stdout)
    assert len(letters) == 4
    assert {(letter["queue"], letter["reason"], letter["task"]) for letter in letters} == {
        ("celery", "rejected", "shop.refuse")
    }
    first, second, third, fourth = (letter["id"] for letter in letters)
    shown = json.loads(run("dead", "show", "shop:app", first, "--json").stdout)
    assert shown["headers"]["task"] == "shop.refuse"
    assert shown["detail"] == "not today"
    assert json.loads(shown["body"])[0] == []
    assert "not today" in run("dead", "show", "shop:app", first).stdout
    assert run("dead", "retry", "shop:app", first, second).stdout.strip() == "put back 2 of 2"
    assert run("queues", "shop:app").stdout.split() == ["celery", "2", "0", "0", "2"]
    refused = run("dead", "drop", "shop:app", third)
    assert refused.returncode == 2
    assert "--yes" in refused.stderr
    assert run("dead", "drop", "shop:app", third, "--yes").returncode == 0
    assert run("dead", "drop", "shop:app", third, "--yes").returncode == 1
    assert run("dead", "list", "shop:app", "--reason", "unknown_task").stdout == ""
    assert run("dead", "retry", "shop:app", "--all", "--reason", "rejected").stdout.strip() == "put back 1 of 1"
    assert fourth
    missing = run("dead", "show", "shop:app", "12345")
    assert missing.returncode == 1
    assert "aqueue dead list" in missing.stderr


def test_tasks_lists_kinds_queues_and_limits(run: Run) -> None:
    rows = [line.split("\t") for line in run("tasks", "shop:app").stdout.splitlines()]
    assert ["shop.thumbnail", "thread", "pictures", "3", "5"] in rows
    assert ["shop.add", "coroutine", "celery", "1", "3600.0"] in rows
    (row,) = [row for row in json.loads(run("tasks", "shop:app", "--json").stdout) if row["task"] == "shop.add"]
    assert row == {"task": "shop.add", "runs_as": "coroutine", "queue": "celery", "attempts": 1, "timeout": 3600.0}


def test_purge_asks_first(run: Run) -> None:
    for n in range(3):
        run("send", "shop:app", "shop.add", str(n))
    refused = run("purge", "shop:app", "celery")
    assert refused.returncode == 2
    assert "--yes" in refused.stderr
    assert run("purge", "shop:app", "celery", "--yes").stdout.strip() == "deleted 3 messages from celery"
    assert run("queues", "shop:app").stderr.strip() == "no queue holds anything"


def test_the_app_is_found_as_in_celery(run: Run) -> None:
    for words in (
        ("-A", "shop", "tasks"),
        ("-A", "shop:app", "tasks"),
        ("tasks", "-A", "shop"),
        ("tasks", "shop:app"),
        ("tasks", "shop"),
    ):
        assert "shop.add" in run(*words).stdout
    assert "shop.add" in run("tasks", env={"AQUEUE_APP": "shop:app"}).stdout
    sent = run("-A", "shop", "send", "shop.add", "1")
    assert sent.returncode == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("worker", "shpo:app"), "did you mean shop?"),
        (("worker", "shop:ap"), "did you mean shop:app?"),
        (("worker", "shop.py"), "name the module: shop"),
        (("worker",), "which app?"),
        (("worker", "shop:app", "-l", "loud"), "debug, info"),
        (("worker", "shop:app", "--log-format", "xml"), "human or json"),
        (("worker", "shop:app", "-Q", "two words"), "without spaces"),
        (("worker", "shop:app", "celery"), "unexpected argument 'celery'"),
        (("send", "shop:app", "shop.ad", "1"), "did you mean shop.add?"),
        (("send", "shop:app"), "aqueue tasks"),
        (("send", "shop:app", "shop.add", "one"), "argument 'x'"),
        (("send", "shop:app", "shop.add", "1", "z=2"), "z"),
        (("send", "shop:app", "shop.add", "1", "--priority", "12"), "0 to 9"),
        (("purge", "shop:app"), "aqueue queues"),
        (("dead", "show", "shop:app"), "aqueue dead list"),
        (("queues", "--broker", "rabbit://localhost"), "there are amqp, amqps"),
        (("queues", "--broker", "localhost"), "something like redis://"),
        (("queues", "--broker", "redis://:canary@localhost/x"), "the database is a number"),
    ],
)
def test_mistakes_end_with_2_and_say_what_to_do(run: Run, words: tuple[str, ...], said: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert "canary" not in done.stderr + done.stdout


def test_an_import_error_inside_the_app_shows_where_it_is(run: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import no_such_module_at_all\n")
    done = run("tasks", "broken:app")
    assert done.returncode != 0
    assert "no_such_module_at_all" in done.stderr
    assert "broken.py" in done.stderr


def test_a_server_that_is_down_ends_with_3(run: Run) -> None:
    url = f"redis://user:canary@127.0.0.1:{free_port()}/0"
    done = run("send", "shop:app", "shop.add", "1", env={"BROKER": url})
    assert done.returncode == 3
    assert "redis://user:***@127.0.0.1" in done.stderr
    assert "Connect call failed" in done.stderr
    assert done.stderr.count("no connection") == 1
    assert "next:" in done.stderr
    assert "canary" not in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_result_ends_with_1(run: Run) -> None:
    done = run("result", "shop:app", "nobody")
    assert done.returncode == 1
    assert "no task nobody is known" in done.stderr
    waited = run("result", "shop:app", "nobody", "--wait")
    assert waited.returncode == 1


def test_no_result_in_time_ends_with_4(run: Run) -> None:
    done = run("send", "shop:app", "shop.add", "1", "--wait", "--timeout", "0.2")
    assert done.returncode == 4
    assert "--timeout" in done.stderr


def test_a_broker_is_looked_at_without_an_app(run: Run, redis_server: RedisServer, redis_url: str) -> None:
    run("send", "shop:app", "shop.add", "1", env={"BROKER": redis_url})
    assert run("queues", "--broker", redis_url).stdout.split() == ["celery", "1", "0", "0", "0"]
    told = json.loads(run("recover", "--broker", redis_url, "--json").stdout)
    assert told == {"leased": 0, "parked": 0, "unacked": 0, "left": 0}
    assert redis_server.client().llen("celery\x06\x169") == 1


def test_a_foreign_task_is_sent_when_asked_to(run: Run) -> None:
    assert run("send", "shop:app", "other.task", "1").returncode == 2
    assert run("send", "shop:app", "other.task", "1", "--foreign", "-Q", "other").returncode == 0
    assert run("queues", "shop:app").stdout.split() == ["other", "1", "0", "0", "0"]
