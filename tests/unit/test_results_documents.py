"""Result documents: every one that a Celery worker stored is read, and ours have the form of theirs."""

import base64
import json
import pickle
import sys
import zlib
from contextlib import suppress
from types import ModuleType
from typing import Any

import msgpack  # type: ignore[import-untyped]
import msgspec
import pytest
import yaml  # type: ignore[import-untyped]
from hypothesis import given, settings
from hypothesis import strategies as st

from aqueue.compression import CONTENT_TYPES
from aqueue.errors import BadMessage, ConfigurationError, EncodeError, MessageTooLarge
from aqueue.results import (
    FAILURE,
    FINAL_STATES,
    RETRY,
    REVOKED,
    STARTED,
    SUCCESS,
    Documents,
    RemoteError,
    Result,
    StoreOptions,
)
from aqueue.serialization import Limits
from tests.unit.elements import nested, quickly
from tests.unit.vectors import Stored, load, stored_results

ID = "11111111-1111-4111-8111-111111111111"
WITH_ERROR = ("RETRY", "FAILURE", "REVOKED")


class MyError(Exception):
    """As the captured task module defines it."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message, code)
        self.code = code


@pytest.fixture
def captured_module(monkeypatch: pytest.MonkeyPatch) -> None:
    """The module whose errors the pickled vectors hold."""
    module = ModuleType("proj.tasks")
    module.__dict__["MyError"] = type("MyError", (MyError,), {"__module__": "proj.tasks"})
    monkeypatch.setitem(sys.modules, "proj", ModuleType("proj"))
    monkeypatch.setitem(sys.modules, "proj.tasks", module)


def documents(serializer: str = "json", **options: Any) -> Documents:
    return Documents(StoreOptions(serializer=serializer, **options))


def meaning(stored: Stored) -> dict[str, Any]:
    """A stored document, read by the libraries alone."""
    data = stored.data
    mark = b"\x00celery-compressed\x00application/x-gzip\x00"
    if data.startswith(mark):
        data = zlib.decompress(data.removeprefix(mark))
    readers = {"json": json.loads, "yaml": yaml.safe_load, "msgpack": msgpack.unpackb, "pickle": pickle.loads}
    found: dict[str, Any] = readers[stored.serializer](data)
    return found


# --- the captured vectors ----------------------------------------------------------------------------------

every_stored = pytest.mark.parametrize("stored", stored_results(), ids=lambda stored: stored.name)


def test_the_vectors_are_all_there() -> None:
    assert len(stored_results()) > 80
    assert {stored.serializer for stored in stored_results()} == {"json", "yaml", "msgpack", "pickle"}


@every_stored
@pytest.mark.usefixtures("captured_module")
def test_a_stored_document_is_read_as_it_was_meant(stored: Stored) -> None:
    expected = meaning(stored)
    result = documents(stored.serializer).decode(stored.task_id, stored.data)
    assert result.task_id == stored.task_id == expected.pop("task_id")
    assert result.state == expected.pop("status")
    assert result.traceback == expected.pop("traceback")
    assert result.children == expected.pop("children")
    assert result.date_done == expected.pop("date_done")
    value = expected.pop("result")
    assert result.extra == expected
    if result.state not in WITH_ERROR or value is None:
        assert result.value == value
    else:
        assert isinstance(result.value, RemoteError)
        if isinstance(value, Exception):
            assert result.value == RemoteError("MyError", ["boom", 7], "proj.tasks")
        else:
            told = result.value
            assert {"exc_type": told.exc_type, "exc_message": told.exc_message, "exc_module": told.exc_module} == value


@every_stored
@pytest.mark.usefixtures("captured_module")
def test_the_states_that_change_no_more_are_known(stored: Stored) -> None:
    result = documents(stored.serializer).decode(stored.task_id, stored.data)
    assert result.is_final is (meaning(stored)["status"] in ("SUCCESS", "FAILURE", "REVOKED"))


@every_stored
@pytest.mark.usefixtures("captured_module")
def test_success_is_seen_in_every_stored_document(stored: Stored) -> None:
    options = {"compression": "gzip"} if stored.name.startswith("gzip") else {}
    assert documents(stored.serializer, **options).says_success(stored.data) is (meaning(stored)["status"] == "SUCCESS")


@every_stored
@pytest.mark.usefixtures("captured_module")
def test_a_stored_document_is_written_again_as_it_was(stored: Stored) -> None:
    if stored.serializer == "pickle":
        return  # an exception is told, not pickled again
    options = {"compression": "gzip"} if stored.name.startswith("gzip") else {}
    ours = documents(stored.serializer, **options)
    again = ours.encode(ours.decode(stored.task_id, stored.data))
    assert meaning(Stored("", "", again, stored.serializer)) == meaning(stored)
    assert again.startswith(b"\x00celery-compressed\x00application/x-gzip\x00") is stored.data.startswith(b"\x00")


def test_a_pickled_error_of_a_module_that_is_not_here_is_undecodable() -> None:
    stored = next(stored for stored in stored_results() if stored.serializer == "pickle" and b"MyError" in stored.data)
    with pytest.raises(BadMessage) as caught:
        documents("pickle").decode(stored.task_id, stored.data)
    assert caught.value.reason == "undecodable"


def test_a_compressed_document_is_read_whatever_our_own_setting_is() -> None:
    (step, *_) = load("redis_result_gzip")["steps"]
    ((key, entry),) = step["backend_keys"].items()
    assert documents().decode(key, base64.b64decode(entry["value_base64"])).value == 5


# --- ours beside theirs --------------------------------------------------------------------------------------

SUCCEEDED = Result(task_id=ID, state=SUCCESS, value=5, date_done="2026-11-22T08:58:24.959481+00:00")
FAILED = Result(
    task_id=ID,
    state=FAILURE,
    value=RemoteError("ValueError", ["boom"], "builtins"),
    traceback="Traceback...",
    date_done="2026-11-22T08:58:25.369668+00:00",
)


def captured(name: str) -> dict[str, Any]:
    (entry,) = load(f"redis_result_{name}")["keys"].values()
    found: dict[str, Any] = json.loads(entry["value"])
    return found


@pytest.mark.parametrize(
    ("name", "result"),
    [
        ("success", SUCCEEDED),
        ("failure", FAILED),
        ("started", Result(task_id=ID, state=STARTED, value={"pid": 1, "hostname": "worker@host"})),
        ("custom_state", Result(task_id=ID, state="PROGRESS", value={"done": 1, "total": 3})),
        (
            "revoked",
            Result(task_id=ID, state=REVOKED, value=RemoteError("TaskRevokedError", ["revoked"], "celery.exceptions")),
        ),
    ],
)
def test_our_documents_have_the_keys_of_celerys_in_their_order(name: str, result: Result) -> None:
    ours, theirs = json.loads(documents().encode(result)), captured(name)
    assert list(ours) == list(theirs)
    assert ours["status"] == theirs["status"]
    if isinstance(theirs["result"], dict):
        assert list(ours["result"]) == list(theirs["result"])
    for key, value in theirs.items():
        if key not in ("children", "date_done", "traceback"):
            assert type(ours[key]) is type(value), key


@pytest.mark.parametrize("serializer", ["json", "yaml", "msgpack", "pickle"])
@pytest.mark.parametrize(
    "result", [SUCCEEDED, FAILED, Result(task_id=ID, state=SUCCESS, value=1.5, extra={"group_id": "g"})], ids=str
)
def test_the_state_comes_first_in_every_format(serializer: str, result: Result) -> None:
    found = meaning(Stored("", ID, documents(serializer).encode(result), serializer))
    if serializer != "yaml":  # which sorts
        assert next(iter(found)) == "status"
    assert found["status"] == result.state
    assert set(found) == {"status", "result", "traceback", "children", "date_done", "task_id", *result.extra}


def test_a_document_without_a_value_is_complete() -> None:
    assert json.loads(documents().encode(Result(task_id=ID, state="PENDING"))) == {
        "status": "PENDING",
        "result": None,
        "traceback": None,
        "children": [],
        "date_done": None,
        "task_id": ID,
    }


@pytest.mark.parametrize("name", sorted(CONTENT_TYPES))
def test_a_compressed_document_is_marked_and_read_again(name: str) -> None:
    ours = documents(compression=name)
    data = ours.encode(SUCCEEDED)
    assert data.startswith(b"\x00celery-compressed\x00" + CONTENT_TYPES[name].encode() + b"\x00")
    assert ours.decode(ID, data) == SUCCEEDED
    assert documents().decode(ID, data) == SUCCEEDED


# --- there and back --------------------------------------------------------------------------------------------

texts = st.text(st.characters(codec=None), max_size=8)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
    | st.uuids()
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)


@given(
    value=values,
    state=st.sampled_from([SUCCESS, "PROGRESS", STARTED]),
    extra=st.dictionaries(st.sampled_from(["group_id", "args"]), values),
)
@settings(max_examples=80, deadline=None)
def test_any_value_comes_back(value: Any, state: str, extra: dict[str, Any]) -> None:
    result = Result(task_id=ID, state=state, value=value, date_done="2030-01-01T00:00:00+00:00", extra=extra)
    assert repr(documents().decode(ID, documents().encode(result))) == repr(result)


@given(kind=texts, arguments=st.lists(values, max_size=3), module=st.none() | texts, traceback=st.none() | texts)
@settings(max_examples=60, deadline=None)
def test_any_error_comes_back(kind: str, arguments: list[Any], module: str | None, traceback: str | None) -> None:
    error = RemoteError(kind or "E", arguments, module)
    result = Result(task_id=ID, state=FAILURE, value=error, traceback=traceback)
    assert repr(documents().decode(ID, documents().encode(result))) == repr(result)


@pytest.mark.parametrize("text", ["\ud800", "\x00", "\u2028", "\U0001f600"])
def test_every_character_may_stand_in_a_result(text: str) -> None:
    for result in (
        Result(task_id=ID, state=SUCCESS, value=text),
        Result(task_id=ID, state=FAILURE, value=RemoteError("E", [text], None), traceback=text),
        Result(task_id=ID, state=SUCCESS, value=1, traceback=text),
    ):
        assert documents().decode(ID, documents().encode(result)) == result


@pytest.mark.parametrize("value", [2**53 + 1, 2**64, -(2**63) - 1, 10**40])
def test_a_large_number_stays_exact(value: int) -> None:
    assert documents().decode(ID, documents().encode(Result(task_id=ID, state=SUCCESS, value=value))).value == value


# --- what can't be written -----------------------------------------------------------------------------------


@pytest.mark.parametrize("serializer", ["json", "yaml", "msgpack", "pickle"])
@pytest.mark.parametrize(
    "value",
    [
        object(),
        10**5000,
        -(10**5000),
        [10**5000],
        float("nan"),
        {1, 2},
        nested(300),
        nested(5_000),
        lambda: None,
        iter([]),
        1j,
    ],
    ids=lambda value: f"{type(value).__name__}",
)
def test_what_cannot_be_written_is_an_encode_error_and_no_other(serializer: str, value: Any) -> None:
    ours = documents(serializer)
    try:
        data = ours.encode(Result(task_id=ID, state=SUCCESS, value=value))
    except EncodeError:
        return
    ours.decode(ID, data)


@pytest.mark.parametrize("field", ["value", "children", "extra"])
def test_what_cannot_be_written_is_an_encode_error_wherever_it_stands(field: str) -> None:
    odd: Any = {"value": object(), "children": [object()], "extra": {"args": [object()]}}[field]
    with pytest.raises(EncodeError):
        documents().encode(Result(task_id=ID, state=SUCCESS, **{field: odd}))


def test_a_result_over_the_limit_is_refused_by_its_task() -> None:
    ours = documents(limits=Limits(message=1000))
    ours.encode(Result(task_id=ID, state=SUCCESS, value="x" * 800))
    for value in ("x" * 1000, ["x" * 1000], RemoteError("E", ["x" * 1000], None)):
        with pytest.raises(MessageTooLarge, match=f"result of task {ID}.*the limit is 1,000"):
            ours.encode(Result(task_id=ID, state=SUCCESS, value=value))


def test_the_limit_is_for_what_is_stored_not_for_what_was_compressed() -> None:
    ours = documents(limits=Limits(message=1000), compression="gzip")
    assert ours.decode(ID, ours.encode(Result(task_id=ID, state=SUCCESS, value="x" * 100_000))).value == "x" * 100_000


# --- what can't be read --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b"5",
        b'"SUCCESS"',
        b"{}",
        b'{"result": 5}',
        b'{"status": 5}',
        b'{"status": null}',
        b'{"status": "SUCCESS"',
        b"\xff",
        b'{"status": "\xff"}',
        b'{"status": "SUCCESS", "result": ' + b"[" * 300 + b"]" * 300 + b"}",
        b"\x00celery-compressed\x00",
        b"\x00celery-compressed\x00application/x-squeeze\x00x",
        b"\x00celery-compressed\x00\xff\xff\x00x",
        b"\x00celery-compressed\x00application/x-gzip\x00x",
        b"\x00celery-compressed\x00application/x-gzip\x00" + zlib.compress(b"\0" * 20_000_000),
    ],
    ids=lambda data: repr(data[:50]),
)
def test_a_document_that_is_none_is_refused(data: bytes) -> None:
    with quickly(1.0), pytest.raises(BadMessage):
        documents().decode(ID, data)
    assert documents().says_success(data) is data.startswith(b'{"status": "SUCCESS"')
    assert not documents(compression="gzip").says_success(data)


@pytest.mark.parametrize(
    "value",
    [
        {"exc_type": "SystemExit", "exc_message": [1], "exc_module": "builtins"},
        {"exc_type": "KeyboardInterrupt", "exc_message": [], "exc_module": "builtins"},
        {"exc_type": "system", "exc_message": "true", "exc_module": "os"},
        {"exc_type": "Popen", "exc_message": [["true"]], "exc_module": "subprocess"},
        {"exc_type": "__import__('os').system", "exc_message": ["true"], "exc_module": None},
    ],
    ids=lambda value: value["exc_type"],
)
def test_an_error_is_told_and_never_rebuilt(value: dict[str, Any]) -> None:
    data = json.dumps({"status": "FAILURE", "result": value, "task_id": ID}).encode()
    found = documents().decode(ID, data).value
    assert found == RemoteError(value["exc_type"], value["exc_message"], value["exc_module"])
    assert type(found) is RemoteError


@pytest.mark.parametrize(
    ("value", "told"),
    [
        (None, None),
        ({}, RemoteError("ValueError", None, None)),
        ({"exc_message": ["x"]}, RemoteError("ValueError", ["x"], None)),
        ({"exc_type": None}, RemoteError("ValueError", None, None)),
        ({"exc_type": "E", "exc_message": "one"}, RemoteError("E", "one", None)),
        ("boom", RemoteError("Exception", "boom", None)),
        (["boom"], RemoteError("Exception", ["boom"], None)),
    ],
)
@pytest.mark.parametrize("state", [FAILURE, RETRY, REVOKED])
def test_an_error_in_another_form_is_told_as_well_as_it_can_be(
    state: str, value: Any, told: RemoteError | None
) -> None:
    assert documents().decode(ID, json.dumps({"status": state, "result": value}).encode()).value == told


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["boom"], "boom"),
        ([], ""),
        (["a", 1], "('a', 1)"),
        ("boom", "boom"),
        (None, ""),
        ([None], "None"),
        ([["a"]], "['a']"),
        (5, "5"),
    ],
    ids=str,
)
def test_the_text_of_an_error_is_what_the_exception_would_say(arguments: Any, text: str) -> None:
    assert RemoteError("E", arguments).text == text


def test_a_document_without_an_id_is_that_of_its_key() -> None:
    assert documents().decode(ID, b'{"status": "SUCCESS"}') == Result(task_id=ID, state=SUCCESS, children=None)
    assert documents().decode(ID, b'{"status": "SUCCESS", "task_id": null}').task_id == ID


def test_a_document_of_another_kind_than_accepted_is_refused() -> None:
    with pytest.raises(BadMessage):
        documents("json").decode(ID, documents("msgpack").encode(SUCCEEDED))
    with pytest.raises(BadMessage):
        documents("msgpack", accept=("json",)).decode(ID, documents("json").encode(SUCCEEDED))


@pytest.mark.parametrize(
    ("options", "readable"),
    [
        ({}, True),
        ({"serializer": "msgpack"}, True),
        ({"serializer": "yaml"}, False),
        ({"serializer": "pickle"}, False),
        ({"compression": "gzip"}, False),
    ],
)
def test_a_server_can_see_the_state_where_it_stands_at_the_start(options: Any, readable: bool) -> None:
    assert documents(**options).status_is_readable is readable
    assert documents(**options).says_success(documents(**options).encode(SUCCEEDED))
    assert not documents(**options).says_success(documents(**options).encode(FAILED))


def test_an_app_that_accepts_signed_messages_stores_plain_results() -> None:
    ours = documents(accept=("auth",))
    assert ours.decode(ID, ours.encode(SUCCEEDED)) == SUCCEEDED


def test_an_unknown_format_is_a_mistake_of_the_settings() -> None:
    with pytest.raises(ConfigurationError, match="xml"):
        documents("xml")
    with pytest.raises(ConfigurationError, match="squeeze"):
        documents(compression="squeeze").encode(SUCCEEDED)


@given(
    st.dictionaries(
        st.sampled_from(["status", "result", "traceback", "children", "date_done", "task_id", "exc_type", "x"]),
        st.sampled_from(
            [
                None,
                "SUCCESS",
                "FAILURE",
                5,
                [],
                {},
                {"exc_type": 5},
                {"exc_type": ["x"], "exc_module": {}},
                True,
                10**4000,
            ]
        ),
    )
)
@settings(max_examples=80, deadline=None)
def test_a_document_may_hold_anything(document: dict[str, Any]) -> None:
    try:
        found = documents().decode(ID, json.dumps(document).encode())
    except BadMessage:
        return
    assert found.state in ("SUCCESS", "FAILURE")
    assert found.is_final is (found.state in FINAL_STATES)
    if isinstance(found.value, RemoteError):
        assert isinstance(found.value.text, str)


@given(st.binary(max_size=60) | st.binary(max_size=30).map(lambda data: b"\x00celery-compressed\x00" + data))
@settings(max_examples=80, deadline=None)
def test_any_bytes_are_refused_or_read_and_nothing_else(data: bytes) -> None:
    for serializer in ("json", "msgpack"):
        with suppress(BadMessage):
            documents(serializer).decode(ID, data)


def test_results_are_compared_by_what_they_hold() -> None:
    assert msgspec.structs.replace(SUCCEEDED) == SUCCEEDED
    assert msgspec.structs.replace(SUCCEEDED, value=6) != SUCCEEDED
