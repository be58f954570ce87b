"""Dead letters in number: found by what they are, sifted in pages, put back or deleted, and never lost on the way."""

import asyncio
from collections.abc import Sequence

import pytest

from aqueue.broker import Broker, Bury, DeadLetter, Sifted
from aqueue.protocol import Message
from tests.conformance.conftest import MakeBroker
from tests.conformance.test_broker import fetch_all, message, names


async def bury(broker: Broker, queue: str, *wanted: str, reason: str = "why") -> None:
    await broker.publish([message(queue, name) for name in wanted])
    while claimed := await broker.fetch([queue], 100, 0):
        await broker.settle([(delivery, Bury(reason, f"detail of {reason}")) for delivery in claimed])


def of(letters: Sequence[DeadLetter]) -> list[str]:
    return [letter.message.headers["id"] for letter in letters if isinstance(letter.message, Message)]


class Visitor:
    """Keeps what it is shown, and chooses by name."""

    def __init__(self, retry: str = "", drop: str = "") -> None:
        self.pages: list[list[str]] = []
        self._retry = retry
        self._drop = drop

    async def __call__(self, page: Sequence[DeadLetter]) -> Sifted:
        self.pages.append(of(page))
        return Sifted(
            [letter.id for letter, name in zip(page, of(page), strict=True) if self._retry and name in self._retry],
            [letter.id for letter, name in zip(page, of(page), strict=True) if self._drop and name in self._drop],
        )


async def test_letters_are_found_by_what_they_are(broker: Broker, queue: str) -> None:
    await bury(broker, queue, "a", "b", reason="one")
    await asyncio.sleep(0.005)
    await bury(broker, queue, "c", "d", reason="two")
    one = await broker.inspection.dead(where=lambda letter: letter.reason == "one")
    assert sorted(of(one)) == ["a", "b"]
    assert len(await broker.inspection.dead(queue, limit=1, where=lambda letter: letter.reason == "one")) == 1
    assert await broker.inspection.dead(queue + "-other", where=lambda letter: True) == []
    assert await broker.inspection.dead(where=lambda letter: False) == []


async def test_sifting_shows_every_letter_once_the_oldest_first(broker: Broker, queue: str) -> None:
    for number in range(3):
        await bury(broker, queue, *(f"{number}{letter}" for letter in "abcde"))
        await asyncio.sleep(0.005)
    visitor = Visitor()
    assert await broker.inspection.sift_dead(visitor, 4) == (0, 0)
    assert all(0 < len(page) <= 4 for page in visitor.pages)
    seen = [name for page in visitor.pages for name in page]
    assert sorted(seen) == sorted(f"{number}{letter}" for number in range(3) for letter in "abcde")
    assert [name[0] for name in seen] == sorted(name[0] for name in seen)
    assert len(await broker.inspection.dead(queue)) == 15


async def test_sifting_nothing_shows_nothing(broker: Broker) -> None:
    visitor = Visitor()
    assert await broker.inspection.sift_dead(visitor) == (0, 0)
    assert visitor.pages == []


@pytest.mark.parametrize("page", [1, 2, 3, 100])
async def test_what_is_chosen_is_put_back_or_deleted_and_the_rest_stays(broker: Broker, queue: str, page: int) -> None:
    await bury(broker, queue, *"abcdefg")
    visitor = Visitor(retry="bce", drop="ag")
    assert await broker.inspection.sift_dead(visitor, page) == (3, 2)
    assert sorted(name for page_of in visitor.pages for name in page_of) == list("abcdefg")
    assert sorted(names(await fetch_all(broker, queue, 0.2))) == ["b", "c", "e"]
    assert sorted(of(await broker.inspection.dead(queue))) == ["d", "f"]


async def test_what_dies_again_meanwhile_is_not_shown_again(broker: Broker, queue: str) -> None:
    await bury(broker, queue, "a", "b", "c")
    shown: list[str] = []

    async def visit(page: Sequence[DeadLetter]) -> Sifted:
        shown.extend(of(page))
        await bury(broker, queue)  # what was put back before
        return Sifted(retry=[letter.id for letter in page])

    await broker.inspection.sift_dead(visit, 1)
    assert sorted(shown) == ["a", "b", "c"]
    await bury(broker, queue)
    assert sorted(of(await broker.inspection.dead(queue))) == ["a", "b", "c"]


async def test_when_sifting_is_broken_off_the_letters_stay(broker: Broker, queue: str) -> None:
    await bury(broker, queue, "a", "b", "c")

    async def visit(page: Sequence[DeadLetter]) -> Sifted:
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        await broker.inspection.sift_dead(visit, 2)
    assert sorted(of(await broker.inspection.dead(queue))) == ["a", "b", "c"]


async def test_letters_of_one_moment_are_all_shown(make_broker: MakeBroker, queue: str) -> None:
    """Dead at the same time of the server's clock, they have no order but that of their ids."""
    broker = await make_broker()
    wanted = sorted(f"{number}" for number in range(300))
    await bury(broker, queue, *wanted)
    visitor = Visitor(drop="7")
    _, dropped = await broker.inspection.sift_dead(visitor, 7)
    assert dropped == 1
    assert sorted(name for page in visitor.pages for name in page) == wanted
