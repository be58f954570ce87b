"""Arguments by their annotations: checked at send, plain on the wire, rebuilt at run."""

import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum, IntEnum, StrEnum
from typing import Annotated, Any, Literal, NamedTuple, Optional, TypedDict, TypeVar, Union
from uuid import UUID

import msgspec
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aqueue import AQueue, Context
from aqueue.arguments import ArgumentCodec
from aqueue.errors import EncodeError, InvalidArguments
from aqueue.serialization import Serializer
from tests.unit import deferred

SERIALIZER = Serializer(["json", "yaml", "msgpack", "pickle"])
MOMENT = datetime(2030, 1, 2, 3, 4, 5, 6, tzinfo=timezone.utc)
ID = UUID(int=1)


class Colour(Enum):
    RED = "r"
    BLUE = "b"


class Level(IntEnum):
    LOW = 1


class Word(StrEnum):
    HELLO = "hello"


@dataclass
class Address:
    street: str
    since: date


@dataclass
class Person:
    name: str
    id: UUID
    born: datetime
    address: Address
    colours: list[Colour] = field(default_factory=list)


class Item(pydantic.BaseModel):
    sku: str
    price: Decimal
    at: datetime
    colour: Colour = Colour.RED


class Order(pydantic.BaseModel):
    items: list[Item]
    id: UUID


class Aliased(pydantic.BaseModel):
    order_id: int = pydantic.Field(alias="orderId")


class Struct(msgspec.Struct):
    x: int
    when: datetime


class Pair(NamedTuple):
    left: int
    right: str


class Shape(TypedDict):
    sides: int


class Plain:
    """A class that says nothing of how it travels."""


class WithJson:
    def __json__(self) -> Any:
        return {"a": 1}


PERSON = Person("Ann", ID, MOMENT, Address("Main St", date(2020, 1, 1)), [Colour.BLUE])
ITEM = Item(sku="a", price=Decimal("9.99"), at=MOMENT, colour=Colour.BLUE)
T = TypeVar("T")


def codec(function: Callable[..., Any], skip: int = 0) -> ArgumentCodec:
    return ArgumentCodec(function, "shop.buy", skip)


def travel(
    function: Callable[..., Any], *args: Any, serializer: str = "json", **kwargs: Any
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments a worker calls the function with, when these were sent."""
    both = codec(function)
    plain = both.encode(args, kwargs, serializer)
    encoded = SERIALIZER.dumps(list(plain), serializer)
    found = SERIALIZER.loads(encoded.data, encoded.content_type, encoded.content_encoding)
    return both.decode(*found)


def refused(function: Callable[..., Any], *args: Any, **kwargs: Any) -> str:
    with pytest.raises(InvalidArguments) as caught:
        codec(function).encode(args, kwargs, "json")
    assert str(caught.value).startswith("shop.buy")
    return str(caught.value)


def taking(annotation: Any) -> Callable[..., Any]:
    """A function of one parameter with this annotation."""

    def function(value: Any) -> None: ...

    function.__annotations__["value"] = annotation
    return function


# --- values that travel ------------------------------------------------------------------------------------

VALUES: list[tuple[Any, Any]] = [
    (int, 5),
    (int, 2**70),
    (float, 1.5),
    (str, "é"),
    (bool, True),
    (type(None), None),
    (None, None),
    (Any, {"a": [1]}),
    (object, [1, "a"]),
    (UUID, ID),
    (datetime, MOMENT),
    (date, date(2030, 1, 2)),
    (time, time(3, 4, 5)),
    (timedelta, timedelta(days=1, seconds=0.5)),
    (Decimal, Decimal("1.10")),
    (bytes, b"utf8"),
    (bytes, b"\xff\xfe"),
    (Colour, Colour.RED),
    (Level, Level.LOW),
    (Word, Word.HELLO),
    (Person, PERSON),
    (Item, ITEM),
    (Order, Order(items=[ITEM, ITEM], id=ID)),
    (Struct, Struct(1, MOMENT)),
    (Pair, Pair(1, "a")),
    (Shape, {"sides": 3}),
    (list, [1, "a"]),
    (dict, {"a": 1}),
    (list[int], [1, 2]),
    (list[UUID], [ID]),
    (list[Person], [PERSON, PERSON]),
    (list[Item], [ITEM]),
    (dict[str, Decimal], {"a": Decimal(1)}),
    (dict[int, str], {1: "a"}),
    (dict[UUID, list[date]], {ID: [date(2030, 1, 2)]}),
    (set[int], {1, 2}),
    (frozenset[str], frozenset({"a"})),
    (tuple[int, str], (1, "a")),
    (tuple[int, ...], (1, 2, 3)),
    (Sequence[int], [1, 2]),
    (Mapping[str, int], {"a": 1}),
    (Optional[UUID], ID),  # noqa: UP045 - both spellings are written
    (Optional[UUID], None),  # noqa: UP045
    (Person | None, PERSON),
    (Item | None, ITEM),
    (Item | None, None),
    (int | str, 5),
    (int | str, "5"),
    (int | str | None, None),
    (Union[list[int], int], [1]),  # noqa: UP007
    (int | Decimal, Decimal("1.5")),
    (Literal["a", "b"], "a"),
    (Literal[1, 2], 2),
    (Annotated[int, "a remark"], 5),
    (Annotated[UUID, "a remark"], ID),
    (T, 5),
    ("int", 5),
    ("UUID", ID),
]


def name_of(case: Any) -> str:
    return str(case)[:40]


@pytest.mark.parametrize(("annotation", "value"), VALUES, ids=name_of)
def test_a_value_comes_back_as_its_annotation_says(annotation: Any, value: Any) -> None:
    (found,), _ = travel(taking(annotation), value)
    assert found == value
    assert type(found) is type(value)
    _, keywords = travel(taking(annotation), value=value)
    assert keywords == {"value": value}


@pytest.mark.parametrize("serializer", ["yaml", "msgpack", "pickle"])
@pytest.mark.parametrize(("annotation", "value"), VALUES, ids=name_of)
def test_a_value_comes_back_whatever_it_is_written_with(annotation: Any, value: Any, serializer: str) -> None:
    if value in (2**70, time(3, 4, 5)) or (serializer == "msgpack" and annotation in (T, object)):
        return
    (found,), _ = travel(taking(annotation), value, serializer=serializer)
    assert found == value


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (str | UUID, "text"),
        (str | UUID, ID),
        (str | datetime, MOMENT),
        (str | bytes, b"x"),
        (Person | Address, PERSON),
        (Item | str, "x"),
    ],
    ids=name_of,
)
def test_an_annotation_too_wide_to_be_rebuilt_by_stops_nobody_from_calling(annotation: Any, value: Any) -> None:
    """Such a function ran under Celery, where annotations say nothing."""
    plain = codec(taking(annotation)).encode([value], {}, "json")
    assert SERIALIZER.dumps(plain, "json")


@pytest.mark.parametrize("annotation", [Callable[[], int], type[int], Iterator[int], "Sequence[int]"], ids=name_of)
def test_an_annotation_that_cannot_be_checked_is_not(annotation: Any) -> None:
    (found,), _ = travel(taking(annotation), [1, 2])
    assert found == [1, 2]


def test_a_whole_number_is_also_a_float() -> None:
    (found,), _ = travel(taking(float), 1)
    assert (found, type(found)) == (1.0, float)


def test_what_the_wire_makes_of_a_value_is_made_of_it_before() -> None:
    plain, keywords = codec(taking(Person)).encode([PERSON], {}, "msgpack")
    assert plain == [
        {
            "name": "Ann",
            "id": str(ID),
            "born": "2030-01-02T03:04:05.000006Z",
            "address": {"street": "Main St", "since": "2020-01-01"},
            "colours": ["b"],
        }
    ]
    assert keywords == {}


def test_without_an_annotation_a_value_travels_as_it_is() -> None:
    def function(value, *rest, **more): ...  # type: ignore[no-untyped-def]

    marker = object()
    assert codec(function).encode([marker, marker], {"x": marker}, "json") == ([marker, marker], {"x": marker})
    assert codec(function).decode([marker, marker], {"x": marker}) == ([marker, marker], {"x": marker})


def test_a_value_that_says_how_it_becomes_json_may_stand_for_anything() -> None:
    assert codec(taking(dict[str, int])).encode([WithJson()], {}, "json") == ([{"a": 1}], {})


def test_a_model_whose_fields_have_other_names_outside_travels() -> None:
    (found,), _ = travel(taking(Aliased), Aliased(orderId=5))
    assert found == Aliased(orderId=5)


# --- parameters of every kind --------------------------------------------------------------------------------


def every_kind(
    a: UUID, /, b: int, c: Decimal = Decimal(0), *rest: date, d: Colour, e: Person | None = None, **more: UUID
) -> None: ...


DAY = date(2030, 1, 2)


def test_every_kind_of_parameter_is_rebuilt_by_its_own_annotation() -> None:
    args, kwargs = travel(every_kind, ID, 1, Decimal("1.5"), DAY, DAY, d=Colour.RED, e=PERSON, x=ID, y=ID)
    assert args == [ID, 1, Decimal("1.5"), DAY, DAY]
    assert kwargs == {"d": Colour.RED, "e": PERSON, "x": ID, "y": ID}


def test_parameters_that_are_left_out_stay_out() -> None:
    assert travel(every_kind, ID, b=1, d=Colour.RED) == ([ID], {"b": 1, "d": Colour.RED})


@pytest.mark.parametrize(
    ("args", "kwargs", "told"),
    [
        ([], {}, "'a'"),
        ([ID], {"d": Colour.RED}, "'b'"),
        ([ID, 1], {}, "'d'"),
        (["no id", 1], {"d": Colour.RED}, "argument 'a'"),
        ([ID, "1"], {"d": Colour.RED}, "argument 'b'"),
        ([ID, 1, "ten"], {"d": Colour.RED}, "argument 'c'"),
        ([ID, 1, Decimal(1), "soon"], {"d": Colour.RED}, "argument '*rest[0]'"),
        ([ID, 1, Decimal(1), DAY, "soon"], {"d": Colour.RED}, "argument '*rest[1]'"),
        ([ID, 1], {"d": "green"}, "argument 'd'"),
        ([ID, 1], {"d": Colour.RED, "e": {"name": 5}}, "argument 'e'"),
        ([ID, 1], {"d": Colour.RED, "z": "no id"}, "argument 'z'"),
        ([ID, 1], {"d": Colour.RED, "b": 2}, "'b'"),
    ],
)
def test_what_does_not_fit_is_refused_by_the_name_of_its_parameter(args: Any, kwargs: Any, told: str) -> None:
    assert told in refused(every_kind, *args, **kwargs)


def test_too_many_arguments_and_unknown_names_are_refused_with_the_signature() -> None:
    def function(a: int, *, b: int = 1) -> None: ...

    assert "shop.buy(a: int, *, b: int = 1)" in refused(function, 1, 2)
    assert "'c'" in refused(function, 1, c=2)
    assert "'a'" in refused(function, 1, a=2)
    with pytest.raises(InvalidArguments):
        codec(function).decode([1, 2], {})


def test_a_function_without_parameters_takes_none() -> None:
    def function() -> None: ...

    assert travel(function) == ([], {})
    refused(function, 1)
    refused(function, a=1)


@pytest.mark.parametrize("name", ["self", "__class__", "function", "cls", "name"])
def test_any_name_may_be_a_keyword(name: str) -> None:
    def function(**more: int) -> None: ...

    assert codec(function).encode([], {name: 1}, "json") == ([], {name: 1})
    assert codec(function).decode([], {name: 1}) == ([], {name: 1})


def test_a_name_that_is_positional_only_may_also_be_a_keyword() -> None:
    def function(a: UUID, /, **more: int) -> None: ...

    assert travel(function, ID, a=5) == ([ID], {"a": 5})


@pytest.mark.parametrize("key", [1, b"a", None, (1,)])
def test_a_keyword_that_is_no_text_is_refused(key: Any) -> None:
    with pytest.raises(InvalidArguments):
        codec(taking(int)).decode([1], {key: 2})


def test_parameters_that_a_worker_fills_in_are_not_the_callers() -> None:
    def function(ctx: Context, a: UUID, b: int = 0) -> None: ...

    both = codec(function, skip=1)
    assert both.decode(*both.encode([ID], {"b": 1}, "json")) == ([ID], {"b": 1})
    with pytest.raises(InvalidArguments, match=r"shop\.buy\(a: uuid\.UUID, b: int = 0\)"):
        both.encode([], {}, "json")
    with pytest.raises(InvalidArguments):
        both.encode([ID, 1, 2], {}, "json")


def test_the_apps_tasks_leave_out_the_context_and_celerys_self() -> None:
    app = AQueue("shop", broker="memory://")

    @app.task(name="with_context")
    def with_context(ctx: Context, a: UUID) -> None: ...

    @app.task(name="with_self", bind=True)
    def with_self(self: Any, a: UUID) -> None: ...

    @app.task(name="plain")
    def plain(a: UUID) -> None: ...

    for task in (with_context, with_self, plain):
        assert task.codec.encode([ID], {}, "json") == ([ID], {})
        with pytest.raises(InvalidArguments):
            task.codec.encode([ID, ID], {}, "json")


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, "5"),
        (int, 1.0),
        (int, True),
        (int, None),
        (str, 5),
        (str, b"x"),
        (bool, 1),
        (float, "1.5"),
        (type(None), 0),
        (UUID, "not an id"),
        (UUID, 5),
        (datetime, "soon"),
        (date, "soon"),
        (Decimal, "ten"),
        (bytes, 5),
        (Colour, "green"),
        (Person, {"name": "Ann"}),
        (Item, {"sku": "a", "price": "x", "at": MOMENT}),
        (list[int], [1, "a"]),
        (dict[str, int], {"a": "b"}),
        (tuple[int, str], (1,)),
        (Literal["a"], "b"),
        (UUID | None, "x"),
        (int | str, 1.5),
        (Plain, Plain()),
    ],
    ids=name_of,
)
def test_a_value_that_does_not_fit_is_refused_before_it_is_sent(annotation: Any, value: Any) -> None:
    assert "argument 'value'" in refused(taking(annotation), value)


def test_a_refusal_says_where_inside_a_value() -> None:
    wrong = {
        "name": "Ann",
        "id": str(ID),
        "born": "2030-01-02T03:04:05Z",
        "address": {"street": 5, "since": "2020-01-01"},
    }
    assert refused(taking(Person), wrong) == "shop.buy: argument 'value': expected str, got int at address.street"


@pytest.mark.parametrize("annotation", [list, list[int], dict[str, Any], object, Any, Person], ids=name_of)
def test_a_value_that_holds_itself_is_refused_like_any_other(annotation: Any) -> None:
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    value: Any = {"me": cyclic} if annotation == dict[str, Any] else cyclic
    with pytest.raises((InvalidArguments, EncodeError)):
        travel(taking(annotation), value)


def test_a_worker_is_lenient_with_what_other_senders_write() -> None:
    def function(a: int, b: UUID, c: datetime, d: set[int]) -> None: ...

    found, _ = codec(function).decode(["5", str(ID), "2030-01-02T03:04:05.000006Z", [1, 1]], {})
    assert found == [5, ID, MOMENT, {1}]


def test_a_worker_refuses_what_does_not_fit_by_the_name_of_its_parameter() -> None:
    with pytest.raises(InvalidArguments, match=r"shop\.buy: argument 'value': expected int"):
        codec(taking(int)).decode(["five"], {})
    with pytest.raises(InvalidArguments, match="argument 'value'"):
        codec(taking(Person)).decode([{"name": "Ann"}], {})
    with pytest.raises(InvalidArguments, match="argument 'value'"):
        codec(taking(Item)).decode([{"sku": "a"}], {})


def test_arguments_given_are_not_changed() -> None:
    args, kwargs = [PERSON], {"value": ID}
    codec(taking(Person)).encode(args, {}, "json")
    codec(taking(UUID)).encode([], kwargs, "json")
    assert (args, kwargs) == ([PERSON], {"value": ID})


# --- annotations that can't be found ---------------------------------------------------------------------------


def test_annotations_that_are_texts_are_found() -> None:
    point = deferred.Point(1, 2)
    assert travel(deferred.resolved, point, ID) == ([point, ID], {})
    both = codec(deferred.resolved)
    assert both.decode_result(both.encode_result(point, "json")) == point


def test_a_name_that_only_a_type_checker_sees_leaves_its_parameter_unchecked() -> None:
    found, _ = travel(deferred.unresolved_in_a_module, {"any": "thing"}, 5)
    assert found == [{"any": "thing"}, 5]


def test_a_name_that_only_a_type_checker_sees_leaves_the_other_parameters_checked() -> None:
    point = deferred.Point(1, 2)
    assert travel(deferred.unresolved, "any", point, 5) == (["any", point, 5], {})
    with pytest.raises(InvalidArguments, match="argument 'count'"):
        codec(deferred.unresolved).encode(["any", point, "five"], {}, "json")


def test_a_result_whose_type_only_a_type_checker_sees_comes_as_it_is() -> None:
    assert codec(deferred.unresolved_result).decode_result({"x": 1}) == {"x": 1}


@pytest.mark.parametrize(
    "function", [deferred.no_such_attribute, deferred.union_with_a_text], ids=lambda function: function.__name__
)
def test_an_annotation_that_cannot_be_evaluated_leaves_its_parameter_unchecked(function: Callable[..., Any]) -> None:
    assert travel(function, {"any": "thing"}, 5) == ([{"any": "thing"}, 5], {})


@pytest.mark.parametrize(
    "function", [deferred.no_such_attribute, deferred.union_with_a_text], ids=lambda function: function.__name__
)
def test_a_function_with_such_an_annotation_can_be_a_task(function: Callable[..., Any]) -> None:
    app = AQueue("shop", broker="memory://")
    assert not app.task(name="t")(function).definition.takes_context


def test_an_annotation_in_words_leaves_its_parameter_unchecked() -> None:
    assert travel(taking("whatever you like"), 5) == ([5], {})


# --- results -----------------------------------------------------------------------------------------------------


def returning(annotation: Any) -> ArgumentCodec:
    def function() -> Any: ...

    function.__annotations__["return"] = annotation
    return codec(function)


@pytest.mark.parametrize(("annotation", "value"), VALUES, ids=name_of)
def test_a_result_comes_back_as_the_return_annotation_says(annotation: Any, value: Any) -> None:
    both = returning(annotation)
    encoded = SERIALIZER.dumps(both.encode_result(value, "json"), "json")
    found = both.decode_result(SERIALIZER.loads(encoded.data, encoded.content_type, encoded.content_encoding))
    assert found == value
    assert type(found) is type(value)


def test_a_result_without_an_annotation_comes_as_the_wire_has_it() -> None:
    def function():  # type: ignore[no-untyped-def]
        ...

    assert codec(function).decode_result(codec(function).encode_result((1, 2), "json")) in ([1, 2], (1, 2))
    assert codec(function).decode_result({"a": 1}) == {"a": 1}


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, "five"),
        (Person, {"name": 5}),
        (Item, {"sku": 5}),
        (list[int], "x"),
        (str | UUID, 5),
        (Person | Address, {}),
        (Plain, 5),
    ],
    ids=name_of,
)
def test_a_result_that_does_not_fit_comes_as_it_is(annotation: Any, value: Any) -> None:
    assert returning(annotation).decode_result(value) == value


@pytest.mark.parametrize("annotation", [int, bool, Person, list[int], dict[str, int], UUID, int | None], ids=name_of)
def test_half_a_surrogate_pair_in_a_result_or_an_argument_is_like_any_other_text(annotation: Any) -> None:
    assert returning(annotation).decode_result("\ud800") == "\ud800"
    with pytest.raises(InvalidArguments):
        codec(taking(annotation)).decode(["\ud800"], {})
    with pytest.raises(InvalidArguments):
        codec(taking(annotation)).encode(["\ud800"], {}, "json")


async def never_awaited() -> None: ...


@pytest.mark.parametrize(
    "what", ["a generator", "an ellipsis", "an object", "a lambda", "a module", "an iterator", "a lock"]
)
def test_a_result_that_nothing_can_be_made_of_is_told_by_its_kind(what: str) -> None:
    value: Any = {
        "a generator": (number for number in (1, 2)),
        "an ellipsis": ...,
        "an object": Plain(),
        "a lambda": lambda: None,
        "a module": typing,
        "an iterator": iter([]),
        "a lock": __import__("threading").Lock(),
    }[what]
    with pytest.raises(EncodeError, match=r"the result of shop\.buy can't be stored: an? .* can't travel"):
        returning(Any).encode_result(value, "json")


def test_a_coroutine_is_no_result() -> None:
    forgotten = never_awaited()
    try:
        with pytest.raises(EncodeError, match="a coroutine can't travel"):
            returning(Any).encode_result(forgotten, "json")
    finally:
        forgotten.close()


def test_a_result_that_holds_itself_cannot_be_stored() -> None:
    cyclic: list[Any] = []
    cyclic.append(cyclic)
    with pytest.raises(EncodeError):
        returning(Any).encode_result(cyclic, "json")


def test_with_pickle_a_result_is_stored_as_it_is() -> None:
    value = Plain()
    assert returning(Any).encode_result(value, "pickle") is value


# --- any values ----------------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
people = st.builds(
    Person,
    name=texts,
    id=st.uuids(),
    born=st.datetimes(timezones=st.just(timezone.utc)),
    address=st.builds(Address, street=texts, since=st.dates()),
    colours=st.lists(st.sampled_from(Colour), max_size=3),
)


@given(person=people, serializer=st.sampled_from(["json", "yaml", "msgpack", "pickle"]))
@settings(max_examples=40, deadline=None)
def test_any_dataclass_comes_back(person: Person, serializer: str) -> None:
    assert travel(taking(Person), person, serializer=serializer) == ([person], {})


@given(
    a=st.integers(-(2**63), 2**63),
    b=st.lists(st.uuids(), max_size=3),
    c=st.dictionaries(texts, st.decimals(allow_nan=False, allow_infinity=False, places=2), max_size=3),
    d=st.none() | st.binary(max_size=8),
)
@settings(max_examples=40, deadline=None)
def test_any_containers_come_back(a: int, b: list[UUID], c: dict[str, Decimal], d: bytes | None) -> None:
    def function(a: int, b: list[UUID], *, c: dict[str, Decimal], d: bytes | None) -> None: ...

    assert travel(function, a, b, c=c, d=d) == ([a, b], {"c": c, "d": d})
