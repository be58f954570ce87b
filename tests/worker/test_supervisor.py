"""``aqueue worker``: a small parent and its worker processes; what dies is started again, what hangs is ended."""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aqueue import AQueue
from aqueue.broker import Ack
from aqueue.url import Url
from tests.kit.busy import length_for
from tests.kit.waiting import until
from tests.kit.workers import WorkerProcess

SHOP = """
import asyncio, os, re, time
from aqueue import AQueue, Context, Settings

app = AQueue("shop", broker=os.environ["BROKER"], settings=Settings(lease=LEASE, kill_after=0.5))

def note(text):
    with open("ran", "a") as file:
        file.write(text + "\\n")

@app.task
async def pid() -> int:
    return os.getpid()

@app.task
async def nap(seconds: float) -> str:
    note("nap begins")
    await asyncio.sleep(seconds)
    note("nap ends")
    return "rested"

@app.task
async def block(seconds: float) -> str:
    note("block begins")
    time.sleep(seconds)
    note("block ends")
    return "done"

@app.task
async def hold_the_interpreter(length: int) -> str:
    note("hold begins")
    re.fullmatch("(a+)+b", "a" * length)
    note("hold ends")
    return "done"

@app.task
async def die(ctx: Context, how: int) -> str:
    note(f"delivery {ctx.deliveries}")
    if ctx.deliveries == 1:
        os.kill(os.getpid(), how) if how < 64 else os._exit(how)
    return "survived"

@app.task
def stubborn() -> None:
    time.sleep(60)

@app.task
async def grow(megabytes: int) -> None:
    app.hoard = b"x" * (megabytes << 20)
"""

Spawn = Callable[..., WorkerProcess]


@pytest.fixture(params=["sqlite", "redis"])
def kind(request: pytest.FixtureRequest) -> str:
    """Brokers that several processes can share."""
    found: str = request.param
    return found


@pytest.fixture
def spawn(tmp_path: Path, url: Url) -> Iterator[Spawn]:
    spawned: list[WorkerProcess] = []

    def start(*arguments: str, lease: float = 1.0) -> WorkerProcess:
        (tmp_path / "shop.py").write_text(SHOP.replace("LEASE", str(lease)))
        worker = WorkerProcess(tmp_path, "shop:app", *arguments, env={"BROKER": url.reveal()})
        spawned.append(worker)
        return worker

    yield start
    for worker in spawned:
        worker.process.stop(5)


def gone(pid: int) -> bool:
    """Whether the process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("kind", ["redis"], indirect=True)
async def test_several_worker_processes_share_the_work_and_end_together(spawn: Spawn, client: AQueue) -> None:
    worker = spawn("--workers", "2", "-c", "1").ready()
    await until(lambda: len(worker.process.children()) == 2, "two worker processes")
    await until(lambda: "worker-0-1@" in worker.log and "worker-0-2@" in worker.log, "both are ready")
    pids: set[int] = set()
    for _ in range(200):
        pids.add(await (await client.send_task("shop.pid")).get(10))
        if len(pids) == 2:
            break
    assert pids == set(worker.process.children())
    worker.terminate()
    assert worker.wait() == 0
    assert all(map(gone, pids))
    assert worker.log.count("tasks     ") == 1  # the banner is shown once


@pytest.mark.parametrize(
    ("how", "said"), [(signal.SIGKILL, "signal 9 (SIGKILL)"), (signal.SIGSEGV, "SIGSEGV"), (77, "exit code 77")]
)
async def test_a_dead_worker_is_started_again_and_it_is_said_why_it_died(
    spawn: Spawn, client: AQueue, ran: Callable[[], list[str]], how: int, said: str
) -> None:
    worker = spawn().ready()
    result = await client.send_task("shop.die", (int(how),))
    assert await result.get(20) == "survived"
    assert ran() == ["delivery 1", "delivery 2"]
    assert said in worker.log
    assert "it held 1 tasks" in worker.log
    worker.terminate()
    assert worker.wait() == 0


async def test_a_task_that_holds_the_interpreter_keeps_its_lease(
    spawn: Spawn, client: AQueue, ran: Callable[[], list[str]]
) -> None:
    """Neither loop nor threads of the worker can do anything meanwhile; the supervisor renews."""
    spawn(lease=1.5).ready()
    spawn(lease=1.5).ready()  # would take what comes back
    result = await client.send_task("shop.hold_the_interpreter", (length_for(4.0),))
    assert await result.get(60) == "done"
    assert ran() == ["hold begins", "hold ends"]


async def test_a_frozen_worker_keeps_its_tasks_and_goes_on(
    spawn: Spawn, client: AQueue, ran: Callable[[], list[str]]
) -> None:
    worker = spawn().ready()
    spawn().ready()
    result = await client.send_task("shop.nap", (1.0,))
    await until(lambda: ran() == ["nap begins"], "it runs")
    victim = worker.worker_pid()
    os.kill(victim, signal.SIGSTOP)
    await asyncio.sleep(3.5)  # twice what it takes for a lease to end and be taken back
    os.kill(victim, signal.SIGCONT)
    assert await result.get(20) == "rested"
    assert ran() == ["nap begins", "nap ends"]


@pytest.mark.parametrize("kind", ["redis"], indirect=True)
async def test_a_loop_that_stands_still_for_too_long_is_ended(
    spawn: Spawn, client: AQueue, ran: Callable[[], list[str]]
) -> None:
    worker = spawn("--max-stall", "6").ready()
    victim = worker.worker_pid()
    await client.send_task("shop.block", (60,))
    await until(lambda: gone(victim), "the worker is killed", 20)
    assert "the event loop is blocked since" in worker.log
    assert "shop.block[" in worker.log
    assert "shop.py" in worker.log
    await until(lambda: "is killed: its event loop stood still" in worker.log, "it is said")
    await until(lambda: len(ran()) == 2, "it runs again", 20)


@pytest.mark.parametrize("kind", ["redis"], indirect=True)
async def test_a_task_that_blocks_the_loop_past_its_limit_is_ended(
    spawn: Spawn, client: AQueue, ran: Callable[[], list[str]]
) -> None:
    worker = spawn().ready()
    victim = worker.worker_pid()
    await client.send_task("shop.block", (60,), timeout=0.5)
    await until(lambda: gone(victim), "the worker is killed", 20)
    await until(lambda: "past the task's time limit" in worker.log, "it is said")


async def test_when_the_supervisor_is_killed_workers_end_when_their_tasks_have(
    spawn: Spawn, client: AQueue, ran: Callable[[], list[str]]
) -> None:
    worker = spawn("-c", "1").ready()
    orphan = worker.worker_pid()
    running = await client.send_task("shop.nap", (1.5,))
    waiting = await client.send_task("shop.nap", (0.0,))
    await until(lambda: ran() == ["nap begins"], "the first task runs")
    os.kill(worker.process.child.pid, signal.SIGKILL)
    assert await running.get(10) == "rested"
    await until(lambda: gone(orphan), "the worker ends", 10)
    assert ran() == ["nap begins", "nap ends"]
    assert await waiting.state() == "PENDING"
    assert "the supervisor is gone" in worker.log


@pytest.mark.parametrize("kind", ["redis"], indirect=True)
async def test_a_worker_that_has_run_enough_tasks_or_takes_too_much_memory_is_replaced(
    spawn: Spawn, client: AQueue
) -> None:
    worker = spawn("--max-tasks", "10", "--max-memory", "150M").ready()
    first = worker.worker_pid()
    for result in [await client.send_task("shop.pid") for _ in range(12)]:
        await result.get(10)
    await until(lambda: gone(first), "it is replaced", 20)
    second = await (await client.send_task("shop.pid")).get(10)
    assert second != first
    await client.send_task("shop.grow", (160,))
    await until(lambda: gone(second), "it is replaced", 20)
    assert await (await client.send_task("shop.pid")).get(10) not in (first, second)
    assert "has run" in worker.log
    assert "MiB; it is replaced" in worker.log
    worker.terminate()
    assert worker.wait() == 0


@pytest.mark.parametrize("kind", ["sqlite"], indirect=True)
async def test_changed_code_is_run(spawn: Spawn, client: AQueue, tmp_path: Path) -> None:
    worker = spawn("--reload").ready()
    before = worker.worker_pid()
    (tmp_path / "shop.py").write_text(SHOP.replace("LEASE", "1.0").replace("return os.getpid()", "return -1"))
    await until(lambda: gone(before), "it starts again", 10)
    assert await (await client.send_task("shop.pid")).get(10) == -1
    assert "the code has changed" in worker.log


@pytest.mark.parametrize("kind", ["sqlite"], indirect=True)
@pytest.mark.parametrize("how", ["terminate", "interrupt"])
async def test_a_signal_during_the_start_ends_it_at_once(spawn: Spawn, tmp_path: Path, how: str) -> None:
    worker = spawn()
    await until(worker.process.children, "a worker process is started")
    start = time.monotonic()
    getattr(worker, how)()
    assert worker.wait() == 0
    assert time.monotonic() - start < 5
    assert "Traceback" not in worker.log


@pytest.mark.parametrize("kind", ["sqlite"], indirect=True)
async def test_what_can_not_start_is_not_started_again(spawn: Spawn, tmp_path: Path) -> None:
    worker = spawn()
    worker.kill()
    (tmp_path / "shop.py").write_text("import nothing_like_that\n")
    failed = WorkerProcess(tmp_path, "shop:app", env={"BROKER": "memory://"})
    assert failed.wait() == 1
    assert failed.log.count("No module named 'nothing_like_that'") == 1
    wrong = WorkerProcess(tmp_path, "nothing_here:app")
    assert wrong.wait() == 2
    assert "there is no module 'nothing_here'" in wrong.log


@pytest.mark.parametrize("kind", ["redis"], indirect=True)
async def test_a_stall_is_shown_by_aqueue_workers(spawn: Spawn, client: AQueue, url: Url) -> None:
    worker = spawn().ready()
    await (await client.send_task("shop.block", (1.5,))).get(20)
    inspection = client.producer().broker.inspection

    async def stalled() -> bool:
        return any(found.stalls == 1 and "shop.block[" in found.stall for found in await inspection.workers())

    await until(stalled, "the stall is told", 10)
    worker.terminate()
    assert worker.wait() == 0
    assert not await inspection.workers()


@pytest.mark.parametrize("kind", ["redis"], indirect=True)
async def test_a_process_whose_slots_are_all_stuck_is_replaced(spawn: Spawn, client: AQueue) -> None:
    worker = spawn("--threads", "1", "--grace", "1").ready()
    first = worker.worker_pid()
    await client.send_task("shop.stubborn", timeout=0.2)
    await until(lambda: gone(first), "it is replaced", 20)
    assert "shop.stubborn[" in worker.log
    assert "another process takes over" in worker.log
    assert await (await client.send_task("shop.pid")).get(20) != first


async def test_the_next_process_says_how_the_last_one_was_lost(spawn: Spawn, client: AQueue) -> None:
    worker = spawn().ready()
    first = worker.worker_pid()
    await client.send_task("shop.nap", (60.0,))
    await until((worker.log_file.parent / "ran").exists, "it runs")
    os.kill(first, signal.SIGKILL)
    await until(lambda: gone(first), "it is dead")
    await until(lambda: worker.log.count("is ready") == 2, "the next one is ready", 20)
    worker.terminate()
    worker.wait()
    (delivery,) = await client.producer().broker.fetch(["celery"], 1, 10)
    (loss,) = delivery.history.losses
    assert "SIGKILL" in loss.cause
    assert loss.worker.startswith("worker-0@")
    await client.producer().broker.settle([(delivery, Ack())])
