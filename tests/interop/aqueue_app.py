"""The aqueue app: ``aqueue worker tests.interop.aqueue_app``, and clients made by `make`."""

import asyncio
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from aqueue import AQueue, Context, Queue, Retry, Settings
from aqueue.signing import Auth
from tests.interop import tasks


@dataclass
class Order:
    """An argument that an annotated task gets whole."""

    number: int
    wanted: date
    lines: list[str]


def make(
    broker: str, results: str, *, queues: Mapping[str, Mapping[str, Any]] | None = None, **settings: Any
) -> AQueue:
    """An app with all tasks; ``settings`` are those of `Settings`, ``auth`` a folder with keys.

    ``queues``: by their names, what `Queue` is made of.
    """
    if queues:
        settings["queues"] = {name: Queue(**made) for name, made in queues.items()}
    keys = settings.pop("auth", None)
    if keys is not None:
        settings["signer"] = auth(Path(keys))
    app = AQueue("interop", broker=broker, backend=results, settings=Settings(**settings))
    for name, function in tasks.PLAIN.items():
        app.task(name=name)(function)
    for name, function in tasks.BOUND.items():
        app.task(name=name, bind=True)(function)
    app.task(name="interop.add")(add)
    app.task(name="interop.ignored", ignore_result=True)(tasks.count)
    app.task(name="interop.late")(tasks.wait_for_flag)
    app.task(name="interop.routed", queue="by-task")(tasks.give)
    app.task(name="interop.sleep")(sleep)
    app.task(name="interop.retry_policy", retry=Retry(attempts=4, backoff=0.2, jitter=False, on=ConnectionError))(
        retry_policy
    )
    app.task(name="interop.retry_now", retry=Retry(attempts=4))(retry_now)
    app.task(name="interop.retry_with_nan", retry=Retry(attempts=2, backoff=0))(retry_with_nan)
    app.task(name="interop.tell_progress")(tell_progress)
    app.task(name="interop.progress_of_coroutine", bind=True)(progress_of_coroutine)
    app.task(name="interop.order")(order)

    async def send_child(queue: str) -> str:
        return (await app.send_task("interop.request", queue=queue)).id

    app.task(name="interop.send_child")(send_child)
    return app


def auth(folder: Path) -> Auth:
    return Auth(folder / "worker.key", folder / "worker.pem", folder / "*.pem")


async def add(x: int, y: int) -> int:
    return x + y


async def sleep(seconds: float) -> None:
    await asyncio.sleep(seconds)


async def retry_policy(ctx: Context, times: int) -> list[Any]:
    """Fail so often before it gives the number of retries."""
    if ctx.attempt <= times:
        raise ConnectionError(f"try {ctx.attempt - 1}")
    return [ctx.attempt - 1, tasks.who()]


async def retry_now(ctx: Context, times: int, after: float) -> list[Any]:
    """Ask so often to be run again."""
    if ctx.attempt <= times:
        raise Retry.now(after=after, error=ConnectionError(f"try {ctx.attempt - 1}"))
    return [ctx.attempt - 1, tasks.who()]


async def retry_with_nan(ctx: Context) -> int:
    """Fail once, with an exception whose argument strict JSON can't hold."""
    if ctx.attempt == 1:
        raise ValueError(math.nan)
    return ctx.attempt - 1


async def tell_progress(ctx: Context, port: int, flag: str) -> str:
    """Tell of progress, then wait for the flag."""
    await ctx.progress(1, 2, "half way")
    return await asyncio.to_thread(tasks.wait_for_flag, port, flag)


async def progress_of_coroutine(self: Any) -> str:
    """As it was written for Celery, with ``async`` before it."""
    self.update_state(state="PROGRESS", meta={"done": 1})
    return tasks.who()


async def order(order: Order) -> str:
    return f"{order.number} until {order.wanted:%d.%m.%Y}: {', '.join(order.lines)}"


app = make(
    os.environ.get("INTEROP_BROKER", "memory://"),
    os.environ.get("INTEROP_RESULTS", "memory://"),
    **json.loads(os.environ.get("INTEROP_SETTINGS", "{}")),
)
