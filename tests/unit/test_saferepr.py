"""Short texts of values: as Celery shows them, never long, never deep, and never failing."""

import re
from collections import OrderedDict
from datetime import date
from enum import StrEnum
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aqueue.saferepr import LIMIT, printable, saferepr
from tests.unit.elements import nested, quickly
from tests.unit.vectors import Captured, task_messages

#: Messages whose arguments are shown whole, hold no bytes (see `test_sending`), and held no tuples before.
SHORT = [
    captured
    for captured in task_messages()
    if "argsrepr" in captured.envelope["headers"]
    and "..." not in captured.envelope["headers"]["argsrepr"] + captured.envelope["headers"]["kwargsrepr"]
    and not any(isinstance(value, bytes) for value in captured.args)
    and captured.name.split("[")[0] not in ("map", "starmap", "chunks")
]


@pytest.mark.parametrize("captured", SHORT, ids=lambda captured: captured.name)
def test_arguments_are_shown_as_celery_shows_them(captured: Captured) -> None:
    headers = captured.envelope["headers"]
    shown = (saferepr(tuple(captured.args)), saferepr(captured.args))
    assert headers["argsrepr"] in shown
    assert saferepr(captured.kwargs) == headers["kwargsrepr"]


@pytest.mark.parametrize(
    "value",
    [
        (), (1,), (1, 2), ("a",), ("it's",), [], [1, "a", None], {}, {"a": 1, "b": [2]}, {1}, {1: {2: 3}}, True, None,
        1.5, "é\n", ("a" * 30,) * 3, (1, 2.5, True, None), date(2030, 1, 2), frozenset({1}), [(), [], {}], (None,) * 20,
        [[1, [2]]], "\x00",
    ],
    ids=repr,
)  # fmt: skip
def test_a_short_value_is_shown_as_python_shows_it(value: Any) -> None:
    assert saferepr(value) == repr(value)


def test_an_empty_set_is_shown_as_python_shows_it() -> None:
    assert saferepr([set(), {1}]) == "[set(), {1}]"
    assert saferepr([frozenset()]) == "[frozenset()]"


def test_deeper_containers_are_left_out() -> None:
    assert saferepr(nested(5)) == "[[[[...]]]]"
    assert saferepr({"a": {"b": {"c": {"d": 1}}}}) == "{'a': {'b': {'c': {...}}}}"
    assert saferepr(((((1,),),),)) == "((((...),),),)"
    assert saferepr([[[[]]]]) == "[[[[]]]]"
    assert saferepr([1, [2, [3]]], levels=1) == "[1, [...]]"
    assert saferepr([1], levels=0) == "[...]"


LONG: dict[str, Any] = {
    "one long text": ("x" * 100_000,),
    "a long text after others": (1, "a", "x" * 100_000, "b"),
    "many texts": ["abc"] * 10_000,
    "many numbers": list(range(100_000)),
    "many keys": {str(number): number for number in range(10_000)},
    "a long key": {"k" * 5_000: 1, "l": 2},
    "long bytes": (b"x" * 100_000, 1),
    "many lists": [[[number] for number in range(100)] for _ in range(100)],
    "a wide set": set(range(10_000)),
    "quotes": ("it's " * 1_000,),
    "beyond ascii": ("\U0001f600" * 5_000,),
    "unprintable": ("\0" * 5_000,),
    "a text as such": "x" * 5_000,
    "numbers of 4,000 digits": (10**4000,) * 15,
    "an ordered dictionary": OrderedDict.fromkeys(map(str, range(5_000))),
}


@pytest.mark.parametrize("what", LONG)
def test_a_long_value_is_cut(what: str) -> None:
    with quickly():
        shown = saferepr(LONG[what])
    assert len(shown) <= 1.25 * LIMIT
    assert "..." in shown


@pytest.mark.parametrize("what", ["many texts", "many keys", "many lists", "a wide set", "long bytes", "a long key"])
def test_brackets_that_were_opened_are_closed(what: str) -> None:
    shown = re.sub(r"'[^']*'", "", saferepr(LONG[what]))
    for opening, closing in ("()", "[]", "{}"):
        assert shown.count(opening) == shown.count(closing)


def test_a_text_is_cut_with_its_quote_closed() -> None:
    assert saferepr(("x" * 5_000,)).endswith("xxx...',)")


def test_the_limit_may_be_set() -> None:
    assert saferepr(["a"] * 100, limit=20).startswith("['a', 'a', 'a'")
    assert len(saferepr(["a"] * 100, limit=20)) <= 36


def test_a_value_that_holds_itself_is_shown() -> None:
    cyclic: list[Any] = [1]
    cyclic.append(cyclic)
    assert saferepr(cyclic).startswith("[1, [1, [1, [...")
    mapping: dict[str, Any] = {}
    mapping["me"] = mapping
    assert "..." in saferepr(mapping)


class RaisingRepr:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


class WrongRepr:
    def __repr__(self) -> Any:
        return 5


class RaisingText(str):
    __slots__ = ()

    def __repr__(self) -> str:
        raise RuntimeError("no text")


class RaisingEnum(StrEnum):
    ONE = "one"

    def __repr__(self) -> str:
        raise RuntimeError("no text")


class RaisingList(list[Any]):
    def __repr__(self) -> str:
        raise RuntimeError("no text")


BAD: list[Any] = [
    RaisingRepr(),
    WrongRepr(),
    RaisingText("x"),
    RaisingText("x" * 5_000),
    RaisingEnum.ONE,
    RaisingList(),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: type(bad).__name__)
def test_a_value_whose_own_text_fails_is_shown_all_the_same(bad: Any) -> None:
    for value in (bad, (bad,), [1, bad, 2], {"a": bad}):
        assert saferepr(value)


def test_what_stands_beside_a_bad_value_is_shown() -> None:
    assert saferepr([RaisingRepr(), "two"]).endswith(", 'two']")


@pytest.mark.parametrize("bad", [RaisingRepr(), RaisingText("x")], ids=lambda bad: type(bad).__name__)
def test_a_key_whose_own_text_fails_is_shown_all_the_same(bad: Any) -> None:
    assert "1" in saferepr({bad: 1})


@pytest.mark.parametrize(
    "value", [[10**5000, "a"], (10**5000,), (1, 10**5000), {"a": 10**5000}, 10**5000], ids=lambda v: type(v).__name__
)
def test_a_number_too_long_for_python_to_show_is_shown_somehow(value: Any) -> None:
    assert 0 < len(saferepr(value)) <= LIMIT


values = st.recursive(
    st.none() | st.integers() | st.floats() | st.text(max_size=30) | st.text("ab'\n", max_size=5).map(str.encode),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=5), inner, max_size=4) | st.tuples(inner, inner)
    ),
    max_leaves=15,
)


@given(value=values, limit=st.integers(50, 200))
@settings(max_examples=100, deadline=None)
def test_no_text_is_much_longer_than_the_limit(value: Any, limit: int) -> None:
    assert len(saferepr(value, limit)) <= 1.5 * limit + 50


@given(values)
@settings(max_examples=100, deadline=None)
def test_what_fits_and_is_not_deep_is_shown_whole(value: Any) -> None:
    assert saferepr(value, limit=100_000, levels=50) == repr(value)


# --- one line for logs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("", ""),
        ("é中", "é中"),
        ("a\nb\tc", "a\\nb\\tc"),
        ("\x1b[31m", "\\x1b[31m"),
        ("\0", "\\x00"),
        ("\u2028", "\\u2028"),
        ("\ud800", "\\ud800"),
        ("\U000e0001", "\\U000e0001"),
        ("x" * 201, "x" * 199 + "…"),
        ("x" * 200, "x" * 200),
        (5, "5"),
        (ValueError("a\nb"), "a\\nb"),
    ],
)
def test_a_line_for_logs_has_no_control_characters(text: object, shown: str) -> None:
    assert printable(text) == shown


@given(text=st.text(st.characters(codec=None), max_size=80), limit=st.integers(1, 60))
@settings(max_examples=100, deadline=None)
def test_any_text_is_one_printable_line_of_limited_length(text: str, limit: int) -> None:
    line = printable(text, limit)
    assert line.isprintable()
    assert len(line) <= limit


def test_a_number_too_long_to_be_shown_is_still_one_line() -> None:
    assert len(printable(10**5000)) <= 200
