"""What all peers measure alike; standard library only, as each peer has its own environment."""

import asyncio
import json
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any


async def rate(send: Callable[[], Awaitable[object]], count: int, senders: int) -> None:
    """Print how many sends a second; so many senders at once, each with one send after the other."""

    async def sender() -> None:
        for _ in range(count // senders):
            await send()

    start = time.perf_counter()
    await asyncio.gather(*[sender() for _ in range(senders)])
    print(json.dumps({"rate": count // senders * senders / (time.perf_counter() - start)}))


async def round_trips(one: Callable[[], Awaitable[None]], count: int) -> None:
    """Print the median and the 99th percentile of one round trip after the other, in ms."""
    for _ in range(50):
        await one()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        await one()
        times.append((time.perf_counter() - start) * 1000)
    report(times)


def blocking_rate(send: Callable[[], object], count: int) -> None:
    """`rate` for those whose send blocks."""
    start = time.perf_counter()
    for _ in range(count):
        send()
    print(json.dumps({"rate": count / (time.perf_counter() - start)}))


def blocking_round_trips(one: Callable[[], object], count: int) -> None:
    """`round_trips` for those who block."""
    for _ in range(50):
        one()
    times = []
    for _ in range(count):
        start = time.perf_counter()
        one()
        times.append((time.perf_counter() - start) * 1000)
    report(times)


def report(times: list[float]) -> None:
    print(json.dumps({"p50": statistics.median(times), "p99": statistics.quantiles(times, n=100)[98]}))


def main(run: Callable[[Any], Any], **commands: Callable[..., Any]) -> None:
    """``python peer.py COMMAND N [WORD]``"""
    _, name, count, *words = sys.argv
    run(commands[name](int(count), *words))
