"""Waiting by looking: quick for who came just now, rare for who waits long, and one look for all."""

import asyncio
from collections.abc import Mapping, Sequence

import pytest

from aqueue.errors import AQueueError, BadMessage, StoreUnavailable
from aqueue.results import SUCCESS, Result
from aqueue.results.polling import Polling
from tests.kit.waiting import until


class Shelf:
    """Results by id, and every look at them."""

    def __init__(self) -> None:
        self.results: dict[str, Result | AQueueError] = {}
        self.looks: list[list[str]] = []
        self.away = False

    async def read(self, task_ids: Sequence[str]) -> Mapping[str, Result | AQueueError]:
        self.looks.append(list(task_ids))
        await asyncio.sleep(0)
        if self.away:
            raise StoreUnavailable("away")
        return {task_id: self.results[task_id] for task_id in task_ids if task_id in self.results}

    def put(self, task_id: str, state: str = SUCCESS) -> None:
        self.results[task_id] = Result(task_id=task_id, state=state)


async def test_who_comes_together_is_looked_for_together() -> None:
    shelf = Shelf()
    polling = Polling(shelf.read)
    waiting = [asyncio.create_task(polling.final(f"{i % 100}", 10)) for i in range(300)]
    await until(lambda: len(shelf.looks) >= 3, "three looks")
    assert all(len(look) == 100 for look in shelf.looks)
    for i in range(100):
        shelf.put(f"{i}")
    assert [result.task_id for result in await asyncio.gather(*waiting) if result] == [f"{i % 100}" for i in range(300)]
    await polling.close()


async def test_looks_become_rarer() -> None:
    shelf = Shelf()
    polling = Polling(shelf.read, longest=0.2)
    assert await polling.final("a", 1.0) is None
    assert 5 < len(shelf.looks) < 30


async def test_one_who_has_waited_long_is_not_looked_for_more_often_because_others_come() -> None:
    shelf = Shelf()
    polling = Polling(shelf.read)
    old = asyncio.create_task(polling.final("old", 10))
    await until(lambda: len(shelf.looks) > 10, "some looks")
    before = sum("old" in look for look in shelf.looks)
    for i in range(100):
        shelf.put(f"{i}")
        assert await polling.final(f"{i}", 10) is not None
    assert sum("old" in look for look in shelf.looks) - before < 50
    shelf.put("old")
    assert await old is not None
    await polling.close()


async def test_nobody_looks_when_nobody_waits() -> None:
    shelf = Shelf()
    polling = Polling(shelf.read)
    waiting = asyncio.create_task(polling.final("a", 10))
    await until(lambda: shelf.looks, "a look")
    waiting.cancel()
    await asyncio.wait([waiting])
    assert polling._looking is not None
    await asyncio.wait_for(polling._looking, 1)
    shelf.put("a")
    assert await polling.final("a", 1) is not None


async def test_states_on_the_way_are_not_told() -> None:
    shelf = Shelf()
    shelf.put("a", "STARTED")
    assert await Polling(shelf.read).final("a", 0.05) is None


async def test_what_can_not_be_read_is_told_to_those_who_wait_for_it_alone() -> None:
    shelf = Shelf()
    polling = Polling(shelf.read)
    waiting = [asyncio.create_task(polling.final(task_id, 10)) for task_id in ("good", "bad")]
    await until(lambda: shelf.looks, "a look")
    shelf.results["bad"] = BadMessage("undecodable", "of a test")
    with pytest.raises(BadMessage):
        await waiting[1]
    shelf.put("good")
    assert await waiting[0] is not None


async def test_a_store_that_is_away_is_told_to_all() -> None:
    shelf = Shelf()
    polling = Polling(shelf.read)
    waiting = [asyncio.create_task(polling.final(task_id, 10)) for task_id in "abc"]
    await until(lambda: shelf.looks, "a look")
    shelf.away = True
    for task in waiting:
        with pytest.raises(StoreUnavailable):
            await task
    shelf.away = False
    shelf.put("a")
    assert await polling.final("a", 1) is not None


async def test_who_waits_when_the_store_is_closed_is_told() -> None:
    polling = Polling(Shelf().read)
    waiting = asyncio.create_task(polling.final("a", 10))
    await asyncio.sleep(0)
    await polling.close()
    with pytest.raises(StoreUnavailable, match="closed"):
        await waiting


async def test_a_look_under_way_ends_by_itself_when_the_store_is_closed() -> None:
    answered = asyncio.Event()
    ended: list[str] = []

    async def read(task_ids: Sequence[str]) -> Mapping[str, Result | AQueueError]:
        await answered.wait()
        ended.extend(task_ids)
        return {}

    polling = Polling(read)
    waiting = asyncio.create_task(polling.final("a", 10))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    asyncio.get_running_loop().call_later(0.05, answered.set)
    await polling.close()
    assert ended == ["a"]
    with pytest.raises(StoreUnavailable, match="closed"):
        await waiting
