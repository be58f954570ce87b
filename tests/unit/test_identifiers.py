"""Names: task ids, workers, senders."""

import os
import re
import socket
from uuid import RFC_4122, UUID

import pytest

from aqueue.identifiers import new_id, node_name, origin


def test_an_id_is_a_random_uuid_in_its_usual_form() -> None:
    for _ in range(200):
        text = new_id()
        parsed = UUID(text)
        assert str(parsed) == text
        assert (parsed.version, parsed.variant) == (4, RFC_4122)


def test_no_id_comes_twice() -> None:
    assert len({new_id() for _ in range(10_000)}) == 10_000


def test_every_digit_of_an_id_varies_but_the_one_that_says_the_version() -> None:
    seen = [set(digits) for digits in zip(*(new_id() for _ in range(500)), strict=True)]
    for place, digits in enumerate(seen):
        if place in (8, 13, 18, 23):
            assert digits == {"-"}
        elif place == 14:
            assert digits == {"4"}
        elif place == 19:
            assert digits == set("89ab")
        else:
            assert digits == set("0123456789abcdef")


HOST = socket.gethostname()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("worker", f"worker@{HOST}"),
        ("a@b", "a@b"),
        ("a@%h", f"a@{HOST}"),
        ("feeds-1@%h", f"feeds-1@{HOST}"),
    ],
)
def test_a_worker_has_a_name_and_a_host(name: str, expected: str) -> None:
    assert node_name(name) == expected


def test_a_worker_without_a_name_has_one() -> None:
    assert node_name() == f"worker@{HOST}"


def test_a_sender_is_known_by_its_process_and_host() -> None:
    assert origin() == f"gen{os.getpid()}@{HOST}"
    assert re.fullmatch(r"gen\d+@.+", origin())
