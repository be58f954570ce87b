"""``aqueue worker`` as a process: signals, kills, several on one broker."""

import asyncio
import json
import os
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aqueue import AQueue, TaskFailed
from aqueue.url import Url
from tests.kit.waiting import until
from tests.kit.workers import WorkerProcess

#: The app, as a user would write it; ``ran`` is a file to which each run adds a line.
SHOP = """
import asyncio, os, time
from aqueue import AQueue, Context, Settings

app = AQueue("shop", broker=os.environ["BROKER"], settings=Settings(lease=1.0, unknown_grace=0, kill_after=0.2))

def note(text):
    with open("ran", "a") as file:
        file.write(text + "\\n")

@app.task
async def quick(n: int) -> int:
    note(f"quick {n}")
    return n

@app.task
def quick_thread(n: int) -> int:
    note(f"quick_thread {n}")
    return n

@app.task
async def nap(seconds: float) -> str:
    note("nap begins")
    await asyncio.sleep(seconds)
    note("nap ends")
    return "rested"

@app.task
def thread_nap(seconds: float) -> str:
    note("nap begins")
    time.sleep(seconds)
    note("nap ends")
    return "rested"

@app.task
async def die(ctx: Context) -> str:
    note(f"delivery {ctx.deliveries}")
    if ctx.deliveries == 1:
        os._exit(9)
    return f"delivery {ctx.deliveries}"

@app.task(timeout=0.1)
async def deaf() -> None:
    while True:
        try:
            note("deaf")
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            continue

@app.task
async def fail() -> None:
    raise ValueError("no luck")
"""

Spawn = Callable[..., WorkerProcess]


@pytest.fixture(params=["sqlite", "redis"])
def kind(request: pytest.FixtureRequest) -> str:
    """Brokers that several processes can share."""
    found: str = request.param
    return found


@pytest.fixture
def spawn(tmp_path: Path, url: Url) -> Iterator[Spawn]:
    (tmp_path / "shop.py").write_text(SHOP)
    spawned: list[WorkerProcess] = []

    def start(*arguments: str) -> WorkerProcess:
        worker = WorkerProcess(tmp_path, "shop:app", *arguments, env={"BROKER": url.reveal()})
        spawned.append(worker)
        return worker

    yield start
    for worker in spawned:
        worker.process.stop()


async def test_several_workers_share_a_queue_and_each_task_runs_once(
    spawn: Spawn, client: AQueue, ran: Callable[[], list[str]]
) -> None:
    workers = [spawn("-c", "5", "--threads", "2").ready() for _ in range(3)]
    results = [await client.send_task(f"shop.{name}", (n,)) for n in range(150) for name in ("quick", "quick_thread")]
    assert [await result.get(20) for result in results] == [n for n in range(150) for _ in range(2)]
    wanted = sorted(f"{name} {n}" for n in range(150) for name in ("quick", "quick_thread"))
    assert sorted(ran()) == wanted
    for worker in workers:
        worker.terminate()
    assert [worker.wait() for worker in workers] == [0, 0, 0]


@pytest.mark.parametrize("how", ["terminate", "interrupt"])
@pytest.mark.parametrize("task", ["nap", "thread_nap"])
async def test_the_first_signal_lets_running_tasks_end(
    spawn: Spawn, client: AQueue, ran: Callable[[], list[str]], how: str, task: str
) -> None:
    worker = spawn("-c", "1", "--threads", "1").ready()
    running = await client.send_task(f"shop.{task}", (1.0,))
    waiting = await client.send_task(f"shop.{task}", (0.0,))
    await until(lambda: ran() == ["nap begins"], "the first task runs")
    getattr(worker, how)()
    assert worker.wait() == 0
    assert ran() == ["nap begins", "nap ends"]
    assert await running.get(1) == "rested"
    assert await waiting.state() == "PENDING"
    assert "Traceback" not in worker.log
    spawn().ready()
    assert await waiting.get(10) == "rested"
    assert ran() == ["nap begins", "nap ends"] * 2


@pytest.mark.parametrize("task", ["nap", "thread_nap"])
async def test_the_second_signal_gives_them_back_at_once(
    spawn: Spawn, client: AQueue, ran: Callable[[], list[str]], task: str
) -> None:
    worker = spawn().ready()
    result = await client.send_task(f"shop.{task}", (20.0,))
    await until(lambda: ran() == ["nap begins"], "the task runs")
    worker.terminate()
    await asyncio.sleep(0.2)
    start = time.monotonic()
    worker.terminate()
    assert worker.wait() == 0
    assert time.monotonic() - start < 3
    assert await result.state() == "PENDING"
    (depth,) = await client.producer().broker.inspection.queues()
    assert (depth.ready, depth.leased) == (1, 0)
    (delivery,) = await client.producer().broker.fetch(["celery"], 1, 1)
    assert delivery.deliveries == 1  # given back, not lost


async def test_after_the_grace_running_tasks_are_given_back(
    spawn: Spawn, client: AQueue, ran: Callable[[], list[str]]
) -> None:
    worker = spawn("--grace", "0.5").ready()
    await client.send_task("shop.nap", (20.0,))
    await until(lambda: ran() == ["nap begins"], "the task runs")
    start = time.monotonic()
    worker.terminate()
    assert worker.wait() == 0
    assert 0.4 < time.monotonic() - start < 4
    (delivery,) = await client.producer().broker.fetch(["celery"], 1, 1)
    assert delivery.deliveries == 1


async def test_a_killed_workers_tasks_are_finished_by_another(
    spawn: Spawn, client: AQueue, ran: Callable[[], list[str]]
) -> None:
    doomed = spawn("-c", "4").ready()
    results = [await client.send_task("shop.nap", (seconds,)) for seconds in (3.0, 3.0, 3.0)]
    await until(lambda: ran().count("nap begins") == 3, "all run")
    spawn().ready()
    doomed.kill()
    start = time.monotonic()
    assert [await result.get(20) for result in results] == ["rested"] * 3
    assert time.monotonic() - start < 3.0 + 1.0 + 0.5 + 2.5  # the naps, the lease, half of it, a look
    assert ran().count("nap begins") == 6
    assert ran().count("nap ends") == 3


async def test_a_task_that_kills_its_process_is_delivered_again_and_counted(
    spawn: Spawn, client: AQueue, ran: Callable[[], list[str]]
) -> None:
    worker = spawn().ready()
    first = worker.worker_pid()
    result = await client.send_task("shop.die")
    assert await result.get(15) == "delivery 2"
    assert ran() == ["delivery 1", "delivery 2"]
    assert worker.worker_pid() != first
    assert f"worker process 1 (pid {first}) has died" in worker.log
    assert "exit code 9" in worker.log


@pytest.mark.parametrize("kind", ["sqlite"], indirect=True)
async def test_a_coroutine_that_ignores_being_cancelled_does_not_keep_the_process(spawn: Spawn, client: AQueue) -> None:
    worker = spawn("--grace", "20").ready()
    result = await client.send_task("shop.deaf")
    await until(lambda: "still runs after" in worker.log, "it is stuck")
    start = time.monotonic()
    worker.terminate()
    assert worker.wait() == 0
    assert time.monotonic() - start < 5
    with pytest.raises(TaskFailed, match="TimeLimitExceeded"):
        await result.get(5)


@pytest.mark.parametrize("kind", ["sqlite"], indirect=True)
async def test_kill_after_kill_leaves_the_file_whole(spawn: Spawn, client: AQueue, url: Url, tmp_path: Path) -> None:
    results = [await client.send_task("shop.quick", (n,)) for n in range(300)]
    for round in range(3):
        worker = spawn("-c", "3").ready()
        await asyncio.sleep(0.05 * round)
        worker.kill()
    spawn("-c", "10").ready()
    assert [await result.get(30) for result in results] == list(range(300))
    with sqlite3.connect(tmp_path / "queue.db") as file:
        assert file.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    left = [path for path in (tmp_path / "queue.db.wakeup").iterdir() if path.name.startswith("messages")]
    assert len(left) <= 2  # dead listeners' pipes are found and removed


@pytest.mark.parametrize("kind", ["sqlite"], indirect=True)
async def test_idle_workers_on_sqlite_use_no_cpu(spawn: Spawn, client: AQueue) -> None:
    worker = spawn().ready()
    result = await client.send_task("shop.quick", (1,))
    assert await result.get(5) == 1

    def used() -> float:
        ticks = 0
        for pid in (worker.process.child.pid, worker.worker_pid()):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    before = used()
    await asyncio.sleep(3)
    assert used() - before < 0.1


async def test_logs_for_people_and_for_programs(spawn: Spawn, client: AQueue) -> None:
    human = spawn().ready()
    await client.send_task("shop.fail")
    await until(lambda: "failed after" in human.log, "the failure is logged for people")
    human.terminate()
    human.wait()
    program = spawn("--log-format", "json").ready()
    await client.send_task("shop.fail")
    await until(lambda: "failed after" in program.log, "and for programs")
    assert "ValueError: no luck" in human.log
    assert "shop.fail" in human.log
    assert "\x1b[" not in human.log  # no colours in a file
    lines = [json.loads(line) for line in program.log.splitlines() if line.startswith("{")]
    failed = next(line for line in lines if "failed after" in line["message"])
    assert failed["level"] == "ERROR"
    assert failed["task"] == "shop.fail"
    assert "ValueError: no luck" in failed["exception"]
    assert failed["task_id"]


async def test_the_banner_says_what_runs_here_and_hides_the_password(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(SHOP)
    env = {"BROKER": "redis://user:canary@127.0.0.1:1/0"}
    worker = WorkerProcess(tmp_path, "shop:app", "-c", "7", "--threads", "3", env=env).ready()
    await until(lambda: "no connection" in worker.log, "it says that the broker is away")
    worker.terminate()
    assert worker.wait() == 0
    assert "canary" not in worker.log
    for text in ("redis://user:***@127.0.0.1:1/0", "shop.quick_thread", "thread", "7 coroutines, 3 threads", "celery"):
        assert text in worker.log
    assert "Traceback" not in worker.log
