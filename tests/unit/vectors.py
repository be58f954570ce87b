"""The captured vectors of ``tests/wire``, with what each of them means, read without any code of aqueue's."""

import ast
import base64
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, datetime, time, timezone
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any
from uuid import UUID

import yaml  # type: ignore[import-untyped]

WIRE = Path(__file__).parent.parent / "wire"

_EXTENDED: dict[str, Callable[[Any], Any]] = {
    "datetime": datetime.fromisoformat,
    "date": date.fromisoformat,
    "time": time.fromisoformat,
    "decimal": Decimal,
    "uuid": lambda value: UUID(value["hex"]),
    "bytes": str.encode,
    "base64": base64.b64decode,
}


def load(name: str) -> Any:
    """A file of the captured vectors, by its name without the ending."""
    return json.loads((WIRE / f"{name}.json").read_text())


@dataclass(frozen=True)
class Captured:
    """One element of a Redis list, as a Celery client wrote it."""

    name: str
    key: str
    raw: bytes
    #: The decoded body, with extended types made what they stand for.
    body: Any

    @property
    def envelope(self) -> dict[str, Any]:
        """The element decoded; the caller's own, to be changed at will."""
        found: dict[str, Any] = json.loads(self.raw)
        return found

    @property
    def queue(self) -> str:
        return self.key.split("\x06\x16")[0]

    @property
    def fields(self) -> dict[str, Any]:
        """Where the message says what it is: the headers, or the body of protocol 1."""
        headers: dict[str, Any] = self.envelope["headers"]
        return headers or self.body

    @property
    def args(self) -> list[Any]:
        return list(self.body["args"] if isinstance(self.body, dict) else self.body[0])

    @property
    def kwargs(self) -> dict[str, Any]:
        kwargs: dict[str, Any] = self.body["kwargs"] if isinstance(self.body, dict) else self.body[1]
        return kwargs

    @property
    def embed(self) -> dict[str, Any]:
        """The four parts of what follows; nothing is None, however it was written."""
        found: dict[str, Any] = self.body if isinstance(self.body, dict) else self.body[2]
        return {part: found.get(part) or None for part in ("callbacks", "errbacks", "chain", "chord")}


def task(name: str, number: int = 0) -> Captured:
    """One message of ``redis_task_<name>.json``."""
    return [found for found in task_messages() if found.name.startswith(f"{name}[")][number]


@cache
def task_messages() -> list[Captured]:
    """Every task message of every ``redis_task_*.json``."""
    return [
        captured
        for path in sorted(WIRE.glob("redis_task_*.json"))
        for captured in _captured(path.stem.removeprefix("redis_task_"), json.loads(path.read_text()))
    ]


def _captured(name: str, file: dict[str, Any]) -> Iterator[Captured]:
    for number, found in enumerate(_elements(file)):
        envelope = json.loads(found["raw"])
        assert envelope == found.get("envelope", envelope), "the file says the same thing twice"
        yield Captured(f"{name}[{number}]", found["redis_key"], found["raw"].encode(), _meaning(found))


def _elements(file: dict[str, Any]) -> list[dict[str, Any]]:
    if "messages_in_publish_order" in file:
        found: list[dict[str, Any]] = file["messages_in_publish_order"]
        return found
    if "unpacked" in file:
        return [{**file, "body_text": file["unpacked"]["field4_signed_body"]}]
    return [
        {"redis_key": key, "raw": raw, "body_text": base64.b64decode(json.loads(raw)["body"]).decode()}
        for key, value in file["broker_keys"].items()
        if value["type"] == "list"
        for raw in value["value"]
    ]


def _meaning(found: dict[str, Any]) -> Any:
    if "body_repr" in found:
        assert base64.b64decode(json.loads(found["raw"])["body"]).hex() == found["body_bytes_hex"]
        return ast.literal_eval(found["body_repr"])
    text = found["body_text"]
    if json.loads(found["raw"])["content-type"] == "application/x-yaml":
        return yaml.safe_load(text)
    return json.loads(text, object_hook=_extended)


def _extended(found: dict[str, Any]) -> Any:
    if set(found) != {"__type__", "__value__"}:
        return found
    return _EXTENDED[found["__type__"]](found["__value__"])


def instant(text: str | None) -> datetime | None:
    """A time on the wire; without an offset it is UTC."""
    if text is None:
        return None
    found = datetime.fromisoformat(text)
    return found.replace(tzinfo=timezone.utc) if found.tzinfo is None else found


@dataclass(frozen=True)
class Stored:
    """One result document, as a Celery worker stored or published it."""

    name: str
    task_id: str
    data: bytes
    serializer: str


@cache
def stored_results() -> list[Stored]:
    """Every result document of every ``redis_result_*.json``."""
    found: list[Stored] = []
    for path in sorted(WIRE.glob("redis_result_*.json")):
        name = path.stem.removeprefix("redis_result_")
        serializer = name if name in ("pickle", "msgpack", "yaml") else "json"
        for key, data in _documents(json.loads(path.read_text())):
            task_id = key.removeprefix("celery-task-meta-")
            found.append(Stored(f"{name}[{len(found)}]", task_id, data, serializer))
    return found


def _documents(file: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    for keys in [file.get("keys", {}), *(step["backend_keys"] for step in file.get("steps", []))]:
        for key, entry in keys.items():
            if key.startswith("celery-task-meta-"):
                yield (
                    key,
                    base64.b64decode(entry["value_base64"]) if "value_base64" in entry else entry["value"].encode(),
                )
    for published in file.get("pubsub_messages_on_result_channels", []):
        if published["channel"].startswith("celery-task-meta-"):
            yield published["channel"], published["data"].encode()


@cache
def odd_elements() -> dict[str, dict[str, Any]]:
    """The hand-made elements of ``redis_tolerance.json`` by their label, with what a Celery worker made of each."""
    return {case["label"]: case for case in load("redis_tolerance")["cases"]}


@cache
def corpus() -> list[bytes]:
    """Everything captured that was an element of a list, to be damaged by tests."""
    return [found.raw for found in task_messages()] + [case["element"].encode() for case in odd_elements().values()]
