"""What ``aqueue worker`` logs: lines for people, coloured on a terminal, or JSON, one object a line.

Only the command does this; the library never touches the application's logging configuration.
"""

import logging
import sys
import time
from typing import Any, Final, Literal

import msgspec

from aqueue.context import Context, current
from aqueue.outcome import Again, Dead, Done, Failed, GiveBack, Outcome, PutOff, Repeated, Revoked
from aqueue.saferepr import printable

LogFormat = Literal["human", "json"]

logger = logging.getLogger("aqueue.tasks")

_COLOURS: Final = {
    logging.DEBUG: "\033[2m",
    logging.INFO: "\033[32m",
    logging.WARNING: "\033[33m",
    logging.ERROR: "\033[31m",
    logging.CRITICAL: "\033[31;1m",
}
_RESET: Final = "\033[0m"


def configure(level: str, style: LogFormat) -> None:
    """Log to standard error, unless the application has set up logging by itself."""
    root = logging.getLogger()
    if root.handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if style == "json" else HumanFormatter(coloured=sys.stderr.isatty()))
    root.addHandler(handler)
    root.setLevel(level.upper())


class HumanFormatter(logging.Formatter):
    """``12:00:01.123 INFO    message``"""

    def __init__(self, *, coloured: bool) -> None:
        super().__init__()
        self._coloured = coloured

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = f"{record.levelname:7}"
        if self._coloured:
            level = f"{_COLOURS.get(record.levelno, '')}{level}{_RESET}"
        text = f"{clock}.{int(record.msecs):03d} {level} {record.getMessage()}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, and the task it is about."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        context = current()
        line["task_id"] = getattr(record, "task_id", context.id if context else None)
        line["task"] = getattr(record, "task_name", context.task if context else None)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode({key: value for key, value in line.items() if value is not None}).decode()


def log_run(context: Context, outcome: Outcome, seconds: float) -> None:
    """An observer: one line for each run, a traceback for each failure."""
    name = printable(context.request.shadow or context.task)
    about = {"task_id": context.id, "task_name": context.task}
    match outcome:
        case Done():
            logger.info("%s[%s] succeeded in %.3f s", name, context.id, seconds, extra=about)
        case Again(delay=delay, error=error):
            why = "" if error is None else f" after {type(error).__name__}: {printable(error)}"
            logger.warning("%s[%s] runs again in %.1f s%s", name, context.id, delay, why, extra=about)
        case Failed(error=error):
            logger.error("%s[%s] failed after %.3f s", name, context.id, seconds, exc_info=error, extra=about)
        case Revoked(reason=reason):
            logger.info("%s[%s] was not run: %s", name, context.id, reason, extra=about)
        case GiveBack() | PutOff():
            logger.info("%s[%s] was given back", name, context.id, extra=about)
        case Dead() | Repeated():
            pass  # logged where it is decided
        case _:
            logger.info("%s[%s] ended in %.3f s", name, context.id, seconds, extra=about)
