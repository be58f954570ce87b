"""``aqueue worker``: what it can be told."""

import os
import sys
from typing import Annotated, Final

import typer

from aqueue.cli import serve
from aqueue.cli.console import stop
from aqueue.cli.serve import Options
from aqueue.cli.target import AppOption, app_name, no_more

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
    named, rest = app_name(context, words, app)
    no_more(rest)
    options = Options(
        app=named,
        queues=queues,
        concurrency=concurrency,
        threads=threads,
        loglevel=loglevel,
        log_format=log_format,
        name=name,
        grace=grace,
    )
    os.execv(sys.executable, [sys.executable, "-m", serve.__name__, *options.words()])  # noqa: S606 - our own words
