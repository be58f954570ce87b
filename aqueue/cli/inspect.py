"""Looking at queues and tasks, and putting queues right."""

import time
from collections.abc import Sequence
from typing import Annotated

import typer

from aqueue.app import AQueue
from aqueue.broker import Presence, QueueDepth, Recovered
from aqueue.cli.console import confirm, run, say, stop, table
from aqueue.cli.target import AppOption, BrokerOption, JsonOption, YesOption, app_and_words, app_or_broker, no_more
from aqueue.saferepr import printable

Words = Annotated[list[str], typer.Argument(metavar="[APP]", show_default=False)]


def queues(
    context: typer.Context,
    words: Words = [],  # noqa: B006 - typer copies it
    app: AppOption = "",
    broker: BrokerOption = "",
    as_json: JsonOption = False,
) -> None:
    """Show how many messages wait, run, are parked for later, and are dead, for each queue.

    RabbitMQ tells only what waits, of the queues that the app names.
    """
    aq, rest = app_or_broker(context, words, app, broker)
    no_more(rest)
    rows = [(q.queue, q.ready, _known(q.leased), _known(q.parked), q.dead) for q in run(_depths(aq))]
    table(rows, ("Queue", "Ready", "Leased", "Parked", "Dead"), as_json=as_json, empty="no queue holds anything")


def _known(count: int | None) -> int | str:
    return "?" if count is None else count


async def _depths(aq: AQueue) -> Sequence[QueueDepth]:
    async with aq:
        return await aq.producer().broker.inspection.queues(aq.queues())


def workers(
    context: typer.Context,
    words: Words = [],  # noqa: B006 - typer copies it
    app: AppOption = "",
    broker: BrokerOption = "",
    as_json: JsonOption = False,
) -> None:
    """Show the workers that were heard of lately: what they run, and what blocked their event loops.

    RabbitMQ keeps no list of them.
    """
    aq, rest = app_or_broker(context, words, app, broker)
    no_more(rest)
    now = time.time()
    rows = [
        (
            found.worker,
            found.pid,
            f"{now - found.told:.0f} s ago",
            found.running,
            sum(found.slots.values()),
            found.ended,
            found.stalls,
            f"{found.stalled_seconds:.1f}",
            printable(found.stall, 120),
        )
        for found in run(_workers(aq))
    ]
    titles = ("Worker", "Pid", "Heard", "Running", "Slots", "Ended", "Stalls", "Seconds", "Blocked last by")
    table(rows, titles, as_json=as_json, empty="no worker was heard of lately")


async def _workers(aq: AQueue) -> Sequence[Presence]:
    async with aq:
        return await aq.producer().broker.inspection.workers()


def tasks(
    context: typer.Context,
    words: Words = [],  # noqa: B006 - typer copies it
    app: AppOption = "",
    as_json: JsonOption = False,
) -> None:
    """List the tasks that an app declares, where they run and where they go."""
    aq, rest = app_and_words(context, words, app)
    no_more(rest)
    rows = [
        (
            name,
            task.definition.kind,
            aq.queue_of(task),
            task.definition.retry.attempts if task.definition.retry else 1,
            task.definition.timeout or aq.settings.timeout,
        )
        for name, task in sorted(aq.tasks.items())
    ]
    titles = ("Task", "Runs as", "Queue", "Attempts", "Timeout")
    table(rows, titles, as_json=as_json, empty=f"{aq.name} declares no tasks; is the module that does imported?")


def purge(
    context: typer.Context,
    words: Annotated[list[str], typer.Argument(metavar="[APP] QUEUE")],
    app: AppOption = "",
    broker: BrokerOption = "",
    yes: YesOption = False,
    as_json: JsonOption = False,
) -> None:
    """Delete the waiting messages of a queue; what runs is left to end."""
    aq, rest = app_or_broker(context, words, app, broker)
    if len(rest) != 1:
        stop("name one queue to purge", "aqueue queues shows which there are")
    confirm(f"Delete every message waiting in {rest[0]} on {aq.servers.broker_name}?", yes, "add --yes")
    purged = run(_purge(aq, rest[0]))
    say(f"deleted {purged} messages from {rest[0]}", as_json=as_json, queue=rest[0], purged=purged)


async def _purge(aq: AQueue, queue: str) -> int:
    async with aq:
        return await aq.producer().broker.inspection.purge(queue)


def recover(
    context: typer.Context,
    words: Words = [],  # noqa: B006 - typer copies it
    app: AppOption = "",
    broker: BrokerOption = "",
    celery: Annotated[bool, typer.Option("--celery", help="Also what Celery workers fetched and left.")] = False,
    older_than: Annotated[float, typer.Option(help="With --celery: fetched more than so many seconds ago.")] = 3600.0,
    parked: Annotated[bool, typer.Option("--parked", help="Also what waits for its time, for Celery to hold.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Give back to their queues what workers that are gone for good have left.

    Live workers do this by themselves. This is for when none is left that would: before only Celery workers
    go on, or, with --celery, after the last Celery worker has stopped. Messages that a live worker of ours
    holds are never touched; those of a live Celery worker can't be told from a dead one's, so stop them first.
    """
    aq, rest = app_or_broker(context, words, app, broker)
    no_more(rest)
    given = run(_recover(aq, older_than, celery, parked))
    counts = f"{given.leased} leased, {given.parked} parked, {given.unacked} from Celery"
    say(
        f"given back: {counts}; left alone: {given.left}",
        as_json=as_json,
        leased=given.leased,
        parked=given.parked,
        unacked=given.unacked,
        left=given.left,
    )


async def _recover(aq: AQueue, older_than: float, celery: bool, parked: bool) -> Recovered:
    async with aq:
        return await aq.producer().broker.inspection.recover(older_than=older_than, celery=celery, parked=parked)
