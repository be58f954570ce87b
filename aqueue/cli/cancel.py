"""``aqueue cancel``: have tasks not run, or end."""

from typing import Annotated

import typer

from aqueue.app import AQueue
from aqueue.async_result import Cancelled
from aqueue.cli.console import NO, run, stop, table
from aqueue.cli.target import AppOption, BrokerOption, JsonOption, app_or_broker


def cancel(
    context: typer.Context,
    words: Annotated[list[str], typer.Argument(metavar="[APP] ID...")],
    app: AppOption = "",
    broker: BrokerOption = "",
    reason: Annotated[str, typer.Option("--reason", "-r", help="Why; told with the result.")] = "cancelled",
    waiting: Annotated[bool, typer.Option("--waiting", help="Leave alone what runs already.")] = False,
    keep: Annotated[
        float, typer.Option(help="Seconds to remember it, for tasks that wait longer than the app's cancel_expires.")
    ] = 0.0,
    as_json: JsonOption = False,
) -> None:
    """Cancel tasks: those that wait don't begin, those that run are ended. Exit code 1 when one had ended before."""
    aq, ids = app_or_broker(context, words, app, broker)
    if not ids:
        stop("name tasks by their ids", "aqueue send prints the id of what it sends")
    done = run(_cancel(aq, ids, reason, not waiting, keep or None))
    table(list(done.items()), ("id", "cancelled"), as_json=as_json)
    if "finished" in done.values():
        raise typer.Exit(NO)


async def _cancel(aq: AQueue, ids: list[str], reason: str, terminate: bool, keep: float | None) -> dict[str, Cancelled]:
    async with aq:
        return await aq.cancel_many(ids, reason, terminate=terminate, keep=keep)
