"""Waiting for a condition, never for a time."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest


async def until(condition: Callable[[], Any], what: str, timeout: float = 10.0) -> Any:
    """Until a function, or a coroutine function, gives something true; fails after ``timeout`` seconds."""
    loop = asyncio.get_running_loop()
    ends = loop.time() + timeout
    while True:
        value = condition()
        if isinstance(value, Awaitable):
            value = await value
        if value:
            return value
        if loop.time() > ends:
            pytest.fail(f"{what}: not within {timeout:g} s")
        await asyncio.sleep(0.01)
