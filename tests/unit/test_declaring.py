"""Declaring tasks: what can't be one, or would silently replace one, is refused where it is declared."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from aqueue import AQueue
from aqueue.errors import ConfigurationError


@pytest.fixture
def app() -> AQueue:
    return AQueue("shop", broker="memory://")


def test_two_tasks_of_one_name_are_refused_and_both_named(app: AQueue) -> None:
    @app.task(name="shop.add")
    def one(x: int) -> int:
        return x

    with pytest.raises(ConfigurationError, match=r"two tasks are named 'shop\.add'.*test_declaring") as refused:

        @app.task(name="shop.add")
        def other(x: int) -> int:
            return -x

    assert str(refused.value).count("test_declaring.py:") == 2
    assert app.tasks["shop.add"].function is one.function


def test_a_module_that_is_loaded_again_declares_its_tasks_again(app: AQueue) -> None:
    for _ in range(2):

        @app.task(name="shop.add")
        def add(x: int) -> int:
            return x

    assert list(app.tasks) == ["shop.add"]


def _generates() -> Iterator[int]:
    yield 1


async def _generates_slowly() -> AsyncIterator[int]:
    yield 1


@pytest.mark.parametrize("wrong", [_generates, _generates_slowly, int, AQueue, 5, None, "shop.add"])
def test_what_is_no_function_that_returns_is_refused(app: AQueue, wrong: Any) -> None:
    with pytest.raises(ConfigurationError):
        app.task(name="shop.wrong")(wrong)
    assert app.tasks == {}
