"""The process in which a worker runs; its supervisor starts it, with options as words, ``name=value``."""

import asyncio
import faulthandler
import gc
import json
import logging
import os
import platform
import signal
import socket
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final

import aqueue
from aqueue.cli import logs
from aqueue.cli.locate import load_app
from aqueue.errors import AQueueError, BrokerUnavailable, ConfigurationError
from aqueue.options import check_queue
from aqueue.supervisor import Options
from aqueue.task import Kind
from aqueue.vitals import Vitals
from aqueue.watchdog import WorkerStuck
from aqueue.worker import Worker

logger = logging.getLogger("aqueue.worker")


def serve(options: Options) -> int:
    """Run one worker until it is told to stop; returns the exit code."""
    faulthandler.register(signal.SIGUSR2, all_threads=True)  # the supervisor asks for the stacks of what stands still
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
        return 1 if isinstance(error, WorkerStuck) else 2
    return 0


async def _work(app: aqueue.AQueue, queues: list[str], options: Options) -> None:
    worker = Worker(
        app,
        queues=queues,
        concurrency=options.concurrency,
        threads=options.threads,
        processes=options.processes,
        name=options.name,
        grace=options.grace,
        max_stall=options.max_stall,
        vitals=Vitals.open(options.vitals) if options.vitals >= 0 else None,
        force=options.force,
    )
    if options.banner:
        print(banner(worker), file=sys.stderr, flush=True)  # noqa: T201
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, worker.stop)
    lifeline = Lifeline(options.lifeline, worker) if options.lifeline >= 0 else None
    await worker.run()
    if lifeline is not None:
        lifeline.close()
    if worker.stuck:  # nothing else ends a coroutine that ignores being cancelled
        logging.shutdown()
        os._exit(0)


class Lifeline:
    """The socket to the supervisor. When that is gone, the worker stops: nobody works unwatched.

    The supervisor says what the last process held when it died, and how: that is remembered with the messages.
    """

    def __init__(self, descriptor: int, worker: Worker) -> None:
        self._socket = socket.socket(fileno=descriptor)
        self._socket.setblocking(False)
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._heard = b""
        self._explaining: set[asyncio.Task[None]] = set()
        url, settings = worker.app.servers.broker_url, worker.app.settings
        if url is not None:
            self._say(broker=url.reveal(), lease=settings.lease, timeout=settings.send_timeout)
        self._loop.add_reader(self._socket, self._hear)

    def _say(self, **what: Any) -> None:
        self._socket.send(json.dumps(what).encode() + b"\n")

    def _hear(self) -> None:
        try:
            data = self._socket.recv(65536)
        except OSError:
            data = b""
        if not data:
            self.close()
            logger.error("the supervisor is gone; this worker ends when its tasks have")
            self._worker.stop()
        *lines, self._heard = (self._heard + data).split(b"\n")
        for line in lines:
            told = json.loads(line)
            explaining = self._loop.create_task(self._explain(told["lost"], told["cause"]))
            self._explaining.add(explaining)
            explaining.add_done_callback(self._explaining.discard)

    async def _explain(self, receipts: list[str], cause: str) -> None:
        try:
            await self._worker.app.producer().broker.losses.explain(receipts, cause)
        except BrokerUnavailable as error:
            logger.warning("nobody will know how %d tasks were lost (%s): %s", len(receipts), cause, error)

    def close(self) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        factory: Callable[[], asyncio.AbstractEventLoop] = import_module("uvloop").new_event_loop
    except ImportError:
        return None
    return factory


_KINDS: Final[dict[Kind, str]] = {"coroutine": "coroutines", "thread": "threads", "process": "processes"}


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
        f"  slots     {', '.join(f'{worker.slots[kind]} {name}' for kind, name in _KINDS.items())}",
        f"  limits    a task may run {app.settings.timeout:g} s unless it says otherwise, block {worker.max_stall:g} s",
        f"  delivery  at least once; again {lease:g} to {lease * 1.75:g} s after a worker was lost",
        f"  tasks     {len(tasks)}{'' if tasks else nothing}",
        *(f"    {name:{width}}  {app.queue_of(task)}  {task.definition.kind}" for name, task in tasks),
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(serve(Options.parse(sys.argv[1:])))
