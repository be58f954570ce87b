"""Tasks in child processes: values, context, death, limits, and nothing left behind."""

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import aqueue
from aqueue import AQueue, ConfigurationError, Retry, Settings, SyncTask, TaskFailed, WorkerLostError
from aqueue.context import local_context
from aqueue.outcome import Done, GiveBack
from aqueue.process_link import End, Warn
from aqueue.process_pool import ProcessPool
from aqueue.run import Run
from aqueue.runners import Runners, ThreadPool
from aqueue.runs import Runs
from aqueue.slots import Slots
from aqueue.task import Signature
from aqueue.url import Url
from tests.kit.waiting import until
from tests.kit.workers import WorkerProcess
from tests.worker import process_tasks
from tests.worker.conftest import MakeApp, StartWorker, running


@pytest.fixture(params=["memory"])
def kind(request: pytest.FixtureRequest) -> str:
    """Nothing here is a broker's."""
    found: str = request.param
    return found


def process(app: AQueue, function: Callable[..., Any], **options: Any) -> SyncTask[..., Any]:
    made: SyncTask[..., Any] = app.task(run="process", **options)(function)
    return made


@asynccontextmanager
async def runs_of(app: AQueue) -> AsyncIterator[tuple[Runs, ProcessPool]]:
    """The runs of a worker that claims nothing by itself."""
    pool = ProcessPool(app.tasks, app.settings)
    runners = Runners(ThreadPool(1, asyncio.get_running_loop()), pool, app.tasks)
    producer = app.producer()
    slots = Slots({"coroutine": 1, "thread": 1, "process": 1})
    try:
        yield Runs(app, "w", {}, producer.broker, producer.store, slots, runners), pool
    finally:
        await pool.close()


async def begun(app: AQueue, runs: Runs, signature: Signature[Any]) -> list[Run]:
    """Send a call, claim it, start it; all that run now."""
    await app.send(signature)
    runs.accept(await app.producer().broker.fetch(["celery"], 1, 1))
    return list(runs.active.values())


def lives(pid: int) -> bool:
    """Whether a process is there and not just unburied."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_values_go_in_and_out(app: AQueue, start_worker: StartWorker) -> None:
    add, pid, move = (process(app, f) for f in (process_tasks.add, process_tasks.pid, process_tasks.move))
    worker = await start_worker(app, processes=1)
    assert worker.slots["process"] == 1
    assert await (await add.send(2, y=3)).get(10) == 5
    first = await (await pid.send()).get(10)
    assert first != os.getpid()
    assert await (await pid.send()).get(10) == first  # it is kept
    assert await (await move.send(process_tasks.Point(1, 2), 10)).get(10) == process_tasks.Point(11, 12)
    assert add(1) == 2  # a plain call stays one


async def test_many_run_at_once_and_each_once(app: AQueue, start_worker: StartWorker) -> None:
    add = process(app, process_tasks.add)
    await start_worker(app, processes=2)
    results = await app.send_many([add.s(n, 0) for n in range(30)])
    assert [await result.get(20) for result in results] == list(range(30))


async def test_the_context_is_there(app: AQueue, start_worker: StartWorker, kind: str) -> None:
    about = process(app, process_tasks.about, retry=Retry(attempts=4))
    bound = app.task(run="process", bind=True)(process_tasks.bound)
    worker = await start_worker(app, processes=1)
    result = await about.options(headers={"tenant": "t1"}).send(5)
    assert await result.get(10) == {
        "id": result.id,
        "same": True,
        "attempt": 1,
        "max_attempts": 4,
        "deliveries": 1,
        "has_token": kind != "rabbitmq",
        "key": result.id,
        "headers": {"tenant": "t1"},
        "worker": worker.name,
        "queue": "celery",
        "cancelled": False,
        "args": [5],
        "x": 5,
    }
    result = await bound.send(7)
    assert await result.get(10) == [result.id, [7], 7]


async def test_what_a_task_tells_is_stored_before_it_goes_on(app: AQueue, start_worker: StartWorker) -> None:
    seen: list[tuple[str, Any]] = []
    tell, refused = process(app, process_tasks.tell), process(app, process_tasks.refused_state)
    await start_worker(app, processes=1)
    store = app.producer().store
    put = store.put

    async def watched(records: Any) -> None:
        seen.extend(record.value for record in records)
        await put(records)

    store.put = watched  # type: ignore[method-assign]
    assert await (await tell.send()).get(10) == "told"
    texts = [value.decode() for value in seen]  # type: ignore[attr-defined]
    assert [state for text in texts for state in ("half", "OWN", "whole") if state in text] == ["half", "OWN", "whole"]
    assert await (await refused.send()).get(10) == "EncodeError"


async def test_exceptions_keep_their_type_and_their_traceback(app: AQueue, start_worker: StartWorker) -> None:
    caught: list[tuple[int, str]] = []

    def wants(error: BaseException) -> bool:
        caught.append((len(caught), type(error).__name__))
        return isinstance(error, KeyError)

    fail = process(app, process_tasks.fail, retry=Retry(attempts=2, backoff=0.0, on=wants))
    await start_worker(app, processes=1)
    for how, kind, text in (
        ("known", "KeyError", "known"),
        ("local", "fail.<locals>.LocalError", "very local"),
        ("unlucky", "Unlucky", "7 really"),
        ("exit", "SystemExit", "4"),
    ):
        with pytest.raises(TaskFailed) as failed:
            await (await fail.send(how)).get(10)
        assert (failed.value.type, failed.value.message) == (kind, text)
        assert "process_tasks.py" in (failed.value.traceback or "")
        assert "process_child.py" not in (failed.value.traceback or "")
    assert [name for _, name in caught] == ["KeyError", "ProcessTaskError", "ProcessTaskError", "SystemExit"]


async def test_control_flow_works(app: AQueue, start_worker: StartWorker) -> None:
    once_more, refuse = process(app, process_tasks.once_more), process(app, process_tasks.refuse)
    await start_worker(app, processes=1)
    assert await (await once_more.send()).get(10) == 2
    with pytest.raises(TaskFailed, match="not me"):
        await (await refuse.send()).get(10)


async def test_what_can_not_be_pickled_is_a_failure_that_says_so(app: AQueue, start_worker: StartWorker) -> None:
    add = process(app, process_tasks.add, retry=Retry(attempts=3, backoff=0.0))
    no_pickle = process(app, process_tasks.no_pickle, retry=Retry(attempts=3, backoff=0.0))

    @app.add_middleware
    async def spoil(context: Any, call_next: Any) -> Any:
        if context.headers.get("spoil"):
            context.args = [lambda: None]
        return await call_next(context)

    await start_worker(app, processes=1)
    with pytest.raises(TaskFailed, match=r"the arguments of .*add can't be pickled"):
        await (await add.options(headers={"spoil": 1}).send(1)).get(10)
    with pytest.raises(TaskFailed, match=r"EncodeError: the result of .*no_pickle can't be stored: .*can't be pickled"):
        await (await no_pickle.send()).get(10)
    assert await (await add.send(1)).get(10) == 2


@pytest.mark.parametrize(
    ("how", "cause"), [("exit", "exit code 3"), ("segfault", "SIGSEGV"), ("SIGKILL", "SIGKILL.*out of memory")]
)
async def test_a_death_fails_its_own_task_and_names_the_cause(
    app: AQueue, start_worker: StartWorker, tmp_path: Path, how: str, cause: str
) -> None:
    die = process(app, process_tasks.die, retry=Retry(attempts=2, backoff=0.0, on=WorkerLostError))
    nap, add = process(app, process_tasks.nap), process(app, process_tasks.add)
    await start_worker(app, processes=2)
    bystander = await nap.send(str(tmp_path / "nap"), 1.5)
    await until((tmp_path / "nap").exists, "the bystander runs")
    with pytest.raises(TaskFailed, match=cause) as failed:
        await (await die.send(how, str(tmp_path / "runs"))).get(10)
    assert failed.value.type == "WorkerLostError"
    assert (tmp_path / "runs").read_text() == "run\nrun\n"  # the policy's two attempts, and no more
    assert await bystander.get(10) == "rested"
    assert await (await add.send(1)).get(10) == 2


async def test_memory_is_bounded(app: AQueue, start_worker: StartWorker) -> None:
    eat = process(app, process_tasks.eat, memory="256M")
    unbound = app.task(run="process", name="unbound")(process_tasks.eat)
    await start_worker(app, processes=1)
    assert await (await eat.send(16)).get(10) == 16 * 2**20
    assert await (await unbound.send(400)).get(10) == 400 * 2**20  # in the same process: the bound was the task's alone
    with pytest.raises(TaskFailed, match="MemoryError: out of memory: this task may have 268,435,456 bytes"):
        await (await eat.send(400)).get(10)
    assert await (await unbound.send(400)).get(10) == 400 * 2**20


async def test_a_soft_limit_is_raised_in_the_task(app: AQueue, start_worker: StartWorker, tmp_path: Path) -> None:
    warned, pid = process(app, process_tasks.warned, soft_timeout=0.3), process(app, process_tasks.pid)
    await start_worker(app, processes=1)
    first = await (await pid.send()).get(10)
    assert await (await warned.send(str(tmp_path / "w"))).get(10) == "warned after 0.3"
    assert await (await pid.send()).get(10) == first


async def test_a_hard_limit_lets_finally_run(app: AQueue, start_worker: StartWorker, tmp_path: Path) -> None:
    nap, pid = process(app, process_tasks.nap), process(app, process_tasks.pid)
    take_the_signal = process(app, process_tasks.take_the_signal)
    await start_worker(app, processes=1)
    first = await (await pid.send()).get(10)
    await (await take_the_signal.send()).get(10)
    with pytest.raises(TaskFailed, match=r"TimeLimitExceeded: 0\.4"):
        await (await nap.options(timeout=0.4).send(str(tmp_path / "nap"))).get(10)
    assert (tmp_path / "nap").read_text() == "cleaned up"
    assert await (await pid.send()).get(10) == first  # it ended well: its process is kept


async def test_what_does_not_end_is_killed_with_its_children_before_it_is_retried(
    make_app: MakeApp, start_worker: StartWorker, tmp_path: Path
) -> None:
    app = make_app(kill_after=0.3)
    deaf = process(app, process_tasks.deaf, timeout=1.0)
    async with app:
        await start_worker(app, processes=1)
        with pytest.raises(TaskFailed, match=r"TimeLimitExceeded: 1\.0"):
            await (await deaf.send(str(tmp_path / "deaf"))).get(10)
        child, grandchild = map(int, (tmp_path / "deaf").read_text().split())
        assert not lives(child)
        await until(lambda: not lives(grandchild), "the grandchild is gone")


async def test_at_shutdown_runs_are_given_back_and_no_process_is_left(make_app: MakeApp, tmp_path: Path) -> None:
    app = make_app(kill_after=0.3)
    nap, deaf, pid = (process(app, f) for f in (process_tasks.nap, process_tasks.deaf, process_tasks.pid))
    async with app:
        async with running(app, processes=3, grace=0.2):
            idle = await (await pid.send()).get(10)
            await nap.send(str(tmp_path / "nap"))
            await deaf.send(str(tmp_path / "deaf"))
            await until((tmp_path / "nap").exists, "one runs")
            await until((tmp_path / "deaf").exists, "the other runs")
            began = time.monotonic()
        assert time.monotonic() - began < 4
        assert (tmp_path / "nap").read_text() == "cleaned up"
        (depth,) = await app.producer().broker.inspection.queues()
        assert (depth.ready, depth.leased) == (2, 0)
        pids = [idle, int((tmp_path / "nap.pid").read_text()), *map(int, (tmp_path / "deaf").read_text().split())]
        await until(lambda: not any(map(lives, pids)), "no process is left")


async def test_signals_from_elsewhere_are_the_workers_business(
    app: AQueue, start_worker: StartWorker, tmp_path: Path
) -> None:
    nap = process(app, process_tasks.nap)
    await start_worker(app, processes=1)
    result = await nap.send(str(tmp_path / "nap"), 0.5)
    await until((tmp_path / "nap").exists, "it runs")
    pid = int((tmp_path / "nap.pid").read_text())
    assert os.getpgid(pid) != os.getpgrp()  # a terminal's Ctrl-C doesn't reach it
    os.kill(pid, signal.SIGTERM)
    assert await result.get(10) == "rested"


async def test_a_task_may_have_children(app: AQueue, start_worker: StartWorker) -> None:
    with_children = process(app, process_tasks.with_children)
    await start_worker(app, processes=1)
    assert await (await with_children.send(4)).get(15) == 14


async def test_an_idle_child_that_dies_harms_nobody(app: AQueue, start_worker: StartWorker) -> None:
    pid = process(app, process_tasks.pid)
    await start_worker(app, processes=1)
    first = await (await pid.send()).get(10)
    os.kill(first, signal.SIGKILL)
    await until(lambda: not lives(first), "it is dead")
    await asyncio.sleep(0.05)
    assert await (await pid.send()).get(10) != first


async def test_children_are_recycled(make_app: MakeApp, start_worker: StartWorker) -> None:
    app = make_app(process_max_tasks=2)
    pid = process(app, process_tasks.pid)
    async with app:
        await start_worker(app, processes=1)
        pids = [await (await pid.send()).get(10) for _ in range(5)]
        assert [len(set(pids[:2])), len(set(pids[2:4])), len(set(pids))] == [1, 1, 3]
        await until(lambda: not lives(pids[0]), "the first has ended")


async def test_a_child_that_keeps_too_much_memory_is_replaced(make_app: MakeApp, start_worker: StartWorker) -> None:
    app = make_app(process_max_memory=200 * 2**20)
    leak = process(app, process_tasks.leak)
    async with app:
        await start_worker(app, processes=1)
        pids = [await (await leak.send(mebibytes)).get(10) for mebibytes in (1, 1, 200, 1)]
        assert pids[0] == pids[1] == pids[2] != pids[3]
        await until(lambda: not lives(pids[0]), "the first has ended")


async def test_logs_of_a_child_come_out_at_the_worker(
    app: AQueue, start_worker: StartWorker, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    log = process(app, process_tasks.log)
    await start_worker(app, processes=1)
    result = await log.send()
    await result.get(10)
    records = [r for r in caplog.records if r.name in ("plain", f"aqueue.task.{log.name}")]
    assert [(r.getMessage(), r.task_id) for r in records] == [  # type: ignore[attr-defined]
        ("from the child", result.id),
        ("plainly", result.id),
    ]


def test_what_can_not_run_in_a_process_is_refused() -> None:
    app = AQueue("refused", broker="memory://")

    async def coroutine() -> None: ...

    def local() -> None: ...

    with pytest.raises(ConfigurationError, match="async def runs on the loop"):
        app.task(run="process")(coroutine)
    with pytest.raises(ConfigurationError, match="top level"):
        app.task(run="process")(local)
    with pytest.raises(ConfigurationError, match='add run="process"'):
        app.task(memory="1G")(process_tasks.add)
    for memory in ("2X", "", "1M", 5, -1, True, "nanG"):
        with pytest.raises(ConfigurationError, match="memory is bytes or like"):
            app.task(run="process", memory=memory)(process_tasks.add)
    made = app.task(run="process", memory="1.5g")(process_tasks.add)
    assert made.definition.memory == 1536 * 2**20


async def test_time_begins_when_the_process_is_ready(
    app: AQueue, start_worker: StartWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "heavy.py").write_text("import time\ntime.sleep(1.0)\ndef light(): return 'done'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    light = process(app, import_module("heavy").light, timeout=0.5)
    await start_worker(app, processes=1)
    assert await (await light.send()).get(10) == "done"


async def test_a_child_that_is_not_needed_any_more_when_it_is_ready_is_kept(
    app: AQueue, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "slow_start.py").write_text(
        f"import os, time\nwith open({str(tmp_path / 'pids')!r}, 'a') as file: file.write(f'{{os.getpid()}} ')\n"
        "time.sleep(0.5)\ndef pid(): return os.getpid()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    pid = process(app, import_module("slow_start").pid)
    seen: list[Any] = []
    app.add_observer(lambda context, outcome, seconds: seen.append(outcome))
    async with runs_of(app) as (runs, pool):
        (run,) = await begun(app, runs, pid.s())
        await until(lambda: len((tmp_path / "pids").read_text().split()) == 2, "a child starts")
        run.end("lease lost")
        await until(lambda: not runs.active, "the run has ended, the child not started")
        await until(lambda: pool._idle, "the child is ready")
        await begun(app, runs, pid.s())
        await until(lambda: not runs.active, "the next has run")
        assert str(seen[-1].value) == (tmp_path / "pids").read_text().split()[1]


async def test_a_child_that_was_told_to_end_in_vain_is_not_used_again(app: AQueue, tmp_path: Path) -> None:
    deaf, pid = process(app, process_tasks.deaf), process(app, process_tasks.pid)
    seen: list[Any] = []
    app.add_observer(lambda context, outcome, seconds: seen.append(outcome))
    async with runs_of(app) as (runs, _):
        (run,) = await begun(app, runs, deaf.s(str(tmp_path / "deaf")))
        await until(lambda: (tmp_path / "deaf").exists() and (tmp_path / "deaf").read_text(), "it runs")
        await pid.send()
        next_one = await app.producer().broker.fetch(["celery"], 1, 1)
        run.end("shutdown")
        await asyncio.sleep(0.05)
        run.interrupt()  # no more patience
        for _ in range(100):  # no time passes, in which the child's death would be seen
            if not runs.active:
                break
            await asyncio.sleep(0)
        runs.accept(next_one)
        await until(lambda: not runs.active, "the next has run")
    assert [type(outcome) for outcome in seen] == [GiveBack, Done]


async def test_what_comes_after_the_answer_is_about_nothing(app: AQueue) -> None:
    pid = process(app, process_tasks.pid)
    context = local_context(pid.name, (), {})
    async with runs_of(app) as (_, pool):
        await pool.take(context)
        first = await pool.run(pid, context)
        for late in (Warn(1, 0.1), End(1, "timeout"), Warn(7, 0.1), End(7, "timeout")):
            pool._taken[context].send(late)
        assert [await pool.run(pid, context) for _ in range(3)] == [first] * 3
        pool.give(context)


async def test_what_ends_well_at_shutdown_is_done(app: AQueue, tmp_path: Path) -> None:
    save = process(app, process_tasks.save)
    async with running(app, processes=1, grace=0.1):
        result = await save.send(str(tmp_path / "save"))
        await until((tmp_path / "save").exists, "it runs")
    assert await result.get(5) == "saved, as shutdown came"


async def test_a_process_that_can_not_be_started_fails_the_task(
    app: AQueue, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = process(app, process_tasks.pid)
    await start_worker(app, processes=1)
    with monkeypatch.context() as without:
        without.setattr(sys, "executable", "/nowhere/python")
        with pytest.raises(TaskFailed, match=r"WorkerLostError: no child process could be started: .*No such file"):
            await (await pid.send()).get(10)
    assert await (await pid.send()).get(10)


async def test_a_module_that_kills_its_process_fails_the_task(
    app: AQueue, start_worker: StartWorker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "fatal.py").write_text(
        f"import os, sys\nif os.getpid() != {os.getpid()}: os._exit(5)\ndef task(): return 1\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    task = process(app, import_module("fatal").task)
    await start_worker(app, processes=1)
    with pytest.raises(TaskFailed, match="while it imported fatal: exit code 5"):
        await (await task.send()).get(10)


SCRIPT = """
import asyncio, sys
from aqueue import AQueue
from aqueue.worker import Worker

app = AQueue("script", broker="memory://")

class Odd(Exception): ...

@app.task(run="process")
def double(n: int) -> int:
    if n < 0:
        raise Odd(n)
    return 2 * n

async def main() -> None:
    async with app:
        worker = Worker(app, processes=1)
        running = asyncio.create_task(worker.run())
        for n in (21, -1):
            print(await (await double.send(n)).get(10))
        worker.stop()
        await running

"""


@pytest.mark.parametrize("how", ["path", "module"])
def test_a_task_defined_in_a_script_works(tmp_path: Path, how: str) -> None:
    (tmp_path / "job.py").write_text(SCRIPT + 'if __name__ == "__main__":\n    asyncio.run(main())\n')
    command = [sys.executable, *(["job.py"] if how == "path" else ["-m", "job"])]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=30, check=False
    )
    assert done.stdout == "42\n"
    assert "TaskFailed: Odd: -1" in done.stderr


def test_a_script_that_starts_its_worker_unguarded_is_told_so(tmp_path: Path) -> None:
    (tmp_path / "job.py").write_text(SCRIPT + "asyncio.run(main())\n")
    done = subprocess.run(
        [sys.executable, "job.py"],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert 'under `if __name__ == "__main__":`' in done.stderr


def environment() -> dict[str, str]:
    """In which a script finds the package."""
    return {**os.environ, "PYTHONPATH": str(Path(aqueue.__file__).parent.parent)}


WORKSHOP = """
import os, re, subprocess
from aqueue import AQueue, Settings

app = AQueue("workshop", broker=os.environ["BROKER"], settings=Settings(lease=1.0))

@app.task
async def last(n: int) -> int:
    return n

@app.task(run="process", memory="1G")
def send_on(n: int) -> str:
    print("hello from the child")
    return last.send_sync(n).id

@app.task(run="process", queue="hard")
def grind() -> None:
    child = subprocess.Popen(["sleep", "60"])
    with open("pids", "w") as file:
        file.write(f"{os.getpid()} {child.pid}")
    re.match(r"(a+)+$", "a" * 60 + "b")  # holds the interpreter's lock for ages
"""


@pytest.mark.parametrize("kind", ["sqlite"], indirect=True)
async def test_on_the_command_line(url: Url, tmp_path: Path) -> None:
    (tmp_path / "workshop.py").write_text(WORKSHOP)
    worker = WorkerProcess(tmp_path, "workshop:app", "--processes", "3", env={"BROKER": url.reveal()})
    try:
        worker.ready()
        assert "16 threads, 3 processes" in worker.log
        assert "workshop.send_on  celery  process" in worker.log
        async with AQueue("client", broker=url.reveal(), settings=Settings(lease=1.0)) as client:
            sent = await (await client.send_task("workshop.send_on", (7,))).get(15)
            assert await client.result(sent).get(15) == 7
            assert "hello from the child" in worker.log
            await client.send_task("workshop.grind", queue="hard")
            await until(lambda: (tmp_path / "pids").exists() and (tmp_path / "pids").read_text(), "it grinds")
            pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
            assert all(map(lives, pids))
            os.kill(worker.worker_pid(), signal.SIGKILL)
            await until(lambda: not any(map(lives, pids)), "the child ends with its worker, and its own child, too")
    finally:
        worker.kill()
