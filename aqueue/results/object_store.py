"""Results as objects: files, S3, Google Cloud Storage, Azure blobs (celery-protocol 4.4).

One result is one object, named as Celery's backend for the same service names it; obstore speaks to all of them. A
store tells nobody of a change, so one look a tick serves everybody who waits; each id costs a request, as none of them
reads several objects at once.

A new document is put on condition that the old one is still the one that was read, so SUCCESS is never overwritten.
Files, and services that refuse conditions, know only "if absent": there the rest is read first and written then, as
Celery does, and of two workers that end one task at the same moment the later wins.

No object has an end of its own. One older than ``expires`` counts as absent and is removed when it is seen; those that
nobody asks for need a lifecycle rule of the bucket. PENDING does not age: its task may be meant for next week.
"""

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Final, NamedTuple, Self, TypeVar

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, GenericError, NotSupportedError, PreconditionError

from aqueue.drivers.buckets import Bucket, open_bucket, sentence
from aqueue.errors import AQueueError, BadMessage, EncodeError, StoreUnavailable
from aqueue.protocol import Record
from aqueue.results import PENDING, Documents, Result, StoreFactory, StoreOptions
from aqueue.results.gathering import all_done
from aqueue.results.keys import task_prefix
from aqueue.results.polling import Polling
from aqueue.url import Url

T = TypeVar("T")

#: What an id may be, that its object has a name everywhere: no folders, no control characters, no end in ``#1``.
_ID: Final = re.compile(r"(?!.*#\d+$)[^/\\\x00-\x1f\x7f]{1,200}")
#: Requests of one store at the same time.
_REQUESTS: Final = 32
#: Seconds between two looks for an id that is waited for long; each costs a request, and money.
_LONGEST_PAUSE: Final = 1.0
#: Seconds after which a file is read again that seems to be half written: Celery empties it first.
_WRITING: Final = (0.001, 0.003, 0.007, 0.015, 0.03, 0.05)
#: How often a record is tried again because others wrote the same object in between.
_TRIES: Final = 20


class _Stored(NamedTuple):
    data: bytes
    #: What a condition refers to: etag, generation.
    version: dict[str, str]
    #: Seconds since it was written, by the store's clock and ours.
    age: float


class ObjectResults:
    """A `aqueue.results.ResultStore` of objects; see the module's text."""

    reply_to = ""

    def __init__(self, bucket: Bucket, prefix: str, options: StoreOptions) -> None:
        self._documents = Documents(options)
        self._expires = options.expires
        self._timeout = options.timeout
        self._store = bucket.store
        self._prefix = bucket.base + prefix
        self._shown = bucket.shown
        self._torn = bucket.torn
        #: Whether the service can put if absent, and if unchanged; it says so when it can't.
        self._creates = True
        self._updates = not bucket.torn
        self._free = asyncio.Semaphore(_REQUESTS)
        self._polling = Polling(self._read, longest=_LONGEST_PAUSE)

    @classmethod
    def factory(cls, url: Url) -> StoreFactory:
        """Stores for ``file:``, ``s3:``, ``gs:`` and ``azureblockblob:`` URLs. Raises ConfigurationError."""
        bucket = open_bucket(url)
        prefix = task_prefix(url.query.get("key_prefix", ""))
        return lambda options: cls(bucket, prefix, options)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._polling.close()

    @property
    def place(self) -> None:
        """No broker keeps its messages here."""
        return None

    def record(self, result: Result) -> Record:
        if _ID.fullmatch(result.task_id) is None:
            raise EncodeError(
                f"the id {result.task_id!r} makes no name of an object: 200 characters, no slash, no control character"
            )
        return Record(self._prefix + result.task_id, self._documents.encode(result), self._expires)

    # --- writing ---

    async def put(self, records: Sequence[Record]) -> None:
        by_name: dict[str, list[Record]] = {}
        for record in records:
            by_name.setdefault(record.key, []).append(record)
        await all_done([self._put_in_order(same) for same in by_name.values()])

    async def _put_in_order(self, records: Sequence[Record]) -> None:
        for record in records:
            await self._put(record)

    async def _put(self, record: Record) -> None:
        for _ in range(_TRIES):
            stored = await self._load(record.key)
            if stored is not None and self._documents.says_success(stored.data) and not self._is_over(stored):
                return
            if await self._write(record, stored):
                return
        raise StoreUnavailable(f"{self._shown}: others keep writing {record.key} in between")

    async def _write(self, record: Record, stored: _Stored | None) -> bool:
        """Write over what was read; False when it is no longer there, or somebody has written first."""
        mode: Any = "create" if self._creates else "overwrite"
        if stored is not None:
            mode = stored.version if self._updates and stored.version else "overwrite"
        try:
            await self._request(lambda: obstore.put_async(self._store, record.key, record.value, mode=mode))
        except (AlreadyExistsError, PreconditionError):
            return False
        except (NotImplementedError, NotSupportedError):
            if mode == "overwrite":
                raise StoreUnavailable(f"{self._shown} takes no objects") from None
            if mode == "create":
                self._creates = False
            else:
                self._updates = False
            return False
        except FileNotFoundError:
            if isinstance(mode, dict):  # removed meanwhile
                return False
            raise StoreUnavailable(f"{self._shown}: there is no such folder, bucket or container; make it") from None
        return True

    async def announce(self, records: Sequence[Record]) -> None:
        await all_done([self._announce(record) for record in records])

    async def _announce(self, record: Record) -> None:
        if self._creates and (await self._write(record, None) or self._creates):
            return
        if await self._load(record.key) is None:
            await self._write(record, None)

    async def forget(self, task_id: str) -> None:
        if _ID.fullmatch(task_id) is not None:
            await self._remove(self._prefix + task_id)

    async def _remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            await self._request(lambda: obstore.delete_async(self._store, name))

    # --- reading ---

    async def get(self, task_id: str, wait: float = 0.0) -> Result | None:
        return await self._polling.get(task_id, wait)

    async def _read(self, task_ids: Sequence[str]) -> Mapping[str, Result | AQueueError]:
        wanted = [task_id for task_id in task_ids if _ID.fullmatch(task_id) is not None]
        news = await all_done([self._result(task_id) for task_id in wanted])
        return {task_id: found for task_id, found in zip(wanted, news, strict=True) if found is not None}

    async def _result(self, task_id: str) -> Result | AQueueError | None:
        stored = await self._load(self._prefix + task_id)
        if stored is None or not stored.data:  # as Celery takes an empty one
            return None
        if self._is_over(stored):
            await self._remove(self._prefix + task_id)
            return None
        try:
            return self._documents.decode(task_id, stored.data)
        except BadMessage as error:
            return error

    def _is_over(self, stored: _Stored) -> bool:
        if not self._expires or stored.age <= self._expires:
            return False
        try:
            return self._documents.decode("", stored.data).state != PENDING
        except BadMessage:
            return True

    async def _load(self, name: str) -> _Stored | None:
        try:
            return await self._request(lambda: self._fetch_whole(name) if self._torn else self._fetch(name))
        except FileNotFoundError:
            return None

    async def _fetch_whole(self, name: str) -> _Stored:
        """A file that Celery may be writing just now."""
        for pause in _WRITING:
            with suppress(GenericError, BadMessage):  # it was cut while it was read; or is not written to its end
                stored = await self._fetch(name)
                self._documents.decode("", stored.data)
                return stored
            await asyncio.sleep(pause)
        return await self._fetch(name)

    async def _fetch(self, name: str) -> _Stored:
        answer = await obstore.get_async(self._store, name)
        meta: Mapping[str, Any] = {**answer.meta}
        version = {key: meta[key] for key in ("e_tag", "version") if meta.get(key) is not None}
        return _Stored(
            data=bytes(await answer.bytes_async()),
            version=version,
            age=time.time() - meta["last_modified"].timestamp(),
        )

    async def _request(self, request: Callable[[], Awaitable[T]]) -> T:
        """An answer in time. Raises StoreUnavailable, and obstore's words for what is there or not."""
        with self._raising():
            async with self._free, asyncio.timeout(self._timeout):
                return await request()

    @contextmanager
    def _raising(self) -> Generator[None]:
        try:
            yield
        except (AlreadyExistsError, PreconditionError, NotSupportedError, FileNotFoundError, NotImplementedError):
            raise
        except TimeoutError:
            raise StoreUnavailable(f"{self._shown}: no answer within {self._timeout:g} s") from None
        except (BaseError, OSError, ValueError) as error:
            raise StoreUnavailable(f"{self._shown}: {sentence(error)}") from None
