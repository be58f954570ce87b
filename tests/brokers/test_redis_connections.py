"""Redis over TLS and behind Sentinels."""

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import redis

from aqueue.broker import Ack
from aqueue.errors import BrokerUnavailable, EnqueueFailed
from tests.brokers.test_redis import open_broker
from tests.conformance.test_broker import message, names
from tests.kit.certificates import make_certificates
from tests.kit.servers import Process, RedisServer, free_port, require, wait_for
from tests.kit.waiting import until


@pytest.fixture
def tls_files(tmp_path: Path) -> dict[str, Path]:
    return make_certificates(tmp_path)


@pytest.fixture
def tls_redis(tmp_path: Path, tls_files: dict[str, Path]) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis", tls=tls_files)
    yield server
    server.stop()


async def test_tls_with_a_known_authority(tls_redis: RedisServer, tls_files: dict[str, Path]) -> None:
    url = f"rediss://127.0.0.1:{tls_redis.port}/0?ssl_ca_certs={tls_files['ca-cert-file']}"
    async with await open_broker(url) as broker:
        await broker.publish([message("q", "secret")])
        claimed = await broker.fetch(["q"], 1, 1)
        assert names(claimed) == ["secret"]
        assert list(await asyncio.to_thread(broker.extend, claimed)) == []
        await broker.settle([(claimed[0], Ack())])


async def test_tls_refuses_an_unknown_authority_unless_told_not_to(tls_redis: RedisServer) -> None:
    url = f"rediss://127.0.0.1:{tls_redis.port}/0"
    async with await open_broker(url) as broker:
        with pytest.raises(EnqueueFailed, match="certificate"):
            await broker.publish([message("q")])
    async with await open_broker(url + "?ssl_cert_reqs=CERT_NONE") as broker:
        await broker.publish([message("q")])


async def test_callers_with_little_time_find_a_server_that_is_back(own_redis: RedisServer) -> None:
    """However long it was away: no pause between two tries is longer than any caller waits."""
    async with await open_broker(own_redis.url, timeout=0.3) as broker:
        own_redis.kill()
        tries = 0
        while broker._link._failures < 8 and tries < 60:
            tries += 1
            with pytest.raises(EnqueueFailed):
                await broker.publish([message("q")])
        own_redis.start()

        async def is_back() -> bool:
            with suppress(EnqueueFailed):
                await broker.publish([message("q")])
                return True
            return False

        await until(is_back, "a send succeeds")


class Sentinels:
    """A master, a replica, and three Sentinels that watch them."""

    def __init__(self, folder: Path) -> None:
        self.master = RedisServer(folder / "master")
        self.replica = RedisServer(folder / "replica", "--replicaof", "127.0.0.1", str(self.master.port))
        self.ports = [free_port() for _ in range(3)]
        self.processes = [self._sentinel(folder, port) for port in self.ports]
        wait_for(self.ready, "Sentinels that know master, replica and each other", 30)

    def _sentinel(self, folder: Path, port: int) -> Process:
        config = folder / f"sentinel-{port}.conf"
        config.write_text(
            f"port {port}\nbind 127.0.0.1\nsentinel monitor shop 127.0.0.1 {self.master.port} 2\n"
            "sentinel down-after-milliseconds shop 500\nsentinel failover-timeout shop 2000\n"
        )
        log = (folder / f"sentinel-{port}.log").open("ab")
        started = Process([require("redis-server", "redis-server"), str(config), "--sentinel"], stdout=log, stderr=log)
        log.close()
        return started

    def ready(self) -> bool:
        for port in self.ports:
            with redis.Redis(port=port, socket_timeout=2) as client:
                try:
                    state = client.sentinel_master("shop")
                except redis.RedisError:
                    return False
                if state["num-slaves"] < 1 or state["num-other-sentinels"] < 2:
                    return False
        return True

    @property
    def url(self) -> str:
        return ";".join(f"sentinel://127.0.0.1:{port}" for port in self.ports) + "/0?master_name=shop"

    def stop(self) -> None:
        for process in self.processes:
            process.stop()
        self.replica.stop()
        self.master.stop()


@pytest.fixture
def sentinels(tmp_path: Path) -> Iterator[Sentinels]:
    found = Sentinels(tmp_path)
    yield found
    found.stop()


async def test_sentinels_lead_to_the_master_and_to_the_next_one(sentinels: Sentinels) -> None:
    async with await open_broker(sentinels.url, timeout=5.0) as broker:
        await broker.publish([message("q", "first"), message("q", "second")])
        (first,) = await broker.fetch(["q"], 1, 1)
        assert list(await asyncio.to_thread(broker.extend, [first])) == []
        assert sentinels.master.client().exists("aqueue:leases")
        wait_for(lambda: sentinels.replica.client().exists("aqueue:leases"), "the replica has the lease")
        sentinels.master.kill()

        async def settles() -> bool:
            try:
                return not await broker.settle([(first, Ack())])
            except BrokerUnavailable:
                return False

        await until(settles, "the new master takes the settle", 30)

        async def fetches() -> list[str]:
            try:
                return names(await broker.fetch(["q"], 1, 1))
            except BrokerUnavailable:
                return []

        assert await until(fetches, "the new master hands out the second message", 30) == ["second"]
        await broker.publish([message("q", "third")])
        assert sentinels.replica.client().llen("q\x06\x169") == 1
