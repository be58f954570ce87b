"""``aqueue worker``: what it can be told."""

import os
import sys
from typing import Annotated, Final

import typer

from aqueue.cli import supervise
from aqueue.cli.console import stop
from aqueue.cli.target import AppOption, app_name, no_more
from aqueue.supervisor import Options

_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
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
    processes: Annotated[
        int, typer.Option("--processes", min=0, help="Functions in processes of their own at once; 0: one per CPU.")
    ] = 0,
    loglevel: Annotated[str, typer.Option("--loglevel", "-l", help="debug, info, warning, error.")] = "info",
    log_format: Annotated[str, typer.Option("--log-format", help="human or json.")] = "human",
    name: Annotated[str, typer.Option("--hostname", "-n", help="The worker's name; %h is the host.")] = "worker",
    grace: Annotated[float, typer.Option(help="Seconds that running tasks may go on after SIGTERM.")] = 25.0,
    workers: Annotated[int, typer.Option("--workers", "-w", min=1, help="Worker processes.")] = 1,
    max_tasks: Annotated[int, typer.Option(min=0, help="Replace a process after so many tasks; 0: never.")] = 0,
    max_memory: Annotated[str, typer.Option(help="Replace a process that takes more, such as 500M; 0: never.")] = "0",
    max_stall: Annotated[
        float, typer.Option(min=1.0, help="Seconds after which a process whose event loop is blocked is killed.")
    ] = 300.0,
    reload: Annotated[bool, typer.Option("--reload", help="Start again when code below this folder changes.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Start whatever the checks say, see aqueue doctor.")] = False,
) -> None:
    """Run an app's tasks until SIGTERM or Ctrl-C; the second one ends it at once."""
    if loglevel.lower() not in _LEVELS:
        stop(f"no log level {loglevel!r}", f"use one of {', '.join(_LEVELS)}")
    if log_format not in ("human", "json"):
        stop(f"no log format {log_format!r}", "use human or json")
    named, rest = app_name(context, words, app)
    no_more(rest)
    options = Options(
        app=named,
        queues=queues,
        concurrency=concurrency,
        threads=threads,
        processes=processes,
        loglevel=loglevel,
        log_format=log_format,
        name=name,
        grace=grace,
        workers=workers,
        max_tasks=max_tasks,
        max_memory=_bytes(max_memory),
        max_stall=max_stall,
        reload=reload,
        force=force,
    )
    # Without -P the folder of the script would stand before the standard library.
    os.execv(sys.executable, [sys.executable, "-P", supervise.__file__, *options.words()])  # noqa: S606 - our own words


def _bytes(text: str) -> int:
    """``500M``, ``2G``, ``1500000`` in bytes."""
    number, unit = (text[:-1], text[-1].upper()) if text[-1:].isalpha() else (text, "")
    try:
        return int(float(number) * _UNITS[unit])
    except (KeyError, ValueError):
        stop(f"{text!r} is no amount of memory", "write it like 500M or 2G")
