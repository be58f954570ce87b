"""Remote control: what is revoked is kept, told, and forgotten in its time, on every broker."""

import asyncio
import json
from collections.abc import Sequence

import pytest
from msgspec.structs import replace

from aqueue.broker import Broker
from aqueue.pidbox import Pidbox, Revocation
from aqueue.protocol import Message
from aqueue.serialization import Serializer
from tests.conformance.conftest import MakeBroker
from tests.kit.waiting import until

LONG = Revocation("too late", terminate=True, keep=3600.0)


async def heard(broker: Broker, *ids: str) -> dict[str, Revocation]:
    """Listen until all of these were told."""
    found: dict[str, Revocation] = {}

    async def all_of_them() -> bool:
        found.update(await broker.control.news(0.5))
        return found.keys() >= set(ids)

    await until(all_of_them, f"told of {ids}")
    return found


async def test_who_listens_is_told(make_broker: MakeBroker, queue: str) -> None:
    worker, other, client = [await make_broker() for _ in range(3)]
    for listener in (worker, other):
        assert await listener.control.news(0.0) == {}
    await client.control.revoke([f"{queue}-1", f"{queue}-2"], LONG)
    await client.control.revoke([f"{queue}-3"], Revocation("later", terminate=False, keep=60.0))
    for listener in (worker, other):
        found = await heard(listener, f"{queue}-1", f"{queue}-2", f"{queue}-3")
        assert (found[f"{queue}-1"].reason, found[f"{queue}-1"].terminate) == ("too late", True)
        assert (found[f"{queue}-3"].reason, found[f"{queue}-3"].terminate) == ("later", False)
        assert 3000 < found[f"{queue}-2"].keep <= 3600
        assert 0 < found[f"{queue}-3"].keep <= 60
        assert await listener.control.news(0.0) == {}


async def test_a_listener_waits_no_longer_than_it_says(broker: Broker) -> None:
    loop = asyncio.get_running_loop()
    await broker.control.news(0.0)
    started = loop.time()
    assert await broker.control.news(0.3) == {}
    assert loop.time() - started >= 0.29


async def test_what_is_revoked_is_kept_for_who_comes_later(make_broker: MakeBroker, queue: str) -> None:
    client = await make_broker()
    await client.control.revoke([queue], LONG)
    await client.control.revoke([f"{queue}-other"], Revocation("é", terminate=False, keep=60.0))
    later = await make_broker()
    if not later.control.durable:
        assert await later.control.revoked() == {}
        return
    kept = await later.control.revoked()
    assert (kept[queue].reason, kept[queue].terminate) == ("too late", True)
    assert 3000 < kept[queue].keep <= 3600
    assert (kept[f"{queue}-other"].reason, kept[f"{queue}-other"].terminate) == ("é", False)
    assert (await later.control.revoked()).keys() == kept.keys()


async def test_what_is_revoked_is_forgotten_in_its_time(make_broker: MakeBroker, queue: str) -> None:
    client, worker = await make_broker(), await make_broker()
    await client.control.revoke([queue], Revocation("soon", terminate=False, keep=0.3))
    await client.control.revoke([f"{queue}-stays"], LONG)

    async def is_forgotten() -> bool:
        return queue not in await worker.control.revoked()

    await until(is_forgotten, "forgotten")
    assert (f"{queue}-stays" in await worker.control.revoked()) == worker.control.durable


async def test_the_last_word_counts(make_broker: MakeBroker, queue: str) -> None:
    client, worker = await make_broker(), await make_broker()
    await worker.control.news(0.0)
    await client.control.revoke([queue], Revocation("first", terminate=False, keep=60.0))
    await heard(worker, queue)
    await client.control.revoke([queue], Revocation("second", terminate=True, keep=600.0))
    told = (await heard(worker, queue))[queue]
    kept = await worker.control.revoked()
    for one in (told, *([kept[queue]] if worker.control.durable else [])):
        assert (one.reason, one.terminate) == ("second", True)
        assert one.keep > 500


async def test_many_are_revoked_at_once(make_broker: MakeBroker, queue: str) -> None:
    client, worker = await make_broker(), await make_broker()
    ids = [f"{queue}-{number}" for number in range(2500)]
    await worker.control.news(0.0)
    await client.control.revoke(ids, LONG)
    assert (await heard(worker, *ids)).keys() == set(ids)
    if worker.control.durable:
        assert (await worker.control.revoked()).keys() >= set(ids)


async def test_so_many_are_kept_and_no_more(make_broker: MakeBroker, queue: str) -> None:
    client = await make_broker()
    if not client.control.durable:
        return
    await client.control.revoke([f"{queue}-first"], Revocation("r", terminate=False, keep=60.0))
    await client.control.revoke([f"{queue}-{number}" for number in range(9_999)], LONG)
    assert len(await client.control.revoked()) == 10_000
    await client.control.revoke([f"{queue}-last"], LONG)
    kept = await client.control.revoked()
    assert len(kept) == 10_000
    assert f"{queue}-last" in kept
    assert f"{queue}-first" not in kept  # its time would have ended first


@pytest.mark.parametrize("kind", ["redis", "rabbitmq"], indirect=True)
async def test_what_is_no_control_message_is_counted_and_no_more(make_broker: MakeBroker, queue: str) -> None:
    pidbox = Pidbox(Serializer())
    worker, client = await make_broker(pidbox=pidbox), await make_broker(pidbox=_Wild())
    await worker.control.news(0.0)
    await client.control.revoke([queue], LONG)
    client_of_ours = await make_broker()
    await client_of_ours.control.revoke([f"{queue}-good"], LONG)
    assert (await heard(worker, f"{queue}-good")).keys() == {f"{queue}-good"}
    assert pidbox.malformed == len(_WILD)


_WILD = [
    b"\xff\xfe",
    b"[]",
    b"{}",
    json.dumps({"method": 1}).encode(),
    json.dumps({"method": "revoke", "arguments": []}).encode(),
    json.dumps({"method": "revoke", "arguments": {}}).encode(),
    json.dumps({"method": "revoke", "arguments": {"task_id": [1, 2]}}).encode(),
    json.dumps({"method": "revoke", "arguments": {"task_id": ["x" * 300]}}).encode(),
    json.dumps({"method": "revoke", "arguments": {"task_id": "a\nb"}}).encode(),
    b"[" * 5000,
]


class _Wild(Pidbox):
    """Writes what nobody can read."""

    def __init__(self) -> None:
        super().__init__(Serializer())

    def revoke(self, ids: Sequence[str], revocation: Revocation) -> list[Message]:
        (good,) = super().revoke(ids, revocation)
        return [replace(good, body=body) for body in _WILD]
