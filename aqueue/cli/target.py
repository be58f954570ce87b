"""What a command works on: an app that is imported, or just a broker's URL."""

import os
from dataclasses import dataclass
from typing import Annotated, Final

import typer

from aqueue.app import AQueue
from aqueue.cli.console import fail, stop
from aqueue.cli.locate import load_app
from aqueue.errors import AQueueError

AppOption = Annotated[
    str, typer.Option("--app", "-A", metavar="MODULE:APP", help="The app; also as first argument, or AQUEUE_APP.")
]
BrokerOption = Annotated[
    str, typer.Option("--broker", "-b", metavar="URL", help="A broker to look at, without importing an app.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Don't ask.")]

_STEP: Final = "aqueue COMMAND module:app, or -A module:app before or behind the command, or set AQUEUE_APP"


@dataclass(slots=True)
class Given:
    """What was said before the command's name, as in Celery's ``-A proj worker``."""

    app: str = ""


def app_name(context: typer.Context, words: list[str], option: str) -> tuple[str, list[str]]:
    """``module:app`` as it was said, and the arguments that are left; exits with a message when there is none."""
    given: Given = context.obj
    named = option or given.app
    if not named and words and ":" in words[0]:
        named, words = words[0], words[1:]
    named = named or os.environ.get("AQUEUE_APP", "")
    if not named and words:
        named, words = words[0], words[1:]
    if not named:
        stop("which app?", _STEP)
    return named, words


def app_and_words(context: typer.Context, words: list[str], option: str) -> tuple[AQueue, list[str]]:
    """The app, imported, and the arguments that are left; exits with a message when that is not possible."""
    named, words = app_name(context, words, option)
    try:
        return load_app(named), words
    except AQueueError as error:
        fail(error)


def app_or_broker(context: typer.Context, words: list[str], option: str, broker: str) -> tuple[AQueue, list[str]]:
    """Like `app_and_words`, or with ``--broker`` an app that knows nothing but the broker."""
    if not broker:
        return app_and_words(context, words, option)
    try:
        return AQueue("cli", broker=broker), words
    except AQueueError as error:
        fail(error)


def no_more(words: list[str]) -> None:
    """Exit with a message when there are arguments that nobody asked for."""
    if words:
        stop(f"unexpected argument {words[0]!r}", "aqueue COMMAND --help shows what it takes")
