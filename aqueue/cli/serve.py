"""The process in which a worker runs.

``aqueue worker`` replaces itself by this module, so that what the command line is made of takes no memory
in a process that lives for weeks. Options come as words, ``name=value``, readable in ``ps``.
"""

import asyncio
import gc
import os
import platform
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib import import_module

import msgspec

import aqueue
from aqueue.cli import logs
from aqueue.cli.locate import load_app
from aqueue.errors import AQueueError, ConfigurationError
from aqueue.options import check_queue
from aqueue.worker import Worker


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What ``aqueue worker`` was told."""

    app: str
    queues: str = ""
    concurrency: int = 100
    threads: int = 16
    loglevel: str = "info"
    log_format: str = "human"
    name: str = "worker"
    grace: float = 25.0

    def words(self) -> list[str]:
        """As arguments of this module."""
        return [f"{field.name}={getattr(self, field.name)}" for field in fields(self)]


def parse(words: Sequence[str]) -> Options:
    """The other way round."""
    return msgspec.convert(dict(word.split("=", 1) for word in words), Options, strict=False)


def serve(options: Options) -> int:
    """Run one worker until it is told to stop; returns the exit code."""
    logs.configure(options.loglevel, "json" if options.log_format == "json" else "human")
    try:
        app = load_app(options.app)
        for module in app.settings.include:
            import_module(module)
        if app.servers.broker_name.startswith("memory:"):
            raise ConfigurationError(
                "memory:// lives inside one program, so nothing could ever reach this worker; "
                "use sqlite:///file or Redis, or run aqueue.worker.Worker inside the program"
            )
        app.add_observer(logs.log_run)
        queues = [check_queue(queue.strip()) for queue in options.queues.split(",") if queue.strip()]
        # What was imported stays; and messages live for a batch, which is longer than the collector expects.
        gc.freeze()
        gc.set_threshold(25_000, 20, 20)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            runner.run(_work(app, queues, options))
    except AQueueError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 2
    return 0


async def _work(app: aqueue.AQueue, queues: list[str], options: Options) -> None:
    worker = Worker(
        app,
        queues=queues,
        concurrency=options.concurrency,
        threads=options.threads,
        name=options.name,
        grace=options.grace,
    )
    print(banner(worker), file=sys.stderr, flush=True)  # noqa: T201
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, worker.stop)
    await worker.run()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        factory: Callable[[], asyncio.AbstractEventLoop] = import_module("uvloop").new_event_loop
    except ImportError:
        return None
    return factory


def banner(worker: Worker) -> str:
    """What a worker says of itself at the start."""
    app = worker.app
    tasks = sorted(app.tasks.items())
    lease = app.settings.lease
    width = max((len(name) for name, _ in tasks), default=0)
    nothing = " (nothing can run: is the module that declares them imported?)"
    lines = [
        f"aqueue {aqueue.__version__}, Python {platform.python_version()}, {worker.name}, pid {os.getpid()}",
        f"  app       {app.name}",
        f"  broker    {app.servers.broker_name}",
        f"  results   {app.servers.store_name}",
        f"  queues    {', '.join(worker.queues)}",
        f"  slots     {worker.slots['coroutine']} coroutines, {worker.slots['thread']} threads",
        f"  limits    a task may run {app.settings.timeout:g} s unless it says otherwise",
        f"  delivery  at least once; again {lease:g} to {lease * 1.75:g} s after a worker was lost",
        f"  tasks     {len(tasks)}{'' if tasks else nothing}",
        *(f"    {name:{width}}  {app.queue_of(task)}  {task.definition.kind}" for name, task in tasks),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(serve(parse(sys.argv[1:])))
