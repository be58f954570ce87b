"""Celery's control messages: what its clients broadcast is obeyed, ours has its form, nothing else has any effect."""

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from aqueue.broker.redis.envelope import pack, unpack
from aqueue.errors import BadMessage, EncodeError
from aqueue.pidbox import LONGEST_KEPT, Pidbox, Revocation
from aqueue.protocol import Message, Unreadable
from aqueue.serialization import Limits, Serializer
from tests.unit.vectors import WIRE, load

NODE = "worker@host"


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(WIRE) / f"{name}.jsonl").read_text().splitlines()]


REQUESTS = [line for line in lines("redis_pidbox") if "request_raw" in line]
WISHES = [line for line in REQUESTS if line["command"] in ("revoke", "terminate")]


def read(raw: bytes | str, node: str = NODE, pidbox: Pidbox | None = None) -> Any:
    element = raw if isinstance(raw, bytes) else raw.encode()
    return (pidbox or Pidbox(Serializer())).read(unpack(element, "celery.pidbox", Limits()), node)


def message(command: Any, **fields: Any) -> Message:
    return Message(queue="", headers={}, body=json.dumps(command).encode(), **fields)


@pytest.mark.parametrize("line", WISHES, ids=lambda line: line["call"][23:70])
def test_what_celerys_clients_revoke_is_revoked(line: dict[str, Any]) -> None:
    arguments = line["request_body"]["arguments"]
    ids = arguments["task_id"] if isinstance(arguments["task_id"], list) else [arguments["task_id"]]
    found = read(line["request_raw"])
    assert list(found) == ids
    terminate = arguments.get("terminate", line["command"] == "terminate")
    assert set(found.values()) == {Revocation("terminated" if terminate else "revoked", terminate, 86400.0)}


def test_there_are_wishes_among_the_captured_requests() -> None:
    assert len(WISHES) >= 4
    assert len(REQUESTS) > 40


@pytest.mark.parametrize(
    "line", [line for line in REQUESTS if line not in WISHES], ids=lambda line: line["call"][23:70]
)
def test_no_other_command_is_obeyed_and_none_is_malformed(line: dict[str, Any]) -> None:
    pidbox = Pidbox(Serializer())
    assert read(line["request_raw"], pidbox=pidbox) == {}
    assert pidbox.malformed == 0


def test_what_a_client_broadcasts_on_rabbitmq_is_obeyed() -> None:
    (line,) = [line for line in lines("amqp_pidbox") if "broadcast('revoke'" in line["what"] and "body" in line]
    body = base64.b64decode(line["body_base64"])
    properties = line["properties"]
    came = Message(queue="", headers=line["headers"], body=body, content_type=properties["content_type"])
    assert list(Pidbox(Serializer()).read(came, NODE)) == ["x1"]


def test_ours_has_the_form_of_celerys() -> None:
    (ours,) = Pidbox(Serializer()).revoke(["x2", "x3"], Revocation("too late", False, 60.0))
    written = json.loads(pack(ours))
    theirs = next(line for line in WISHES if line["request_body"]["arguments"]["task_id"] == ["x2", "x3"])
    captured = json.loads(theirs["request_raw"])
    assert written.keys() == captured.keys()
    assert written["headers"].keys() == captured["headers"].keys()
    assert written["properties"]["delivery_info"] == captured["properties"]["delivery_info"]
    assert (written["content-type"], written["content-encoding"]) == ("application/json", "utf-8")
    body = json.loads(base64.b64decode(written["body"]))
    asked = {name: value for name, value in theirs["request_body"].items() if name not in ("ticket", "reply_to")}
    assert {**body, "arguments": {**body["arguments"]}} == {
        **asked,
        "arguments": {**asked["arguments"], "reason": "too late", "keep": 60.0},
    }


def test_ours_are_read_as_they_were_written() -> None:
    pidbox = Pidbox(Serializer(("msgpack",)), "msgpack")
    revocation = Revocation("é too late", True, 12.5)
    ids = [f"id-{number}" for number in range(2100)]
    messages = pidbox.revoke(ids, revocation)
    assert len(messages) == 3
    found: dict[str, Revocation] = {}
    for one in messages:
        found |= pidbox.read(one, NODE)
    assert found == dict.fromkeys(ids, revocation)


def test_what_no_worker_accepts_is_not_written() -> None:
    with pytest.raises(EncodeError):
        Pidbox(Serializer()).revoke(["x"], Revocation("\ud800", True, float("nan")))


REVOKE: dict[str, Any] = {"method": "revoke", "arguments": {"task_id": "x"}}


@pytest.mark.parametrize(
    ("to", "obeyed"),
    [
        ({}, True),
        ({"destination": None, "pattern": None, "matcher": None}, True),
        ({"destination": []}, True),
        ({"destination": [NODE, "other@host"]}, True),
        ({"destination": ["other@host"]}, False),
        ({"pattern": "work*", "matcher": "glob"}, True),
        ({"pattern": "other*", "matcher": "glob"}, False),
        ({"pattern": "^worker", "matcher": "pcre"}, False),
        ({"pattern": "(a+)+$", "matcher": "pcre"}, False),
    ],
)
def test_a_command_is_obeyed_by_those_it_is_for(to: dict[str, Any], obeyed: bool) -> None:
    assert bool(Pidbox(Serializer()).read(message({**REVOKE, **to}), NODE)) is obeyed


@pytest.mark.parametrize(
    "command",
    [
        None,
        [],
        {},
        {"method": None},
        {"method": "revoke", "arguments": []},
        {"method": "revoke", "arguments": {}},
        {"method": "revoke", "arguments": {"task_id": None}},
        {"method": "revoke", "arguments": {"task_id": ["x", 1]}},
        {"method": "revoke", "arguments": {"task_id": {"x": 1}}},
        {"method": "revoke", "arguments": {"task_id": ""}},
        {"method": "revoke", "arguments": {"task_id": "x" * 256}},
        {"method": "revoke", "arguments": {"task_id": "two\nlines"}},
        {"method": "revoke", "arguments": {"task_id": "x"}, "destination": "worker@host"},
        {"method": "revoke", "arguments": {"task_id": "x"}, "destination": [1]},
    ],
)
def test_what_can_not_be_read_is_counted(command: Any) -> None:
    pidbox = Pidbox(Serializer())
    assert pidbox.read(message(command), NODE) == {}
    assert pidbox.malformed == 1


def test_what_is_not_accepted_is_counted() -> None:
    pidbox = Pidbox(Serializer(limits=Limits(message=1000)))
    assert pidbox.read(message(REVOKE, content_type="application/x-python-serialize"), NODE) == {}
    assert pidbox.read(message({**REVOKE, "x": "y" * 1000}), NODE) == {}
    assert pidbox.read(Unreadable("", b"x", BadMessage("undecodable", "x")), NODE) == {}
    assert read(load("redis_pidbox_auth")["published"][0]["raw"], pidbox=pidbox) == {}
    assert pidbox.malformed == 4


@pytest.mark.parametrize(
    ("told", "kept"),
    [
        (60, 60),
        (0.5, 0.5),
        (0, 86400),
        (-1, 86400),
        ("60", 86400),
        (None, 86400),
        (True, 86400),
        (1e300, LONGEST_KEPT),
    ],
)
def test_it_is_kept_as_long_as_it_says_within_reason(told: Any, kept: float) -> None:
    command = {"method": "revoke", "arguments": {"task_id": "x", "keep": told}}
    assert Pidbox(Serializer(), keep=86400).read(message(command), NODE)["x"].keep == kept


@pytest.mark.parametrize(("told", "reason"), [("why", "why"), ("", "revoked"), (7, "revoked"), ("x" * 999, None)])
def test_a_reason_is_a_short_text(told: Any, reason: str | None) -> None:
    command = {"method": "revoke", "arguments": {"task_id": "x", "reason": told}}
    found = Pidbox(Serializer()).read(message(command), NODE)["x"].reason
    assert len(found) <= 200
    assert reason is None or found == reason
