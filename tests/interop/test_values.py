"""Arguments and results, in both directions, on both layouts of databases."""

import uuid
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any, Final

import pytest

from tests.interop.conftest import SOON, TO_AQUEUE, TO_CELERY, Call, Connect, Fleet, ended

#: What JSON can say by itself.
PLAIN: Final[list[Any]] = [
    None,
    True,
    False,
    0,
    -1,
    2**53,
    2**70,
    0.1,
    -1.5e300,
    "",
    "text",
    [],
    {},
    [1, [2, [3, {"deep": [None]}]]],
    {"a": {"b": [1, 2.5, "c", None, True]}},
]
UNICODE: Final = "Grüße, мир, 世界, 👩‍🚀, \u0000 \u001f \u2028 \ufeff \\ \" '"
#: What Celery's extended JSON adds.
EXTENDED: Final[list[Any]] = [
    datetime(2024, 2, 29, 23, 59, 59, 123456, tzinfo=timezone.utc),
    datetime(2024, 2, 29, 12, 0, tzinfo=timezone(timedelta(hours=5, minutes=30))),
    datetime(2024, 2, 29, 12, 0),  # noqa: DTZ001 - a naive one stays naive
    date(2024, 2, 29),
    time(3, 4, 5, 678),
    Decimal("1.10"),
    Decimal("123456789012345678901234567890.123456789"),
    uuid.UUID(int=1),
    b"plain bytes",
    b"\x00\xff\xfe",
]


async def test_arguments_and_keyword_arguments_arrive(call: Call) -> None:
    assert await call("interop.echo", 1, "two", three=[3], four={"v": 4}) == [
        [1, "two"],
        {"three": [3], "four": {"v": 4}},
    ]


async def test_a_task_without_arguments_runs(call: Call) -> None:
    assert await call("interop.echo") == [[], {}]


async def test_the_plainest_task_adds(call: Call) -> None:
    assert await call("interop.add", 2, 3) == 5
    assert await call("interop.add", x=20, y=30) == 50


async def test_every_json_value_comes_back_as_it_went(call: Call) -> None:
    for value in PLAIN:
        found = await call("interop.give", value)
        assert found == value
        assert type(found) is type(value)


async def test_unicode_comes_back_as_it_went(call: Call) -> None:
    assert await call("interop.give", {UNICODE: UNICODE}) == {UNICODE: UNICODE}


async def test_extended_types_come_back_as_they_went(call: Call) -> None:
    for value in EXTENDED:
        found = await call("interop.give", value)
        assert found == value
        assert type(found) is type(value)
    assert await call("interop.give", {"all": EXTENDED}) == {"all": EXTENDED}


async def test_the_worker_sees_extended_types_as_what_they_are(call: Call) -> None:
    assert await call("interop.kinds", *EXTENDED) == [type(value).__name__ for value in EXTENDED]


async def test_a_tuple_becomes_a_list(call: Call) -> None:
    assert await call("interop.give", (1, (2, 3))) == [1, [2, 3]]


async def test_a_payload_of_half_a_megabyte_travels_both_ways(call: Call) -> None:
    text = "0123456789" * 50_000
    assert await call("interop.measure", text) == 500_000
    assert await call("interop.give", text) == text


async def test_an_argument_that_looks_like_a_typed_value_of_an_unknown_type_is_left_alone(call: Call) -> None:
    odd = {"__type__": "datetime", "__value__": "2024-01-02T03:04:05", "and": "more"}
    assert await call("interop.give", odd) == odd


async def test_an_annotated_argument_is_built_from_what_a_celery_client_sent(plain_fleet: Fleet) -> None:
    order = {"number": 7, "wanted": "2024-02-29", "lines": ["tea", "milk"]}
    result = plain_fleet.client.send_task("interop.order", [order], queue=TO_AQUEUE)
    assert await ended(result) == "7 until 29.02.2024: tea, milk"


async def test_a_typed_task_of_ours_is_sent_to_a_celery_worker(fleet: Fleet, connect: Connect) -> None:
    app = await connect(fleet.site)
    add = app.tasks["interop.add"]
    result = await add.options(queue=TO_CELERY).send(2, 3)
    assert await result.get(SOON) == 5


async def test_many_tasks_sent_in_one_round_trip_run_on_a_celery_worker(fleet: Fleet, connect: Connect) -> None:
    app = await connect(fleet.site)
    add = app.tasks["interop.add"].options(queue=TO_CELERY)
    results = await app.send_many([add.s(number, 1) for number in range(50)])
    assert [await result.get(SOON) for result in results] == list(range(1, 51))


@pytest.mark.parametrize("value", [None, False, 0, "", []])
async def test_an_empty_result_is_a_result(call: Call, value: Any) -> None:
    assert await call("interop.give", value) == value
