"""The first file of Celery's tutorial, and what else people write on their first day, with one line changed."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.interop.celery_names import Celery
from tests.interop.conftest import close_backend, ended
from tests.interop.workers import PATIENCE, QUICK, Site, WorkerProcess, process_environment

TASKS: Final = """\
from celery import Celery

app = Celery('tasks', broker='{broker}', backend='{results}')

@app.task
def add(x, y):
    return x + y
"""
OURS: Final = "from aqueue import AQueue as Celery"


@pytest.fixture
def folder(tmp_path: Path, site: Site) -> Path:
    """With Celery's ``tasks.py`` in one folder, and ours in another."""
    text = TASKS.format(broker=site.broker, results=site.results)
    for name, changed in (("celery", text), ("aqueue", text.replace("from celery import Celery", OURS))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tasks.py").write_text(changed)
    return tmp_path


@pytest.fixture
def worker(folder: Path) -> Iterator[WorkerProcess]:
    """``aqueue -A tasks worker --loglevel=INFO``, word for word after the program's name."""
    command = ["-m", "aqueue", "-A", "tasks", "worker", "--loglevel=INFO"]
    with WorkerProcess("tutorial", command, folder / "worker.log", " is ready", {}, cwd=folder / "aqueue") as made:
        yield made


def run(folder: Path, program: str) -> str:
    """Run a small program beside ``tasks.py``; what it prints."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env=process_environment({}),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


async def test_the_tutorials_tasks_run_under_our_worker_for_a_celery_client(worker: WorkerProcess, site: Site) -> None:
    client: Any = Celery("tasks", broker=site.broker, backend=site.results, set_as_current=False)
    result = client.send_task("tasks.add", (4, 4))
    assert await ended(result) == 8
    assert result.ready()
    close_backend(client)
    assert "tasks.add" in worker.log


def test_the_tutorials_own_client_calls_our_worker(worker: WorkerProcess, folder: Path) -> None:
    program = "from tasks import add; r = add.delay(4, 4); print(r.get(timeout=10), r.ready())"
    assert run(folder / "celery", program) == "8 True\n"


def test_the_changed_file_calls_our_worker_from_a_script(worker: WorkerProcess, folder: Path) -> None:
    program = (
        "import asyncio\n"
        "from tasks import add\n"
        "async def main():\n"
        "    result = await add.delay(4, 4)\n"
        "    print(await result.get(timeout=10), await result.ready())\n"
        "asyncio.run(main())\n"
    )
    assert run(folder / "aqueue", program) == "8 True\n"


def test_the_changed_file_calls_the_tutorials_own_worker(folder: Path) -> None:
    command = ["-m", "celery", "-A", "tasks", "worker", "--loglevel=INFO", "-P", "solo", *QUICK]
    program = (
        "import asyncio\n"
        "from tasks import add\n"
        "async def main():\n"
        "    print(await (await add.delay(4, 4)).get(timeout=10))\n"
        "asyncio.run(main())\n"
    )
    with WorkerProcess("tutorial", command, folder / "worker.log", " ready.", {}, cwd=folder / "celery"):
        assert run(folder / "aqueue", program) == "8\n"
