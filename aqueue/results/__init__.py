"""What aqueue asks of a result store, and Celery's result document (celery-protocol 4.1-4.3).

A store keeps records: a key, the encoded document, a life. The worker stores first and settles second,
so a settled task always has its result; SUCCESS is never overwritten. Those who wait are told, they
never poll; a store that can't tell looks once for all of them, see `aqueue.results.polling`.
"""

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib import import_module
from types import TracebackType
from typing import Any, Final, Protocol, Self

import msgspec

from aqueue.attempts import Attempt, attempts_of
from aqueue.compression import compress, decompress
from aqueue.errors import BadMessage, ConfigurationError
from aqueue.protocol import Record, is_success
from aqueue.serialization import Limits, Serializer
from aqueue.shapes import is_list, is_object
from aqueue.url import RABBITMQ_SCHEMES, REDIS_SCHEMES, Url

PENDING: Final = "PENDING"
STARTED: Final = "STARTED"
RETRY: Final = "RETRY"
SUCCESS: Final = "SUCCESS"
FAILURE: Final = "FAILURE"
REVOKED: Final = "REVOKED"

#: States that do not change any more. Every other name, known or a task's own, is on the way.
FINAL_STATES: Final = frozenset((SUCCESS, FAILURE, REVOKED))


class Result(msgspec.Struct, kw_only=True):
    """A task's state and what belongs to it (section 4.2).

    ``value`` is the task's value for SUCCESS, a `RemoteError` for RETRY, FAILURE and REVOKED, and any
    document for other states. ``extra`` holds further keys: group_id, parent_id, attempts, and with
    ``result_extended`` name, args, kwargs, worker, retries, queue.
    """

    task_id: str
    state: str
    value: Any = None
    traceback: str | None = None
    children: list[Any] | None = msgspec.field(default_factory=list[Any])
    date_done: str | None = None
    extra: dict[str, Any] = msgspec.field(default_factory=dict[str, Any])
    #: The queue of the client that waits for it; of use to stores that send results, and not stored.
    reply_to: str = ""

    @property
    def is_final(self) -> bool:
        return self.state in FINAL_STATES

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """The attempts that have failed, the oldest first, of a task that was run more than once."""
        return attempts_of(self.extra.get("attempts"))


class RemoteError(msgspec.Struct, frozen=True):
    """An exception as Celery stores it (section 4.3): told, not rebuilt."""

    exc_type: str
    exc_message: Any
    exc_module: str | None = None

    @property
    def text(self) -> str:
        """The exception's arguments, as ``str(exception)`` would show them."""
        arguments = self.exc_message
        if not is_list(arguments):
            return "" if arguments is None else str(arguments)
        return str(arguments[0]) if len(arguments) == 1 else str(tuple(arguments)) if arguments else ""


_WITH_ERROR: Final = frozenset((RETRY, FAILURE, REVOKED))
_MARK: Final = b"\x00celery-compressed\x00"


class StoreOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What an app tells its result store, whatever the store is."""

    serializer: str = "json"
    accept: Sequence[str] = ("json",)
    compression: str | None = None
    #: Seconds a result is kept; None keeps it for ever.
    expires: float | None = 86400.0
    #: Seconds any command may take, connecting included.
    timeout: float = 5.0
    limits: Limits = msgspec.field(default_factory=Limits)


class _Plain(msgspec.Struct):
    """A document that needs none of Celery's extended types."""

    status: str
    result: str | int | bool | None
    traceback: str | None
    children: list[Any] | None
    date_done: str | None
    task_id: str


#: Values that every JSON encoder writes alike.
_SCALARS: Final = frozenset((int, str, bool, type(None)))
_encode_plain = msgspec.json.Encoder().encode


class Documents:
    """Results to bytes and back, by one app's options."""

    def __init__(self, options: StoreOptions) -> None:
        self._options = options
        # Results are not signed: whoever can write to the store needs no message to make a result.
        self._serializer = Serializer({*options.accept, options.serializer} - {"auth"}, options.limits)
        encoded = self._serializer.dumps(None, options.serializer)
        self.content_type, self.content_encoding = encoded.content_type, encoded.content_encoding
        self._plain_json = options.serializer == "json" and options.compression is None

    @property
    def status_is_readable(self) -> bool:
        """Whether a server's script can find the state at the start of a document."""
        return self._options.serializer in ("json", "msgpack") and self._options.compression is None

    def encode(self, result: Result) -> bytes:
        """The document. Raises EncodeError, MessageTooLarge."""
        value = result.value
        data = b""
        if self._plain_json and type(value) in _SCALARS and not result.extra:
            plain = _Plain(result.state, value, result.traceback, result.children, result.date_done, result.task_id)
            with suppress(TypeError, ValueError, OverflowError):  # lone surrogates, huge numbers
                data = _encode_plain(plain)
        data = data or self._encode_extended(result)
        self._serializer.check_size(len(data), f"the result of task {result.task_id}")
        return data

    def _encode_extended(self, result: Result) -> bytes:
        document = {
            "status": result.state,
            "result": _plain_value(result.value),
            "traceback": result.traceback,
            "children": result.children,
            "date_done": result.date_done,
            **result.extra,
            "task_id": result.task_id,
        }
        return self._dumps(document)

    def encode_value(self, value: Any, what: str) -> bytes:
        """One part of a result, for stores that keep the parts apart. Raises EncodeError, MessageTooLarge."""
        data = self._dumps(_plain_value(value))
        self._serializer.check_size(len(data), what)
        return data

    def _dumps(self, value: Any) -> bytes:
        data = self._serializer.dumps(value, self._options.serializer).data
        if self._options.compression is not None:
            compressed, kind = compress(data, self._options.compression)
            data = _MARK + kind.encode() + b"\x00" + compressed
        return data

    def decode(self, task_id: str, data: bytes, content_type: str | None = None) -> Result:
        """Read a document that we or a Celery worker wrote; of another content type if accepted.

        Raises BadMessage.
        """
        document = self.decode_value(data, content_type)
        if not is_object(document) or not isinstance(document.get("status"), str):
            raise BadMessage("undecodable", f"the stored result of {task_id} is no result document")
        found = dict(document)
        state = found.pop("status")
        value = found.pop("result", None)
        return Result(
            task_id=found.pop("task_id", None) or task_id,
            state=state,
            value=told_value(state, value),
            traceback=found.pop("traceback", None),
            children=found.pop("children", None),
            date_done=found.pop("date_done", None),
            extra=found,
        )

    def decode_value(self, data: bytes, content_type: str | None = None) -> Any:
        """What `encode_value`, or a Celery worker, has written; of another content type if accepted.

        Raises BadMessage.
        """
        if data.startswith(_MARK):
            kind, _, data = data[len(_MARK) :].partition(b"\x00")
            data = decompress(data, kind.decode(errors="replace"), self._options.limits.decompressed)
        return self._serializer.loads(data, content_type or self.content_type, None)

    def says_success(self, data: bytes) -> bool:
        """Whether a stored document says SUCCESS, whatever it is written with."""
        if self.status_is_readable:
            return is_success(data)
        try:
            return self.decode("", data).state == SUCCESS
        except BadMessage:
            return False


def _plain_value(value: Any) -> Any:
    if isinstance(value, RemoteError):
        return {"exc_type": value.exc_type, "exc_message": value.exc_message, "exc_module": value.exc_module}
    return value


def told_value(state: str, value: Any) -> Any:
    """A decoded value as `Result.value` has it: an error where the state tells one."""
    return _remote_error(value) if state in _WITH_ERROR else value


def _remote_error(value: Any) -> Any:
    if is_object(value):
        return RemoteError(
            exc_type=str(value.get("exc_type") or "ValueError"),
            exc_message=value.get("exc_message"),
            exc_module=value.get("exc_module"),
        )
    if isinstance(value, BaseException):  # a pickled result, from an app that accepts pickle
        arguments = [arg if type(arg) in (str, int, float, bool) else str(arg) for arg in value.args]
        return RemoteError(type(value).__qualname__, arguments, type(value).__module__)
    return None if value is None else RemoteError("Exception", value)


class ResultStore(Protocol):
    """One result store, seen from one event loop."""

    #: Where workers send results, for a store that has them sent; "" where they are kept for everybody. Who sends a
    #: task announces it to such a store first.
    reply_to: str

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    @property
    def place(self) -> object:
        """Where records may also be written by a broker, see `aqueue.broker.Broker.keeps`; None: nowhere."""
        ...

    def record(self, result: Result) -> Record:
        """A result as it is stored. Raises EncodeError, MessageTooLarge."""
        ...

    async def put(self, records: Sequence[Record]) -> None:
        """Store records and tell those who wait. Never overwrites SUCCESS. Raises StoreUnavailable."""
        ...

    async def announce(self, records: Sequence[Record]) -> None:
        """Store those records whose key is absent. Raises StoreUnavailable."""
        ...

    async def get(self, task_id: str, wait: float = 0.0) -> Result | None:
        """The latest state, waiting up to ``wait`` seconds for a final one; None when there is none.

        Raises StoreUnavailable, BadMessage.
        """
        ...

    async def forget(self, task_id: str) -> None:
        """Delete a result. Raises StoreUnavailable."""
        ...


# --- from a URL --------------------------------------------------------------------------------------

_RPC = "aqueue.results.rpc:RpcResults"
_DATABASE = "aqueue.results.database:DatabaseResults"
_REDIS = "aqueue.results.redis:RedisResults"
_MEMCACHED = "aqueue.results.memcached:MemcachedResults"
_OBJECTS = "aqueue.results.object_store:ObjectResults"
_STORES: Final = {
    "memory": "aqueue.results.memory:MemoryResults",
    "sqlite": "aqueue.results.sqlite:SqliteResults",
    **dict.fromkeys(REDIS_SCHEMES, _REDIS),
    **dict.fromkeys(RABBITMQ_SCHEMES, _RPC),
    **dict.fromkeys(("db+sqlite", "db+postgresql", "db+mysql", "db+mariadb"), _DATABASE),
    # The names of Celery's clients for memcached: it has one for all of them, too.
    **dict.fromkeys(("cache+memcached", "cache+memcache", "cache+pymemcache", "cache+pylibmc"), _MEMCACHED),
    **dict.fromkeys(("file", "s3", "gs", "azureblockblob"), _OBJECTS),
}
#: The extra that brings what a store imports.
_EXTRAS: Final = {
    "db+sqlite": "sqlalchemy",
    "db+postgresql": "postgresql",
    **dict.fromkeys(("db+mysql", "db+mariadb"), "mysql"),
    "azureblockblob": "azureblockblob",
    "file": "file",
    "gs": "gcs",
    "s3": "s3",
}
#: SQLAlchemy's URLs may name a driver behind the database.
_DRIVER: Final = re.compile(r"(?<=^db\+)(\w+)\+\w+$")

#: Makes a store for the event loop it is called on.
StoreFactory = Callable[[StoreOptions], ResultStore]


def from_url(url: Url) -> StoreFactory:
    """How to make stores for a URL; the driver is imported here. Raises ConfigurationError."""
    scheme = _DRIVER.sub(r"\1", url.scheme)
    if scheme not in _STORES:
        raise ConfigurationError(
            f"no result store for {url.scheme}:// in {url}; there are {', '.join(sorted(_STORES))}"
        )
    module, name = _STORES[scheme].split(":")
    try:
        factory: Any = getattr(import_module(module), name)
        made: StoreFactory = factory.factory(url)
    except ImportError as error:
        if scheme not in _EXTRAS:
            raise
        raise ConfigurationError(
            f"{url} needs a package that is missing ({error}): pip install 'aqueue[{_EXTRAS[scheme]}]'"
        ) from None
    return made
