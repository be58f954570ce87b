"""Messages whose holders were lost: what is remembered of it, the pauses, the causes, what is known after death."""

import time
from collections.abc import Sequence

import pytest

from aqueue.broker import Ack, Broker, BrokerOptions, Bury, Delivery, Release
from aqueue.broker.history import KEPT, NO_HISTORY
from aqueue.protocol import Message
from tests.conformance.conftest import MakeBroker
from tests.conformance.test_broker import message, names
from tests.kit.waiting import until

#: Seconds; as short as makes tests quick.
SHORT = 0.4
#: In which a message surely comes back: the lease, half of it again, a look, and RabbitMQ's whole seconds.
SOON = 20.0
NO_PAUSE = {"lease": SHORT, "lost_backoff": (0.0,)}


async def lose(broker: Broker, queue: str, times: int) -> Sequence[Delivery]:
    """Claim a message so often, and let each lease end."""
    lost: list[Delivery] = []
    for number in range(times):
        (delivery,) = await broker.fetch([queue], 1, SOON)
        assert delivery.deliveries == number + 1
        lost.append(delivery)
    return lost


async def next_one(broker: Broker, queue: str) -> Delivery:
    (delivery,) = await broker.fetch([queue], 1, SOON)
    return delivery


async def test_a_message_that_was_never_lost_has_no_history(broker: Broker, queue: str) -> None:
    await broker.publish([message(queue)])
    (delivery,) = await broker.fetch([queue], 1, 1)
    assert delivery.history == NO_HISTORY
    await broker.settle([(delivery, Release())])
    (again,) = await broker.fetch([queue], 1, 1)
    assert again.history == NO_HISTORY  # given back is not lost


async def test_each_loss_says_who_held_the_message_and_when(make_broker: MakeBroker, queue: str, kind: str) -> None:
    one, two = await make_broker(**NO_PAUSE), await make_broker(**NO_PAUSE)
    before = time.time()
    await one.publish([message(queue)])
    lost = [await next_one(one, queue), await next_one(two, queue)]
    found = await next_one(one, queue)
    assert found.deliveries == 3
    losses = found.history.losses
    assert all(before - 1 < loss.lost < time.time() + 1 for loss in losses)
    if kind == "rabbitmq":  # the server doesn't tell who it was
        assert [(loss.worker, loss.claimed, loss.cause) for loss in losses] == [("", None, "")] * 2
        return
    assert [loss.worker for loss in losses] == [one.holder, two.holder]
    assert [loss.receipt for loss in losses] == [delivery.receipt for delivery in lost]
    for loss in losses:
        assert loss.claimed is not None
        assert before - 1 < loss.claimed < loss.lost
        assert loss.cause == ""


async def test_the_last_losses_are_kept_and_all_are_counted(make_broker: MakeBroker, queue: str) -> None:
    broker = await make_broker(lease=0.2, lost_backoff=(0.0,))
    await broker.publish([message(queue)])
    lost = await lose(broker, queue, KEPT + 2)
    found = await next_one(broker, queue)
    assert found.deliveries == KEPT + 3
    assert len(found.history.losses) == KEPT
    if found.history.losses[-1].receipt:
        assert [loss.receipt for loss in found.history.losses] == [one.receipt for one in lost[-KEPT:]]


async def test_who_succeeds_forgets_the_losses(make_broker: MakeBroker, queue: str) -> None:
    broker = await make_broker(**NO_PAUSE)
    await broker.publish([message(queue)])
    await lose(broker, queue, 1)
    assert not await broker.settle([(await next_one(broker, queue), Ack())])
    await broker.publish([message(queue)])
    fresh = await next_one(broker, queue)
    assert (fresh.deliveries, fresh.history) == (1, NO_HISTORY)


# --- pauses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("losses", "pause"), [(1, 0), (2, 5), (3, 30), (4, 120), (5, 120), (99, 120)])
def test_the_pauses_of_a_usual_lease(losses: int, pause: float) -> None:
    assert BrokerOptions().pause_after(losses) == pause
    assert BrokerOptions(lease=600.0).pause_after(losses) == pause
    assert BrokerOptions(lease=3.0).pause_after(losses) == pytest.approx(pause / 10)
    assert BrokerOptions(lost_backoff=()).pause_after(losses) == 0


async def test_a_message_waits_longer_after_each_loss(make_broker: MakeBroker, queue: str) -> None:
    broker = await make_broker(lease=0.2, lost_backoff=(0.0, 300.0))  # of which a 150th counts: 2 s
    await broker.publish([message(queue)])
    first = await next_one(broker, queue)
    second = await next_one(broker, queue)
    since = time.monotonic()
    assert second.deliveries == 2
    third = await next_one(broker, queue)
    assert third.deliveries == 3
    assert time.monotonic() - since > 2.0
    assert len({first.receipt, second.receipt, third.receipt}) == 3
    assert not await broker.settle([(third, Ack())])


async def test_who_waits_for_its_loss_holds_up_nobody(make_broker: MakeBroker, queue: str) -> None:
    broker = await make_broker(lease=0.2, lost_backoff=(3000.0,))
    await broker.publish([message(queue, "poison")])
    await lose(broker, queue, 1)
    await broker.publish([message(queue, "good")])
    assert names([await next_one(broker, queue)]) == ["good"]


# --- causes -------------------------------------------------------------------------------------------


@pytest.fixture
def tells(kind: str) -> None:
    if kind == "rabbitmq":
        pytest.skip("RabbitMQ doesn't tell who held a message")


@pytest.mark.usefixtures("tells")
async def test_a_cause_may_be_told_before_the_lease_has_ended(make_broker: MakeBroker, queue: str) -> None:
    dead, heir = await make_broker(**NO_PAUSE), await make_broker(**NO_PAUSE)
    await dead.publish([message(queue, "a"), message(queue, "b")])
    a, b = await dead.fetch([queue], 2, 1)
    await heir.losses.explain([a.receipt], "exit code 9")
    await heir.losses.explain([a.receipt, b.receipt], "signal 9 (SIGKILL)")
    for _ in range(2):
        found = await next_one(heir, queue)
        assert [loss.cause for loss in found.history.losses] == ["signal 9 (SIGKILL)"]
        assert found.history.cause == "signal 9 (SIGKILL)"


@pytest.mark.usefixtures("tells")
@pytest.mark.parametrize("times", [1, 2])
async def test_a_cause_may_be_told_after_the_message_was_taken_back(
    make_broker: MakeBroker, queue: str, times: int
) -> None:
    dead, heir = await make_broker(**NO_PAUSE), await make_broker(**NO_PAUSE)
    await dead.publish([message(queue)])
    lost = await lose(dead, queue, times)
    found = await next_one(heir, queue)  # so all of them have been taken back
    await heir.losses.explain([one.receipt for one in lost], "out of memory")
    await heir.losses.explain([found.receipt], "stalled for 300 s")
    again = await next_one(heir, queue)
    assert [loss.cause for loss in again.history.losses] == ["out of memory"] * times + ["stalled for 300 s"]
    assert [loss.receipt for loss in again.history.losses] == [*(one.receipt for one in lost), found.receipt]


@pytest.mark.usefixtures("tells")
async def test_a_cause_while_the_message_waits_for_its_pause_is_kept(make_broker: MakeBroker, queue: str) -> None:
    broker = await make_broker(lease=0.2, lost_backoff=(75.0,))  # half a second
    await broker.publish([message(queue)])
    (lost,) = await lose(broker, queue, 1)

    async def waits() -> bool:
        assert not await broker.fetch([queue], 1, 0)
        return any(row.parked for row in await broker.inspection.queues())

    await until(waits, "it is taken back, and waits")
    await broker.losses.explain([lost.receipt], "exit code 1")
    assert [loss.cause for loss in (await next_one(broker, queue)).history.losses] == ["exit code 1"]


async def test_a_cause_for_what_is_settled_or_unknown_changes_nothing(make_broker: MakeBroker, queue: str) -> None:
    broker = await make_broker(**NO_PAUSE)
    await broker.publish([message(queue, "done"), message(queue, "other")])
    done, other = await broker.fetch([queue], 2, 1)
    assert not await broker.settle([(done, Ack())])
    await broker.losses.explain([done.receipt, "999999:nobody", "x"], "exit code 1")
    await broker.losses.explain([], "exit code 1")
    found = await next_one(broker, queue)
    assert names([found]) == ["other"]
    assert [loss.cause for loss in found.history.losses] == [""]
    assert found.receipt != other.receipt


@pytest.mark.usefixtures("tells")
async def test_a_cause_of_strange_characters_breaks_nothing(make_broker: MakeBroker, queue: str) -> None:
    broker = await make_broker(**NO_PAUSE)
    await broker.publish([message(queue)])
    (lost,) = await lose(broker, queue, 1)
    await broker.losses.explain([lost.receipt], "a\tb\nc\x1b[31m é %1 " + "x" * 1000)
    (loss,) = (await next_one(broker, queue)).history.losses
    assert loss.cause.startswith("a")
    assert "é %1 xxx" in loss.cause


async def test_a_cause_leaves_the_message_as_it_was(make_broker: MakeBroker, queue: str) -> None:
    broker = await make_broker(**NO_PAUSE)
    sent = message(queue)
    sent.body = b"\x00\t\n1\n\xff \r\n"
    await broker.publish([sent])
    (lost,) = await lose(broker, queue, 1)
    await broker.losses.explain([lost.receipt], "one")
    found = await next_one(broker, queue)
    await broker.losses.explain([found.receipt], "two")
    again = await next_one(broker, queue)
    assert isinstance(again.message, Message)
    assert (again.message.body, again.message.headers) == (sent.body, sent.headers)
    assert again.deliveries == 3


async def test_giving_back_what_nobody_took_is_always_possible(make_broker: MakeBroker, queue: str) -> None:
    broker = await make_broker()
    await broker.losses.give_back_untaken()
    await broker.publish([message(queue, f"{number}") for number in range(5)])
    assert len(await broker.fetch([queue], 2, 1)) == 2
    await broker.losses.give_back_untaken()
    found: list[str] = []
    while len(found) < 3:
        found += names(await broker.fetch([queue], 10, 5))
    assert sorted(found) == ["2", "3", "4"]


# --- after death --------------------------------------------------------------------------------------


async def test_a_dead_letter_tells_its_losses(make_broker: MakeBroker, queue: str, kind: str) -> None:
    broker = await make_broker(**NO_PAUSE)
    await broker.publish([message(queue)])
    (lost,) = await lose(broker, queue, 1)
    await broker.losses.explain([lost.receipt], "signal 11 (SIGSEGV)")
    found = await next_one(broker, queue)
    await broker.settle([(found, Bury("delivery_limit", "enough"))])
    (letter,) = await broker.inspection.dead(queue)
    assert letter.history.losses == found.history.losses
    assert letter.history.cause == ("" if kind == "rabbitmq" else "signal 11 (SIGSEGV)")
    assert letter.deliveries == 2


async def test_a_replayed_message_remembers_its_deaths(make_broker: MakeBroker, queue: str) -> None:
    broker = await make_broker(**NO_PAUSE)
    sent = message(queue)
    await broker.publish([sent])
    await lose(broker, queue, 1)
    await broker.settle([(await next_one(broker, queue), Bury("first", "once"))])
    (first,) = await broker.inspection.dead(queue)
    assert await broker.inspection.retry_dead([first.id]) == 1
    replayed = await next_one(broker, queue)
    assert isinstance(replayed.message, Message)
    assert (replayed.message.body, replayed.message.headers) == (sent.body, sent.headers)
    assert (replayed.deliveries, replayed.history.losses) == (1, ())
    again = await next_one(broker, queue)  # a loss does not make it forget
    assert (again.deliveries, len(again.history.losses)) == (2, 1)
    await broker.settle([(again, Bury("second", "twice"))])
    (second,) = await broker.inspection.dead(queue)
    assert [(death.id, death.reason, death.detail) for death in second.history.deaths] == [(first.id, "first", "once")]
    (death,) = second.history.deaths
    assert (death.died, death.deliveries, death.worker) == (first.died.timestamp(), 2, broker.holder)
    assert death.losses == first.history.losses
    assert abs(death.replayed - time.time()) < 60
    await broker.inspection.retry_dead([second.id])
    assert [one.reason for one in (await next_one(broker, queue)).history.deaths] == ["first", "second"]


async def test_a_replayed_message_that_succeeds_leaves_nothing_behind(make_broker: MakeBroker, queue: str) -> None:
    broker = await make_broker()
    await broker.publish([message(queue)])
    await broker.settle([(await next_one(broker, queue), Bury("x"))])
    (letter,) = await broker.inspection.dead(queue)
    await broker.inspection.retry_dead([letter.id])
    assert not await broker.settle([(await next_one(broker, queue), Ack())])
    await broker.publish([message(queue)])
    assert (await next_one(broker, queue)).history == NO_HISTORY
