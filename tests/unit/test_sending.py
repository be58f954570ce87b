"""What aqueue sends, field by field beside what a Celery client sent for the same call."""

import asyncio
import base64
import json
import logging
import re
import time
from collections import ChainMap, deque
from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from types import MappingProxyType
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st

from aqueue import AQueue, ConfigurationError, EncodeError, InvalidArguments, MessageTooLarge, Settings
from aqueue.broker.redis.envelope import pack
from aqueue.broker.redis.keys import Keys
from aqueue.context import Context, enter
from aqueue.protocol import Message, decode
from aqueue.sending import Routes
from aqueue.serialization import Encoded, Limits, Serializer
from tests.unit.elements import element, read
from tests.unit.vectors import Captured, instant, task, task_messages

FIRST = datetime(2024, 1, 2, 3, 4, 5, 6, tzinfo=timezone.utc)


async def message_sent(
    name: str,
    args: Any = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    settings: Settings | None = None,
    by_name: bool = False,
    **options: Any,
) -> Message:
    """The message that a call leaves on its queue; one with an ETA is not held back.

    The task is one of the app's, or with ``by_name`` one that the app knows nothing of.
    """
    async with AQueue("proj", broker="memory://", settings=settings or Settings(eta_queues=("*",))) as app:
        if by_name:
            await app.send_task(name, args, kwargs, **options)
        else:

            @app.task(name=name)
            def work(*args, **kwargs): ...  # type: ignore[no-untyped-def]

            await work.apply_async(args, kwargs, **options)
        (delivery,) = await app.producer().broker.fetch([options.get("queue", "celery"), "routed"], 10, 0)
    assert isinstance(delivery.message, Message)
    return delivery.message


async def sent(name: str, args: Any = (), kwargs: Mapping[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """The same as an element of a Redis list, decoded; as urgent as what a Celery client sends without a priority."""
    options = {"priority": 9, **options}
    envelope: dict[str, Any] = json.loads(pack(await message_sent(name, args, kwargs, **options)))
    return envelope


def normal(envelope: dict[str, Any]) -> dict[str, Any]:
    """An envelope with all that differs from send to send made alike, once its form has been looked at."""
    found: dict[str, Any] = json.loads(json.dumps(envelope))
    headers, properties = found["headers"], found["properties"]
    assert headers["root_id"] == headers["id"] == properties["correlation_id"]
    UUID(properties["delivery_tag"])
    assert UUID(properties["delivery_tag"]).version == 4
    assert properties["reply_to"]
    assert re.fullmatch(r"gen\d+@\S+", headers["origin"])
    for name in ("id", "root_id"):
        headers[name] = "an id"
    headers["origin"] = "an origin"
    properties |= {"correlation_id": "an id", "delivery_tag": "a tag", "reply_to": "a queue"}
    found["body"] = json.loads(base64.b64decode(found["body"]))
    return found


def alike(ours: Any, theirs: Any) -> None:
    """Equal, down to the types of everything inside."""
    assert ours == theirs
    assert json.dumps(ours, sort_keys=True) == json.dumps(theirs, sort_keys=True), "1, 1.0 and True are not the same"


# --- beside the captured vectors ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vector", "args", "kwargs"),
    [("simple", (2, 3), {}), ("kwargs", (2,), {"y": 3}), ("noargs", (), {})],
)
async def test_a_plain_call_is_sent_as_celery_sends_it(vector: str, args: Any, kwargs: dict[str, Any]) -> None:
    captured = task(vector)
    alike(normal(await sent(captured.fields["task"], args, kwargs)), normal(captured.envelope))


async def test_a_call_with_options_is_sent_as_celery_sends_it() -> None:
    before = datetime.now(timezone.utc)
    options: dict[str, Any] = {
        "task_id": "11111111-1111-4111-8111-111111111111",
        "expires": 120,
        "timeout": 30,
        "soft_timeout": 20,
        "priority": 9 - 5,
        "shadow": "alias",
        "ignore_result": True,
        "headers": {"x-trace": "abc"},
    }
    ours, theirs = await sent("proj.tasks.add", (2, 3), **options), task("options").envelope
    assert ours["headers"]["id"] == theirs["headers"]["id"]
    expires = instant(ours["headers"]["expires"])
    assert expires is not None
    assert before <= expires - timedelta(seconds=120) <= datetime.now(timezone.utc)
    ours["headers"]["expires"] = theirs["headers"]["expires"]
    alike(normal(ours), normal(theirs))


async def test_a_countdown_is_sent_as_an_eta() -> None:
    before = datetime.now(timezone.utc)
    ours, theirs = await sent("proj.tasks.add", (2, 3), countdown=60), task("eta").envelope
    eta = instant(ours["headers"]["eta"])
    assert eta is not None
    assert before <= eta - timedelta(seconds=60) <= datetime.now(timezone.utc)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?\+00:00", ours["headers"]["eta"])
    ours["headers"]["eta"] = theirs["headers"]["eta"]
    alike(normal(ours), normal(theirs))


async def test_an_eta_and_an_expiry_given_as_times_are_sent_as_they_are() -> None:
    eta, expires = datetime(2030, 1, 2, 3, 4, 5, tzinfo=timezone.utc), datetime(2030, 1, 3, tzinfo=timezone.utc)
    ours, theirs = await sent("proj.tasks.add", (2, 3), eta=eta, expires=expires), task("eta_abs").envelope
    left = int(ours["properties"].pop("expiration")) / 1000
    assert left == pytest.approx((expires - datetime.now(timezone.utc)).total_seconds(), abs=5)
    assert re.fullmatch(r"\d+", theirs["properties"].pop("expiration"))
    alike(normal(ours), normal(theirs))


async def test_an_eta_without_a_zone_means_utc() -> None:
    ours = await sent("proj.tasks.add", (2, 3), eta=datetime(2030, 1, 2, 3, 4, 5))  # noqa: DTZ001
    theirs = task("eta_naive").envelope
    assert instant(ours["headers"]["eta"]) == instant(theirs["headers"]["eta"])
    ours["headers"]["eta"] = theirs["headers"]["eta"]
    alike(normal(ours), normal(theirs))


@pytest.mark.parametrize(
    "captured", [found for found in task_messages() if found.name.startswith("priority[")], ids=lambda found: found.name
)
async def test_a_priority_is_sent_in_the_sense_of_redis(captured: Captured) -> None:
    wire = captured.envelope["properties"]["priority"]
    ours = await sent("proj.tasks.add", captured.args, priority=9 - wire)
    alike(normal(ours), normal({**captured.envelope, "properties": {**captured.envelope["properties"]}}))
    assert Keys("").list_of("celery", 9 - wire) == captured.key


#: What the client of the vector `ext_types` sent.
EXTENDED = (
    FIRST.replace(tzinfo=None),
    FIRST.replace(microsecond=0),
    FIRST.date(),
    FIRST.replace(microsecond=0).time(),
    Decimal("1.10"),
    UUID(int=1),
    b"utf8",
    b"\xff\xfe",
)


async def test_extended_types_are_sent_as_celery_sends_them() -> None:
    assert list(EXTENDED) == task("ext_types").args
    ours, theirs = await sent("proj.tasks.identity", EXTENDED, {"k": {"__type__": "x"}}), task("ext_types").envelope
    ours["headers"]["argsrepr"] = theirs["headers"]["argsrepr"]  # compared below
    alike(normal(ours), normal(theirs))


async def test_extended_types_are_shown_as_celery_shows_them() -> None:
    ours, theirs = await sent("proj.tasks.identity", EXTENDED), task("ext_types").envelope
    # Celery shows the hexadecimal digits of bytes that are no UTF-8; ours are shown as Python writes them.
    assert ours["headers"]["argsrepr"] == theirs["headers"]["argsrepr"].replace("b'fffe'", r"b'\xff\xfe'")


async def test_text_beyond_ascii_is_sent_as_celery_sends_it() -> None:
    args = ("h\u00e9 \u4e2d \U0001f600", [1, (2, 3)], {"a": {"b": {"c": {"d": 1}}}}, "x" * 3000)
    ours, theirs = await sent("proj.tasks.identity", args), task("unicode").envelope
    shown = [envelope["headers"].pop("argsrepr") for envelope in (ours, theirs)]
    assert shown[0][:1000] == shown[1][:1000]
    assert abs(len(shown[0]) - len(shown[1])) <= 16
    alike(normal(ours), normal(theirs))


@pytest.fixture
def another_zone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine whose clock on the wall is five hours behind UTC."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "EST5")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("another_zone")
async def test_an_eta_without_a_zone_means_utc_wherever_the_machine_stands() -> None:
    assert datetime(2030, 1, 1).astimezone().utcoffset() == timedelta(hours=-5)
    message = await message_sent("t", eta=datetime(2030, 1, 2, 3, 4, 5), expires=datetime(2030, 1, 3))  # noqa: DTZ001
    assert instant(message.headers["eta"]) == datetime(2030, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
    assert instant(message.headers["expires"]) == datetime(2030, 1, 3, tzinfo=timezone.utc)
    assert message.delay == pytest.approx(
        datetime(2030, 1, 2, 3, 4, 5, tzinfo=timezone.utc).timestamp() - time.time(), abs=5
    )


async def test_a_call_for_another_queue_is_sent_as_celery_sends_it() -> None:
    ours = await sent("other.task", ["a"], {"k": 1}, queue="other", by_name=True)
    theirs = task("send_task").envelope
    for envelope in (ours, theirs):
        assert envelope["headers"].pop("argsrepr") in ("['a']", "('a',)")
        envelope["headers"].pop("ignore_result")  # compared below
    alike(normal(ours), normal(theirs))


async def test_whether_the_result_of_a_task_known_by_name_is_kept_is_left_to_its_worker() -> None:
    theirs = task("send_task").envelope["headers"]["ignore_result"]
    assert theirs is None, "the task's own setting decides"
    assert (await sent("other.task", ["a"], by_name=True))["headers"]["ignore_result"] is None
    assert (await sent("other.task", ["a"], by_name=True, ignore_result=False))["headers"]["ignore_result"] is False
    assert (await sent("other.task", ["a"]))["headers"]["ignore_result"] is False


async def test_what_is_sent_has_no_keys_that_celery_does_not_know() -> None:
    ours, theirs = await sent("proj.tasks.add", (2, 3)), task("simple").envelope
    assert set(ours) == set(theirs)
    assert set(ours["headers"]) == set(theirs["headers"])
    assert set(ours["properties"]) == set(theirs["properties"])
    assert set(ours["properties"]["delivery_info"]) == set(theirs["properties"]["delivery_info"])


# --- by itself --------------------------------------------------------------------------------------------------


async def test_every_send_has_an_id_and_a_tag_of_its_own() -> None:
    one, other = await sent("t"), await sent("t")
    assert one["headers"]["id"] != other["headers"]["id"]
    assert one["properties"]["delivery_tag"] != other["properties"]["delivery_tag"]


async def test_a_countdown_of_nothing_is_no_eta() -> None:
    message = await message_sent("t", countdown=0)
    assert message.headers["eta"] is None
    assert message.delay == 0


async def test_an_eta_that_has_passed_is_sent_without_a_delay() -> None:
    message = await message_sent("t", eta=FIRST)
    assert message.delay == 0
    assert instant(message.headers["eta"]) == FIRST


@pytest.mark.parametrize(("expires", "written"), [(120, "120000"), (0.25, "250"), (0, "0"), (-5, "0")])
async def test_the_time_to_expire_is_a_text_of_whole_milliseconds(expires: float, written: str) -> None:
    assert (await message_sent("t", expires=expires)).properties["expiration"] == written


async def test_a_message_that_does_not_expire_has_no_expiration() -> None:
    assert "expiration" not in (await message_sent("t")).properties


async def test_a_future_message_waits_at_the_broker() -> None:
    async with AQueue("proj", broker="memory://") as app:
        await app.send_task("t", countdown=3600)
        producer = app.producer()
        assert not await producer.broker.fetch(["celery"], 10, 0)
        (depth,) = await producer.broker.inspection.queues()
        assert (depth.ready, depth.parked) == (0, 1)


async def test_texts_of_arguments_may_be_given_instead() -> None:
    headers = (await sent("t", ["secret"], {"k": "secret"}, argsrepr="(***)", kwargsrepr="{***}"))["headers"]
    assert (headers["argsrepr"], headers["kwargsrepr"]) == ("(***)", "{***}")


async def test_a_task_sent_by_a_task_belongs_to_its_family() -> None:
    async def parent() -> dict[str, Any]:
        enter(Context(read(element(headers={"id": "parent", "root_id": "root"}))))
        return await sent("t")

    headers = (await asyncio.create_task(parent()))["headers"]
    assert (headers["root_id"], headers["parent_id"]) == ("root", "parent")
    assert headers["id"] not in ("root", "parent")


async def test_the_app_decides_what_a_call_does_not_say() -> None:
    settings = Settings(
        default_queue="routed", default_priority=7, serializer="msgpack", compression="gzip", ignore_result=True
    )
    message = await message_sent("t", settings=settings)
    assert (message.queue, message.priority, message.content_type) == ("routed", 7, "application/x-msgpack")
    assert message.headers["compression"] == "application/x-gzip"
    assert message.headers["ignore_result"] is True


async def test_a_call_wins_over_its_route_and_the_route_over_the_app() -> None:
    settings = Settings(default_priority=1, routes={"feeds.*": {"queue": "routed", "priority": 5}})
    assert (await message_sent("feeds.read", settings=settings)).priority == 5
    assert (await message_sent("feeds.read", settings=settings, priority=9)).priority == 9
    assert (await message_sent("other", settings=settings)).priority == 1


def test_the_first_route_that_fits_counts_and_may_be_a_queue() -> None:
    routes = Routes(Settings(routes={"a.b": "exact", "a.*": "glob", "*": {"priority": 2}}))
    assert routes("a.b") == {"queue": "exact"}
    assert routes("a.c") == {"queue": "glob"}
    assert routes("z") == {"priority": 2}
    assert routes("a.b") is routes("a.b")
    assert Routes(Settings())("a.b") == {}


def test_a_route_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(InvalidArguments, match="queue"):
        Routes(Settings(routes={"*": "two words"}))("t")


@pytest.mark.parametrize("serializer", ["json", "yaml", "msgpack", "pickle"])
@pytest.mark.parametrize("compression", [None, "gzip", "bzip2", "lzma", "brotli", "zstd"])
async def test_every_serializer_goes_with_every_compression(serializer: str, compression: str | None) -> None:
    args = [1, "é", None, [True, {"k": 1.5}]]
    options: dict[str, Any] = {} if compression is None else {"compression": compression}
    message = await message_sent("t", args, {"k": "\u2028"}, serializer=serializer, **options)
    request = decode(message, Serializer(["json", "yaml", "msgpack", "pickle"]))
    assert (request.args, request.kwargs) == (args, {"k": "\u2028"})
    assert ("compression" in message.headers) is (compression is not None)


@given(
    args=st.lists(
        st.none() | st.booleans() | st.integers() | st.text(st.characters(codec=None), max_size=5), max_size=4
    ),
    kwargs=st.dictionaries(
        st.text(st.characters(codec=None), max_size=5), st.integers() | st.text(max_size=5), max_size=3
    ),
)
@given_settings(max_examples=60, deadline=None)
def test_plain_arguments_come_back_exactly(args: list[Any], kwargs: dict[str, Any]) -> None:
    serializer = Serializer()
    body = serializer.dumps_call(args, kwargs, {"chain": None}, "json")
    assert repr(serializer.loads(*_as_read(body))) == repr([args, kwargs, {"chain": None}])
    assert repr(json.loads(body.data)) == repr([args, kwargs, {"chain": None}])


def _as_read(encoded: Encoded) -> tuple[bytes, str, str]:
    return encoded.data, encoded.content_type, encoded.content_encoding


@pytest.mark.parametrize(
    "route",
    [
        {"countdown": 60}, {"eta": FIRST}, {"expires": 60}, {"argsrepr": "(***)"}, {"kwargsrepr": "{***}"},
        {"shadow": "s"}, {"timeout": 5}, {"soft_timeout": 5}, {"headers": {"x": 1}}, {"ignore_result": True},
        {"compression": "gzip"}, {"serializer": "yaml"}, {"priority": 3},
    ],
    ids=str,
)  # fmt: skip
async def test_a_route_may_say_all_that_a_call_may(route: Any) -> None:
    by_call, by_route = [
        json.loads(pack(message))
        for message in (
            await message_sent("t", [1], settings=Settings(eta_queues=("*",)), **route),
            await message_sent("t", [1], settings=Settings(eta_queues=("*",), routes={"t": route})),
        )
    ]
    for envelope in (by_call, by_route):
        for name in ("id", "root_id"):
            del envelope["headers"][name]
        for name in ("correlation_id", "reply_to", "delivery_tag"):
            del envelope["properties"][name]
        for name in ("eta", "expires"):
            envelope["headers"][name] = (envelope["headers"][name] or "")[:13]
    assert by_route == by_call


async def test_messages_of_one_task_share_nothing_that_can_be_changed() -> None:
    async with AQueue("proj", broker="memory://") as app:

        @app.task(name="t", headers={"x": {"a": 1}})
        def work() -> None: ...

        for _ in range(2):
            await work.send()
        one, other = [delivery.message for delivery in await app.producer().broker.fetch(["celery"], 2, 0)]
    assert isinstance(one, Message)
    assert isinstance(other, Message)
    one.headers["stamps"]["x"] = 1
    one.headers["timelimit"][0] = 5
    assert other.headers["stamps"] == {}
    assert other.headers["timelimit"] == [None, None]


# --- refused before anything is sent -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "kwargs", "named"), [((1, {2}), {}, "argument number 2"), ((1,), {"where": {2}}, "argument 'where'")]
)
async def test_an_argument_that_cannot_be_written_is_named(args: Any, kwargs: dict[str, Any], named: str) -> None:
    with pytest.raises(EncodeError, match=f"^shop.buy: {named} can't be written as json"):
        await sent("shop.buy", args, kwargs)


async def test_a_message_over_the_limit_is_refused_with_what_to_do() -> None:
    with pytest.raises(MessageTooLarge, match="the limit is 1,000"):
        await message_sent("t", ["x" * 1000], settings=Settings(limits=Limits(message=1000)))


either_way = pytest.mark.parametrize("by_name", [False, True], ids=["a task of the app", "by its name"])


@either_way
@pytest.mark.parametrize("args", [[0, 1], (0, 1), range(2), deque([0, 1])], ids=lambda args: type(args).__name__)
async def test_arguments_may_come_in_any_sequence(args: Any, by_name: bool) -> None:
    assert decode(await message_sent("t", args, by_name=by_name), Serializer()).args == [0, 1]


@either_way
@pytest.mark.parametrize(
    "kwargs", [MappingProxyType({"a": 1}), ChainMap({"a": 1}), {"a": 1}], ids=lambda kwargs: type(kwargs).__name__
)
async def test_keyword_arguments_may_come_in_any_mapping(kwargs: Any, by_name: bool) -> None:
    assert decode(await message_sent("t", (), kwargs, by_name=by_name), Serializer()).kwargs == {"a": 1}


@either_way
@pytest.mark.parametrize("args", ["ab", b"ab", 5, {"a": 1}], ids=repr)
async def test_arguments_that_are_no_sequence_of_arguments_are_refused_or_taken_apart(args: Any, by_name: bool) -> None:
    """Never sent so that every worker would refuse them."""
    try:
        message = await message_sent("t", args, by_name=by_name)
    except (InvalidArguments, EncodeError, TypeError):
        return
    assert len(decode(message, Serializer()).args) == len(args)


async def test_the_limit_is_for_what_travels_not_for_what_was_compressed() -> None:
    small = Settings(limits=Limits(message=200))
    await message_sent("t", ["x" * 10_000], settings=small, compression="gzip")
    with pytest.raises(MessageTooLarge):
        await message_sent("t", ["x" * 10_000], settings=small)


async def test_headers_that_our_own_workers_would_refuse_are_refused_here() -> None:
    with pytest.raises(MessageTooLarge):
        await message_sent("t", headers={"x": "y" * 70_000})
    with pytest.raises(MessageTooLarge):
        await message_sent("t", argsrepr="y" * 70_000)


@pytest.mark.parametrize(
    ("options", "named"), [({"compression": "squeeze"}, "squeeze"), ({"serializer": "xml"}, "xml")]
)
async def test_an_unknown_format_is_a_mistake_of_the_settings(options: Any, named: str) -> None:
    with pytest.raises(ConfigurationError, match=named):
        await message_sent("t", [{}], **options)


@pytest.mark.parametrize("args", [[10**5000], [1, 10**5000], ["a", 10**5000], [[10**5000]]], ids=len)
async def test_a_number_that_no_reader_takes_is_refused_as_any_other(args: list[Any]) -> None:
    with pytest.raises(EncodeError):
        await message_sent("t", args)


async def test_nothing_is_sent_when_one_call_of_many_cannot_be() -> None:
    async with AQueue("proj", broker="memory://") as app:

        @app.task(name="t")
        def work(value: Any) -> None: ...

        with pytest.raises(EncodeError):
            await app.send_many([work.s(1), work.s({2}), work.s(3)])
        assert not await app.producer().broker.fetch(["celery"], 10, 0)


async def test_headers_that_cannot_travel_are_refused_before_anything_is_sent() -> None:
    async with AQueue("proj", broker="memory://") as app:
        with pytest.raises((EncodeError, InvalidArguments)):
            pack(await _sent_through(app, headers={"x": object()}))
        assert not await app.producer().broker.fetch(["celery"], 10, 0)


async def _sent_through(app: AQueue, **options: Any) -> Message:
    await app.send_task("t", **options)
    (delivery,) = await app.producer().broker.fetch(["celery"], 1, 0)
    assert isinstance(delivery.message, Message)
    return delivery.message


@pytest.mark.parametrize("options", [{"eta": None}, {"headers": None}], ids=str)
async def test_an_option_that_is_none_is_refused_by_name_or_means_nothing(options: Any) -> None:
    try:
        envelope = await sent("t", **options)
    except InvalidArguments as error:
        told = str(error)
    else:
        assert normal(envelope) == normal(await sent("t"))
        return
    assert next(iter(options)) in told


async def test_a_send_while_the_store_is_gone_is_told_and_carried_out(caplog: pytest.LogCaptureFixture) -> None:
    """The queue holds the task, so the send succeeds; only the record of it is missing."""
    async with AQueue(
        "proj", broker="memory://", backend="redis://127.0.0.1:1/0", settings=Settings(send_timeout=0.2)
    ) as app:
        with caplog.at_level(logging.WARNING, "aqueue.send"):
            await app.send_task("t")
        assert len(await app.producer().broker.fetch(["celery"], 10, 0)) == 1
    assert "not recorded as sent" in caplog.text
