"""The outbox: sends that gather behind one another, and what each caller is told when something goes wrong."""

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from aqueue.errors import BrokerUnavailable, EnqueueFailed, EnqueueUnknown
from aqueue.outbox import Outbox
from aqueue.protocol import Message
from tests.kit.waiting import until

Answer = Callable[[Sequence[Message]], None]


def accept(messages: Sequence[Message]) -> None:
    """The answer of a broker that stored everything."""


class FakeBroker:
    """The one verb that an outbox uses; it waits while it is held, and then answers."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.stored: list[str] = []
        self.answer: Answer = accept
        #: Seconds after which it gives up by itself, as every broker does.
        self.patience: float | None = None
        self._open = asyncio.Event()
        self._open.set()

    async def publish(self, messages: Sequence[Message]) -> None:
        names = [str(message.properties["correlation_id"]) for message in messages]
        self.batches.append(names)
        try:
            async with asyncio.timeout(self.patience):
                await self._open.wait()
        except TimeoutError:
            raise EnqueueUnknown("no answer", names) from None
        self.answer(messages)
        self.stored += names

    def hold(self) -> None:
        """Let every publish wait from now on."""
        self._open.clear()

    def go_on(self) -> None:
        self._open.set()


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker()


def outbox_of(broker: FakeBroker, timeout: float = 5.0) -> Outbox:
    return Outbox(broker.publish, timeout)


def messages(*names: str) -> list[Message]:
    return [Message(queue="q", headers={}, body=b"", properties={"correlation_id": name}) for name in names]


def send(outbox: Outbox, *names: str) -> asyncio.Task[None]:
    """A caller of its own that sends these messages."""
    return asyncio.create_task(outbox.publish(messages(*names)))


async def behind(broker: FakeBroker, outbox: Outbox) -> asyncio.Task[None]:
    """Has a first message on its way and held, so that what is sent next must wait."""
    broker.hold()
    first = send(outbox, "first")
    await until(lambda: broker.batches, "the first message is on its way")
    return first


async def told(caller: asyncio.Task[None]) -> BaseException | None:
    """What a caller is told: an error, or None when its messages are stored."""
    await asyncio.wait([caller])
    return caller.exception()


async def failed(caller: asyncio.Task[None]) -> EnqueueFailed:
    error = await told(caller)
    assert isinstance(error, EnqueueFailed), error
    return error


async def unknown(caller: asyncio.Task[None]) -> EnqueueUnknown:
    error = await told(caller)
    assert isinstance(error, EnqueueUnknown), error
    return error


# --- gathering -------------------------------------------------------------------------------------------------


async def test_a_lone_message_leaves_at_once(broker: FakeBroker) -> None:
    await outbox_of(broker).publish(messages("a"))
    assert broker.batches == [["a"]]


async def test_messages_of_one_caller_leave_together(broker: FakeBroker) -> None:
    await outbox_of(broker).publish(messages("a", "b", "c"))
    assert broker.batches == [["a", "b", "c"]]


async def test_what_is_sent_meanwhile_leaves_together_and_in_order(broker: FakeBroker) -> None:
    outbox = outbox_of(broker)
    first = await behind(broker, outbox)
    callers = [send(outbox, "a"), send(outbox, "b", "c"), send(outbox, "d")]
    await asyncio.sleep(0)
    broker.go_on()
    assert [await told(caller) for caller in (first, *callers)] == [None] * 4
    assert broker.batches == [["first"], ["a", "b", "c", "d"]]


async def test_a_thousand_callers_cost_a_few_batches(broker: FakeBroker) -> None:
    outbox = outbox_of(broker)
    first = await behind(broker, outbox)
    callers = [send(outbox, str(number)) for number in range(1000)]
    await asyncio.sleep(0)
    broker.go_on()
    await asyncio.gather(first, *callers)
    assert [len(batch) for batch in broker.batches] == [1, 500, 500]
    assert broker.stored == ["first", *map(str, range(1000))]


async def test_what_one_caller_sends_is_not_torn_apart(broker: FakeBroker) -> None:
    outbox = outbox_of(broker)
    first = await behind(broker, outbox)
    sizes = [200, 200, 200, 700, 1]
    callers = [send(outbox, *(f"{caller}-{number}" for number in range(size))) for caller, size in enumerate(sizes)]
    await asyncio.sleep(0)
    broker.go_on()
    await asyncio.gather(first, *callers)
    assert [len(batch) for batch in broker.batches] == [1, 400, 200, 700, 1]


async def test_sends_after_a_pause_leave_by_themselves(broker: FakeBroker) -> None:
    outbox = outbox_of(broker)
    for name in "abc":
        await outbox.publish(messages(name))
    assert broker.batches == [["a"], ["b"], ["c"]]


async def test_nothing_to_send_is_sent_without_an_error(broker: FakeBroker) -> None:
    await outbox_of(broker).publish([])
    assert broker.stored == []


# --- a caller that gives up --------------------------------------------------------------------------------------


async def test_a_caller_that_is_cancelled_before_its_turn_sends_nothing(broker: FakeBroker) -> None:
    outbox = outbox_of(broker)
    first = await behind(broker, outbox)
    gone, staying = send(outbox, "gone"), send(outbox, "staying")
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.wait([gone])
    broker.go_on()
    assert [await told(first), await told(staying)] == [None, None]
    assert gone.cancelled()
    assert broker.batches == [["first"], ["staying"]]


async def test_a_caller_that_is_cancelled_on_the_way_takes_no_other_along(broker: FakeBroker) -> None:
    outbox = outbox_of(broker)
    first = await behind(broker, outbox)
    callers = [send(outbox, name) for name in "abc"]
    await asyncio.sleep(0)
    broker.go_on()
    await until(lambda: len(broker.batches) == 2 or broker.stored, "the second batch is on its way")
    callers[1].cancel()
    assert [await told(caller) for caller in (first, callers[0], callers[2])] == [None] * 3
    await outbox.close()
    assert broker.stored == ["first", "a", "b", "c"]


async def test_the_only_caller_may_be_cancelled_on_the_way(broker: FakeBroker) -> None:
    outbox = outbox_of(broker)
    first = await behind(broker, outbox)
    first.cancel()
    await asyncio.wait([first])
    broker.go_on()
    await outbox.close()
    assert broker.stored == ["first"]
    await outbox.publish(messages("next"))
    assert broker.stored == ["first", "next"]


async def test_an_error_that_nobody_waits_for_is_nobodys(broker: FakeBroker) -> None:
    """Warnings are errors here: a future whose error is never looked at would fail the test."""
    outbox = outbox_of(broker)
    first = await behind(broker, outbox)
    first.cancel()
    await asyncio.wait([first])
    broker.answer = raising(BrokerUnavailable("gone"))
    broker.go_on()
    await outbox.close()


# --- refusals and errors -------------------------------------------------------------------------------------------


def raising(error: Exception) -> Answer:
    def answer(messages: Sequence[Message]) -> None:
        raise error

    return answer


async def batch_of(
    broker: FakeBroker, outbox: Outbox, answer: Answer, *callers: tuple[str, ...]
) -> list[asyncio.Task[None]]:
    """Callers whose messages leave as one batch, which is answered so."""
    first = await behind(broker, outbox)
    sending = [send(outbox, *names) for names in callers]
    await asyncio.sleep(0)

    def after_the_first(messages: Sequence[Message]) -> None:
        broker.answer = answer

    broker.answer = after_the_first
    broker.go_on()
    assert await told(first) is None
    return sending


async def test_when_nothing_was_stored_everybody_is_told(broker: FakeBroker) -> None:
    outbox = outbox_of(broker)
    callers = await batch_of(broker, outbox, raising(EnqueueFailed("the disk is full")), ("a",), ("b", "c"))
    for caller in callers:
        error = await failed(caller)
        assert "the disk is full" in str(error)
        assert error.refused is None
    assert broker.stored == ["first"]


async def test_what_was_refused_is_told_to_its_sender_by_the_senders_own_positions(broker: FakeBroker) -> None:
    outbox = outbox_of(broker)
    error = EnqueueFailed("some were refused", {1: "too large", 4: "no queue", 5: "too large"})
    callers = await batch_of(broker, outbox, raising(error), ("a", "b"), ("c",), ("d", "e", "f"), ("g",))
    one, other, third, last = callers
    assert (await failed(one)).refused == {1: "too large"}
    assert await told(other) is None
    assert (await failed(third)).refused == {1: "no queue", 2: "too large"}
    assert await told(last) is None


async def test_a_caller_all_of_whose_messages_were_refused_has_nothing_stored(broker: FakeBroker) -> None:
    outbox = outbox_of(broker)
    error = EnqueueFailed("some were refused", {0: "no queue", 2: "too large", 3: "no queue"})
    one, other, third = await batch_of(broker, outbox, raising(error), ("a",), ("b",), ("c", "d"))
    assert (await failed(one)).refused is None
    assert "no queue" in str(await failed(one))
    assert await told(other) is None
    both = await failed(third)
    assert both.refused is None
    assert "no queue" in str(both)
    assert "too large" in str(both)


async def test_when_nobody_knows_what_was_stored_each_is_told_its_own_ids(broker: FakeBroker) -> None:
    outbox = outbox_of(broker)
    answer = raising(EnqueueUnknown("the link broke", ["a", "b", "c"]))
    one, other = await batch_of(broker, outbox, answer, ("a", "b"), ("c",))
    assert (await unknown(one)).ids == ("a", "b")
    assert (await unknown(other)).ids == ("c",)
    assert "the link broke" in str(await unknown(one))


@pytest.mark.parametrize(
    "error", [BrokerUnavailable("gone"), ValueError("a bug"), RuntimeError()], ids=lambda error: type(error).__name__
)
async def test_any_other_error_reaches_everybody_who_waits(broker: FakeBroker, error: Exception) -> None:
    outbox = outbox_of(broker)
    callers = await batch_of(broker, outbox, raising(error), ("a",), ("b",))
    assert [await told(caller) for caller in callers] == [error, error]


async def test_after_an_error_the_next_send_is_tried_as_if_nothing_had_been(broker: FakeBroker) -> None:
    outbox = outbox_of(broker)
    broker.answer = raising(BrokerUnavailable("gone"))
    with pytest.raises(BrokerUnavailable):
        await outbox.publish(messages("a"))
    broker.answer = accept
    await outbox.publish(messages("b"))
    assert broker.stored == ["b"]


async def test_an_error_of_one_batch_does_not_stop_the_next(broker: FakeBroker) -> None:
    outbox = outbox_of(broker)
    first = await behind(broker, outbox)
    second = send(outbox, "second")
    await asyncio.sleep(0)

    def refuse_once(messages: Sequence[Message]) -> None:
        broker.answer = accept
        raise BrokerUnavailable("gone")

    broker.answer = refuse_once
    broker.go_on()
    assert isinstance(await told(first), BrokerUnavailable)
    assert await told(second) is None


# --- time -----------------------------------------------------------------------------------------------------------


async def test_what_has_no_turn_in_time_was_certainly_not_sent(broker: FakeBroker) -> None:
    outbox = outbox_of(broker, timeout=0.1)
    first = await behind(broker, outbox)
    waiting = send(outbox, "waiting")
    error = await failed(waiting)
    assert "not sent within 0.1 s" in str(error)
    assert error.refused is None
    broker.go_on()
    await asyncio.wait([first])
    await outbox.close()
    assert broker.batches == [["first"]]


async def test_what_is_on_its_way_without_an_answer_may_be_stored_or_not(broker: FakeBroker) -> None:
    outbox = outbox_of(broker, timeout=0.1)
    error = await unknown(await behind(broker, outbox))
    assert error.ids == ("first",)
    broker.go_on()
    await outbox.close()


async def test_an_outbox_that_ran_out_of_time_sends_again(broker: FakeBroker) -> None:
    outbox = outbox_of(broker, timeout=0.05)
    await unknown(await behind(broker, outbox))
    broker.go_on()
    await outbox.publish(messages("next"))
    assert "next" in broker.stored


async def test_no_caller_waits_longer_than_its_time(broker: FakeBroker) -> None:
    """`Settings.send_timeout` is all that a send may take, its turn behind others included."""
    timeout = 0.2
    outbox = outbox_of(broker, timeout)
    broker.hold()
    started = time.monotonic()
    ended: dict[str, float] = {}

    async def caller(name: str) -> None:
        with pytest.raises((EnqueueFailed, EnqueueUnknown)):
            await outbox.publish(messages(name))
        ended[name] = time.monotonic() - started

    broker.patience = timeout
    first = asyncio.create_task(caller("first"))
    await until(lambda: broker.batches, "the first message is on its way")
    await asyncio.gather(first, caller("second"), caller("third"))
    await outbox.close()
    assert max(ended.values()) < 1.6 * timeout, ended


async def test_a_slow_broker_is_waited_for(broker: FakeBroker) -> None:
    outbox = outbox_of(broker, timeout=30)
    first = await behind(broker, outbox)
    await asyncio.sleep(0.05)
    assert not first.done()
    broker.go_on()
    assert await told(first) is None


# --- the end -----------------------------------------------------------------------------------------------------


async def test_closing_waits_for_what_is_on_its_way_and_what_waits_behind_it(broker: FakeBroker) -> None:
    outbox = outbox_of(broker)
    first = await behind(broker, outbox)
    second = send(outbox, "second")
    await asyncio.sleep(0)
    closing = asyncio.create_task(outbox.close())
    await asyncio.sleep(0)
    assert not closing.done()
    broker.go_on()
    await closing
    assert broker.stored == ["first", "second"]
    assert [await told(first), await told(second)] == [None, None]


async def test_closing_an_idle_outbox_is_nothing(broker: FakeBroker) -> None:
    outbox = outbox_of(broker)
    await outbox.close()
    await outbox.publish(messages("a"))
    await outbox.close()


async def test_closing_does_not_wait_for_ever(broker: FakeBroker) -> None:
    outbox = outbox_of(broker, timeout=0.1)
    first = await behind(broker, outbox)
    async with asyncio.timeout(2):
        await outbox.close()
    broker.go_on()
    await told(first)


async def test_nothing_is_left_running_when_everything_was_sent(broker: FakeBroker) -> None:
    before = asyncio.all_tasks()
    outbox = outbox_of(broker)
    await asyncio.gather(*(outbox.publish(messages(str(number))) for number in range(10)))
    left: Any = asyncio.all_tasks() - before
    await until(lambda: all(task.done() for task in left), "the sending task has ended")
