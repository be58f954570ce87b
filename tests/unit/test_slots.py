"""Slots: how much runs at once, and how much a worker claims from which queues."""

import pytest

from aqueue.slots import Slots

BOTH = ["feeds", "mail"]


def slots(coroutine: int = 20, thread: int = 6) -> Slots:
    return Slots({"coroutine": coroutine, "thread": thread})


def full(some: Slots, kind: str) -> Slots:
    """With every slot of a kind taken."""
    while some.take(kind):  # type: ignore[arg-type]
        pass
    return some


def test_slots_are_taken_and_given_back() -> None:
    some = slots(thread=2)
    assert [some.take("thread") for _ in range(3)] == [True, True, False]
    some.give("thread")
    assert some.take("thread")
    assert not some.take("thread")


def test_each_kind_has_slots_of_its_own() -> None:
    some = slots(coroutine=1, thread=1)
    assert some.take("thread")
    assert some.take("coroutine")
    assert not some.take("coroutine")


def test_a_refused_slot_costs_nothing() -> None:
    some = slots(thread=1)
    for _ in range(5):
        some.take("thread")
    some.give("thread")
    assert some.take("thread")


@pytest.mark.parametrize(("coroutine", "thread"), [(10, 3), (2, 30)])
def test_before_anything_was_met_the_claim_is_for_half_of_the_larger_kind(coroutine: int, thread: int) -> None:
    queues, number = slots(coroutine, thread).demand(BOTH)
    assert (list(queues), number) == (BOTH, max(coroutine, thread) // 2)


def test_the_claim_fits_whichever_kind_it_turns_out_to_be_of_those_a_queue_brought_last() -> None:
    some = slots(20, 6)
    some.meet("feeds", frozenset({"thread"}))
    assert some.demand(["feeds"])[1] == 3
    some.meet("feeds", frozenset({"coroutine"}))
    assert some.demand(["feeds"])[1] == 10
    some.meet("feeds", frozenset({"coroutine", "thread"}))
    assert some.demand(["feeds"])[1] == 3


def test_the_claim_fits_every_queue_it_is_made_from() -> None:
    some = slots(20, 6)
    some.meet("feeds", frozenset({"coroutine"}))
    some.meet("mail", frozenset({"thread"}))
    assert some.demand(BOTH) == (BOTH, 3)
    assert some.demand(["feeds"])[1] == 10


def test_the_claim_shrinks_and_grows_with_the_free_slots() -> None:
    some = slots(20, 6)
    some.meet("feeds", frozenset({"thread"}))
    assert some.demand(["feeds"])[1] == 3
    for _ in range(4):
        some.take("thread")
    assert some.demand(["feeds"])[1] == 2
    full(some, "thread")
    some.give("thread")
    assert some.demand(["feeds"])[1] == 1


@pytest.mark.parametrize(("size", "claim"), [(1, 1), (2, 1), (3, 1), (100, 50), (101, 50)])
def test_one_claim_is_for_half_of_the_slots_and_for_one_at_least(size: int, claim: int) -> None:
    assert slots(size, 1).demand(["feeds"])[1] == claim


def test_a_queue_whose_kind_is_full_is_left_out() -> None:
    some = slots(20, 6)
    some.meet("feeds", frozenset({"coroutine"}))
    some.meet("mail", frozenset({"thread"}))
    full(some, "thread")
    queues, number = some.demand(BOTH)
    assert (list(queues), number) == (["feeds"], 10)


def test_when_everything_is_full_nothing_is_claimed() -> None:
    some = slots(2, 2)
    some.meet("feeds", frozenset({"coroutine"}))
    full(full(some, "coroutine"), "thread")
    queues, number = some.demand(BOTH)
    assert (list(queues), number) == ([], 0)


def test_a_queue_that_brings_both_kinds_waits_for_the_full_one() -> None:
    some = slots(20, 6)
    some.meet("feeds", frozenset({"coroutine", "thread"}))
    full(some, "thread")
    assert not some.demand(["feeds"])[0]


def test_queues_that_may_be_walked_once_are_kept_in_order() -> None:
    assert list(slots().demand(iter(BOTH))[0]) == BOTH


@pytest.mark.parametrize(("coroutine", "thread"), [(10, 3), (0, 5), (5, 0)])
def test_the_total_is_that_of_all_kinds_whatever_is_taken(coroutine: int, thread: int) -> None:
    some = slots(coroutine, thread)
    some.take("coroutine")
    assert some.total == coroutine + thread


def test_a_kind_without_slots_is_never_taken_and_its_queue_never_asked() -> None:
    some = slots(thread=0)
    assert not some.take("thread")
    some.meet("feeds", frozenset({"thread"}))
    assert not some.demand(["feeds"])[0]


def test_the_sizes_given_are_not_changed() -> None:
    sizes = {"coroutine": 1, "thread": 1}
    Slots(sizes).take("thread")  # type: ignore[arg-type]
    assert sizes == {"coroutine": 1, "thread": 1}
