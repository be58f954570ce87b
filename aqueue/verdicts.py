"""From an outcome to what the broker and the result store are told; the one place that decides it."""

import logging
import os
import time
from datetime import datetime, timezone
from typing import Any, Final

import msgspec

from aqueue import errors
from aqueue.admission import task_id_of
from aqueue.arguments import PLAIN_TYPES
from aqueue.attempts import ERRORS, Attempt, attempts_of, remembered, snoozes_of
from aqueue.broker import Ack, Bury, Delivery, Release, Verdict
from aqueue.errors import (
    ControlFlow,
    EncodeError,
    Ignore,
    InvalidArguments,
    MessageTooLarge,
    Reject,
    RetryTask,
    Snooze,
)
from aqueue.failures import GivenUp, MaxRetriesExceeded, Rejected, remote_error, remote_text, traceback_text
from aqueue.options import is_seconds
from aqueue.outcome import Again, Dead, Done, Failed, GiveBack, Outcome, PutOff, Repeated, Revoked, Skipped, Snoozed
from aqueue.protocol import Message, Record, Request, Unreadable, retry_message, snooze_message
from aqueue.results import FAILURE, FINAL_STATES, RETRY, REVOKED, STARTED, SUCCESS, RemoteError, Result, ResultStore
from aqueue.retry import Retry
from aqueue.saferepr import printable
from aqueue.settings import Settings
from aqueue.task import Task

logger = logging.getLogger("aqueue.worker")


def outcome_of(error: BaseException, request: Request, task: Task[..., Any]) -> Outcome:
    """What an exception out of a run means. Running out of time is decided by the worker, not here."""
    policy = task.definition.retry
    match error:
        case Ignore():
            return Skipped()
        case Reject(requeue=True):
            return GiveBack(last=True)
        case Reject(reason=reason):
            return Dead("rejected", reason, Rejected(reason, False))
        case errors.Dead(reason=reason):
            given_up = GivenUp(reason).with_traceback(error.__traceback__)
            given_up.__cause__ = error.__cause__
            return Dead("dead_by_task", reason, given_up)
        case Snooze(after=after):
            return Snoozed(after)
        case RetryTask():
            return _retry(error, request, policy or Retry.default)
        case InvalidArguments():
            return Failed(error)
        case _:
            return _after_error(error, request, policy or Retry.none)


def _after_error(error: BaseException, request: Request, policy: Retry) -> Outcome:
    if request.retries + 1 < policy.attempts and not isinstance(error, ControlFlow) and policy.wants(error):
        return Again(policy.delay(request.retries + 1), error)
    return Failed(error)


def _retry(asked: RetryTask, request: Request, policy: Retry) -> Outcome:
    attempts = policy.attempts if asked.attempts is None else asked.attempts
    error = asked.error
    if error is not None and error.__traceback__ is None:  # never raised: it stands for what was
        error = error.with_traceback(asked.__traceback__)
    if asked.after is not None and not is_seconds(max(asked.after, 0.0)):  # in this order NaN stays NaN
        return Failed(InvalidArguments(f"a retry after {asked.after!r:.40}, which is no number of seconds"))
    if request.retries + 1 < attempts:
        return Again(policy.delay(request.retries + 1) if asked.after is None else asked.after, error)
    if error is None:
        told = f"{request.task}[{request.id}] was retried {request.retries} times"
        error = MaxRetriesExceeded(told).with_traceback(asked.__traceback__)
    return Failed(error)


#: How an attempt failed that asked for another without an error.
_ASKED_FOR: Final = RemoteError("Retry", ["the task asked to be run again"])
#: At so many snoozes, and at ten times as many, a warning is logged.
_MANY_SNOOZES: Final = 100


class Clock:
    """The time as Celery writes it; the text, which costs more than the reading, is kept for a millisecond."""

    def __init__(self) -> None:
        self._made = 0.0
        self._text = ""

    def __call__(self) -> str:
        now = time.time()
        if not 0 <= now - self._made < 0.001:
            self._made = now
            self._text = datetime.fromtimestamp(now, timezone.utc).isoformat(timespec="microseconds")
        return self._text


class Verdicts:
    """Outcomes to verdicts, for one worker."""

    def __init__(self, settings: Settings, store: ResultStore, worker: str) -> None:
        self._settings = settings
        self._store = store
        self._worker = worker
        self._clock = Clock()

    def of(
        self, delivery: Delivery, request: Request | None, task: Task[..., Any] | None, outcome: Outcome, now: float
    ) -> Verdict:
        """``request`` is None for a message that can't be read; ``now`` is the broker's clock as unix time."""
        match outcome:
            case Done(value=value):
                return Ack(record=self._success(delivery, request, task, value))
            case Failed(error=error):
                return Ack(record=self._with_error(delivery, request, task, FAILURE, error, self._last(request, error)))
            case Revoked(reason=reason):
                told = RemoteError("TaskRevokedError", [reason], "celery.exceptions")
                return Ack(record=self._record(delivery, request, task, REVOKED, told))
            case Skipped() | Repeated():
                return Ack()
            case Dead(reason=reason, detail=detail, error=error):
                told_of = None if error is None else self._with_error(delivery, request, task, FAILURE, error)
                return Bury(reason, printable(detail, 500), told_of)
            case _:
                return self._later(delivery, request, task, outcome, now)

    def _later(
        self,
        delivery: Delivery,
        request: Request | None,
        task: Task[..., Any] | None,
        outcome: Again | Snoozed | GiveBack | PutOff,
        now: float,
    ) -> Verdict:
        """Of what is not over yet."""
        match outcome:
            case GiveBack(delay=delay, last=last):
                return Release(delay, last)
            case PutOff(delay=delay, headers=headers):
                assert isinstance(delivery.message, Message), "only what was understood is put off"
                marked = {**delivery.message.headers, **headers}
                return Ack(publish=[msgspec.structs.replace(delivery.message, headers=marked, delay=delay)])
            case Snoozed(delay=delay):
                assert request is not None, "only what was understood can run"
                again = snooze_message(request, delay, now)
                _watch_snoozes(request, snoozes_of(again.headers))
                return Ack(publish=[again])
            case Again(delay=delay, error=error):
                assert request is not None, "only what was understood can run"
                attempts = self._attempts(request, error)
                record = self._with_error(delivery, request, task, RETRY, error, attempts)
                return Ack(publish=[retry_message(request, delay, now, attempts)], record=record)

    def _attempts(self, request: Request, error: BaseException | None) -> list[dict[str, Any]]:
        """What has failed so far, the attempt that just did so included."""
        said = _ASKED_FOR if error is None else remote_text(error)
        attempt = Attempt(request.retries + 1, time.time(), self._worker, said.exc_type, said.text)
        return remembered(request.message.headers, attempt)

    def _last(self, request: Request | None, error: BaseException) -> list[dict[str, Any]] | None:
        """All attempts of a task that has failed for good; None for the only one, whose error says everything."""
        if request is None or ERRORS not in request.message.headers:
            return None
        return self._attempts(request, error)

    def started(self, request: Request) -> Record:
        """The record of a task that has begun."""
        return self.own_state(request, STARTED, {"pid": os.getpid(), "hostname": self._worker})

    def own_state(self, request: Request, state: str, meta: Any) -> Record:
        """The record of a state that a task tells of itself. Raises EncodeError, MessageTooLarge."""
        reply_to = _reply_to(request.message)
        told = Result(task_id=request.id, state=state, value=meta, extra=_family(request), reply_to=reply_to)
        return self._store.record(told)

    def keeps_result(self, request: Request | None, task: Task[..., Any] | None) -> bool:
        """Whether anybody wants to know how it ended: the message decides, then the task, then the app."""
        if request is not None and request.ignore_result is not None:
            return not request.ignore_result
        if task is None:
            return not self._settings.ignore_result
        return not task.definition.options.get("ignore_result", self._settings.ignore_result)

    def _success(
        self, delivery: Delivery, request: Request | None, task: Task[..., Any] | None, value: Any
    ) -> Record | None:
        try:
            if task is not None and type(value) not in PLAIN_TYPES and self.keeps_result(request, task):
                value = task.codec.encode_result(value, self._settings.result_serializer)
            return self._record(delivery, request, task, SUCCESS, value)
        except (EncodeError, MessageTooLarge) as error:  # the work is done: it is not run again for this
            logger.error("%s ended well, but its result can't be stored: %s", _named(request), error)
            return self._with_error(delivery, request, task, FAILURE, error)

    def _with_error(
        self,
        delivery: Delivery,
        request: Request | None,
        task: Task[..., Any] | None,
        state: str,
        error: BaseException | None,
        attempts: list[dict[str, Any]] | None = None,
    ) -> Record | None:
        """A record that tells an error in full, or as briefly as must be."""
        if error is None:
            return self._record(delivery, request, task, state, None, None, attempts)
        text = None if error.__traceback__ is None else traceback_text(error)
        try:
            return self._record(delivery, request, task, state, remote_error(error), text, attempts)
        except (EncodeError, MessageTooLarge):
            return self._record(delivery, request, task, state, remote_text(error), None, attempts)

    def _record(
        self,
        delivery: Delivery,
        request: Request | None,
        task: Task[..., Any] | None,
        state: str,
        value: Any,
        text: str | None = None,
        attempts: list[dict[str, Any]] | None = None,
    ) -> Record | None:
        task_id = task_id_of(delivery.message) if request is None else request.id
        if task_id is None or not self.keeps_result(request, task):
            return None
        done = self._clock() if state in FINAL_STATES else None
        extra = self._extra(request, attempts) if request is not None else {}
        result = Result(
            task_id=task_id,
            state=state,
            value=value,
            traceback=text,
            date_done=done,
            extra=extra,
            reply_to=_reply_to(delivery.message),
        )
        try:
            return self._store.record(result)
        except (EncodeError, MessageTooLarge) as error:
            if "args" not in extra:
                raise
            del extra["args"], extra["kwargs"]
            record = self._store.record(result)
            logger.warning("the result of %s is stored without the arguments: %s", _named(request), error)
            return record

    def _extra(self, request: Request, attempts: list[dict[str, Any]] | None) -> dict[str, Any]:
        extra = _family(request)
        if attempts is None and ERRORS in request.message.headers:
            attempts = [msgspec.structs.asdict(one) for one in attempts_of(request.message.headers[ERRORS])]
        if attempts:
            extra["attempts"] = attempts
        if self._settings.result_extended:
            extra |= {
                "name": request.task,
                "args": request.args,
                "kwargs": request.kwargs,
                "worker": self._worker,
                "retries": request.retries,
                "queue": request.message.queue,
            }
        return extra


def _watch_snoozes(request: Request, count: int) -> None:
    """A task decides itself how often it puts itself off; for ever it shall not do so unnoticed."""
    if count >= _MANY_SNOOZES and str(count).rstrip("0") == "1":
        logger.warning("%s has put itself off %d times", _named(request), count)


def _family(request: Request) -> dict[str, Any]:
    """Where a task belongs, which is told with every state (celery-protocol 4.2)."""
    extra: dict[str, Any] = {}
    if request.group is not None:
        extra["group_id"] = request.group
    if request.parent_id is not None:
        extra["parent_id"] = request.parent_id
    return extra


def _reply_to(message: Message | Unreadable) -> str:
    found = message.properties.get("reply_to") if isinstance(message, Message) else None
    return found if isinstance(found, str) else ""


def _named(request: Request | None) -> str:
    return "a task" if request is None else f"{request.task}[{request.id}]"
