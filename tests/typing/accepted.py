"""What a type checker must accept, and the types it must see. Checked, never run."""

from collections.abc import Coroutine
from typing import Any, Literal, assert_type

from aqueue import AQueue, AsyncResult, AsyncTask, Attempt, Context, Options, Retry, Settings, Signature, SyncTask

app = AQueue("typing", broker="memory://", settings=Settings(lease=5.0, routes={"a.*": "a", "b": {"queue": "b"}}))


@app.task
async def plain(x: int, *, y: str = "") -> float:
    return x


@app.task(queue="q", retry=Retry(attempts=3, on=(ValueError, KeyError)), timeout=5, priority=9)
async def with_context(ctx: Context, x: int) -> list[str]:
    return [ctx.id]


@app.task
def threaded(ctx: Context, x: int) -> bytes:
    return b""


@app.task(ignore_result=True)
def threaded_with_options(x: int) -> None: ...


@app.task(run="process", memory="2G", timeout=600, soft_timeout=590)
def in_a_process(ctx: Context, x: int) -> float:
    ctx.check()
    return x


@app.task(bind=True, name="bound")
def bound(self: Any, x: int) -> str:
    return ""


@app.task(bind=True)
async def bound_async(self: Any, x: int) -> str:
    return ""


async def use() -> None:
    assert_type(await plain.send(1, y="a"), AsyncResult[float])
    assert_type(await (await plain.send(1)).get(timeout=3), float)
    assert_type(await (await plain.send(1)), float)
    assert_type(await plain.options(countdown=3, priority=9).send(1), AsyncResult[float])
    assert_type(await plain.delay(1), AsyncResult[float])
    assert_type(await plain.apply_async((1,), {"y": "a"}, countdown=3), AsyncResult[float])
    assert_type(plain.s(1, y="b"), Signature[float])
    assert_type(await app.send_many([plain.s(1), plain.s(2)]), list[AsyncResult[float]])
    assert_type(await plain.send_many([plain.s(1)]), list[AsyncResult[float]])
    assert_type(plain.send_sync(1), AsyncResult[float])
    assert_type(plain.result("id"), AsyncResult[float])
    assert_type(await plain.result("id").cancel("why", terminate=False), Literal["requested", "finished"])
    assert_type(await plain.result("id").attempts(), tuple[Attempt, ...])
    assert_type(await app.cancel("id", keep=60), Literal["requested", "finished"])
    unawaited = assert_type(plain(1), Coroutine[Any, Any, float])
    unawaited.close()
    assert_type(await plain(1), float)

    assert_type(await with_context.send(1), AsyncResult[list[str]])
    assert_type(await with_context(1), list[str])
    assert_type(threaded(1), bytes)
    assert_type(await threaded.send(1), AsyncResult[bytes])
    assert_type(in_a_process(1), float)
    assert_type(await in_a_process.send(1), AsyncResult[float])
    assert_type(bound(1), str)
    assert_type(await bound.send(1), AsyncResult[str])
    assert_type(await bound_async(1), str)
    threaded_with_options(1)

    options: Options = {"queue": "q", "countdown": 1.0}
    await plain.options(**options).send(1)


def kinds(one: AsyncTask[[int], str], other: SyncTask[[int], str]) -> None:
    assert_type(other(1), str)
    unawaited = assert_type(one(1), Coroutine[Any, Any, str])
    unawaited.close()
