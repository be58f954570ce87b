"""``aqueue doctor``: what is wrong with an app, its servers and this machine, and what to change."""

import os
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Final

import typer

from aqueue import checks
from aqueue.checks import Machine
from aqueue.cli.console import NO, UNREACHABLE, WRONG, fail, run, to_json
from aqueue.cli.target import AppOption, JsonOption, app_and_words, no_more
from aqueue.errors import AQueueError
from aqueue.findings import RULES, Finding
from aqueue.options import check_queue
from aqueue.task import Kind

_COLOURS: Final = {"refuse": "red", "warn": "yellow", "info": "cyan"}


def examine(
    context: typer.Context,
    words: Annotated[list[str], typer.Argument(metavar="[APP]", show_default=False)] = [],  # noqa: B006 - copied
    app: AppOption = "",
    queues: Annotated[
        str, typer.Option("--queues", "-Q", help="Queues of the worker, comma-separated; default: all of the app.")
    ] = "",
    concurrency: Annotated[int, typer.Option("--concurrency", "-c", min=1, help="Coroutines at once.")] = 100,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Plain functions at once.")] = 16,
    processes: Annotated[int, typer.Option("--processes", min=0, help="Child processes at once; 0: one a CPU.")] = 0,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 for warnings, too.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check an app, its tasks, its servers and this machine; nothing is changed.

    Exit codes: 0 fine; 1 with --strict, there are warnings; 2 a worker would refuse to start, or the app can't be
    loaded; 3 the broker or the result store can't be reached, so only the rest was checked.
    """
    aq, rest = app_and_words(context, words, app)
    no_more(rest)
    try:
        for module in aq.settings.include:
            import_module(module)
        served = [check_queue(queue.strip()) for queue in queues.split(",") if queue.strip()] or aq.queues()
    except AQueueError as error:
        fail(error)
    slots: dict[Kind, int] = {
        "coroutine": concurrency,
        "thread": threads,
        "process": processes or os.cpu_count() or 1,
    }
    found = run(checks.everything(aq, served, slots, Machine.here()))
    _show(found, as_json)
    raise typer.Exit(_exit_code(found, strict))


def _show(found: Sequence[Finding], as_json: bool) -> None:
    if as_json:
        keys = ("severity", "rule", "what", "next")
        rows = [(one.severity, one.rule, one.what, one.step) for one in found]
        typer.echo(to_json([dict(zip(keys, row, strict=True)) for row in rows]))
        return
    for one in found:
        typer.echo(f"{typer.style(f'{one.severity:6}', fg=_COLOURS[one.severity])}  {one.rule}  {one.what}")
        typer.echo(f"               next: {one.step}")
    typer.echo(f"{len(RULES)} rules, {len(found)} findings{'; docs/doctor.md explains them' if found else ''}")


def _exit_code(found: Sequence[Finding], strict: bool) -> int:
    severities = {one.severity for one in found}
    if "refuse" in severities:
        return WRONG
    if any(one.rule in ("AQ001", "AQ002") for one in found):
        return UNREACHABLE
    return NO if strict and "warn" in severities else 0
