"""``aqueue worker``: run an app's tasks until told to stop."""

import asyncio
import gc
import os
import platform
import signal
from importlib import import_module
from typing import Annotated, Final

import typer

import aqueue
from aqueue.app import AQueue
from aqueue.cli import logs
from aqueue.cli.console import fail, stop
from aqueue.cli.target import AppOption, app_and_words, no_more
from aqueue.errors import AQueueError
from aqueue.options import check_queue
from aqueue.worker import Worker

_LEVELS: Final = ("debug", "info", "warning", "error", "critical")


def work(
    context: typer.Context,
    words: Annotated[list[str], typer.Argument(metavar="[APP]", show_default=False)] = [],  # noqa: B006 - copied
    app: AppOption = "",
    queues: Annotated[
        str, typer.Option("--queues", "-Q", help="Queues to work on, comma-separated; default: all that the app names.")
    ] = "",
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", min=1, help="Coroutines at once.")] = 100,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Plain functions at once.")] = 16,
    loglevel: Annotated[str, typer.Option("--loglevel", "-l", help="debug, info, warning, error.")] = "info",
    log_format: Annotated[str, typer.Option("--log-format", help="human or json.")] = "human",
    name: Annotated[str, typer.Option("--hostname", "-n", help="The worker's name; %h is the host.")] = "worker",
    grace: Annotated[float, typer.Option(help="Seconds that running tasks may go on after SIGTERM.")] = 25.0,
) -> None:
    """Run an app's tasks until SIGTERM or Ctrl-C; the second one ends it at once."""
    if loglevel.lower() not in _LEVELS:
        stop(f"no log level {loglevel!r}", f"use one of {', '.join(_LEVELS)}")
    if log_format not in ("human", "json"):
        stop(f"no log format {log_format!r}", "use human or json")
    aq, rest = app_and_words(context, words, app)
    no_more(rest)
    logs.configure(loglevel, "json" if log_format == "json" else "human")
    try:
        for module in aq.settings.include:
            import_module(module)
        wanted = [check_queue(queue.strip()) for queue in queues.split(",") if queue.strip()]
        aq.add_observer(logs.log_run)
        code = run_worker(aq, wanted, concurrency, threads, name, grace)
    except AQueueError as error:
        fail(error)
    raise typer.Exit(code)


def run_worker(aq: AQueue, queues: list[str], concurrency: int, threads: int, name: str, grace: float) -> int:
    """Run one worker in this process; returns the exit code."""

    async def main() -> None:
        worker = Worker(aq, queues=queues, concurrency=concurrency, threads=threads, name=name, grace=grace)
        typer.echo(banner(worker), err=True)
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, worker.stop)
        await worker.run()

    # What was imported stays; and messages live for a batch, which is longer than the collector expects.
    gc.freeze()
    gc.set_threshold(25_000, 20, 20)
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        runner.run(main())
    return 0


def _loop_factory() -> "type[asyncio.AbstractEventLoop] | None":
    try:
        factory: type[asyncio.AbstractEventLoop] = import_module("uvloop").new_event_loop
    except ImportError:
        return None
    return factory


def banner(worker: Worker) -> str:
    """What a worker says of itself at the start."""
    aq = worker.app
    tasks = sorted(aq.tasks.items())
    lease = aq.settings.lease
    width = max((len(task) for task, _ in tasks), default=0)
    lines = [
        f"aqueue {aqueue.__version__}, Python {platform.python_version()}, {worker.name}, pid {os.getpid()}",
        f"  app      {aq.name}",
        f"  broker   {aq.servers.broker_name}",
        f"  results  {aq.servers.store_name}",
        f"  queues   {', '.join(worker.queues)}",
        f"  slots    {worker.slots['coroutine']} coroutines, {worker.slots['thread']} threads",
        f"  limits   a task may run {aq.settings.timeout:g} s unless it says otherwise",
        f"  delivery at least once; again {lease:g} to {lease * 1.75:g} s after a worker was lost",
        f"  tasks    {len(tasks)}"
        + ("" if tasks else " (nothing can run: is the module that declares them imported?)"),
        *(f"    {task:{width}}  {aq.queue_of(made)}  {made.definition.kind}" for task, made in tasks),
    ]
    return "\n".join(lines)
