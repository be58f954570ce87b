"""The commands, put together."""

import logging
from typing import Annotated

import typer

import aqueue
from aqueue.cli import cancel, dead, doctor, inspect, send, worker
from aqueue.cli.target import Given

cli = typer.Typer(
    name="aqueue",
    help="An asyncio-native task queue that speaks Celery's wire protocol.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@cli.callback(invoke_without_command=True)
def everything(
    context: typer.Context,
    app: Annotated[str, typer.Option("--app", "-A", metavar="MODULE:APP", help="The app, as in Celery.")] = "",
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(aqueue.__version__)
        raise typer.Exit
    logging.getLogger("aqueue").setLevel(logging.ERROR)  # what goes wrong is said once, at the end
    context.obj = Given(app)


cli.command("worker")(worker.work)
cli.command("send")(send.send)
cli.command("result")(send.result)
cli.command("doctor")(doctor.examine)
cli.command("cancel")(cancel.cancel)
cli.command("queues")(inspect.queues)
cli.command("workers")(inspect.workers)
cli.command("tasks")(inspect.tasks)
cli.command("purge")(inspect.purge)
cli.command("recover")(inspect.recover)
cli.add_typer(dead.commands, name="dead")
