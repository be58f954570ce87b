"""What counts as an object and as a list among decoded values."""

from collections import OrderedDict, UserDict, UserList
from typing import Any

import pytest

from aqueue.shapes import is_list, is_object


@pytest.mark.parametrize(
    ("value", "is_an_object", "is_a_list"),
    [
        ({}, True, False),
        (OrderedDict(a=1), True, False),
        ([], False, True),
        ((), False, True),
        ("text", False, False),
        (b"bytes", False, False),
        (None, False, False),
        (5, False, False),
        ({1}, False, False),
        (iter([]), False, False),
        (UserDict(), False, False),
        (UserList(), False, False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_decoded_value_is_an_object_a_list_or_neither(value: Any, is_an_object: bool, is_a_list: bool) -> None:
    assert is_object(value) is is_an_object
    assert is_list(value) is is_a_list
