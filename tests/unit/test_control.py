"""What a worker knows of cancelled tasks: for how long, and how many."""

import asyncio
import logging

import pytest

from aqueue import control
from aqueue.broker.control import Inbox
from aqueue.control import Revocations
from aqueue.errors import BrokerUnavailable
from aqueue.pidbox import Revocation


class Clock:
    def __init__(self) -> None:
        self.time = 1000.0

    def __call__(self) -> float:
        return self.time


def revocation(keep: float = 60.0, reason: str = "r") -> Revocation:
    return Revocation(reason, terminate=False, keep=keep)


def test_what_is_revoked_is_found_until_its_end() -> None:
    clock = Clock()
    known = Revocations(clock)
    assert not known.known
    known.add({"short": revocation(1), "long": revocation(100)})
    clock.time += 0.9
    assert known.find("short") == revocation(1)
    clock.time += 0.2
    assert known.find("short") is None
    assert known.find("long") is not None
    assert known.find("other") is None
    assert list(known.known) == ["long"]


def test_the_last_word_counts() -> None:
    clock = Clock()
    known = Revocations(clock)
    known.add({"x": revocation(1, "first")})
    known.add({"x": revocation(100, "second")})
    clock.time += 50
    found = known.find("x")
    assert found is not None
    assert found.reason == "second"


def test_memory_is_bounded_and_what_is_forgotten_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(control, "_MOST_KNOWN", 100)
    known = Revocations(Clock())
    with caplog.at_level(logging.WARNING):
        known.add({str(number): revocation(number + 1) for number in range(100)})
        assert caplog.text == ""
        known.add({"one-more": revocation(1000)})
    assert "51 cancelled tasks are forgotten" in caplog.text
    assert len(known.known) == 50
    assert known.find("one-more") is not None
    assert known.find("99") is not None
    assert known.find("3") is None


def test_what_has_ended_makes_room_without_a_word(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(control, "_MOST_KNOWN", 100)
    clock = Clock()
    known = Revocations(clock)
    known.add({str(number): revocation(1) for number in range(100)})
    clock.time += 2
    known.add({"new": revocation(1)})
    assert caplog.text == ""
    assert known.find("new") is not None
    assert len(known.known) <= 50


async def test_an_inbox_gives_what_was_told_once() -> None:
    inbox = Inbox()
    assert await inbox.take(0) == {}
    inbox.put({"x": revocation()})
    inbox.put({})
    inbox.put({"y": revocation()})
    assert set(await inbox.take(10)) == {"x", "y"}
    assert await inbox.take(0) == {}
    asyncio.get_running_loop().call_later(0.05, inbox.put, {"z": revocation()})
    assert set(await inbox.take(10)) == {"z"}


async def test_an_inbox_says_once_that_something_was_missed() -> None:
    inbox = Inbox()
    inbox.put({"x": revocation()})
    inbox.miss("the link was lost")
    with pytest.raises(BrokerUnavailable, match="the link was lost"):
        await inbox.take(10)
    assert set(await inbox.take(0)) == {"x"}
