"""Dead letters: messages that nobody could or wanted to run, kept until a person decides."""

import base64
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from aqueue.app import AQueue
from aqueue.broker import DeadLetter
from aqueue.cli.console import NO, confirm, run, say, stop, table, to_json
from aqueue.cli.target import AppOption, BrokerOption, JsonOption, YesOption, app_or_broker, no_more
from aqueue.protocol import Unreadable
from aqueue.saferepr import printable

commands = typer.Typer(help="Messages that nobody could run: list, show, retry, drop.", no_args_is_help=True)

QueueOption = Annotated[str, typer.Option("--queue", "-Q", help="Only those of one queue.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Only those with this reason.")]
AllOption = Annotated[bool, typer.Option("--all", help="All that fit --queue and --reason.")]
Ids = Annotated[list[str], typer.Argument(metavar="[APP] [ID]...", show_default=False)]
#: More dead letters than a person would look at one by one.
_MANY = 1_000_000


@commands.command("list")
def list_letters(
    context: typer.Context,
    words: Annotated[list[str], typer.Argument(metavar="[APP]", show_default=False)] = [],  # noqa: B006 - copied
    app: AppOption = "",
    broker: BrokerOption = "",
    queue: QueueOption = "",
    reason: ReasonOption = "",
    limit: Annotated[int, typer.Option(help="At most so many, the newest first.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """List dead letters, the newest first."""
    aq, rest = app_or_broker(context, words, app, broker)
    no_more(rest)
    rows = [
        (
            letter.id,
            letter.message.queue,
            letter.reason,
            printable(_header(letter, "task"), 60),
            printable(_header(letter, "id"), 40),
            letter.died.strftime("%Y-%m-%d %H:%M:%S"),
            printable(letter.detail, 80),
        )
        for letter in run(_letters(aq, queue, reason))[:limit]
    ]
    titles = ("Id", "Queue", "Reason", "Task", "Task id", "Died", "Detail")
    table(rows, titles, as_json=as_json, empty="no dead letters")


@commands.command("show")
def show(
    context: typer.Context,
    words: Ids,
    app: AppOption = "",
    broker: BrokerOption = "",
    as_json: JsonOption = False,
) -> None:
    """Show one dead letter whole: why it died, its headers, its body."""
    aq, rest = app_or_broker(context, words, app, broker)
    if len(rest) != 1:
        stop("name one dead letter by its id", "aqueue dead list shows them")
    letter = run(_find(aq, rest[0]))
    if letter is None:
        stop(f"there is no dead letter {rest[0]}", "aqueue dead list shows them", NO)
    found = _document(letter)
    if as_json:
        typer.echo(to_json(found))
        return
    for name, value in found.items():
        typer.echo(f"{name + ':':14}{printable(value if isinstance(value, str) else to_json(value), 4000)}")


@commands.command("retry")
def retry(
    context: typer.Context,
    words: Ids = [],  # noqa: B006 - typer copies it
    app: AppOption = "",
    broker: BrokerOption = "",
    everything: AllOption = False,
    queue: QueueOption = "",
    reason: ReasonOption = "",
    as_json: JsonOption = False,
) -> None:
    """Put dead letters back at the end of their queues, byte for byte."""
    aq, rest = app_or_broker(context, words, app, broker)
    ids = _chosen(aq, rest, everything, queue, reason)
    moved = run(_retry(aq, ids))
    say(f"put back {moved} of {len(ids)}", as_json=as_json, retried=moved)
    if moved < len(ids):
        raise typer.Exit(NO)


@commands.command("drop")
def drop(
    context: typer.Context,
    words: Ids = [],  # noqa: B006 - typer copies it
    app: AppOption = "",
    broker: BrokerOption = "",
    everything: AllOption = False,
    queue: QueueOption = "",
    reason: ReasonOption = "",
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Delete dead letters for good."""
    aq, rest = app_or_broker(context, words, app, broker)
    ids = _chosen(aq, rest, everything, queue, reason)
    confirm(f"Delete {len(ids)} dead letters for good?", yes, "add --yes")
    dropped = run(_drop(aq, ids))
    say(f"deleted {dropped} of {len(ids)}", as_json=as_json, dropped=dropped)
    if dropped < len(ids):
        raise typer.Exit(NO)


def _chosen(aq: AQueue, ids: list[str], everything: bool, queue: str, reason: str) -> list[str]:
    if everything:
        return [letter.id for letter in run(_letters(aq, queue, reason))]
    if not ids:
        stop("name dead letters by their ids, or --all", "aqueue dead list shows them")
    return ids


def _header(letter: DeadLetter, name: str) -> Any:
    return "" if isinstance(letter.message, Unreadable) else letter.message.headers.get(name, "")


def _document(letter: DeadLetter) -> dict[str, Any]:
    found: dict[str, Any] = {
        "id": letter.id,
        "queue": letter.message.queue,
        "reason": letter.reason,
        "detail": letter.detail,
        "died": letter.died.isoformat(),
        "deliveries": letter.deliveries,
        "worker": letter.worker,
    }
    if not isinstance(letter.message, Unreadable):
        found["content_type"] = letter.message.content_type
        found["headers"] = letter.message.headers
        found["properties"] = letter.message.properties
    try:
        found["body"] = letter.raw.decode()
    except UnicodeDecodeError:
        found["body_base64"] = base64.b64encode(letter.raw).decode()
    return found


async def _letters(aq: AQueue, queue: str, reason: str) -> Sequence[DeadLetter]:
    async with aq:
        found = await aq.producer().broker.inspection.dead(queue or None, _MANY)
    return [letter for letter in found if reason in ("", letter.reason)]


async def _find(aq: AQueue, id: str) -> DeadLetter | None:
    async with aq:
        return await aq.producer().broker.inspection.find_dead(id)


async def _retry(aq: AQueue, ids: list[str]) -> int:
    async with aq:
        return await aq.producer().broker.inspection.retry_dead(ids)


async def _drop(aq: AQueue, ids: list[str]) -> int:
    async with aq:
        return await aq.producer().broker.inspection.drop_dead(ids)
