"""Dead letters: messages that nobody could or wanted to run, kept until a person decides."""

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, BinaryIO, Final, Literal

import typer

from aqueue.app import AQueue
from aqueue.broker import DeadLetter, Sifted
from aqueue.cli.console import NO, confirm, fail, run, say, stop, table, to_json
from aqueue.cli.letters import Selection, Tally, document, duration, exported, header, imported
from aqueue.cli.target import AppOption, BrokerOption, JsonOption, YesOption, app_or_broker, no_more
from aqueue.errors import ConfigurationError
from aqueue.protocol import Message
from aqueue.saferepr import printable

commands = typer.Typer(
    help="Messages that nobody could run: list, show, retry, drop, export, import.", no_args_is_help=True
)

QueueOption = Annotated[str, typer.Option("--queue", "-Q", help="Only those of one queue.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Only those with this reason.")]
TaskOption = Annotated[str, typer.Option("--task", metavar="GLOB", help="Only those of tasks with such a name.")]
OlderOption = Annotated[
    str, typer.Option("--older-than", metavar="TIME", help="Only those dead for longer: 30s, 1h...")
]
NewerOption = Annotated[str, typer.Option("--newer-than", metavar="TIME", help="Only those dead for less: 30s, 1h...")]
IdOption = Annotated[list[str], typer.Option("--id", help="Only those with this id, of the letter or of its task.")]
AllOption = Annotated[bool, typer.Option("--all", help="All there are.")]
DryOption = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
Ids = Annotated[list[str], typer.Argument(metavar="[APP] [ID]...", show_default=False)]
Words = Annotated[list[str], typer.Argument(metavar="[APP]", show_default=False)]
#: Letters looked at, or sent, at once.
_PAGE: Final = 500


@commands.command("list")
def list_letters(
    context: typer.Context,
    words: Words = [],  # noqa: B006 - typer copies it
    app: AppOption = "",
    broker: BrokerOption = "",
    queue: QueueOption = "",
    reason: ReasonOption = "",
    task: TaskOption = "",
    older_than: OlderOption = "",
    newer_than: NewerOption = "",
    id: IdOption = [],  # noqa: B006
    limit: Annotated[int, typer.Option(help="At most so many, the newest first.")] = 50,
    as_json: JsonOption = False,
) -> None:
    """List dead letters, the newest first."""
    aq, rest = app_or_broker(context, words, app, broker)
    no_more(rest)
    chosen = _selection(id, queue, reason, task, older_than, newer_than)
    rows = [
        (
            letter.id,
            letter.message.queue,
            letter.reason,
            printable(header(letter, "task"), 60),
            printable(header(letter, "id"), 40),
            letter.died.strftime("%Y-%m-%d %H:%M:%S"),
            printable(letter.detail, 80),
        )
        for letter in run(_newest(aq, chosen, limit))
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
    """Show one dead letter whole: why it died, who lost it, its earlier deaths, its headers, its body."""
    aq, rest = app_or_broker(context, words, app, broker)
    if len(rest) != 1:
        stop("name one dead letter by its id", "aqueue dead list shows them")
    letter = run(_find(aq, rest[0]))
    if letter is None:
        stop(f"there is no dead letter {rest[0]}", "aqueue dead list shows them", NO)
    found = document(letter)
    if as_json:
        typer.echo(to_json(found))
        return
    for name, value in found.items():
        for line in value if name in ("losses", "earlier_deaths") else [value]:
            typer.echo(f"{name + ':':16}{printable(line if isinstance(line, str) else to_json(line), 4000)}")


@commands.command("retry")
def retry(
    context: typer.Context,
    words: Ids = [],  # noqa: B006 - typer copies it
    *,
    app: AppOption = "",
    broker: BrokerOption = "",
    everything: AllOption = False,
    queue: QueueOption = "",
    reason: ReasonOption = "",
    task: TaskOption = "",
    older_than: OlderOption = "",
    newer_than: NewerOption = "",
    id: IdOption = [],  # noqa: B006
    rate: Annotated[float, typer.Option(help="At most so many each second; 0: as fast as can be.", min=0)] = 0.0,
    dry_run: DryOption = False,
    as_json: JsonOption = False,
) -> None:
    """Put dead letters back at the end of their queues, byte for byte, the oldest first."""
    aq, rest = app_or_broker(context, words, app, broker)
    chosen = _selection([*rest, *id], queue, reason, task, older_than, newer_than)
    _something(chosen, everything)
    if dry_run:
        _foretell("put back", run(_sift(aq, chosen, "keep"))[0], as_json)
        return
    found, moved = run(_sift(aq, chosen, "retry", rate) if rate or not _by_name(chosen, rest) else _retry(aq, rest))
    _report("put back", found, moved, rest, as_json, "retried")


@commands.command("drop")
def drop(
    context: typer.Context,
    words: Ids = [],  # noqa: B006 - typer copies it
    *,
    app: AppOption = "",
    broker: BrokerOption = "",
    everything: AllOption = False,
    queue: QueueOption = "",
    reason: ReasonOption = "",
    task: TaskOption = "",
    older_than: OlderOption = "",
    newer_than: NewerOption = "",
    id: IdOption = [],  # noqa: B006
    dry_run: DryOption = False,
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Delete dead letters for good."""
    aq, rest = app_or_broker(context, words, app, broker)
    chosen = _selection([*rest, *id], queue, reason, task, older_than, newer_than)
    _something(chosen, everything)
    if dry_run:
        _foretell("delete", run(_sift(aq, chosen, "keep"))[0], as_json)
        return
    if not yes:
        total = run(_sift(aq, chosen, "keep"))[0].total
        confirm(f"Delete {total} dead letters for good?", yes, "add --yes")
    found, moved = run(_drop(aq, rest) if _by_name(chosen, rest) else _sift(aq, chosen, "drop"))
    _report("deleted", found, moved, rest, as_json, "dropped")


@commands.command("export")
def export(
    context: typer.Context,
    words: Words = [],  # noqa: B006 - typer copies it
    app: AppOption = "",
    broker: BrokerOption = "",
    queue: QueueOption = "",
    reason: ReasonOption = "",
    task: TaskOption = "",
    older_than: OlderOption = "",
    newer_than: NewerOption = "",
    id: IdOption = [],  # noqa: B006
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE", help="A new file; - prints.")] = "-",
) -> None:
    """Write dead letters as lines of JSON, the oldest first; they stay where they are."""
    aq, rest = app_or_broker(context, words, app, broker)
    no_more(rest)
    chosen = _selection(id, queue, reason, task, older_than, newer_than)
    if output == "-":
        run(_export(aq, chosen, sys.stdout.buffer))
        return
    try:
        with Path(output).open("xb") as file:
            written = run(_export(aq, chosen, file))
    except OSError as error:
        stop(f"can't write {output}: {error.strerror}", "name a file that is not there yet, on a disk with room")
    say(f"wrote {written} to {output}")


@commands.command("import")
def import_letters(
    context: typer.Context,
    words: Annotated[list[str], typer.Argument(metavar="[APP] FILE")],
    app: AppOption = "",
    broker: BrokerOption = "",
    as_json: JsonOption = False,
) -> None:
    """Send what was exported, from this broker or another one, to its queues on this one."""
    aq, rest = app_or_broker(context, words, app, broker)
    if len(rest) != 1:
        stop("name one file", "aqueue dead export --output FILE writes one")
    try:
        with Path(rest[0]).open("rb") as file:
            sent, left = run(_import(aq, file))
    except OSError as error:
        stop(f"can't read {rest[0]}: {error.strerror}")
    say(f"sent {sent}, left out {left} that nobody can read", as_json=as_json, sent=sent, left=left)
    if left:
        raise typer.Exit(NO)


# --- what is meant -------------------------------------------------------------------------------------------


def _selection(ids: Sequence[str], queue: str, reason: str, task: str, older_than: str, newer_than: str) -> Selection:
    try:
        return Selection(
            ids=ids,
            queue=queue,
            reason=reason,
            task=task,
            older_than=duration(older_than) if older_than else None,
            newer_than=duration(newer_than) if newer_than else None,
        )
    except ConfigurationError as error:
        fail(error)


def _something(chosen: Selection, everything: bool) -> None:
    """Nothing said is not everything meant."""
    if chosen.is_everything and not everything:
        stop("name dead letters by their ids, by what they are (--queue, --task...), or --all", "see aqueue dead list")


def _by_name(chosen: Selection, named: Sequence[str]) -> bool:
    """Whether nothing is said but the ids of letters, which are found without looking at all letters."""
    return bool(named) and chosen == Selection(ids=named, now=chosen.now)


# --- what is said --------------------------------------------------------------------------------------------


def _foretell(what: str, found: Tally, as_json: bool) -> None:
    rows = [(count, *map(printable, group)) for group, count in sorted(found.groups.items())]
    if not as_json:
        say(f"would {what} {found.total}")
    if rows or as_json:
        table(rows, ("Count", "Queue", "Reason", "Task"), as_json=as_json)


def _report(what: str, found: Tally, moved: int, named: Sequence[str], as_json: bool, field: str) -> None:
    wanted = max(found.total, len(named))
    say(f"{what} {moved} of {wanted}", as_json=as_json, **{field: moved})
    if moved < wanted:
        raise typer.Exit(NO)


# --- what is done --------------------------------------------------------------------------------------------


async def _newest(aq: AQueue, chosen: Selection, limit: int) -> Sequence[DeadLetter]:
    async with aq:
        where = None if chosen.is_everything else chosen
        return await aq.producer().broker.inspection.dead(chosen.queue or None, limit, where)


async def _find(aq: AQueue, id: str) -> DeadLetter | None:
    async with aq:
        return await aq.producer().broker.inspection.find_dead(id)


async def _retry(aq: AQueue, ids: Sequence[str]) -> tuple[Tally, int]:
    async with aq:
        return Tally(), await aq.producer().broker.inspection.retry_dead(ids)


async def _drop(aq: AQueue, ids: Sequence[str]) -> tuple[Tally, int]:
    async with aq:
        return Tally(), await aq.producer().broker.inspection.drop_dead(ids)


async def _sift(
    aq: AQueue, chosen: Selection, fate: Literal["keep", "retry", "drop"], rate: float = 0.0
) -> tuple[Tally, int]:
    """What was chosen, and how many of them met their fate, ``rate`` each second."""
    found = Tally()
    loop = asyncio.get_running_loop()
    due = loop.time()

    async def visit(page: Sequence[DeadLetter]) -> Sifted:
        nonlocal due
        mine = [letter for letter in page if chosen(letter)]
        found.add(mine)
        if rate and mine:
            await asyncio.sleep(due - loop.time())
            due = max(due, loop.time()) + len(mine) / rate
        ids = [letter.id for letter in mine]
        return Sifted(retry=ids if fate == "retry" else (), drop=ids if fate == "drop" else ())

    page = max(1, min(_PAGE, int(rate))) if rate else _PAGE
    async with aq:
        retried, dropped = await aq.producer().broker.inspection.sift_dead(visit, page)
    return found, retried + dropped


async def _export(aq: AQueue, chosen: Selection, file: BinaryIO) -> int:
    written = 0

    async def visit(page: Sequence[DeadLetter]) -> Sifted:
        nonlocal written
        mine = [letter for letter in page if chosen(letter)]
        file.writelines(map(exported, mine))
        written += len(mine)
        return Sifted()

    async with aq:
        await aq.producer().broker.inspection.sift_dead(visit, _PAGE)
    file.flush()
    return written


async def _import(aq: AQueue, file: BinaryIO) -> tuple[int, int]:
    """How many were sent, and how many nobody can read. Raises ConfigurationError, EnqueueFailed, EnqueueUnknown."""
    sent = left = 0
    batch: list[Message] = []
    async with aq:
        broker = aq.producer().broker
        for number, line in enumerate(file, 1):
            try:
                message = imported(line)
            except ConfigurationError as error:
                raise ConfigurationError(f"line {number}: {error}; {sent} before it were sent") from None
            if message is None:
                left += 1
                continue
            batch.append(message)
            if len(batch) == _PAGE:
                await broker.publish(batch)
                sent += len(batch)
                batch = []
        await broker.publish(batch)
    return sent + len(batch), left
