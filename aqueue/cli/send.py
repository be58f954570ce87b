"""Sending a task from a shell, and asking for a result."""

from contextlib import suppress
from difflib import get_close_matches
from typing import Annotated, Any

import msgspec
import typer

from aqueue.app import AQueue
from aqueue.async_result import UNKNOWN, AsyncResult
from aqueue.cli.console import NO, fail, run, say, stop, to_json
from aqueue.cli.target import AppOption, BrokerOption, JsonOption, app_and_words, app_or_broker
from aqueue.errors import AQueueError, TaskFailed, TaskRevoked
from aqueue.options import Options, check
from aqueue.results import RemoteError, Result
from aqueue.task import Signature


def send(
    context: typer.Context,
    words: Annotated[list[str], typer.Argument(metavar="[APP] TASK [ARGUMENT]... [NAME=VALUE]...")],
    app: AppOption = "",
    queue: Annotated[str, typer.Option("--queue", "-Q", help="Send to this queue.")] = "",
    countdown: Annotated[float, typer.Option(help="Run no sooner than in so many seconds.")] = 0.0,
    priority: Annotated[int, typer.Option(help="0 to 9, higher is more urgent.")] = -1,
    foreign: Annotated[bool, typer.Option("--foreign", help="The task is another program's, not this app's.")] = False,
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait for the result and print it.")] = False,
    timeout: Annotated[float, typer.Option(help="With --wait: seconds to wait.")] = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Send a task. Arguments are JSON where they can be read as JSON, else text."""
    aq, rest = app_and_words(context, words, app)
    if not rest:
        stop("which task?", "aqueue tasks shows which there are")
    options: Options = {}
    if queue:
        options["queue"] = queue
    if countdown:
        options["countdown"] = countdown
    if priority >= 0:
        options["priority"] = priority
    signature = _signature(aq, rest[0], rest[1:], options, foreign)
    result = run(_send(aq, signature, timeout if wait else None))
    if isinstance(result, AsyncResult):
        say(result.id, as_json=as_json, id=result.id)
    else:
        typer.echo(to_json(result))


def _signature(aq: AQueue, name: str, words: list[str], options: Options, foreign: bool) -> Signature[Any]:
    task = aq.tasks.get(name)
    if task is None and not foreign:
        near = get_close_matches(name, aq.tasks, 1)
        step = (
            f"did you mean {near[0]}?" if near else "aqueue tasks lists them; for another program's task add --foreign"
        )
        stop(f"{aq.name} has no task {name!r}", step)
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key.isidentifier():
            kwargs[key] = _value(value)
        else:
            args.append(_value(word))
    try:
        return Signature(name, args, kwargs, check(options), None if task is None else task.codec)
    except AQueueError as error:
        fail(error)


def _value(text: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


async def _send(aq: AQueue, signature: Signature[Any], timeout: float | None) -> Any:
    async with aq:
        result = await aq.send(signature)
        return result if timeout is None else await result.get(timeout)


def result(
    context: typer.Context,
    words: Annotated[list[str], typer.Argument(metavar="[APP] ID")],
    app: AppOption = "",
    backend: BrokerOption = "",
    wait: Annotated[bool, typer.Option("--wait", "-w", help="Wait until the task has ended.")] = False,
    timeout: Annotated[float, typer.Option(help="With --wait: seconds to wait.")] = 60.0,
    as_json: JsonOption = False,
) -> None:
    """Show what is known of a task: its state and its value, or its error and traceback."""
    aq, rest = app_or_broker(context, words, app, backend)
    if len(rest) != 1:
        stop("name one task by its id", "aqueue send prints the id of what it sends")
    found = run(_result(aq, rest[0], timeout if wait else None))
    if found is None:
        stop(f"no task {rest[0]} is known", "check the id; results are kept for the app's result_expires", NO)
    _show(found, as_json)
    if found.is_final and found.state != "SUCCESS":
        raise typer.Exit(NO)


async def _result(aq: AQueue, task_id: str, timeout: float | None) -> Result | None:
    async with aq:
        asked = aq.result(task_id)
        if timeout is not None and await asked.state() != UNKNOWN:
            with suppress(TaskFailed, TaskRevoked):  # shown by the caller
                await asked.get(timeout)
        return await asked.fetch()


def _show(found: Result, as_json: bool) -> None:
    error = found.value if isinstance(found.value, RemoteError) else None
    if as_json:
        document: dict[str, Any] = {"id": found.task_id, "state": found.state, "date_done": found.date_done}
        if error is None:
            document["result"] = found.value
        else:
            document |= {"error": {"type": error.exc_type, "message": error.text}, "traceback": found.traceback}
        if found.attempts:
            document["attempts"] = found.attempts
        typer.echo(to_json(document))
    elif error is None:
        typer.echo(
            found.state if found.value is None and not found.is_final else f"{found.state}  {to_json(found.value)}"
        )
    else:
        typer.echo(f"{found.state}  {error.exc_type}: {error.text}")
        if found.traceback:
            typer.echo(found.traceback.rstrip())
