"""What is particular to RabbitMQ: routing, refusals, names, sizes, hosts, TLS, quorum queues, odd messages."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from uuid import uuid4

import amqp
import pytest
import pytest_asyncio

from aqueue import broker as brokers
from aqueue.broker import Ack, Broker, BrokerOptions, Bury, Delivery, Queue, Release
from aqueue.broker.amqp import AmqpBroker, consuming
from aqueue.drivers.amqp_publisher import Publication, nothing_to_prepare
from aqueue.errors import BrokerUnavailable, ControlRefused, EnqueueFailed
from aqueue.pidbox import Revocation
from aqueue.protocol import Message, Unreadable
from aqueue.url import Url
from tests.conformance.test_broker import fetch_all, message, names
from tests.kit.certificates import make_certificates
from tests.kit.proxy import Proxy
from tests.kit.rabbitmq import RabbitServer
from tests.kit.servers import free_port
from tests.kit.waiting import until


async def open_broker(url: str, **options: Any) -> AmqpBroker:
    made = brokers.from_url(Url(url))(BrokerOptions(**{"lease": 30.0, "timeout": 5.0, **options}))
    assert isinstance(made, AmqpBroker)
    made.holder = "tester@host"
    return made


@pytest_asyncio.fixture
async def broker(rabbit_url: str) -> AsyncIterator[AmqpBroker]:
    async with await open_broker(rabbit_url) as made:
        yield made


@pytest.fixture
def channel(rabbit_server: RabbitServer, rabbit_url: str) -> Iterator[amqp.Channel]:
    """A channel of a foreign client's."""
    with amqp.Connection(f"127.0.0.1:{rabbit_server.port}", confirm_publish=True) as connection:
        yield connection.channel()


@pytest.fixture
def user(rabbit_server: RabbitServer) -> Iterator[tuple[str, str]]:
    """A user that may do nothing yet, and the URL to be that user."""
    name = f"user-{uuid4().hex[:8]}"
    rabbit_server.ctl("add_user", name, "canary-password")
    yield name, f"amqp://{name}:canary-password@127.0.0.1:{rabbit_server.port}//"
    rabbit_server.ctl("delete_user", name)


# --- routing ------------------------------------------------------------------------------------------


async def test_an_exchange_that_is_missing_is_named(broker: AmqpBroker, queue: str) -> None:
    with pytest.raises(EnqueueFailed, match=f"no exchange '{queue}-x'") as caught:
        await broker.publish([message("", exchange=f"{queue}-x", routing_key="k")])
    assert caught.value.refused is None
    await broker.publish([message(queue, "next")])
    assert names(await broker.fetch([queue], 1, 1)) == ["next"]


async def test_an_exchange_without_a_binding_is_named(broker: AmqpBroker, channel: amqp.Channel, queue: str) -> None:
    channel.exchange_declare(queue, "topic", durable=True, auto_delete=False)
    with pytest.raises(EnqueueFailed, match=f"'{queue}' has no queue for 'some.key'"):
        await broker.publish([message("", exchange=queue, routing_key="some.key")])


async def test_one_unroutable_message_of_a_batch_is_refused_and_the_others_are_stored(
    broker: AmqpBroker, channel: amqp.Channel, queue: str
) -> None:
    channel.exchange_declare(queue, "topic", durable=True, auto_delete=False)
    channel.queue_declare(queue, durable=True, auto_delete=False)
    channel.queue_bind(queue, queue, "known.*")
    keys = ("known.a", "unknown", "known.b", "unknown")
    batch = [message("", f"{i}", exchange=queue, routing_key=key) for i, key in enumerate(keys)]
    with pytest.raises(EnqueueFailed) as caught:
        await broker.publish([*batch, message(queue, "straight")])
    assert caught.value.refused is not None
    assert sorted(caught.value.refused) == [1, 3]
    assert names(await fetch_all(broker, queue, 0.2)) == ["0", "2", "straight"]


async def test_a_queue_that_is_full_refuses_by_position(rabbit_url: str, queue: str) -> None:
    full = Queue(arguments={"x-max-length": 3, "x-overflow": "reject-publish"})
    async with await open_broker(rabbit_url, queues={queue: full}) as broker:
        with pytest.raises(EnqueueFailed, match="full") as caught:
            await broker.publish([message(queue, f"{i}") for i in range(5)] + [message(queue + "-other", "5")])
        refused = caught.value.refused
        assert refused is not None
        with pytest.raises(EnqueueFailed) as caught:
            await broker.publish([message(queue, "late")])
        assert caught.value.refused is None
        stored = names(await fetch_all(broker, queue, 0.2))
        assert sorted(f"{i}" for i in refused) == sorted({f"{i}" for i in range(5)} - set(stored))
        assert len(stored) >= 3
        assert names(await broker.fetch([queue + "-other"], 5, 1)) == ["5"]


async def test_a_deleted_queue_is_made_again_by_the_next_send(
    broker: AmqpBroker, channel: amqp.Channel, queue: str
) -> None:
    await broker.publish([message(queue, "gone")])
    channel.queue_delete(queue)
    with suppress(EnqueueFailed):  # noticed by this one, which says so
        await broker.publish([message(queue, "first")])
        pytest.fail("the server had no queue for it, and it was said to be stored")
    await broker.publish([message(queue, "second")])
    assert names(await broker.fetch([queue], 5, 1)) == ["second"]


async def test_letters_are_kept_though_their_queue_was_deleted(
    broker: AmqpBroker, channel: amqp.Channel, queue: str
) -> None:
    for number in range(2):
        await broker.publish([message(queue, f"{number}")])
        (delivery,) = await broker.fetch([queue], 1, 1)

        async def buries(claimed: Delivery = delivery) -> bool:
            try:
                return not await broker.settle([(claimed, Bury("x"))])
            except BrokerUnavailable:
                return False

        await until(buries, "the letter is put away")
        assert len(await broker.inspection.dead(queue)) == 1
        channel.queue_delete("aqueue.dead")


async def test_what_waits_for_its_time_arrives_in_a_queue_that_was_deleted_and_made_again(
    rabbit_url: str, channel: amqp.Channel, queue: str
) -> None:
    async with await open_broker(rabbit_url) as sender, await open_broker(rabbit_url) as worker:
        waiting = asyncio.create_task(worker.fetch([queue], 5, 15))
        await sender.publish([message(queue, "later", delay=3.0)])
        await until(lambda: channel.queue_declare(queue, passive=True).consumer_count, "it is consumed")
        channel.queue_delete(queue)
        assert names(await waiting) == ["later"]


async def test_two_sends_of_which_one_is_forbidden_are_told_apart(
    rabbit_server: RabbitServer, channel: amqp.Channel, user: tuple[str, str], queue: str
) -> None:
    """Who is told that nothing was stored may send again; so that is never said of what may be there."""
    name, url = user
    rabbit_server.ctl("set_permissions", name, ".*", r"^(amq\.default|q-.*)$", ".*")
    channel.exchange_declare(f"forbidden-{queue}", "fanout", durable=True, auto_delete=False)
    channel.queue_declare(queue, durable=True, auto_delete=False)
    channel.queue_bind(queue, f"forbidden-{queue}")
    async with await open_broker(url) as broker:
        await broker.publish([message(queue, "first")])
        told: dict[str, BaseException | None] = {}

        async def send(name: str, **where: str) -> None:
            try:
                await broker.publish([message(queue if not where else "", name, **where)])
                told[name] = None
            except BrokerUnavailable as error:
                told[name] = error

        for round in range(10):
            sends = [send(f"allowed-{round}-{i}") for i in range(5)]
            sends.insert(3, send(f"forbidden-{round}", exchange=f"forbidden-{queue}", routing_key=""))
            await asyncio.gather(*sends)
    async with await open_broker(rabbit_server.url) as reader:
        stored = set(names(await fetch_all(reader, queue, 0.3)))
    assert not any(name.startswith("forbidden") for name in stored)
    assert {name for name, error in told.items() if isinstance(error, EnqueueFailed)} & stored == set()
    assert {name for name, error in told.items() if error is None} <= stored
    assert any("ACCESS_REFUSED" in str(error) for name, error in told.items() if name.startswith("forbidden"))


# --- names and values ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["größe {*} 排队", "with space", "x" * 200, "é" * 120, "a.b.#", "{}"])
async def test_any_name_that_rabbitmq_takes_is_a_queue(broker: AmqpBroker, queue: str, name: str) -> None:
    named = f"{name}{queue}"
    longest_key = len(named.encode()) + 2 * 28
    await broker.publish([message(named, "a"), message(named, "b", delay=0.1 if longest_key <= 255 else 0.0)])
    (a,) = await broker.fetch([named], 1, 5)
    (b,) = await broker.fetch([named], 1, 5)
    assert names([a, b]) == ["a", "b"]
    assert b.message.queue == named
    await broker.settle([(a, Ack()), (b, Bury("x"))])
    assert [letter.message.queue for letter in await broker.inspection.dead(named)] == [named]


@pytest.mark.parametrize("name", ["x" * 256, "é" * 128])
async def test_a_name_that_is_too_long_is_refused_by_position(broker: AmqpBroker, queue: str, name: str) -> None:
    with pytest.raises(EnqueueFailed, match="255") as caught:
        await broker.publish([message(queue, "good"), message(name, "bad")])
    assert caught.value.refused is None or sorted(caught.value.refused) == [1]
    await broker.publish([message(queue, "next")])
    found = names(await fetch_all(broker, queue, 0.2))
    assert found == (["next"] if caught.value.refused is None else ["good", "next"])
    with pytest.raises(BrokerUnavailable, match="255"):
        await broker.fetch([name], 1, 0)
    assert await broker.fetch([queue], 1, 0) == []


async def test_a_name_too_long_for_a_delay_is_refused(broker: AmqpBroker, queue: str) -> None:
    """Its routing key on the ladder has 57 characters more."""
    with pytest.raises(EnqueueFailed, match="255"):
        await broker.publish([message(f"{queue}{'x' * 200}", delay=1.0)])
    await broker.publish([message(queue, "next")])


@pytest.mark.parametrize(
    "value",
    [1 << 70, {1, 2}, object(), [[{"deep": 1 << 64}]], {"k" * 256: 1}, float],
    ids=lambda value: type(value).__name__,
)
async def test_a_header_that_amqp_cannot_carry_is_refused_by_position(
    broker: AmqpBroker, queue: str, value: object
) -> None:
    odd = message(queue, "odd")
    odd.headers["odd"] = value
    with pytest.raises(EnqueueFailed) as caught:
        await broker.publish([message(queue, "0"), odd, message(queue, "2")])
    assert caught.value.refused is not None
    assert list(caught.value.refused) == [1]
    assert names(await broker.fetch([queue], 5, 1)) == ["0", "2"]


async def test_headers_larger_than_a_frame_are_refused_by_position(broker: AmqpBroker, queue: str) -> None:
    large = message(queue, "large")
    large.headers["large"] = "x" * 140_000
    with pytest.raises(EnqueueFailed, match="headers") as caught:
        await broker.publish([large, message(queue, "small")])
    assert caught.value.refused is not None
    assert list(caught.value.refused) == [0]
    assert names(await broker.fetch([queue], 5, 1)) == ["small"]


@pytest.mark.parametrize("size", [0, 131063, 131064, 131065, 5_000_000])
async def test_bodies_of_any_size_travel_both_ways(broker: AmqpBroker, queue: str, size: int) -> None:
    sent = message(queue)
    sent.body = bytes(index * 7 & 255 for index in range(1000)) * (size // 1000 + 1)
    sent.body = sent.body[:size]
    await broker.publish([sent, message(queue, "behind")])
    first, behind = await broker.fetch([queue], 2, 5)
    assert isinstance(first.message, Message)
    assert first.message.body == sent.body
    assert names([behind]) == ["behind"]


# --- hosts, logins, TLS -------------------------------------------------------------------------------


async def test_the_next_host_is_taken_when_the_first_is_dead(rabbit_server: RabbitServer, queue: str) -> None:
    url = f"amqp://guest:guest@127.0.0.1:{free_port()}//;amqp://guest:guest@127.0.0.1:{rabbit_server.port}//"
    async with await open_broker(url) as broker:
        await broker.publish([message(queue, "a")])

        async def fetches() -> list[str]:
            try:
                return names(await broker.fetch([queue], 1, 1))
            except BrokerUnavailable:
                return []

        assert await until(fetches, "the second host answers") == ["a"]


@pytest.mark.parametrize("wrong", ["password", "user", "virtual host"])
async def test_a_refused_login_is_said_at_once_without_the_password(
    rabbit_server: RabbitServer, user: tuple[str, str], wrong: str, queue: str
) -> None:
    name, url = user
    url = {
        "password": url.replace("canary-", "canary-wrong-"),
        "user": url.replace(name, "nobody"),
        "virtual host": f"{url[:-1]}nowhere",
    }[wrong]
    async with await open_broker(url) as broker:
        start = time.monotonic()
        with pytest.raises(EnqueueFailed) as sending:
            await broker.publish([message(queue)])
        with pytest.raises(BrokerUnavailable) as fetching:
            await broker.fetch([queue], 1, 10)
        assert time.monotonic() - start < 4
        for caught in (sending, fetching):
            assert "canary" not in str(caught.value)
            assert str(rabbit_server.port) in str(caught.value)
            assert ("nowhere" if wrong == "virtual host" else "ACCESS_REFUSED") in str(caught.value)


async def test_a_server_that_is_down_is_named_within_the_deadline(queue: str) -> None:
    url = f"amqp://guest:canary-password@127.0.0.1:{free_port()}//"
    async with await open_broker(url, timeout=0.7) as broker:
        start = time.monotonic()
        with pytest.raises(EnqueueFailed, match=r"127\.0\.0\.1.*refused") as caught:
            await broker.publish([message(queue)])
        assert time.monotonic() - start < 2
        with pytest.raises(BrokerUnavailable, match="refused"):
            await broker.fetch([queue], 1, 10)
        assert "canary" not in str(caught.value)


async def test_a_server_that_says_nothing_is_given_up_within_the_deadline(rabbit_proxy: Proxy, queue: str) -> None:
    rabbit_proxy.silence()
    url = f"amqp://guest:guest@127.0.0.1:{rabbit_proxy.port}//?connection_timeout=1"
    async with await open_broker(url, timeout=1.5) as broker:
        start = time.monotonic()
        with pytest.raises(EnqueueFailed, match="did not answer"):
            await broker.publish([message(queue)])
        with pytest.raises(BrokerUnavailable, match="did not answer"):
            await broker.fetch([queue], 1, 10)
        assert time.monotonic() - start < 5
    rabbit_proxy.heal()


async def test_tls_is_checked(tmp_path: Path, queue: str) -> None:
    files = make_certificates(tmp_path)
    server = RabbitServer(tmp_path / "rabbitmq", tls=files)
    try:
        url = f"amqps://guest:guest@127.0.0.1:{server.tls_port}//"
        async with await open_broker(f"{url}?ssl_ca_certs={files['ca-cert-file']}") as broker:
            await broker.publish([message(queue, "secret", delay=0), message(queue, "large")])
            claimed = await broker.fetch([queue], 2, 5)
            assert names(claimed) == ["secret", "large"]
            await broker.settle([(delivery, Ack()) for delivery in claimed])
        async with await open_broker(url, timeout=1.0) as broker:
            with pytest.raises(EnqueueFailed, match="certificate"):
                await broker.publish([message(queue)])
            with pytest.raises(BrokerUnavailable, match="certificate"):
                await broker.fetch([queue], 1, 1)
        async with await open_broker(f"{url}?ssl_cert_reqs=CERT_NONE") as broker:
            await broker.publish([message(queue, "unchecked")])
            assert names(await broker.fetch([queue], 1, 5)) == ["unchecked"]
    finally:
        server.stop()


async def test_what_is_revoked_while_the_link_is_down_is_told_when_it_is_up(
    rabbit_url: str, rabbit_proxy: Proxy, queue: str
) -> None:
    url = f"amqp://guest:guest@127.0.0.1:{rabbit_proxy.port}//"
    async with await open_broker(url) as worker, await open_broker(rabbit_url) as client:
        assert await worker.control.news(0.0) == {}
        rabbit_proxy.refuse()
        await client.control.revoke([queue], Revocation("missed", terminate=True, keep=60.0))
        with pytest.raises(BrokerUnavailable):
            await worker.control.news(10.0)
        with pytest.raises(BrokerUnavailable):
            await worker.control.news(0.0)
        rabbit_proxy.heal()
        assert set(await worker.control.news(0.0) or await worker.control.news(10.0)) == {queue}


async def test_no_queue_for_control_messages_is_left(rabbit_server: RabbitServer) -> None:
    url = rabbit_server.virtual_host("control")

    def queues() -> str:
        return rabbit_server.ctl("list_queues", "--silent", "-p", "control", "name")

    async with await open_broker(url) as broker:
        await broker.control.news(0.0)
        assert "celery.pidbox" in await asyncio.to_thread(queues)
    assert "celery.pidbox" not in await asyncio.to_thread(queues)


async def test_who_may_not_listen_is_told_so(rabbit_server: RabbitServer, user: tuple[str, str]) -> None:
    name, url = user
    rabbit_server.ctl("set_permissions", name, "^q-", ".*", "^q-")
    async with await open_broker(url) as broker:
        with pytest.raises(ControlRefused, match="refused"):
            await broker.control.news(0.0)


# --- queues -------------------------------------------------------------------------------------------


async def test_a_queue_that_exists_with_other_arguments_is_used_as_it_is(
    rabbit_url: str, channel: amqp.Channel, queue: str
) -> None:
    channel.queue_declare(queue, durable=False, auto_delete=False, arguments={"x-max-length": 1000})
    async with await open_broker(rabbit_url, queues={queue: Queue(max_priority=9)}) as broker:
        await broker.publish([message(queue, "a"), message(queue, "later", delay=0.5)])
        assert names(await broker.fetch([queue], 1, 1)) == ["a"]
        assert names(await broker.fetch([queue], 1, 5)) == ["later"]


async def test_several_queues_of_different_kinds(rabbit_url: str, queue: str) -> None:
    kinds = {
        f"{queue}-classic": Queue(),
        f"{queue}-urgent": Queue(max_priority=9),
        f"{queue}-quorum": Queue(arguments={"x-queue-type": "quorum"}),
        f"{queue}-topic": Queue(exchange=f"{queue}-topics", exchange_type="topic", routing_key="a.#"),
    }
    async with await open_broker(rabbit_url, queues=kinds) as broker:
        await broker.publish([message(name, f"{name}-{i}") for i in range(20) for name in kinds])
        await broker.publish([message("", "routed", exchange=f"{queue}-topics", routing_key="a.b.c")])
        found: list[Delivery] = []
        while batch := await broker.fetch(list(kinds), 7, 0.3):
            found += batch
            await broker.settle([(delivery, Ack()) for delivery in batch])
        assert sorted(names(found)) == sorted(["routed", *(f"{name}-{i}" for i in range(20) for name in kinds)])
        assert {delivery.deliveries for delivery in found} == {1}


async def test_a_quorum_queue_counts_by_itself_and_buries_beyond_its_limit(rabbit_url: str, queue: str) -> None:
    arguments = {
        "x-queue-type": "quorum",
        "x-delivery-limit": 2,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": "aqueue.dead",
    }
    options = {"lease": 0.5, "queues": {queue: Queue(arguments=arguments)}}
    async with await open_broker(rabbit_url, **options) as broker:
        await broker.publish([message(queue, "poison"), message(queue, "other")])
        (other,) = [one for one in await broker.fetch([queue], 2, 1) if names([one]) == ["other"]]
        await broker.settle([(other, Bury("makes", "the letters' queue exist"))])
        counts: list[int] = []
        while found := await broker.fetch([queue], 1, 3):
            counts.append(found[0].deliveries)
        assert counts == [2, 3]
        poison = next(one for one in await broker.inspection.dead(queue) if one.reason.startswith("server"))
        assert (poison.reason, poison.message.queue) == ("server_delivery_limit", queue)
        assert await broker.inspection.retry_dead([poison.id]) == 1
        (again,) = await broker.fetch([queue], 1, 5)
        assert (names([again]), again.deliveries) == (["poison"], 1)
        await broker.settle([(again, Ack())])


async def test_what_was_on_its_way_to_a_worker_that_stops_is_not_counted(rabbit_url: str, queue: str) -> None:
    """However often workers are restarted: a message that is counted each time would be buried in the end."""
    async with await open_broker(rabbit_url) as sender:
        for round in range(10):
            async with await open_broker(rabbit_url) as stopped:
                fetching = asyncio.create_task(stopped.fetch([queue], 300, 5))
                await sender.publish([message(queue, f"{round}-first")])
                claimed = list(await fetching)
                fetching = asyncio.create_task(stopped.fetch([queue], 300, 5))
                batch = [message(queue, f"{round}-{number}") for number in range(60)]
                publishing = asyncio.create_task(sender.publish(batch))
                await asyncio.sleep(0.001 * round)
                fetching.cancel()
                await asyncio.wait([fetching])
                claimed += [] if fetching.cancelled() else fetching.result()
                await stopped.settle([(delivery, Release()) for delivery in claimed])
            await publishing
        found = await fetch_all(sender, queue, 0.3)
    wanted = [f"{round}-{number}" for round in range(10) for number in ("first", *range(60))]
    assert sorted(names(found)) == sorted(wanted)
    assert {delivery.deliveries for delivery in found} == {1}


async def test_a_fetch_cancelled_very_often_leaks_nothing(
    rabbit_server: RabbitServer, rabbit_url: str, queue: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(consuming, "_ECHO", 0.1)
    async with await open_broker(rabbit_url) as broker:
        for round in range(300):
            fetching = asyncio.create_task(broker.fetch([queue, f"{queue}-{round % 3}"], 1 + round % 5, 5))
            await asyncio.sleep(0.001 * (round % 9))
            fetching.cancel()
            await asyncio.wait([fetching])
        await broker.publish([message(queue, "a")])
        assert names(await broker.fetch([queue], 1, 5)) == ["a"]
        consumption: Any = broker._consumption
        assert len(consumption._ordered) <= 4 * 4, "four queues, four consumers each"

        async def idle_ones_are_gone() -> bool:
            listed = await asyncio.to_thread(rabbit_server.ctl, "list_consumers", "--no-table-headers", "queue_name")
            return sum(name.startswith(queue) for name in listed.split()) <= 1

        await until(idle_ones_are_gone, "the server has no consumers left that nobody asks for")


async def test_brokers_of_two_event_loops_in_one_process(rabbit_url: str, queue: str) -> None:
    async def work(own: str, other: str) -> list[str]:
        async with await open_broker(rabbit_url) as broker:
            await broker.publish([message(other, f"{other}-{i}") for i in range(50)])
            found: list[str] = []
            while len(found) < 50:
                batch = await broker.fetch([own], 10, 5)
                found += names(batch)
                await broker.settle([(delivery, Ack()) for delivery in batch])
            return found

    first, second = f"{queue}-1", f"{queue}-2"
    there: list[list[str]] = []
    thread = threading.Thread(target=lambda: there.append(asyncio.run(work(second, first))))
    thread.start()
    here = await work(first, second)
    await asyncio.to_thread(thread.join, 10)
    assert here == [f"{first}-{i}" for i in range(50)]
    assert there == [[f"{second}-{i}" for i in range(50)]]


# --- foreign messages ---------------------------------------------------------------------------------

FULL = {
    "content_type": "text/x-odd",
    "content_encoding": "rot13",
    "delivery_mode": 1,
    "priority": 200,
    "correlation_id": "é" * 100,
    "reply_to": "nobody",
    "expiration": "3600000",
    "message_id": "m",
    "timestamp": int(datetime(2001, 2, 3, tzinfo=timezone.utc).timestamp()),
    "type": "t",
    "user_id": "guest",
    "app_id": "a",
    "cluster_id": "c",
}
ODD: dict[str, tuple[bytes, dict[str, Any]]] = {
    "nothing at all": (b"", {}),
    "no headers": (b"\x00\xff", {"content_type": "application/json"}),
    "every property": (b"{}", FULL),
    "odd headers": (
        b"[[], {}, {}]",
        {"application_headers": {"task": 5, "id": [1, {"x": None}], "deep": [[[[{}]]]], "": "empty", "t": True}},
    ),
    "headers that are ours": (
        b"x",
        {"application_headers": {"aqueue-deliveries": "many", "aqueue-dead": 7, "x-delivery-count": -3}},
    ),
    "a death in its past": (b"x", {"application_headers": {"x-death": "none", "x-first-death-queue": [1]}}),
}


def nested_tables(depth: int) -> bytes:
    """A field table in a field table, and so on."""
    table = b"\x00\x00\x00\x00"
    for _ in range(depth):
        table = (len(table) + 3).to_bytes(4, "big") + b"\x01aF" + table
    return table


async def letters_of(broker: Broker, queue: str, count: int) -> Sequence[Any]:
    """Fetch what is there, bury it, and return the letters."""
    claimed: list[Delivery] = []
    while len(claimed) < count:
        claimed += await broker.fetch([queue], count, 5)
    await broker.settle([(delivery, Bury("undecodable", "odd")) for delivery in claimed])
    return await broker.inspection.dead(queue)


@pytest.mark.parametrize("odd", ODD)
async def test_odd_messages_are_buried_and_replayed_as_they_came(
    rabbit_url: str, channel: amqp.Channel, queue: str, odd: str
) -> None:
    body, properties = ODD[odd]
    channel.queue_declare(queue, durable=True, auto_delete=False)
    channel.basic_publish(amqp.Message(body, **properties), routing_key=queue)
    async with await open_broker(rabbit_url) as broker:
        (letter,) = await letters_of(broker, queue, 1)
    assert (letter.message.queue, letter.raw, letter.deliveries) == (queue, body, 1)
    async with await open_broker(rabbit_url) as broker:
        assert await broker.inspection.retry_dead([letter.id]) == 1
    again = channel.basic_get(queue, no_ack=True)
    assert again.body in (body, body.decode("latin-1"))
    kept = {name: value for name, value in properties.items() if name in ("correlation_id", "reply_to", "type")}
    assert again.properties.items() >= kept.items()


#: Properties that RabbitMQ passes on, and nobody can read: the flags, then what they promise.
UNREADABLE = {
    "a header of a year far away": b"\x20\x00\x00\x00\x00\x0c\x02abT\x7f\xff\xff\xff\xff\xff\xff\xff",
    "a timestamp of a year far away": b"\x00\x40\x7f\xff\xff\xff\xff\xff\xff\xff",
    "a name that is no text": b"\x20\x00\x00\x00\x00\x04\x02\xff\xfeV",
    "tables too deep": b"\x20\x00" + nested_tables(80),
}


@pytest.mark.parametrize("odd", UNREADABLE)
async def test_properties_that_nobody_can_read_are_buried_and_replayed_as_they_came(
    broker: AmqpBroker, queue: str, odd: str
) -> None:
    properties = UNREADABLE[odd]
    await publish_raw(broker, queue, properties, b"body \xff")
    (letter,) = await letters_of(broker, queue, 1)
    assert isinstance(letter.message, Unreadable)
    assert (letter.reason, letter.raw) == ("undecodable", b"body \xff")
    assert await broker.inspection.retry_dead([letter.id]) == 1
    (again,) = await broker.fetch([queue], 1, 5)
    assert isinstance(again.message, Unreadable)
    assert broker._unreadable[again.receipt].properties == properties
    await broker.settle([(again, Ack())])


async def test_headers_that_are_no_text_go_on_as_they_came(broker: AmqpBroker, queue: str) -> None:
    """AMQP's strings are bytes; what is sent again, with a count or to the end of its queue, has the same."""
    raw = b"\xff\xfe\xed\xa0\x80"
    table = b"\x02abS" + len(raw).to_bytes(4, "big") + raw
    properties = b"\x24\x00" + len(table).to_bytes(4, "big") + table + bytes((len(raw),)) + raw
    await publish_raw(broker, queue, properties, b"body")
    (first,) = await broker.fetch([queue], 1, 5)
    assert isinstance(first.message, Message)
    await broker.settle([(first, Release(last=True))])
    (again,) = await broker.fetch([queue], 1, 5)
    assert isinstance(again.message, Message)
    assert again.message.headers == first.message.headers
    assert again.message.properties["correlation_id"] == first.message.properties["correlation_id"]
    assert str(again.message.headers["ab"]).encode("utf-8", "surrogateescape") == raw
    await broker.settle([(again, Ack())])


@pytest.mark.parametrize("readable", [True, False])
async def test_headers_that_fill_a_whole_frame_are_buried_and_replayed(
    broker: AmqpBroker, queue: str, readable: bool
) -> None:
    """Though nothing can be added to them."""
    value = b"S" + (130_900).to_bytes(4, "big") + b"x" * 130_900
    table = b"\x02ab" + value + (b"" if readable else b"\x02\xff\xfeV")
    properties = b"\x20\x00" + len(table).to_bytes(4, "big") + table
    await publish_raw(broker, queue, properties, b"body")
    (letter,) = await asyncio.wait_for(letters_of(broker, queue, 1), 20)
    assert (letter.message.queue, letter.reason, letter.raw) == (queue, "undecodable", b"body")
    assert await broker.inspection.retry_dead([letter.id]) == 1
    (again,) = await broker.fetch([queue], 1, 5)
    assert isinstance(again.message, Message) is readable
    await broker.settle([(again, Ack())])


async def test_a_message_with_full_headers_that_came_back_is_handed_out(rabbit_url: str, queue: str) -> None:
    async with await open_broker(rabbit_url, lease=0.5) as broker:
        value = b"S" + (130_990).to_bytes(4, "big") + b"x" * 130_990
        properties = b"\x20\x00" + (len(value) + 3).to_bytes(4, "big") + b"\x02ab" + value
        await publish_raw(broker, queue, properties, b"body")
        assert len(await broker.fetch([queue], 1, 5)) == 1
        (again,) = await broker.fetch([queue], 1, 5)
        assert again.deliveries == 2
        await broker.settle([(again, Ack())])


async def test_a_foreign_letter_does_not_hide_the_others(broker: AmqpBroker, channel: amqp.Channel, queue: str) -> None:
    await broker.publish([message(queue, "ours")])
    await letters_of(broker, queue, 1)
    heads: list[Any] = [
        None,
        5,
        {},
        {"deliveries": "many", "id": [], "died": 7, "queue": None},
        {"deliveries": 1 << 62},
    ]
    for head in heads:
        headers = {"application_headers": {"aqueue-dead": head, "aqueue-properties": b"\xff"}}
        channel.basic_publish(amqp.Message(b"x", **headers), routing_key="aqueue.dead")
    letters = await broker.inspection.dead()
    assert len(letters) == 1 + len(heads)
    assert [letter.reason for letter in letters if letter.message.queue == queue] == ["undecodable"]


async def publish_raw(broker: AmqpBroker, queue: str, properties: bytes, body: bytes) -> None:
    """A message whose properties are these bytes."""
    await broker.fetch([queue], 1, 0)  # makes the queue
    await broker._publisher.publish([Publication("", queue, properties, body, "")], nothing_to_prepare)
