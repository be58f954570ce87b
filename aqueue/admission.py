"""From a delivery to a task that may run, or to the outcome that says why not."""

import logging
from collections.abc import Mapping
from typing import Any, Final

from aqueue.broker import OWN_QUEUE, Delivery
from aqueue.broker.history import OUT_OF_MEMORY
from aqueue.errors import BadMessage, StoreUnavailable, WorkerLostError
from aqueue.failures import NotRegistered
from aqueue.outcome import Dead, GiveBack, Outcome, PutOff, Repeated, Revoked
from aqueue.protocol import MAX_ID_LENGTH, Message, Request, Unreadable, decode, is_name
from aqueue.results import REVOKED, SUCCESS, ResultStore
from aqueue.saferepr import printable
from aqueue.serialization import Serializer, is_finite_number
from aqueue.settings import Settings
from aqueue.task import Task

logger = logging.getLogger("aqueue.worker")

#: Names of unknown tasks that a log tells.
_TOLD: Final = 1000
#: Header by which a message remembers since when (unix time) no worker knew its task.
UNKNOWN_SINCE: Final = "aqueue_unknown_since"
#: Seconds between two looks for a worker that knows a task: a quarter of the time it has waited, within these.
#: In a fleet where one worker in ten knows it, that one is found within the hour but for one task in a thousand.
_SHORTEST_LOOK: Final = 5.0
_LONGEST_LOOK: Final = 60.0
#: Seconds until a message that came back is looked at again, when nobody can say whether its task has succeeded.
_ASK_AGAIN: Final = 5.0


def understand(delivery: Delivery, serializer: Serializer) -> Request | Dead:
    """Decode; bytes that nobody can read are dead, and nothing else is disturbed by them."""
    message = delivery.message
    try:
        if isinstance(message, Unreadable):
            raise message.error
        return decode(message, serializer)
    except BadMessage as error:
        return Dead(error.reason, error.detail, error.with_traceback(None))


def killed_by_reading(delivery: Delivery, settings: Settings) -> Dead | None:
    """Why a message is not even read: it was to be buried before, and its worker was lost once more."""
    return _lost_too_often(delivery) if delivery.deliveries > settings.max_deliveries + 1 else None


def admit(
    delivery: Delivery, request: Request, tasks: Mapping[str, Task[..., Any]], settings: Settings, now: float
) -> Task[..., Any] | Outcome:
    """The task to run, or why it is not run now. ``now`` is the broker's clock as unix time."""
    if delivery.deliveries > settings.max_deliveries:
        return _lost_too_often(delivery)
    if request.expires is not None and request.expires.timestamp() <= now:
        return Revoked("expired")
    if request.eta is not None and request.eta.timestamp() > now:
        return GiveBack(delay=request.eta.timestamp() - now)
    embed = request.embed
    if embed.callbacks or embed.errbacks or embed.chain or embed.chord:
        return Dead("unsupported_canvas", "callbacks, chains and chords are not carried out by this version")
    task = tasks.get(request.task)
    return task if task is not None else _unknown(request, settings, now)


def _lost_too_often(delivery: Delivery) -> Dead:
    """Buried with what is known of the losses: the last holder, and the last cause that somebody has told."""
    history = delivery.history
    lost = f"its worker was lost {delivery.deliveries - 1} times while it held the task"
    if history.losses and history.losses[-1].worker:
        lost += f", the last time {history.losses[-1].worker}"
    if history.cause:
        lost += f" ({history.cause})"
    out_of_memory = OUT_OF_MEMORY in history.cause
    return Dead("oom" if out_of_memory else "delivery_limit", lost, WorkerLostError(lost))


def _unknown(request: Request, settings: Settings, now: float) -> Outcome:
    """Another worker may know the task, or this one may after the next deploy: wait, then give up."""
    since: Any = request.message.headers.get(UNKNOWN_SINCE)
    since = since if is_finite_number(since) and 0 <= since <= now else now
    waited = now - since
    if waited >= settings.unknown_grace:
        text = f"no worker knew the task {printable(request.task)!r} for {waited:.0f} s"
        return Dead("unknown_task", text, NotRegistered(request.task))
    delay = min(max(waited / 4, _SHORTEST_LOOK), _LONGEST_LOOK, settings.unknown_grace - waited)
    return PutOff(delay, {UNKNOWN_SINCE: since})


class UnknownTasks:
    """Says once for each name that no task here has it."""

    def __init__(self) -> None:
        self._told: set[str] = set()

    def tell(self, request: Request, delay: float) -> None:
        if request.task in self._told or len(self._told) >= _TOLD:
            return
        self._told.add(request.task)
        logger.warning(
            "no task here is called %s: its messages wait for a worker that knows it, the first, %s from queue %s, "
            "for %.0f s; is the module that declares it imported?",
            printable(request.task),
            printable(request.id),
            request.message.queue,
            delay,
        )


def task_id_of(message: Message | Unreadable) -> str | None:
    """The id that a message which can't be read claims to have, if it is fit to store a result under."""
    found = message.task_id if isinstance(message, Unreadable) else message.headers.get("id")
    return found if is_name(found, MAX_ID_LENGTH) else None


async def repeated(request: Request, store: ResultStore) -> Outcome | None:
    """Why a message that was delivered before is not run once more; None when it is.

    Its worker may have been lost after it had stored the result, and before it settled. Of a broadcast the result may
    be another worker's.
    """
    if request.message.queue.startswith(OWN_QUEUE):
        return None
    try:
        stored = await store.get(request.id)
    except StoreUnavailable as error:
        logger.warning("%s[%s] came back, and waits for the result store: %s", request.task, request.id, error)
        return GiveBack(_ASK_AGAIN)
    except BadMessage:  # not written by a worker of ours, and no reason to leave out the work
        return None
    if stored is None or stored.state not in (SUCCESS, REVOKED):
        return None
    told = "succeeded" if stored.state == SUCCESS else "been cancelled"
    logger.warning("%s[%s] came back after it had %s; it is not run again", request.task, request.id, told)
    return Repeated()
