"""What is particular to Redis: kombu's keys, scripts, links that break, servers that refuse."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import redis

from aqueue import broker as brokers
from aqueue import results as stores
from aqueue.broker import Ack, BrokerOptions, Bury, Delivery, Release
from aqueue.broker.redis import RedisBroker
from aqueue.control import Following
from aqueue.errors import BrokerUnavailable, ControlRefused, EnqueueFailed, EnqueueUnknown, StoreUnavailable
from aqueue.pidbox import Revocation
from aqueue.protocol import Message, Unreadable
from aqueue.results import SUCCESS, Result, StoreOptions
from aqueue.url import Url
from tests.conformance.test_broker import message, names
from tests.kit.proxy import Proxy
from tests.kit.servers import RedisServer
from tests.kit.waiting import until

SEP = "\x06\x16"


async def open_broker(url: str, **options: Any) -> RedisBroker:
    made = brokers.from_url(Url(url))(BrokerOptions(**{"lease": 30.0, "timeout": 1.0, **options}))
    assert isinstance(made, RedisBroker)
    made.holder = "tester@host"
    return made


@pytest_asyncio.fixture
async def broker(redis_url: str) -> AsyncIterator[RedisBroker]:
    async with await open_broker(redis_url) as made:
        yield made


@pytest_asyncio.fixture
async def through_proxy(redis_proxy: Proxy) -> AsyncIterator[RedisBroker]:
    async with await open_broker(f"redis://127.0.0.1:{redis_proxy.port}/0") as made:
        yield made


@pytest.fixture
def client(redis_server: RedisServer, redis_url: str) -> redis.Redis:
    return redis_server.client()


async def settle_patiently(broker: RedisBroker, delivery: Delivery) -> Sequence[Delivery]:
    """As the worker does: until the broker has answered."""
    while True:
        try:
            return await broker.settle([(delivery, Ack())])
        except BrokerUnavailable:
            await asyncio.sleep(0.05)


# --- kombu's keys -------------------------------------------------------------------------------------


async def test_priorities_land_on_kombus_lists(broker: RedisBroker, client: redis.Redis) -> None:
    await broker.publish([message("q", f"{priority}", priority=priority) for priority in range(10)])
    found = {
        name: [json.loads(raw)["properties"]["priority"] for raw in client.lrange(name, 0, -1)]
        for name in ("q", f"q{SEP}3", f"q{SEP}6", f"q{SEP}9")
    }
    # 0 is the most urgent on this wire; lists are pushed on the left.
    assert found == {"q": [0, 1, 2], f"q{SEP}3": [3, 4, 5], f"q{SEP}6": [6, 7, 8], f"q{SEP}9": [9]}


async def test_the_binding_is_written_as_kombu_does(broker: RedisBroker, client: redis.Redis) -> None:
    await broker.publish([message("q")])
    member = f"q{SEP}{SEP}q".encode()
    assert client.smembers("_kombu.binding.q") == {member}
    assert client.smembers("_kombu.binding_permanent.q") == {member}


async def test_the_key_prefix_is_before_every_key(redis_url: str, client: redis.Redis) -> None:
    async with await open_broker(redis_url + "?key_prefix=my:") as broker:
        await broker.publish([message("q"), message("q", delay=60)])
        (delivery,) = await broker.fetch(["q"], 1, 1)
        assert delivery.message.queue == "q"
        await broker.settle([(delivery, Bury("x"))])
    names_found: list[bytes] = client.keys("*")  # type: ignore[assignment]
    assert [key for key in names_found if not key.startswith(b"my:")] == []


async def test_routing_through_an_exchange_uses_kombus_bindings(broker: RedisBroker, client: redis.Redis) -> None:
    client.sadd("_kombu.binding.direct", f"black{SEP}{SEP}d1", f"black{SEP}{SEP}d2", f"white{SEP}{SEP}d3")
    client.sadd("_kombu.binding.topic", f"media.#{SEP}^media\\..*?${SEP}t1", f"*.news{SEP}^[^\\.]+\\.news${SEP}t2")
    await broker.publish([message("", "one", exchange="direct", routing_key="black", priority=9)])
    await broker.publish([message("", "two", exchange="topic", routing_key="media.news", priority=9)])
    assert {name: client.llen(name) for name in ("d1", "d2", "d3", "t1", "t2")} == {
        "d1": 1, "d2": 1, "d3": 0, "t1": 1, "t2": 1,
    }  # fmt: skip
    with pytest.raises(EnqueueFailed, match="unroutable"):
        await broker.publish([message("", "three", exchange="topic", routing_key="nobody")])


async def test_bytes_go_back_exactly_as_they_came(broker: RedisBroker, client: redis.Redis) -> None:
    odd = b' {"body" : "W1tdLCB7fSwge31d","headers":{"task":"t","id":"1","n":12345678901234567890},"properties":{}}  '
    client.lpush("q", odd)
    (delivery,) = await broker.fetch(["q"], 1, 1)
    await broker.settle([(delivery, Release())])
    assert client.lrange("q", 0, -1) == [odd]
    (delivery,) = await broker.fetch(["q"], 1, 1)
    await broker.settle([(delivery, Release(delay=0.05))])
    (delivery,) = await broker.fetch(["q"], 1, 3)
    await broker.settle([(delivery, Bury("x"))])
    (letter,) = await broker.inspection.dead()
    await broker.inspection.retry_dead([letter.id])
    assert client.lrange("q", 0, -1) == [odd]


async def test_garbage_comes_out_as_unreadable_and_disturbs_nobody(broker: RedisBroker, client: redis.Redis) -> None:
    client.lpush("q", b"\x00\xff not json", b"", b"null", b"[]", b"42", b'{"body": 1}')
    await broker.publish([message("q", "good", priority=9)])
    found = await broker.fetch(["q"], 10, 1)
    assert len(found) == 7
    unreadable = [delivery.message for delivery in found if isinstance(delivery.message, Unreadable)]
    assert unreadable[0].raw == b"\x00\xff not json"
    assert {bad.error.reason for bad in unreadable} == {"undecodable"}
    assert [d.message.headers["id"] for d in found if isinstance(d.message, Message)] == ["good"]


# --- scripts ------------------------------------------------------------------------------------------


async def test_scripts_survive_a_flush(broker: RedisBroker, client: redis.Redis) -> None:
    for number in range(3):
        await broker.publish([message("q", f"{number}")])
        client.script_flush()
        (delivery,) = await broker.fetch(["q"], 1, 1)
        client.script_flush()
        assert list(await asyncio.to_thread(broker.extend, [delivery])) == []
        client.script_flush()
        assert not await broker.settle([(delivery, Ack())])


async def test_a_queue_key_of_another_type_is_named_and_disturbs_no_other_queue(
    broker: RedisBroker, client: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    client.set("broken", "not a list")
    await broker.publish([message("fine", "good")])
    assert names(await broker.fetch(["broken", "fine"], 10, 1)) == ["good"]
    assert "broken" in caplog.text
    assert "WRONGTYPE" in caplog.text
    with pytest.raises(EnqueueFailed, match="broken") as caught:
        await broker.publish([message("fine", "also good"), message("broken", "bad", priority=9)])
    assert list(caught.value.refused or {}) == [1]
    assert names(await broker.fetch(["fine"], 10, 1)) == ["also good"]


async def test_a_settle_that_can_not_be_carried_out_leaves_the_message_leased(
    broker: RedisBroker, client: redis.Redis
) -> None:
    client.set("broken", "not a list")
    await broker.publish([message("q", "bad"), message("q", "good")])
    bad, good = await broker.fetch(["q"], 2, 1)
    refused = await broker.settle([(bad, Ack(publish=[message("broken", priority=9)])), (good, Ack())])
    assert refused == [bad]
    assert client.zcard("aqueue:leases") == 1


async def test_the_mark_of_a_lease_that_was_settled_after_all_does_not_stay(
    redis_url: str, client: redis.Redis
) -> None:
    async with await open_broker(redis_url, lease=0.4) as broker:
        await broker.publish([message("q")])
        (delivery,) = await broker.fetch(["q"], 1, 1)
        await until(lambda: client.hlen("aqueue:suspects"), "its lease was seen ended")
        assert not await broker.settle([(delivery, Ack())])
        await until(lambda: not client.exists("aqueue:suspects"), "nobody is suspected any more")


async def test_with_memory_full_work_ends_and_sends_are_refused(own_redis: RedisServer) -> None:
    client = own_redis.client()
    async with await open_broker(own_redis.url, lease=1.0) as broker:
        await broker.publish([message("q", f"{i}") for i in range(20)])
        client.config_set("maxmemory", "1mb")
        with pytest.raises(EnqueueFailed, match="OOM"):
            await broker.publish([message("q", "too much")])
        await broker.control.revoke(["cancelled"], Revocation("no room", terminate=True, keep=60.0))
        assert "cancelled" in await broker.control.revoked()
        claimed = await broker.fetch(["q"], 20, 1)
        assert len(claimed) == 20
        assert list(await asyncio.to_thread(broker.extend, claimed)) == []
        assert not await broker.settle([(claimed[0], Release()), *((d, Ack()) for d in claimed[1:])])
        assert names(await broker.fetch(["q"], 20, 1)) == ["0"]
        client.config_set("maxmemory", "0")
        (again,) = await broker.fetch(["q"], 20, 5)  # its lease ended: reaping works, too
        assert again.deliveries == 2


async def test_an_idle_consumer_costs_less_than_a_command_a_second(broker: RedisBroker, client: redis.Redis) -> None:
    fetching = asyncio.create_task(broker.fetch(["q", "other"], 10, 60))
    following = asyncio.create_task(Following(broker.control, lambda _: None, broker.lease).run())
    await asyncio.sleep(1.0)
    before = client.info("stats")["total_commands_processed"]
    start = time.monotonic()
    await asyncio.sleep(10.0)
    spent = client.info("stats")["total_commands_processed"] - before - 1
    assert spent / (time.monotonic() - start) < 1.0
    fetching.cancel()
    following.cancel()
    await asyncio.wait([fetching, following])


async def test_what_is_revoked_leaves_no_key_for_ever(broker: RedisBroker, client: redis.Redis) -> None:
    await broker.control.revoke(["long"], Revocation("r", terminate=True, keep=1000.0))
    await broker.control.revoke(["short"], Revocation("r", terminate=True, keep=0.1))
    keys = client.keys("aqueue:revoked*")
    assert len(keys) == 3
    assert all(990 < client.ttl(key) <= 1000 for key in keys)

    async def is_over() -> bool:
        return set(await broker.control.revoked()) == {"long"}

    await until(is_over, "the time of the short one is over")
    await broker.control.revoke(["next"], Revocation("r", terminate=True, keep=1000.0))
    assert client.hkeys("aqueue:revoked:why") == [b"long", b"next"]


async def test_what_is_kept_and_not_of_our_writing_is_left_out(broker: RedisBroker, client: redis.Redis) -> None:
    await broker.control.revoke(["good", "bad"], Revocation("r", terminate=True, keep=1000.0))
    client.hset("aqueue:revoked:why", "bad", b"\xff")
    client.zadd("aqueue:revoked", {"without-a-reason": time.time() * 2000})
    assert set(await broker.control.revoked()) == {"good"}


async def test_who_may_not_subscribe_is_told_so(redis_url: str, client: redis.Redis) -> None:
    client.acl_setuser("deaf", enabled=True, nopass=True, keys=["*"], categories=["+@all"], commands=["-subscribe"])
    async with await open_broker(redis_url.replace("redis://", "redis://deaf:x@")) as broker:
        with pytest.raises(ControlRefused, match="permission"):
            await broker.control.news(0.0)
        assert await broker.control.revoked() == {}
    client.acl_deluser("deaf")


async def test_a_server_without_tracking_is_polled(redis_url: str, client: redis.Redis) -> None:
    client.acl_setuser(
        "plain",
        enabled=True,
        nopass=True,
        keys=["*"],
        channels=["*"],
        categories=["+@all"],
        commands=["-client|tracking"],
    )
    async with await open_broker(redis_url.replace("redis://", "redis://plain:x@")) as broker:
        waiting = asyncio.create_task(broker.fetch(["q"], 10, 5))
        await asyncio.sleep(0.3)
        await broker.publish([message("q", "seen")])
        assert names(await waiting) == ["seen"]
    client.acl_deluser("plain")


# --- links --------------------------------------------------------------------------------------------


async def test_a_claim_outlives_the_connection_it_was_made_on(through_proxy: RedisBroker, redis_proxy: Proxy) -> None:
    await through_proxy.publish([message("q", "a"), message("q", "b")])
    claimed = await through_proxy.fetch(["q"], 10, 1)
    redis_proxy.cut()
    await asyncio.sleep(0.05)
    assert list(await asyncio.to_thread(through_proxy.extend, claimed)) == []
    assert not await through_proxy.settle([(delivery, Ack()) for delivery in claimed])
    assert await through_proxy.fetch(["q"], 10, 0.1) == []


async def test_waiting_goes_on_after_a_cut(through_proxy: RedisBroker, redis_proxy: Proxy, broker: RedisBroker) -> None:
    await through_proxy.fetch(["q"], 1, 0)

    async def fetch() -> Sequence[Delivery]:
        while True:
            try:
                if found := await through_proxy.fetch(["q"], 10, 5):
                    return found
            except BrokerUnavailable:
                continue

    waiting = asyncio.create_task(fetch())
    for _ in range(3):
        await asyncio.sleep(0.05)
        redis_proxy.cut()
    await asyncio.sleep(0.3)
    await broker.publish([message("q", "after the cut")])
    assert names(await asyncio.wait_for(waiting, 5)) == ["after the cut"]


async def test_a_silent_server_is_noticed_and_nothing_hangs(through_proxy: RedisBroker, redis_proxy: Proxy) -> None:
    await through_proxy.publish([message("q", "a")])
    (claimed,) = await through_proxy.fetch(["q"], 1, 1)
    redis_proxy.silence()
    start = time.monotonic()
    with pytest.raises(EnqueueUnknown):
        await through_proxy.publish([message("q", "b")])
    with pytest.raises(BrokerUnavailable):
        await through_proxy.settle([(claimed, Ack())])
    with pytest.raises(BrokerUnavailable):
        await through_proxy.fetch(["q"], 1, 30)
    with pytest.raises(BrokerUnavailable):
        await asyncio.to_thread(through_proxy.extend, [claimed])
    assert time.monotonic() - start < 8
    redis_proxy.heal()
    redis_proxy.cut()
    assert not await settle_patiently(through_proxy, claimed)


async def test_a_refused_connection_is_a_certain_failure_within_the_deadline(redis_proxy: Proxy) -> None:
    redis_proxy.refuse()
    async with await open_broker(f"redis://127.0.0.1:{redis_proxy.port}/0", timeout=0.5) as broker:
        start = time.monotonic()
        with pytest.raises(EnqueueFailed, match=r"redis://127\.0\.0\.1"):
            await broker.publish([message("q")])
        assert time.monotonic() - start < 2


async def test_a_send_waits_for_a_server_that_is_back_in_time(redis_proxy: Proxy) -> None:
    redis_proxy.refuse()
    async with await open_broker(f"redis://127.0.0.1:{redis_proxy.port}/0", timeout=5.0) as broker:
        sending = asyncio.create_task(broker.publish([message("q", "patient")]))
        await asyncio.sleep(0.3)
        redis_proxy.heal()
        await asyncio.wait_for(sending, 5)
        assert names(await broker.fetch(["q"], 1, 1)) == ["patient"]


async def test_a_cancelled_command_leaves_no_reply_for_the_next(broker: RedisBroker, client: redis.Redis) -> None:
    client.set("answer", "right")
    link = broker._link
    for delay in (0.0, 0.0001, 0.0005, 0.001) * 20:
        doomed = asyncio.create_task(link.call("GET", "nothing"))
        await asyncio.sleep(delay)
        doomed.cancel()
        assert await link.call("GET", "answer") == b"right"
        await asyncio.wait([doomed])


async def test_a_killed_server_that_comes_back_has_everything(own_redis: RedisServer) -> None:
    async with await open_broker(own_redis.url, timeout=5.0) as broker:
        await broker.publish([message("q", "a"), message("q", "b"), message("q", "later", delay=0.3)])
        (a,) = await broker.fetch(["q"], 1, 1)
        own_redis.kill()
        own_redis.start()
        assert not await settle_patiently(broker, a)

        async def next_one() -> Sequence[Delivery]:
            try:
                return await broker.fetch(["q"], 1, 5)
            except BrokerUnavailable:
                return []

        assert names(await until(next_one, "b is fetched")) == ["b"]
        assert names(await until(next_one, "the parked one is fetched")) == ["later"]


async def test_a_frozen_server_is_waited_for(own_redis: RedisServer) -> None:
    async with await open_broker(own_redis.url, lease=1.0, timeout=1.0) as broker:
        await broker.publish([message("q", "a")])
        (a,) = await broker.fetch(["q"], 1, 1)
        own_redis.pause()
        with pytest.raises(BrokerUnavailable):
            await broker.settle([(a, Ack())])
        own_redis.go_on()
        # The lease ended while nobody could renew it, but nobody took it back either.
        assert list(await asyncio.to_thread(broker.extend, [a])) in ([], [a])


async def test_wrong_credentials_are_said_at_once_and_without_the_password(redis_url: str, client: redis.Redis) -> None:
    client.acl_setuser("locked", enabled=True, passwords=["+right"], keys=["*"], categories=["+@all"])
    url = redis_url.replace("redis://", "redis://locked:canary-password@")
    async with await open_broker(url, timeout=5.0) as broker:
        start = time.monotonic()
        with pytest.raises(EnqueueFailed) as caught:
            await broker.publish([message("q")])
        assert time.monotonic() - start < 1
        assert "canary" not in str(caught.value)
        assert "refuses" in str(caught.value)
    client.acl_deluser("locked")


async def test_the_result_store_waits_through_a_cut(redis_url: str, redis_proxy: Proxy) -> None:
    through = stores.from_url(Url(f"redis://127.0.0.1:{redis_proxy.port}/0"))(StoreOptions(timeout=2.0))
    direct = stores.from_url(Url(redis_url))(StoreOptions())
    async with through, direct:

        async def get() -> Result | None:
            while True:
                try:
                    return await through.get("a", wait=8)
                except StoreUnavailable:
                    continue

        waiting = asyncio.create_task(get())
        await asyncio.sleep(0.1)
        redis_proxy.cut()
        await asyncio.sleep(0.3)
        await direct.put([direct.record(Result(task_id="a", state=SUCCESS, value=1))])
        result = await asyncio.wait_for(waiting, 5)
        assert result is not None
        assert result.value == 1


# --- other ways to connect ----------------------------------------------------------------------------


async def test_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    server = RedisServer(tmp_path / "redis", "--unixsocket", str(path))
    try:
        for url in (f"redis+socket://{path}?virtual_host=2", f"unix://{path}?db=2"):
            async with await open_broker(url) as broker:
                await broker.publish([message("q", "via socket")])
                claimed = await broker.fetch(["q"], 1, 1)
                assert names(claimed) == ["via socket"]
                assert list(await asyncio.to_thread(broker.extend, claimed)) == []
                await broker.settle([(claimed[0], Ack())])
        assert server.client(2).exists("aqueue:seq")
    finally:
        server.stop()


async def test_another_database(redis_url: str, redis_server: RedisServer) -> None:
    async with await open_broker(redis_url[:-1] + "3") as broker:
        await broker.publish([message("q")])
    assert redis_server.client(3).llen(f"q{SEP}9") == 1


async def test_what_a_celery_worker_left_and_nobody_can_read_is_left_alone(
    broker: RedisBroker, client: redis.Redis
) -> None:
    good = json.dumps([{"headers": {}, "properties": {}, "body": ""}, "", "q"])
    odd = ["nonsense", "[]", "[1, 2]", '["x", "", "q"]', '[{"headers": 5, "properties": {}}, "", "q"]', "null"]
    for number, entry in enumerate([*odd, good]):
        client.hset("unacked", f"{number}", entry)
        client.zadd("unacked_index", {f"{number}": 1.0})
    found = await broker.inspection.recover(older_than=0.0, celery=True, parked=False)
    assert (found.unacked, found.left) == (1, len(odd))
    assert client.hlen("unacked") == len(odd)
    assert client.llen("q") == 1
