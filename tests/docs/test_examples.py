"""Every example runs, as its own text says."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from tests.kit.servers import Process, free_port, wait_for
from tests.kit.workers import AQUEUE, WorkerProcess

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder of files for the demo to read."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for number in range(60):
        (folder / f"code{number}.py").write_text(f"def f{number}():\n    return {number}\n" * 50)
        (folder / f"text{number}.md").write_text("some words\n" * number)
    return folder


def demo(folder: Path, sources: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / "demo" / "demo.py"), str(sources)],
        cwd=folder,
        env={**os.environ, "COLUMNS": "200"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that Ctrl-C can be sent to all of it, as a terminal does
    )


def test_the_demo_reads_everything_and_shows_what_failed(tmp_path: Path, sources: Path) -> None:
    for _ in range(2):  # it works twice in a row
        printed, _ = demo(tmp_path, sources).communicate(timeout=60)
        assert "120 files read, 1 failed" in printed
        assert "FileNotFoundError" in printed
        assert "Traceback" in printed
        assert re.search(r"\.py\s*│\s*60 │\s*6,000", printed)


@pytest.mark.parametrize("after", [0.6, 1.0, 1.4])
def test_the_demo_stops_at_ctrl_c_and_picks_up_what_was_left(tmp_path: Path, sources: Path, after: float) -> None:
    first = demo(tmp_path, sources)
    time.sleep(after)
    os.killpg(first.pid, signal.SIGINT)
    printed, _ = first.communicate(timeout=30)
    assert "KeyboardInterrupt" not in printed
    assert "stopped; run it again" in printed or "120 files read" in printed
    again, _ = demo(tmp_path, sources).communicate(timeout=60)
    assert "120 files read, 1 failed" in again


def test_the_script(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "script.py")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines() == [f"PAGE {n}" for n in range(5)]


def test_celerys_tutorial_file_with_the_import_exchanged(tmp_path: Path, redis_url: str) -> None:
    text = (EXAMPLES / "celery_tutorial" / "tasks.py").read_text().replace("redis://localhost", redis_url)
    (tmp_path / "tasks.py").write_text(text)
    worker = WorkerProcess(tmp_path, "tasks:app").ready()
    done = subprocess.run(
        [AQUEUE, "-A", "tasks", "send", "tasks.add", "4", "4", "--wait"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.strip() == "8"
    worker.terminate()
    assert worker.wait() == 0


@pytest.fixture
def web(request: pytest.FixtureRequest, tmp_path: Path, redis_url: str) -> Iterator[str]:
    """A web server with one of the examples, and its worker; gives the server's address."""
    module: str = request.param
    port = free_port()
    commands = {
        "fastapi_app": ["-m", "uvicorn", "examples.fastapi_app:web", "--port", str(port)],
        "aiohttp_app": ["-m", "aiohttp.web", "-H", "127.0.0.1", "-P", str(port), "examples.aiohttp_app:make_app"],
    }
    env = {**os.environ, "BROKER": redis_url, "PYTHONPATH": str(ROOT)}
    log = (tmp_path / "web.log").open("wb")
    server = Process([sys.executable, *commands[module]], cwd=tmp_path, env=env, stdout=log, stderr=log)
    log.close()
    worker = WorkerProcess(tmp_path, f"examples.{module}:tasks", env=env).ready()
    wait_for(lambda: answers(port), "the web server answers", 20)
    yield f"http://127.0.0.1:{port}"
    worker.process.stop()
    assert server.stop() in (0, -signal.SIGTERM)
    assert "Traceback" not in (tmp_path / "web.log").read_text()


def answers(port: int) -> bool:
    try:
        fetch(f"http://127.0.0.1:{port}/nothing")
    except OSError:
        return False
    return True


def fetch(url: str, data: bytes | None = None) -> tuple[int, dict[str, object]]:
    try:
        with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=10) as answer:
            return answer.status, json.loads(answer.read())
    except HTTPError as error:
        return error.code, {}


@pytest.mark.parametrize("web", ["fastapi_app"], indirect=True)
def test_the_fastapi_app(web: str) -> None:
    status, sent = fetch(f"{web}/reports", b'{"customer": "c1", "items": [1, 2, 3]}')
    assert status == 202

    def finished() -> dict[str, object] | None:
        status, answer = fetch(f"{web}{sent['url']}")
        assert status == 200
        return answer if answer["state"] == "SUCCESS" else None

    assert wait_for(finished, "the report is there")["report"] == {"c1": 6}
    assert fetch(f"{web}/reports/nobody")[0] == 404
    assert fetch(f"{web}/reports", b'{"customer": "c1", "items": ["x"]}')[0] == 422


@pytest.mark.parametrize("web", ["aiohttp_app"], indirect=True)
def test_the_aiohttp_app(web: str) -> None:
    status, sent = fetch(f"{web}/digests", b"hello")
    assert status == 202
    status, answer = fetch(f"{web}/digests/{sent['id']}?wait=10")
    assert (status, str(answer["digest"])[:8]) == (200, "2cf24dba")
    assert fetch(f"{web}/digests/nobody")[0] == 404
