"""What commands print: tables on a terminal, plain text in a pipe, JSON when asked; errors with a next step."""

import asyncio
import sys
from collections.abc import Coroutine, Sequence
from typing import Any, NoReturn, TypeVar

import msgspec
import typer

from aqueue.errors import (
    AQueueError,
    BrokerUnavailable,
    ConfigurationError,
    InvalidArguments,
    ResultTimeout,
    ResultUnknown,
    StoreUnavailable,
)

T = TypeVar("T")

OK, NO, WRONG, UNREACHABLE, TOO_LATE = range(5)

_NEXT_STEPS: dict[type[AQueueError], str] = {
    BrokerUnavailable: "check that the broker runs and that its URL is right",
    StoreUnavailable: "check that the result store runs and that its URL is right",
    ResultTimeout: "ask again later, or give it longer with --timeout",
    ResultUnknown: "check the id; results are kept for the app's result_expires",
}


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run a command's coroutine; what aqueue raises becomes a sentence and an exit code."""
    try:
        return asyncio.run(work)
    except AQueueError as error:
        fail(error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def fail(error: AQueueError) -> NoReturn:
    """Say what happened and what to do next, and exit."""
    step = next((step for kind, step in _NEXT_STEPS.items() if isinstance(error, kind)), "")
    stop(str(error), step, code=_code(error))


def stop(what: str, step: str = "", code: int = WRONG) -> NoReturn:
    """End the command with a message on standard error."""
    typer.secho(f"error: {what}", fg="red", err=True)
    if step:
        typer.secho(f"next:  {step}", err=True)
    raise typer.Exit(code)


def _code(error: AQueueError) -> int:
    if isinstance(error, ResultTimeout):
        return TOO_LATE
    if isinstance(error, BrokerUnavailable | StoreUnavailable):
        return UNREACHABLE
    return WRONG if isinstance(error, ConfigurationError | InvalidArguments) else NO


def say(text: str, *, as_json: bool = False, **fields: Any) -> None:
    """One line for people, or its fields as JSON."""
    typer.echo(to_json(fields) if as_json else text)


def to_json(value: Any) -> str:
    """JSON on one line; what JSON doesn't know is written as text."""
    return msgspec.json.encode(value, enc_hook=repr).decode()


def table(
    rows: Sequence[Sequence[Any]], titles: Sequence[str], *, as_json: bool = False, empty: str = "nothing"
) -> None:
    """Rows as an aligned table on a terminal, as tab-separated text in a pipe, or as JSON objects."""
    if as_json:
        keys = [title.lower().replace(" ", "_") for title in titles]
        typer.echo(to_json([dict(zip(keys, row, strict=True)) for row in rows]))
    elif not rows:
        typer.echo(empty, err=True)
    elif sys.stdout.isatty():
        _aligned(rows, titles)
    else:
        for row in rows:
            typer.echo("\t".join(map(_text, row)))


def _aligned(rows: Sequence[Sequence[Any]], titles: Sequence[str]) -> None:
    cells = [[*map(_text, row)] for row in rows]
    widths = [max(len(row[column]) for row in (titles, *cells)) for column in range(len(titles))]
    numbers = [all(isinstance(row[column], int | float) for row in rows) for column in range(len(titles))]
    typer.secho(_line(titles, widths, numbers), bold=True)
    for row in cells:
        typer.echo(_line(row, widths, numbers))


def _line(cells: Sequence[str], widths: Sequence[int], numbers: Sequence[bool]) -> str:
    aligned = [
        cell.rjust(width) if number else cell.ljust(width)
        for cell, width, number in zip(cells, widths, numbers, strict=True)
    ]
    return "  ".join(aligned).rstrip()


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def confirm(question: str, yes: bool, step: str) -> None:
    """Ask, unless told not to; without a terminal to ask on, stop."""
    if yes:
        return
    if not sys.stdin.isatty():
        stop("this needs a confirmation, and there is no terminal to ask on", step)
    if not typer.confirm(question):
        raise typer.Exit(NO)
