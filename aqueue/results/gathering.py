"""Doing several things at the same time."""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import TypeVar

T = TypeVar("T")


async def all_done(work: Sequence[Awaitable[T]]) -> list[T]:
    """The outcomes, when everything has ended; the first failure is raised then."""
    outcomes = await asyncio.gather(*work, return_exceptions=True)
    done: list[T] = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        done.append(outcome)
    return done
