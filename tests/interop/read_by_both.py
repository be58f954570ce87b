"""What holds wherever results are kept: each kind of worker writes them, each kind of client reads them.

A module of tests derives a class from `ReadByBoth`, and has a fixture ``pair``.
"""

import asyncio
from typing import Any, Final, Protocol

import pytest

from aqueue import AQueue, TaskFailed
from aqueue.results import FAILURE, RemoteError, Result
from tests.interop.conftest import SOON, ended
from tests.interop.workers import Site
from tests.kit.waiting import until

VALUES: Final = [5, None, 2**70, "", {"a": [1, "é\x00"]}, "x" * 50_000]


class Pair(Protocol):
    """Clients of both kinds, and a worker of one that takes this queue."""

    @property
    def site(self) -> Site: ...

    @property
    def queue(self) -> str: ...

    @property
    def theirs(self) -> Any: ...

    def ours(self) -> AQueue: ...


class ReadByBoth:
    async def test_values(self, pair: Pair) -> None:
        async with pair.ours() as app:
            for value in VALUES:
                theirs = pair.theirs.send_task("interop.give", [value], queue=pair.queue)
                ours = await app.send_task("interop.give", [value], queue=pair.queue)
                assert await ended(theirs) == value
                assert await ours.get(SOON) == value
                assert await app.result(theirs.id, known=True).get(SOON) == value
                assert await ended(pair.theirs.AsyncResult(ours.id)) == value

    async def test_failures(self, pair: Pair) -> None:
        async with pair.ours() as app:
            theirs = pair.theirs.send_task("interop.fail", ["bööm"], queue=pair.queue)
            ours = await app.send_task("interop.fail", ["bööm"], queue=pair.queue)
            for task_id in (theirs.id, ours.id):
                found = pair.theirs.AsyncResult(task_id)
                with pytest.raises(ValueError, match="bööm"):
                    await ended(found)
                assert found.state == "FAILURE"
                assert not found.children
                assert "bööm" in found.traceback
                with pytest.raises(TaskFailed, match="bööm") as caught:
                    await app.result(task_id, known=True).get(SOON)
                assert caught.value.type == "ValueError"
                assert "bööm" in (caught.value.traceback or "")

    async def test_states_on_the_way(self, pair: Pair, key: str) -> None:
        async with pair.ours() as app:
            ours = await app.send_task("interop.wait_for_flag", [pair.site.port, key], queue=pair.queue)
            theirs = pair.theirs.AsyncResult(ours.id)

            async def started() -> bool:
                return await ours.state() == "STARTED"

            await until(started, "state STARTED", SOON)
            assert theirs.state == "STARTED"
            assert not theirs.ready()
            assert theirs.info == await ours.info()
            pair.site.put_up(key)
            assert await ours.get(SOON) == await ended(theirs)

            retried = await app.send_task("interop.retry_self", [1, 0.05], queue=pair.queue)
            assert (await retried.get(SOON))[0] == 1

    async def test_a_success_is_kept(self, pair: Pair) -> None:
        async with pair.ours() as app:
            ours = await app.send_task("interop.give", [5], queue=pair.queue)
            assert await ours.get(SOON) == 5
            store = app.producer().store
            failure = Result(task_id=ours.id, state=FAILURE, value=RemoteError("ValueError", ["late"], "builtins"))
            await store.put([store.record(failure)])
            await asyncio.to_thread(pair.theirs.backend.store_result, ours.id, ValueError("late"), "FAILURE")
            assert await ours.get(SOON) == await ended(pair.theirs.AsyncResult(ours.id)) == 5

    async def test_a_result_is_forgotten(self, pair: Pair) -> None:
        async with pair.ours() as app:
            one, other = [await app.send_task("interop.give", [5], queue=pair.queue) for _ in range(2)]
            assert [await one.get(SOON), await other.get(SOON)] == [5, 5]
            await one.forget()
            await asyncio.to_thread(pair.theirs.AsyncResult(other.id).forget)
            assert pair.theirs.AsyncResult(one.id).state == "PENDING"
            assert await app.result(other.id).state() == "UNKNOWN"
