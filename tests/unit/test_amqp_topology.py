"""Where delayed messages enter Celery's ladder of queues, and which settings are meant for a queue."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aqueue.broker import Queue, arguments_of
from aqueue.broker.amqp.topology import LEVELS, LONGEST_DELAY, delayed_route
from tests.unit.vectors import WIRE


def seconds_of(key: str) -> int:
    return int("".join(key.split(".")[:LEVELS]), 2)


@pytest.mark.parametrize(
    ("delay", "seconds"),
    [
        (0.001, 1),
        (0.999, 1),
        (1.0, 1),
        (1.0000001, 2),
        (6.0, 6),
        (59.5, 60),
        (86400.0, 86400),
        (LONGEST_DELAY - 0.5, LONGEST_DELAY),
        (LONGEST_DELAY + 1.0, LONGEST_DELAY),
        (1e300, LONGEST_DELAY),
        (0.0, 1),
        (-5.0, 1),
    ],
)
def test_a_delay_is_never_shorter_than_asked_for_and_ends_somewhere(delay: float, seconds: int) -> None:
    _, key = delayed_route("q", delay)
    assert seconds_of(key) == seconds


@given(st.floats(0.0, LONGEST_DELAY), st.text("ab.-é", min_size=1, max_size=20))
def test_a_message_enters_at_its_highest_bit_and_ends_at_its_queue(delay: float, queue: str) -> None:
    exchange, key = delayed_route(queue, delay)
    bits = key.split(".")[:LEVELS]
    assert key == f"{'.'.join(bits)}.{queue}"
    assert delay <= seconds_of(key) <= delay + 1
    level = int(exchange.removeprefix("celery_delayed_"))
    assert bits.index("1") == LEVELS - 1 - level


def test_the_key_is_celerys() -> None:
    """Celery's enter at the top, and reach by zeros where ours enter."""
    file = json.loads((WIRE / "amqp_delayed_messages.json").read_text())
    keys = [word for word in json.dumps(file).split('"') if word.count(".") >= LEVELS and set(word[:55]) <= set("01.")]
    assert keys
    for key in keys:
        queue = key.split(".", LEVELS)[LEVELS]
        assert delayed_route(queue, seconds_of(key))[1] == key


@pytest.mark.parametrize(
    ("name", "priority"), [("exact", 1), ("exact-not", 2), ("other", 3), ("ex", 3), ("exa", 2), ("[exact]", 3)]
)
def test_a_name_counts_before_the_first_glob_that_fits(name: str, priority: int) -> None:
    queues = {"exa*": Queue(max_priority=2), "*": Queue(max_priority=3), "exact": Queue(max_priority=1)}
    assert arguments_of(queues, name).max_priority == priority


def test_a_queue_that_no_setting_means_is_celerys() -> None:
    found = arguments_of({"other": Queue(max_priority=2)}, "celery")
    assert found == Queue()
    assert found.all_arguments == {}
