"""A real broker and a real result store in a thin coat that writes down what passes, and breaks at failpoints.

An app takes brokers and stores as factories; so the product needs no hooks for this.
"""

from collections.abc import Collection, Sequence
from types import TracebackType
from typing import Any, Self

from aqueue.broker import Ack, Broker, Bury, Delivery, Inspection, Losses, Presence, Release, Verdict
from aqueue.broker.control import Control
from aqueue.errors import BrokerUnavailable
from aqueue.protocol import Message, Record
from aqueue.results import Result, ResultStore
from tests.chaos.failpoints import Failpoints
from tests.chaos.history import Recorder, monotonic


def name_of(delivery: Delivery) -> dict[str, Any]:
    """The id and the attempt of a delivery, as events have them."""
    message = delivery.message
    if not isinstance(message, Message):
        return {"id": message.task_id or "?"}
    retries = message.headers.get("retries") or 0
    return {"id": str(message.headers.get("id")), "attempt": int(retries) + 1}


class RecordingBroker:
    """See the module's text; a `aqueue.broker.Broker`."""

    def __init__(self, inner: Broker, record: Recorder, failpoints: Failpoints) -> None:
        self.pushes = inner.pushes
        self.sends_at_once = inner.sends_at_once
        self.lease = inner.lease
        self._inner = inner
        self._record = record
        self._failpoints = failpoints
        #: Claims that were not begun, by the identity of their messages.
        self._claimed: dict[int, tuple[object, str]] = {}

    @property
    def holder(self) -> str:
        return self._inner.holder

    @holder.setter
    def holder(self, name: str) -> None:
        self._inner.holder = name

    @property
    def inspection(self) -> Inspection:
        return self._inner.inspection

    async def __aenter__(self) -> Self:
        await self._inner.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._inner.__aexit__(kind, error, traceback)

    def now(self) -> float:
        return self._inner.now()

    def keeps(self, place: object) -> bool:
        return self._inner.keeps(place)

    def present(self, presence: Presence, seconds: float) -> None:
        self._inner.present(presence, seconds)

    async def waiting(self, queues: Sequence[str]) -> bool:
        return await self._inner.waiting(queues)

    def reconnect(self) -> None:
        self._inner.reconnect()

    async def let_go(self, delivery: Delivery) -> bool:
        return await self._inner.let_go(delivery)

    @property
    def losses(self) -> Losses:
        return self._inner.losses

    @property
    def control(self) -> Control:
        return self._inner.control

    def begun(self, message: Message) -> str:
        """The token of the claim that brought this message."""
        return self._claimed.pop(id(message), (None, ""))[1]

    async def publish(self, messages: Sequence[Message]) -> None:
        await self._inner.publish(messages)
        self._failpoints.hit("publish_sent", len(messages))

    async def fetch(self, queues: Sequence[str], limit: int, wait: float) -> Sequence[Delivery]:
        began = monotonic()
        found = await self._inner.fetch(queues, limit, wait)
        if not found:
            return found
        self._failpoints.hit("claim_sent", len(found))
        self._record.many(
            "CLAIM",
            [{**name_of(one), "token": one.receipt, "n": one.deliveries, "began": began} for one in found],
        )
        self._claimed |= {id(one.message): (one.message, one.receipt) for one in found}
        self._failpoints.hit("claimed", len(found))
        return found

    def extend(self, deliveries: Collection[Delivery]) -> Sequence[Delivery]:
        began = monotonic()
        lost = self._inner.extend(deliveries)
        gone = {delivery.receipt for delivery in lost}
        self._record.many("LEASE_LOST", [{**name_of(one), "token": one.receipt} for one in lost])
        held = [one for one in deliveries if one.receipt not in gone]
        self._record.many("RENEW", [{**name_of(one), "token": one.receipt, "began": began} for one in held])
        return lost

    async def settle(self, verdicts: Sequence[tuple[Delivery, Verdict]]) -> Sequence[Delivery]:
        rows = [
            {**name_of(one), "token": one.receipt, "kind": kind_of(verdict), "began": monotonic()}
            for one, verdict in verdicts
        ]
        self._record.many("SETTLING", rows)
        self._failpoints.hit("settle", len(verdicts))
        try:
            refused = await self._inner.settle(verdicts)
        except BrokerUnavailable:
            self._record.many("SETTLE", [{**row, "ok": None} for row in rows])
            raise
        self._failpoints.hit("settle_sent", len(verdicts))
        follow_ups = sum(isinstance(verdict, Ack) and bool(verdict.publish) for _, verdict in verdicts)
        if follow_ups and not self._inner.pushes:
            self._failpoints.hit("retry", follow_ups)
        gone = {one.receipt for one in refused}
        self._record.many("SETTLE", [{**row, "ok": row["token"] not in gone} for row in rows])
        return refused


def kind_of(verdict: Verdict) -> str:
    """``ack``, ``release`` or ``bury``."""
    match verdict:
        case Release():
            return "release"
        case Bury():
            return "bury"
        case _:
            return "ack"


class RecordingStore:
    """See the module's text; a `aqueue.results.ResultStore`."""

    def __init__(self, inner: ResultStore, failpoints: Failpoints) -> None:
        self.reply_to = inner.reply_to
        self._inner = inner
        self._failpoints = failpoints

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    async def __aenter__(self) -> Self:
        await self._inner.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._inner.__aexit__(kind, error, traceback)

    @property
    def place(self) -> object:
        return self._inner.place

    def record(self, result: Result) -> Record:
        return self._inner.record(result)

    async def put(self, records: Sequence[Record]) -> None:
        await self._inner.put(records)
        self._failpoints.hit("result_done", len(records))

    async def announce(self, records: Sequence[Record]) -> None:
        await self._inner.announce(records)

    async def get(self, task_id: str, wait: float = 0.0) -> Result | None:
        return await self._inner.get(task_id, wait)

    async def forget(self, task_id: str) -> None:
        await self._inner.forget(task_id)
