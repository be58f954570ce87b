"""What a worker and its child processes tell each other, cut out of bytes as they come."""

import os
import random

import pytest

from aqueue.process_link import End, Exit, Returned, Told, Unpacker, Warn, pack
from aqueue.processes import how_it_ended, resident

MESSAGES = [Warn(1, 0.5), End(1, "timeout"), Told(3, ValueError("no")), Returned(b"x" * 70_000), Exit()]


@pytest.mark.parametrize("size", [1, 7, 8, 9, 1000, 10**6])
def test_messages_are_found_however_the_bytes_come(size: int) -> None:
    data = b"".join(map(pack, MESSAGES))
    unpacker = Unpacker()
    found = [message for at in range(0, len(data), size) for message in unpacker.feed(data[at : at + size])]
    assert [type(message) for message in found] == [type(message) for message in MESSAGES]
    assert found[0] == MESSAGES[0]
    assert found[3] == MESSAGES[3]
    assert str(found[2].error) == "no"


def test_pieces_of_any_size() -> None:
    chance = random.Random(7)
    data = b"".join(map(pack, MESSAGES * 3))
    unpacker, found, at = Unpacker(), 0, 0
    while at < len(data):
        size = chance.randint(1, 5000)
        found += len(unpacker.feed(data[at : at + size]))
        at += size
    assert found == 3 * len(MESSAGES)
    assert unpacker.feed(b"") == []


@pytest.mark.parametrize(
    ("code", "out_of_memory", "text"),
    [
        (0, False, "exit code 0"),
        (3, True, "exit code 3"),
        (-9, False, "signal 9 (SIGKILL)"),
        (-9, True, "signal 9 (SIGKILL), out of memory"),
        (-11, True, "signal 11 (SIGSEGV)"),
        (-99, False, "signal 99 (unknown)"),
    ],
)
def test_how_a_process_has_ended(code: int, out_of_memory: bool, text: str) -> None:
    assert how_it_ended(code, out_of_memory) == text


def test_the_memory_of_a_process() -> None:
    before = resident(os.getpid())
    held = b"x" * 50_000_000
    assert resident(os.getpid()) - before > 0.9 * len(held)
    assert resident(2**22 + 1) == 0  # no process has such an identifier
