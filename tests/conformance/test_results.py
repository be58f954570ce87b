"""What `aqueue.results` asks of every result store."""

import asyncio
import time
from datetime import datetime, timezone
from typing import Any

import pytest
from msgspec.structs import replace

from aqueue.results import FAILURE, PENDING, RETRY, SUCCESS, RemoteError, Result, ResultStore
from tests.conformance.conftest import MakeStore, Traits
from tests.kit.waiting import until

#: Some stores reckon the end of a result from this, so it lies in the present; some keep whole seconds only.
DONE = datetime.now(timezone.utc).isoformat(timespec="seconds")


def success(task_id: str, value: Any = 5) -> Result:
    return Result(task_id=task_id, state=SUCCESS, value=value, date_done=DONE)


async def put(store: ResultStore, *results: Result, reader: ResultStore | None = None) -> None:
    """Store results; of a store that sends them, to ``reader``, itself by default."""
    reader = reader or store
    await reader.announce([])
    await store.put([store.record(replace(result, reply_to=reader.reply_to)) for result in results])


async def test_what_is_put_is_got(store: ResultStore, traits: Traits) -> None:
    result = Result(
        task_id="a",
        state=FAILURE,
        value=RemoteError("ValueError", ["boom", 7], "builtins"),
        traceback="Traceback...",
        date_done=DONE,
        extra={"parent_id": "p", "group_id": "g"} if traits.keeps_family else {},
    )
    await put(store, result)
    assert await store.get("a") == result


@pytest.mark.parametrize("value", [None, True, 0, -5, 2**70, 1.5, "é\x00\ud800", [1, [2]], {"a": {"b": None}}])
async def test_every_json_value_survives(store: ResultStore, value: Any) -> None:
    await put(store, success("a", value))
    got = await store.get("a")
    assert got is not None
    assert got.value == value


async def test_an_unknown_id_is_none(store: ResultStore) -> None:
    assert await store.get("nobody") is None
    start = time.monotonic()
    assert await store.get("nobody", wait=0.2) is None
    assert 0.15 < time.monotonic() - start < 1.5


async def test_who_waits_is_told_by_another_connection(make_store: MakeStore) -> None:
    waiter, writer = await make_store(), await make_store()
    waiting = [asyncio.create_task(waiter.get(f"{i % 7}", wait=10)) for i in range(50)]
    await asyncio.sleep(0.2)
    assert not any(task.done() for task in waiting)
    start = time.monotonic()
    await put(writer, *[success(f"{i}", i) for i in range(7)], reader=waiter)
    results = await asyncio.gather(*waiting)
    assert time.monotonic() - start < 1.0
    assert [result and result.value for result in results] == [i % 7 for i in range(50)]


async def test_waiting_goes_on_until_the_state_is_final(make_store: MakeStore) -> None:
    waiter, writer = await make_store(), await make_store()
    waiting = asyncio.create_task(waiter.get("a", wait=10))
    for state in ("STARTED", "PROGRESS", RETRY):
        await put(writer, Result(task_id="a", state=state, value=None), reader=waiter)
        await asyncio.sleep(0.05)
        assert not waiting.done()
    await put(writer, success("a"), reader=waiter)
    result = await waiting
    assert result is not None
    assert result.state == SUCCESS


async def test_what_was_stored_before_is_not_waited_for(store: ResultStore) -> None:
    await put(store, success("a"))
    start = time.monotonic()
    assert await store.get("a", wait=5) == success("a")
    assert time.monotonic() - start < 1


async def test_at_the_end_of_the_wait_the_latest_state_is_told(store: ResultStore) -> None:
    await put(store, Result(task_id="a", state="PROGRESS", value={"current": 1}))
    result = await store.get("a", wait=0.2)
    assert result is not None
    assert (result.state, result.value) == ("PROGRESS", {"current": 1})


async def test_success_is_never_overwritten(store: ResultStore) -> None:
    await put(store, success("a", 1))
    await put(store, Result(task_id="a", state=FAILURE, value=RemoteError("E", [], "m")))
    await put(store, success("a", 2))
    assert await store.get("a") == success("a", 1)


async def test_any_other_state_is_overwritten(store: ResultStore) -> None:
    for state in (PENDING, "STARTED", RETRY, FAILURE):
        await put(
            store, Result(task_id="a", state=state, value=RemoteError("E", [], "m") if state == FAILURE else None)
        )
    await put(store, success("a"))
    assert await store.get("a") == success("a")


async def test_a_value_that_mentions_success_is_no_success(store: ResultStore) -> None:
    await put(store, Result(task_id="a", state="PROGRESS", value={"status": "SUCCESS"}))
    await put(store, Result(task_id="a", state=FAILURE, value=RemoteError("status", ["SUCCESS"], "m")))
    await put(store, success("a"))
    assert await store.get("a") == success("a")


async def test_announce_writes_only_what_is_absent(store: ResultStore) -> None:
    await store.announce([store.record(Result(task_id="a", state=PENDING))])
    result = await store.get("a")
    assert result is not None
    assert result.state == PENDING
    await put(store, success("a"))
    await store.announce([store.record(Result(task_id="a", state=PENDING))])
    assert await store.get("a") == success("a")


async def test_forget(store: ResultStore) -> None:
    await put(store, success("a"))
    await store.forget("a")
    assert await store.get("a") is None
    await store.forget("a")


async def test_results_end_after_their_time(make_store: MakeStore, traits: Traits) -> None:
    store = await make_store(expires=traits.shortest_life)
    await put(store, Result(task_id="a", state=SUCCESS, date_done=datetime.now(timezone.utc).isoformat()))
    assert await store.get("a") is not None

    async def is_gone() -> bool:
        return await store.get("a") is None

    await until(is_gone, "the end of the result", timeout=traits.shortest_life + 2)


async def test_results_without_an_end_stay(make_store: MakeStore) -> None:
    store = await make_store(expires=None)
    await put(store, success("a"))
    assert await store.get("a") == success("a")


@pytest.mark.parametrize("options", [{"serializer": "msgpack"}, {"serializer": "yaml"}, {"compression": "gzip"}])
async def test_other_serializers_and_compression(make_store: MakeStore, options: dict[str, str]) -> None:
    store = await make_store(**options)
    result = success("a", {"text": "x" * 1000, "n": [1, 2.5, None]})
    await put(store, result)
    assert await store.get("a") == result
    await put(store, Result(task_id="a", state=FAILURE, value=RemoteError("E", [], "m")))
    assert await store.get("a") == result
