"""The five promises of `aqueue.broker`, and what people need, on every broker."""

import asyncio
import time
from collections.abc import Sequence
from itertools import permutations
from typing import Any

import pytest

from aqueue.broker import Ack, Broker, Bury, Delivery, Presence, Release, token_of
from aqueue.errors import ConfigurationError
from aqueue.protocol import Message
from tests.conformance.conftest import LEASE, MakeBroker
from tests.kit.waiting import until

#: How long a lost message may take to come back: the lease, half of it again, a look.
COMES_BACK = LEASE * 1.5 + LEASE / 4 + 2.0


def message(queue: str, name: str = "m", **fields: Any) -> Message:
    headers = {"task": "t", "id": name, "lang": "py", "own": {"nested": [1, None, "é"]}}
    return Message(queue=queue, headers=headers, body=b"[[], {}, {}]", **fields)


def names(deliveries: Sequence[Delivery]) -> list[str]:
    return [delivery.message.headers["id"] for delivery in deliveries]  # type: ignore[union-attr]


async def fetch_all(broker: Broker, queue: str, wait: float = 0.0) -> list[Delivery]:
    found: list[Delivery] = []
    while batch := await broker.fetch([queue], 100, wait):
        found += batch
    return found


class Unknown(int):
    """A number that a server doesn't tell: it is whatever it should be."""

    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


async def depth(broker: Broker, queue: str) -> tuple[int, int, int, int]:
    for row in await broker.inspection.queues([queue]):
        if row.queue == queue:
            leased, parked = (Unknown() if count is None else count for count in (row.leased, row.parked))
            return row.ready, leased, parked, row.dead
    return (0, 0, 0, 0) if not broker.pushes else (0, Unknown(), Unknown(), 0)


# --- 1: publish ---------------------------------------------------------------------------------------


async def test_what_is_published_is_fetched_unchanged(broker: Broker, queue: str) -> None:
    sent = message(queue, "whole", content_type="application/x-msgpack", content_encoding="binary", priority=3)
    sent.body = bytes(range(256))
    sent.properties = {"correlation_id": "c", "reply_to": "r", "delivery_mode": 2}
    await broker.publish([sent])
    (delivery,) = await broker.fetch([queue], 10, 1)
    got = delivery.message
    assert isinstance(got, Message)
    assert (got.queue, got.headers, got.body) == (queue, sent.headers, sent.body)
    assert (got.content_type, got.content_encoding) == ("application/x-msgpack", "binary")
    assert got.properties.items() >= sent.properties.items()
    assert delivery.deliveries == 1


async def test_another_connection_sees_what_was_published(make_broker: MakeBroker, queue: str) -> None:
    sender, worker = await make_broker(), await make_broker()
    await sender.publish([message(queue, "a"), message(queue, "b")])
    assert names(await worker.fetch([queue], 10, 1)) == ["a", "b"]


async def test_publishing_nothing_is_nothing(broker: Broker, queue: str) -> None:
    await broker.publish([])
    assert await broker.fetch([queue], 10, 0) == []


async def test_a_large_batch_arrives_whole_and_in_order(broker: Broker, queue: str) -> None:
    wanted = [f"{i}" for i in range(1234)]
    await broker.publish([message(queue, name) for name in wanted])
    assert names(await fetch_all(broker, queue)) == wanted


# --- order --------------------------------------------------------------------------------------------


async def test_higher_priority_first_and_fifo_within(broker: Broker, queue: str) -> None:
    await broker.publish(
        [message(queue, f"{priority}-{i}", priority=priority) for i in (1, 2) for priority in (0, 9, 5)]
    )
    assert names(await fetch_all(broker, queue)) == ["9-1", "9-2", "5-1", "5-2", "0-1", "0-2"]


async def test_the_most_urgent_of_several_queues_first(broker: Broker, queue: str) -> None:
    other = queue + "-other"
    await broker.publish([message(queue, "calm"), message(other, "urgent", priority=9), message(other, "calm too")])
    first, *rest = await broker.fetch([queue, other], 10, 1)
    assert names([first]) == ["urgent"]
    assert sorted(names(rest)) == ["calm", "calm too"]


async def test_no_queue_starves_its_neighbour(broker: Broker, queue: str) -> None:
    other = queue + "-other"
    await broker.publish([message(queue, f"a{i}") for i in range(20)] + [message(other, f"b{i}") for i in range(20)])
    seen = [names(await broker.fetch([queue, other], 1, 0))[0][0] for _ in range(10)]
    assert {"a", "b"} == set(seen)


async def test_the_limit_is_kept(broker: Broker, queue: str) -> None:
    await broker.publish([message(queue, f"{i}") for i in range(10)])
    assert len(await broker.fetch([queue], 4, 0)) == 4
    assert len(await broker.fetch([queue], 100, 0)) == 6


# --- waiting ------------------------------------------------------------------------------------------


async def test_fetch_waits_and_is_woken_by_a_message(make_broker: MakeBroker, queue: str) -> None:
    sender, worker = await make_broker(), await make_broker()
    waiting = asyncio.create_task(worker.fetch([queue], 10, 10))
    await asyncio.sleep(0.2)
    assert not waiting.done()
    start = time.monotonic()
    await sender.publish([message(queue, "wake")])
    assert names(await waiting) == ["wake"]
    assert time.monotonic() - start < 2.0  # woken, not found by a look of its own


async def test_fetch_is_woken_by_any_priority_and_any_queue(make_broker: MakeBroker, queue: str) -> None:
    sender, worker = await make_broker(), await make_broker()
    for priority in (0, 4, 7, 9):
        for name in (queue, queue + "-other"):
            waiting = asyncio.create_task(worker.fetch([queue, queue + "-other"], 10, 10))
            await asyncio.sleep(0.05)
            start = time.monotonic()
            await sender.publish([message(name, f"{name}{priority}", priority=priority)])
            assert names(await waiting) == [f"{name}{priority}"]
            assert time.monotonic() - start < 2.0


async def test_fetch_comes_back_empty_when_nothing_comes(broker: Broker, queue: str) -> None:
    start = time.monotonic()
    assert await broker.fetch([queue], 10, 0.3) == []
    assert 0.25 < time.monotonic() - start < 1.5


# --- 2: a claim is exclusive --------------------------------------------------------------------------


async def test_a_claimed_message_is_nobody_elses(make_broker: MakeBroker, queue: str) -> None:
    one, two = await make_broker(), await make_broker()
    await one.publish([message(queue)])
    assert len(await one.fetch([queue], 10, 1)) == 1
    assert await two.fetch([queue], 10, LEASE / 3) == []
    assert await depth(two, queue) == (0, 1, 0, 0)


async def test_many_consumers_share_without_overlap(make_broker: MakeBroker, queue: str) -> None:
    consumers = [await make_broker(lease=30.0) for _ in range(3)]
    wanted = sorted(f"{i}" for i in range(600))
    await consumers[0].publish([message(queue, name) for name in wanted])
    found: list[str] = []

    async def consume(broker: Broker) -> None:
        while batch := await broker.fetch([queue], 7, 0.1):
            found.extend(names(batch))
            assert await broker.settle([(delivery, Ack()) for delivery in batch]) in ([], ())

    await asyncio.gather(*map(consume, consumers))
    assert sorted(found) == wanted
    assert await depth(consumers[0], queue) == (0, 0, 0, 0)


async def test_a_cancelled_fetch_loses_nothing_and_counts_nothing(make_broker: MakeBroker, queue: str) -> None:
    broker, other = await make_broker(lease=30.0), await make_broker(lease=30.0)
    for round in range(40):
        waiting = asyncio.create_task(broker.fetch([queue], 10, 5))
        if round % 2:
            await asyncio.sleep(0)
        publishing = asyncio.create_task(other.publish([message(queue, f"{round}")]))
        await asyncio.sleep(0.0005 * (round % 8))
        waiting.cancel()
        await publishing
        await asyncio.wait([waiting])
        kept = [] if waiting.cancelled() else waiting.result()
        await broker.settle([(delivery, Release()) for delivery in kept])
    found: list[Delivery] = []

    async def everything_is_back() -> bool:
        found.extend(await other.fetch([queue], 100, 0.1))
        return len(found) == 40

    await until(everything_is_back, "all messages are back in the queue")
    assert sorted(names(found)) == sorted(f"{i}" for i in range(40))
    assert {delivery.deliveries for delivery in found} == {1}


async def test_what_a_cancelled_fetch_had_claimed_is_not_overtaken(make_broker: MakeBroker, queue: str) -> None:
    broker = await make_broker(lease=30.0)
    await broker.publish([message(queue, f"{number}") for number in range(3)])
    for round in range(40):
        claiming = asyncio.create_task(broker.fetch([queue], 1, 5))
        await asyncio.sleep(0.00005 * round)
        claiming.cancel()
        await asyncio.wait([claiming])
        first = await broker.fetch([queue], 1, 5) if claiming.cancelled() else claiming.result()
        assert names(first) == ["0"], round
        await broker.settle([(delivery, Release()) for delivery in first])


# --- 3: a lease that ends -----------------------------------------------------------------------------


async def test_a_lost_message_comes_back_counted(make_broker: MakeBroker, queue: str) -> None:
    lost, finder = await make_broker(lease=LEASE), await make_broker(lease=LEASE)
    await lost.publish([message(queue, "first"), message(queue, "second")])
    (old,) = await lost.fetch([queue], 1, 1)
    found = await finder.fetch([queue], 1, 0)
    assert names(found) == ["second"]
    await finder.settle([(found[0], Ack())])
    (again,) = await finder.fetch([queue], 10, COMES_BACK)
    assert names([again]) == ["first"]
    assert again.deliveries == 2
    assert again.receipt != old.receipt


async def test_every_claim_has_a_higher_number_than_those_before(
    make_broker: MakeBroker, queue: str, kind: str
) -> None:
    """Whoever claims, whatever is claimed, in one batch and over a release; RabbitMQ numbers nothing."""
    one, other = await make_broker(lease=30.0), await make_broker(lease=30.0)
    await one.publish([message(queue, f"{number}") for number in range(6)])
    claimed = list(await one.fetch([queue], 3, 1))
    claimed += await other.fetch([queue], 3, 1)
    await one.settle([(delivery, Release()) for delivery in claimed[:2]])
    await other.publish([message(queue, "late")])
    claimed += await other.fetch([queue], 1, 1)
    claimed += await one.fetch([queue], 5, 1)
    numbers = [token_of(delivery.receipt) for delivery in claimed]
    assert len(claimed) == 9
    if kind == "rabbitmq":
        assert set(numbers) == {None}
    else:
        assert None not in numbers
        assert sorted(set(numbers), key=lambda number: number or 0) == numbers


async def test_a_lost_message_goes_to_the_front(make_broker: MakeBroker, queue: str, kind: str) -> None:
    """But on a classic queue of RabbitMQ's, which doesn't count: there it is sent again, with its count."""
    lost, finder = await make_broker(lease=LEASE), await make_broker(lease=LEASE)
    await lost.publish([message(queue, f"{i}") for i in range(4)])
    assert names(await lost.fetch([queue], 2, 1)) == ["0", "1"]

    async def back() -> bool:
        await finder.fetch([queue + "-none"], 1, 0.05)  # a live consumer brings back what a dead one held
        return (await depth(finder, queue))[0] == 4

    await until(back, "the lost messages are ready again", COMES_BACK)
    found: list[Delivery] = []
    while len(found) < 4:
        found += await finder.fetch([queue], 10, 1)
    assert names(found) == (["2", "3", "0", "1"] if kind == "rabbitmq" else ["0", "1", "2", "3"])
    assert sorted(delivery.deliveries for delivery in found) == [1, 1, 2, 2]


async def test_every_loss_is_counted_and_success_forgets(make_broker: MakeBroker, queue: str) -> None:
    broker = await make_broker(lease=0.5)
    await broker.publish([message(queue)])
    for number in (1, 2, 3):
        (delivery,) = await broker.fetch([queue], 1, COMES_BACK)
        assert delivery.deliveries == number
    assert await broker.settle([(delivery, Ack())]) in ([], ())
    await broker.publish([message(queue)])
    (fresh,) = await broker.fetch([queue], 1, 1)
    assert fresh.deliveries == 1


async def test_a_renewed_lease_does_not_end(make_broker: MakeBroker, queue: str) -> None:
    holder, other = await make_broker(lease=LEASE), await make_broker(lease=LEASE)
    await holder.publish([message(queue)])
    held = await holder.fetch([queue], 1, 1)
    ends = time.monotonic() + COMES_BACK
    while time.monotonic() < ends:
        assert list(await asyncio.to_thread(holder.extend, held)) == []
        assert await other.fetch([queue], 1, LEASE / 4) == []
    assert await holder.settle([(held[0], Ack())]) in ([], ())
    assert await depth(other, queue) == (0, 0, 0, 0)


async def test_extend_says_what_is_no_longer_ours(make_broker: MakeBroker, queue: str) -> None:
    broker = await make_broker()
    await broker.publish([message(queue, "kept"), message(queue, "gone")])
    kept, gone = await broker.fetch([queue], 2, 1)
    await broker.settle([(gone, Ack())])
    assert list(await asyncio.to_thread(broker.extend, [kept, gone])) == [gone]


async def test_extending_nothing_is_nothing(broker: Broker) -> None:
    assert list(await asyncio.to_thread(broker.extend, [])) == []


# --- 4 and 5: settle ----------------------------------------------------------------------------------


async def test_what_is_settled_is_gone(make_broker: MakeBroker, queue: str) -> None:
    broker = await make_broker(lease=LEASE)
    await broker.publish([message(queue, f"{i}") for i in range(5)])
    claimed = await broker.fetch([queue], 10, 1)
    assert await broker.settle([(delivery, Ack()) for delivery in claimed]) in ([], ())
    assert await depth(broker, queue) == (0, 0, 0, 0)
    assert await broker.fetch([queue], 10, COMES_BACK) == []


async def test_what_is_settled_in_any_order_does_not_come_again(make_broker: MakeBroker, queue: str) -> None:
    """Nor does anything else go with it, once its holder is gone."""
    finder = await make_broker(lease=LEASE)
    left: dict[str, str] = {}
    for order in permutations(range(3), 2):
        name = f"{queue}-{order[0]}{order[1]}"
        left[name] = f"{3 - sum(order)}"
        holder = await make_broker(lease=LEASE)
        await holder.publish([message(name, f"{i}") for i in range(3)])
        claimed = await holder.fetch([name], 3, 1)
        assert await holder.settle([(claimed[i], Ack()) for i in order]) in ([], ())
        await holder.__aexit__(None, None, None)
    for name, kept in left.items():
        assert names(await finder.fetch([name], 10, COMES_BACK)) == [kept], name
        assert await depth(finder, name) == (0, 1, 0, 0)


async def test_settling_twice_is_refused_quietly(broker: Broker, queue: str) -> None:
    await broker.publish([message(queue)])
    (delivery,) = await broker.fetch([queue], 1, 1)
    assert await broker.settle([(delivery, Ack())]) in ([], ())
    assert await broker.settle([(delivery, Ack())]) == [delivery]


async def test_an_older_claim_cannot_settle_a_newer_one(make_broker: MakeBroker, queue: str) -> None:
    slow, quick = await make_broker(lease=LEASE), await make_broker(lease=LEASE)
    await slow.publish([message(queue)])
    (old,) = await slow.fetch([queue], 1, 1)
    (new,) = await quick.fetch([queue], 1, COMES_BACK)
    follow_up = message(queue, "follow-up")
    for verdict in (Ack(publish=[follow_up]), Release(), Bury("stale")):
        assert await slow.settle([(old, verdict)]) == [old]
    assert await depth(quick, queue) == (0, 1, 0, 0)
    assert await quick.settle([(new, Ack())]) in ([], ())
    assert await depth(quick, queue) == (0, 0, 0, 0)


async def test_released_messages_go_to_the_front_in_order_and_uncounted(broker: Broker, queue: str) -> None:
    await broker.publish([message(queue, f"{i}") for i in range(5)])
    claimed = await broker.fetch([queue], 3, 1)
    await broker.settle([(delivery, Release()) for delivery in claimed])
    again = await broker.fetch([queue], 10, 1)
    assert names(again) == ["0", "1", "2", "3", "4"]
    assert {delivery.deliveries for delivery in again} == {1}


async def test_a_released_message_keeps_its_priority(broker: Broker, queue: str) -> None:
    await broker.publish([message(queue, "calm"), message(queue, "urgent", priority=9)])
    (urgent,) = await broker.fetch([queue], 1, 1)
    await broker.settle([(urgent, Release(last=True))])
    assert names(await broker.fetch([queue], 10, 1)) == ["urgent", "calm"]


async def test_released_last_goes_behind_the_others(broker: Broker, queue: str) -> None:
    await broker.publish([message(queue, f"{i}") for i in range(3)])
    (first,) = await broker.fetch([queue], 1, 1)
    await broker.settle([(first, Release(last=True))])
    assert names(await broker.fetch([queue], 10, 1)) == ["1", "2", "0"]


async def test_release_with_delay_parks(broker: Broker, queue: str, kind: str) -> None:
    await broker.publish([message(queue)])
    (delivery,) = await broker.fetch([queue], 1, 1)
    start = time.monotonic()
    await broker.settle([(delivery, Release(delay=0.4))])
    assert await depth(broker, queue) == (0, 0, 1, 0)
    (again,) = await broker.fetch([queue], 1, 5)
    latest = 3.0 if kind == "rabbitmq" else 1.5  # its ladder has whole seconds
    assert 0.35 < time.monotonic() - start < latest
    assert again.deliveries == 1


async def test_follow_ups_leave_with_the_ack(make_broker: MakeBroker, queue: str) -> None:
    broker, other = await make_broker(), await make_broker()
    await broker.publish([message(queue, "one")])
    (one,) = await broker.fetch([queue], 1, 1)
    waiting = asyncio.create_task(other.fetch([queue], 5, 5))
    await asyncio.sleep(0.05)
    await broker.settle([(one, Ack(publish=[message(queue, "two"), message(queue, "later", delay=0.2)]))])
    assert names(await waiting) == ["two"]
    assert names(await other.fetch([queue], 5, 5)) == ["later"]


async def test_buried_messages_are_found_retried_and_dropped(broker: Broker, queue: str) -> None:
    sent = message(queue, "poison")
    sent.body = b"\x00\xff not a body"
    await broker.publish([sent, message(queue, "worse")])
    claimed = await broker.fetch([queue], 2, 1)
    await broker.settle([(delivery, Bury("bad_body", "it is bad")) for delivery in claimed])
    assert await depth(broker, queue) == (0, 0, 0, 2)
    letters = {letter.message.headers["id"]: letter for letter in await broker.inspection.dead(queue)}  # type: ignore[union-attr]
    letter = letters["poison"]
    assert (letter.reason, letter.detail, letter.raw) == ("bad_body", "it is bad", sent.body)
    assert letter.worker == broker.holder
    assert await broker.inspection.find_dead(letter.id) == letter
    assert await broker.inspection.find_dead("999999") is None
    assert await broker.inspection.drop_dead([letters["worse"].id, "999999"]) == 1
    assert await broker.inspection.retry_dead([letter.id, "999999"]) == 1
    (again,) = await broker.fetch([queue], 10, 1)
    assert isinstance(again.message, Message)
    assert (again.message.body, again.message.headers, again.deliveries) == (sent.body, sent.headers, 1)
    assert await broker.inspection.dead() == []


async def test_dead_letters_are_listed_newest_first_and_by_queue(broker: Broker, queue: str) -> None:
    for number in range(3):
        await broker.publish([message(queue, f"{number}"), message(queue + "-other", "x")])
        for name in (queue, queue + "-other"):
            (delivery,) = await broker.fetch([name], 1, 1)
            await broker.settle([(delivery, Bury(f"r{number}"))])
        await asyncio.sleep(0.002)
    assert [letter.reason for letter in await broker.inspection.dead(queue)] == ["r2", "r1", "r0"]
    assert [letter.reason for letter in await broker.inspection.dead(queue, limit=1)] == ["r2"]
    assert len(await broker.inspection.dead()) == 6


# --- time ---------------------------------------------------------------------------------------------


async def test_a_delayed_message_waits_for_its_time(make_broker: MakeBroker, queue: str, kind: str) -> None:
    sender, worker = await make_broker(), await make_broker()
    waiting = asyncio.create_task(worker.fetch([queue], 10, 5))
    await asyncio.sleep(0.05)
    start = time.monotonic()
    await sender.publish([message(queue, "late", delay=0.4)])
    assert await depth(sender, queue) == (0, 0, 1, 0)
    assert names(await waiting) == ["late"]
    assert 0.38 < time.monotonic() - start < (3.0 if kind == "rabbitmq" else 2.0)


async def test_a_short_delay_is_not_held_up_by_a_long_one(broker: Broker, queue: str) -> None:
    await broker.publish([message(queue, "tomorrow", delay=86400), message(queue, "soon", delay=0.2)])
    assert names(await broker.fetch([queue], 10, 5)) == ["soon"]


async def test_queues_of_celery_workers_get_their_etas_at_once(make_broker: MakeBroker, queue: str) -> None:
    broker = await make_broker(eta_queues=("legacy-*",))
    await broker.publish([message(f"legacy-{queue}", "now", delay=60), message(queue, "parked", delay=60)])
    assert names(await broker.fetch([f"legacy-{queue}", queue], 10, 0)) == ["now"]


async def test_the_brokers_clock_is_the_time(broker: Broker, queue: str) -> None:
    await broker.fetch([queue], 1, 0)
    assert abs(broker.now() - time.time()) < 2


# --- people -------------------------------------------------------------------------------------------


async def test_depths_tell_where_messages_are(broker: Broker, queue: str) -> None:
    await broker.publish([message(queue, f"{i}", priority=i % 10) for i in range(6)])
    await broker.publish([message(queue, "later", delay=60)])
    claimed = await broker.fetch([queue], 3, 1)
    await broker.settle([(claimed[0], Bury("x"))])

    async def as_it_should() -> bool:  # what is pushed for nobody is sent back in a moment
        return await depth(broker, queue) == (3, 2, 1, 1)

    await until(as_it_should, "3 ready, 2 leased, 1 parked, 1 dead")


async def test_peek_shows_the_next_without_claiming(broker: Broker, queue: str, kind: str) -> None:
    await broker.publish([message(queue, f"{i}") for i in range(3)] + [message(queue, "urgent", priority=9)])
    if kind == "rabbitmq":
        with pytest.raises(ConfigurationError, match="only by delivering it"):
            await broker.inspection.peek(queue, 3)
        return
    peeked = await broker.inspection.peek(queue, 3)
    assert [found.headers["id"] for found in peeked if isinstance(found, Message)] == ["urgent", "0", "1"]
    assert await depth(broker, queue) == (4, 0, 0, 0)


async def test_purge_deletes_what_waits_and_nothing_else(broker: Broker, queue: str, kind: str) -> None:
    await broker.publish([message(queue, f"{i}", priority=i) for i in range(5)] + [message(queue, "later", delay=60)])
    await broker.publish([message(queue + "-other", "kept")])
    (running,) = await broker.fetch([queue], 1, 1)
    assert await broker.inspection.purge(queue) == (4 if kind == "rabbitmq" else 5)  # its ladder belongs to all
    assert await depth(broker, queue) == (0, 1, 0, 0)
    assert await broker.settle([(running, Ack())]) in ([], ())
    assert names(await broker.fetch([queue + "-other"], 1, 1)) == ["kept"]


@pytest.mark.parametrize("count", [0, 1])
async def test_closing_twice_or_unused_is_fine(make_broker: MakeBroker, queue: str, count: int) -> None:
    broker = await make_broker()
    for _ in range(count):
        await broker.fetch([queue], 1, 0)
    await broker.__aexit__(None, None, None)


async def test_workers_are_shown_while_they_live(make_broker: MakeBroker, kind: str) -> None:
    broker = await make_broker()
    told = {
        name: Presence(
            worker=name,
            pid=7,
            started=1.0,
            told=2.0,
            queues=["a"],
            slots={"thread": 3},
            running=1,
            ended=5,
            stalls=1,
            stalled_seconds=1.5,
            stall="crunch at shop.py:1",
        )
        for name in ("one@here", "two@here")
    }
    for presence in told.values():
        broker.present(presence, 60.0)
    expected = [] if kind == "rabbitmq" else [told["one@here"], told["two@here"]]
    assert list(await (await make_broker()).inspection.workers()) == expected
    broker.present(told["one@here"], 0.0)
    assert list(await broker.inspection.workers()) == expected[1:]
