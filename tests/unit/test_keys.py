"""Names of keys on Redis, beside those that Celery's clients and workers were seen to use."""

import pytest

from aqueue.broker.redis.keys import SEP, STEPS, Keys, matching_queues
from tests.unit.vectors import load

PLAIN = Keys("")


@pytest.mark.parametrize(
    ("priority", "key"),
    [
        (9, "celery"), (8, "celery"), (7, "celery"),
        (6, "celery\x06\x163"), (5, "celery\x06\x163"), (4, "celery\x06\x163"),
        (3, "celery\x06\x166"), (2, "celery\x06\x166"), (1, "celery\x06\x166"),
        (0, "celery\x06\x169"),
    ],
)  # fmt: skip
def test_a_priority_has_its_list(priority: int, key: str) -> None:
    assert PLAIN.list_of("celery", priority) == key


def test_the_captured_priorities_are_on_the_lists_we_look_at() -> None:
    for found in load("redis_task_priority")["messages_in_publish_order"]:
        assert found["redis_key"] == PLAIN.list_of("celery", 9 - found["envelope"]["properties"]["priority"])


def test_each_step_of_all_queues_comes_before_the_next_step() -> None:
    assert PLAIN.lists(["a", "b"]) == [
        "a", "b", f"a{SEP}3", f"b{SEP}3", f"a{SEP}6", f"b{SEP}6", f"a{SEP}9", f"b{SEP}9",
    ]  # fmt: skip


def test_queues_may_come_from_anything_that_can_be_walked_once() -> None:
    assert PLAIN.lists(iter(["a", "b"])) == PLAIN.lists(["a", "b"])


@pytest.mark.parametrize("prefix", ["", "myapp:", "a\x06"])
@pytest.mark.parametrize("queue", ["celery", "q:1", "7", "a.b"])
@pytest.mark.parametrize("step", STEPS)
def test_a_list_leads_back_to_its_queue(prefix: str, queue: str, step: int) -> None:
    keys = Keys(prefix)
    assert keys.queue_of(keys.step_list(queue, step)) == queue


def test_a_prefix_goes_before_every_key() -> None:
    keys = Keys("myapp:")
    assert keys.list_of("celery", 0) == "myapp:celery\x06\x169"
    assert keys.ours("leases", "dead") == ["myapp:aqueue:leases", "myapp:aqueue:dead"]
    assert keys.binding("celery") == "myapp:_kombu.binding.celery"
    assert keys.permanent_binding("celery") == "myapp:_kombu.binding_permanent.celery"


def test_a_queue_is_bound_as_a_celery_client_binds_it() -> None:
    captured = load("redis_task_simple")["other_broker_keys"]
    assert captured[PLAIN.binding("celery")]["value"] == [PLAIN.binding_member("celery")]
    assert captured[PLAIN.permanent_binding("celery")]["value"] == [PLAIN.binding_member("celery")]


MEDIA = [member.encode() for member in load("redis_bindings")["keys"]["_kombu.binding.media"]["value"]]


@pytest.mark.parametrize(
    ("routing_key", "queues"),
    [
        ("media.a.news", ["feeds"]),
        ("media.a.b.news", ["feeds"]),
        ("media.news", ["img"]),
        ("media.image", ["img"]),
        ("media.a.image", []),
        ("media.newsletter", ["img"]),
        ("other", []),
        ("", []),
    ],
)
def test_a_routing_key_leads_where_kombu_leads_it(routing_key: str, queues: list[str]) -> None:
    assert matching_queues(MEDIA, routing_key) == queues


def test_a_direct_routing_key_is_compared_whole() -> None:
    members = [f"a{SEP}{SEP}one".encode(), f"a{SEP}{SEP}two".encode(), f"ab{SEP}{SEP}three".encode()]
    assert matching_queues(members, "a") == ["one", "two"]


def test_a_queue_bound_twice_is_found_once() -> None:
    members = [f"a{SEP}{SEP}one".encode(), f"a{SEP}^a${SEP}one".encode()]
    assert matching_queues(members, "a") == ["one"]


def test_the_captured_publishes_went_where_we_would_send_them() -> None:
    found = load("redis_bindings")
    for publish in found["publishes"]:
        options = publish["apply_async_kwargs"]
        exchange = options.get("exchange")
        if exchange is None or f"_kombu.binding.{exchange}" not in found["keys"]:
            continue
        members = [member.encode() for member in found["keys"][f"_kombu.binding.{exchange}"]["value"]]
        pushed = sorted(PLAIN.queue_of(key) for key in publish["pushed"])
        assert matching_queues(members, options.get("routing_key", "celery")) == pushed
