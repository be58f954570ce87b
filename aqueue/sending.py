"""From a signature to a stored message: route, encode, announce, publish. One `Producer` an event loop."""

import asyncio
import logging
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone
from fnmatch import fnmatchcase
from typing import Final, TypeVar

from aqueue.async_result import AsyncResult, Cancelled
from aqueue.broker import Broker
from aqueue.broker.control import KeptControl
from aqueue.context import current
from aqueue.errors import BadMessage, EncodeError, EnqueueFailed, EnqueueUnknown, StoreUnavailable
from aqueue.identifiers import new_id, origin
from aqueue.options import Options, check, check_cancel, merged
from aqueue.outbox import Outbox
from aqueue.pidbox import Revocation
from aqueue.protocol import Call, Message, Record, Template, task_message, template
from aqueue.results import PENDING, Result, ResultStore
from aqueue.saferepr import printable, saferepr
from aqueue.serialization import Serializer
from aqueue.settings import Route, Settings
from aqueue.task import Signature

logger = logging.getLogger("aqueue.send")

R = TypeVar("R")

#: Messages of one `send_many` that travel together.
_CHUNK: Final = 500
#: Results that are looked at together.
_LOOKS: Final = 100


class Routes:
    """Where tasks go by their names; a name is looked up once."""

    def __init__(self, settings: Settings) -> None:
        self._table = settings.routes
        self._found: dict[str, Options] = {}

    def __call__(self, task: str) -> Options:
        """Options for a task that says nothing itself. The caller must not change them."""
        found = self._found.get(task)
        if found is None:
            routes = [route for glob, route in self._table.items() if fnmatchcase(task, glob)]
            found = self._found[task] = _as_options(routes[0] if routes else {})
        return found


class Producer:
    """Sends over one event loop's broker and result store."""

    def __init__(
        self,
        settings: Settings,
        routes: Routes,
        serializer: Serializer,
        broker: Broker,
        store: ResultStore,
        keeper: Broker | None = None,
    ) -> None:
        self.broker = broker
        self.store = store
        #: Tells workers which tasks are cancelled.
        self.control = broker.control if keeper is None else KeptControl(broker.control, keeper.control)
        self._keeper = keeper
        #: How many ``async with app`` are open on this loop; the last one closes.
        self.users = 0
        self._settings = settings
        self._routes = routes
        self._serializer = serializer
        self._outbox = Outbox(self._post, settings.send_timeout, broker.sends_at_once)
        #: The broker takes along the records that say that a task was sent.
        self._together = broker.keeps(store.place)
        self._origin = origin()
        #: Every Celery message names a queue for its result.
        self._reply_to = store.reply_to or new_id()
        #: By task, for calls that add no option to the task's own, whose dict stands first, to tell.
        self._templates: dict[str, tuple[Options, Options, Template]] = {}

    async def send(self, signature: Signature[R]) -> AsyncResult[R]:
        """Store one call.

        Raises InvalidArguments, EncodeError, MessageTooLarge, EnqueueFailed, EnqueueUnknown.
        """
        message, sent = self._message(signature)
        await self._outbox.publish([message])
        return sent

    async def send_many(self, signatures: Sequence[Signature[R]]) -> list[AsyncResult[R]]:
        """Store all calls, in chunks that keep the server's steps short; raises like `send`.

        All are checked before the first is sent. An EnqueueFailed after that says by position which were not stored.
        """
        made = [self._message(signature) for signature in signatures]
        for start in range(0, len(made), _CHUNK):
            try:
                await self._outbox.publish([message for message, _ in made[start : start + _CHUNK]])
            except EnqueueFailed as error:
                raise _beyond(error, start, len(made)) from None
            except EnqueueUnknown as error:
                raise EnqueueUnknown(str(error), [sent.id for _, sent in made[start:]]) from None
        return [sent for _, sent in made]

    async def cancel(self, ids: Sequence[str], reason: str, terminate: bool, keep: float | None) -> list[Cancelled]:
        """Cancel tasks; of each id what has become of that, in their order.

        Raises InvalidArguments, BrokerUnavailable.
        """
        keep = self._settings.cancel_expires if keep is None else keep
        check_cancel(ids, reason, keep)
        found: list[bool] = []
        for start in range(0, len(ids), _LOOKS):
            found += await asyncio.gather(*map(self._has_ended, ids[start : start + _LOOKS]))
        open_ids = [id for id, ended in zip(ids, found, strict=True) if not ended]
        if open_ids:
            await self.control.revoke(open_ids, Revocation(printable(reason), terminate, keep))
        return ["finished" if ended else "requested" for ended in found]

    async def _has_ended(self, task_id: str) -> bool:
        """As far as the result store knows."""
        try:
            result = await self.store.get(task_id)
        except (StoreUnavailable, BadMessage):
            return False
        return result is not None and result.is_final

    async def close(self) -> None:
        """Wait for what is on its way, and close the connections."""
        await self._outbox.close()
        await self.broker.__aexit__(None, None, None)
        if self._keeper is not None:
            await self._keeper.__aexit__(None, None, None)
        await self.store.__aexit__(None, None, None)

    async def _post(self, messages: Sequence[Message]) -> None:
        """Publish what has gathered, and announce it to a store that is not the broker's own server."""
        announcing = [message.announce for message in messages if message.announce is not None]
        if self._together or not announcing:
            await self.broker.publish(messages)
            return
        for message in messages:
            message.announce = None
        if self.store.reply_to:
            await self._expect(announcing)
            await self.broker.publish(messages)
        else:
            announced = asyncio.create_task(self._announce(announcing))
            try:
                await self.broker.publish(messages)
            finally:
                await announced

    async def _expect(self, records: Sequence[Record]) -> None:
        """Have a place for results to come to, before anything is sent that asks for one."""
        try:
            async with asyncio.timeout(self._settings.send_timeout):
                await self.store.announce(records)
        except (StoreUnavailable, TimeoutError) as error:
            raise EnqueueFailed(f"not sent, as its result would have nowhere to go: {error}") from None

    async def _announce(self, records: Sequence[Record]) -> None:
        try:
            await self.store.announce(records)
        except StoreUnavailable as error:
            logger.warning("sent, but not recorded as sent: %s", error)

    def _get_store(self) -> ResultStore:
        return self.store

    def _common(self, signature: Signature[R]) -> tuple[Options, Template]:
        """All options of a call, its route's included, and what its message has in common with others."""
        task = signature.task
        known = self._templates.get(task)
        if known is not None and known[0] is signature.options:
            return known[1:]
        settings = self._settings
        options = merged(self._routes(task), signature.options)
        # Without the task at hand nobody here can say for it that its result is wanted.
        keeps_none = settings.ignore_result if signature.codec is not None else settings.ignore_result or None
        made = template(
            task,
            queue=options.get("queue", settings.default_queue),
            serializer=options.get("serializer", settings.serializer),
            origin=self._origin,
            compression=options.get("compression", settings.compression),
            priority=options.get("priority", settings.default_priority),
            exchange=options.get("exchange", ""),
            routing_key=options.get("routing_key", ""),
            time_limit=options.get("timeout"),
            soft_time_limit=options.get("soft_timeout"),
            ignore_result=options.get("ignore_result", keeps_none),
            shadow=options.get("shadow"),
            headers=options.get("headers"),
        )
        if known is None:
            self._templates[task] = (signature.options, options, made)
        return options, made

    def _message(self, signature: Signature[R]) -> tuple[Message, AsyncResult[R]]:
        options, common = self._common(signature)
        args, kwargs = signature.args, signature.kwargs
        if signature.codec is not None:
            args, kwargs = signature.codec.encode(args, kwargs, common.serializer)
        task_id = options.get("task_id") or new_id()
        delay, eta = self._start(options)
        expires, expires_in = self._expiry(options)
        parent = current()
        call = Call(
            id=task_id,
            args=args,
            kwargs=kwargs,
            argsrepr=options["argsrepr"] if "argsrepr" in options else saferepr(tuple(signature.args)),
            kwargsrepr=options["kwargsrepr"] if "kwargsrepr" in options else saferepr(dict(signature.kwargs)),
            reply_to=self._reply_to,
            root_id=task_id if parent is None else parent.root_id,
            parent_id=None if parent is None else parent.id,
            delay=delay,
            eta=eta,
            expires=expires,
            expires_in=expires_in,
        )
        try:
            message = task_message(common, call, self._serializer)
        except EncodeError as error:
            raise _named(error, common, call, self._serializer) from None
        ignored = bool(common.headers["ignore_result"])
        if (self._settings.track_sent or self.store.reply_to) and not ignored:
            message.announce = self._pending(task_id, delay)
        sent: AsyncResult[R] = AsyncResult(
            task_id, self._get_store, codec=signature.codec, known=True, ignored=ignored, canceller=self.cancel
        )
        return message, sent

    def _pending(self, task_id: str, delay: float) -> Record:
        record = self.store.record(Result(task_id=task_id, state=PENDING))
        return record if record.ttl is None or not delay else Record(record.key, record.value, record.ttl + delay)

    def _start(self, options: Options) -> tuple[float, datetime | None]:
        """Seconds to wait, and the ETA to write."""
        if "eta" in options:
            eta = _aware(options["eta"])
            return max(0.0, eta.timestamp() - self.broker.now()), eta
        countdown = options.get("countdown", 0.0)
        if not countdown:
            return 0.0, None
        return countdown, self._utc(countdown)

    def _expiry(self, options: Options) -> tuple[datetime | None, float | None]:
        """The time to write, and the seconds until then."""
        expires = options.get("expires")
        if expires is None:
            return None, None
        if isinstance(expires, datetime):
            expires = _aware(expires)
            return expires, expires.timestamp() - self.broker.now()
        return self._utc(expires), expires

    def _utc(self, seconds: float) -> datetime:
        return datetime.fromtimestamp(self.broker.now(), timezone.utc) + timedelta(seconds=seconds)


def _beyond(error: EnqueueFailed, start: int, count: int) -> EnqueueFailed:
    """The error of one chunk, in positions of the whole: what stood before it is stored, what follows is not."""
    if error.refused is None:
        return error if not start else EnqueueFailed(str(error), dict.fromkeys(range(start, count), str(error)))
    refused = {start + position: reason for position, reason in error.refused.items()}
    rest = dict.fromkeys(range(min(start + _CHUNK, count), count), "not sent after these")
    return EnqueueFailed(str(error), {**refused, **rest})


def _as_options(route: Route) -> Options:
    return check({"queue": route} if isinstance(route, str) else route)


def _aware(time: datetime) -> datetime:
    """A time without a zone is UTC, as every worker reads it."""
    return time if time.tzinfo is not None else time.replace(tzinfo=timezone.utc)


def _named(error: EncodeError, common: Template, call: Call, serializer: Serializer) -> EncodeError:
    """The same error, naming the argument that can't be written."""
    arguments = {**{str(i): value for i, value in enumerate(call.args)}, **call.kwargs}
    for name, value in arguments.items():
        try:
            serializer.dumps(value, common.serializer)
        except EncodeError as found:
            where = f"argument {name!r}" if not name.isdecimal() else f"argument number {int(name) + 1}"
            return EncodeError(f"{common.task}: {where} {found}")
    return EncodeError(f"{common.task}: the arguments {error}")
