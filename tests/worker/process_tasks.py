"""Functions that tests run in child processes, which import this module."""

import asyncio
import ctypes
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from aqueue import Context, Dead, Reject, Retry, Snooze, SoftTimeLimitExceeded, current


@dataclass
class Point:
    x: int
    y: int


class Unlucky(Exception):
    def __init__(self, number: int, why: str) -> None:
        super().__init__(f"{number} {why}")  # so that it can't be rebuilt from its arguments


def add(x: int, y: int = 1) -> int:
    return x + y


def pid() -> int:
    return os.getpid()


def move(point: Point, by: int) -> Point:
    return Point(point.x + by, point.y + by)


def about(ctx: Context, x: int) -> dict[str, Any]:
    here = current()
    return {
        "id": ctx.id,
        "same": here is ctx,
        "attempt": ctx.attempt,
        "max_attempts": ctx.max_attempts,
        "deliveries": ctx.deliveries,
        "has_token": ctx.token is not None,
        "key": ctx.idempotency_key,
        "headers": ctx.headers,
        "worker": ctx.worker,
        "queue": ctx.queue,
        "cancelled": ctx.cancelled,
        "args": list(ctx.args),
        "x": x,
    }


def bound(self: Any, x: int) -> list[Any]:
    return [self.request.id, self.request.args, x]


def once_more(ctx: Context) -> int:
    if ctx.attempt == 1:
        raise Retry.now(after=0.0)
    return ctx.attempt


def refuse() -> NoReturn:
    raise Reject("not me")


def fail(how: str) -> None:
    if how == "known":
        raise KeyError("known")
    if how == "local":

        class LocalError(Exception): ...

        raise LocalError("very local")
    if how == "unlucky":
        raise Unlucky(7, "really")
    sys.exit(4)


def tell(ctx: Context) -> str:
    ctx.progress_sync(1, 2, "half")
    with suppress(Exception):
        ctx.update_state_sync("ODD", object())
    ctx.update_state_sync("OWN", {"step": 2})
    asyncio.run(ctx.progress(2, 2, "whole"))
    return "told"


def refused_state(ctx: Context) -> str:
    try:
        ctx.update_state_sync("ODD", {"it": object()})
    except Exception as error:
        return type(error).__name__
    return "stored"


def no_pickle() -> Any:
    return lambda: None


def die(how: str, file: str = "") -> None:
    if file:
        with Path(file).open("a") as runs:
            runs.write("run\n")
    if how == "exit":
        os._exit(3)
    if how == "segfault":
        ctypes.string_at(0)
    os.kill(os.getpid(), getattr(signal, how))
    time.sleep(20)


def eat(mebibytes: int) -> int:
    return len(bytearray(mebibytes * 2**20))


kept: list[bytes] = []


def leak(mebibytes: int) -> int:
    kept.append(b"x" * (mebibytes * 2**20))
    return os.getpid()


def nap(file: str, seconds: float = 30.0) -> str:
    path = Path(file)
    path.with_suffix(".pid").write_text(str(os.getpid()))
    path.write_text("begun")
    try:
        time.sleep(seconds)
    finally:
        path.write_text("cleaned up")
    return "rested"


def warned(file: str) -> str:
    path = Path(file)
    path.write_text("begun")
    try:
        time.sleep(30)
    except SoftTimeLimitExceeded as error:
        return f"warned after {error}"
    return "slept"


def take_the_signal() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def save(file: str) -> str:
    Path(file).write_text("begun")
    try:
        time.sleep(30)
    except asyncio.CancelledError as error:
        return f"saved, as {error} came"
    return "slept"


def deaf(file: str) -> None:
    """Holds on, whatever it is told, and has a child of its own."""
    child = subprocess.Popen(["sleep", "60"])
    Path(file).write_text(f"{os.getpid()} {child.pid}")
    while True:
        try:
            time.sleep(30)
        except BaseException:
            continue


def _square(n: int, results: "multiprocessing.Queue[int]") -> None:
    results.put(n * n)


def with_children(n: int) -> int:
    """Children of its own, forked."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=_square, args=(k, results)) for k in range(n)]
    for child in children:
        child.start()
    total: int = sum(results.get(timeout=10) for _ in children)
    for child in children:
        child.join(10)
    stopped = context.Process(target=time.sleep, args=(60,))
    stopped.start()
    stopped.terminate()
    stopped.join(10)
    assert stopped.exitcode == -signal.SIGTERM
    return total


def log(ctx: Context) -> None:
    ctx.logger.warning("from the %s", "child")
    logging.getLogger("plain").error("plainly")
    logging.getLogger("plain").debug("too fine")


def not_yet(ctx: Context) -> list[Any]:
    """Put off once, fail once; then what it knows of that."""
    if not ctx.snoozes:
        raise Snooze(0.0)
    if ctx.attempt == 1:
        raise ConnectionError("first")
    return [ctx.attempt, ctx.snoozes, [error.text for error in ctx.errors]]


def hopeless() -> None:
    raise Dead("no use")
