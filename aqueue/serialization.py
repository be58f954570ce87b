"""Values to bytes and back: content types, Celery's extended JSON, limits (celery-protocol 1.9, 1.10).

A `Serializer` belongs to one app: it knows which content types that app accepts and how large a message
may be. Limits are checked before anything is built. Everything that can't be read raises BadMessage with
a reason code; nothing here imports, calls or looks up a name that came from a message, except pickle,
which is refused unless the app lists it in ``accept_content``.
"""

import base64
import binascii
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import date, datetime, time
from decimal import Decimal
from importlib import import_module
from typing import Any, Final, NamedTuple, Protocol, TypeGuard
from uuid import UUID

import msgspec

from aqueue.errors import BadMessage, ConfigurationError, EncodeError, MessageTooLarge
from aqueue.shapes import is_list, is_object

JSON = "application/json"
MSGPACK = "application/x-msgpack"
YAML = "application/x-yaml"
PICKLE = "application/x-python-serialize"
DATA = "application/data"
TEXT = "text/plain"


#: What a sender may call a serializer, with the content type that travels.
CONTENT_TYPES = {"json": JSON, "msgpack": MSGPACK, "yaml": YAML, "pickle": PICKLE, "auth": DATA}


class Encoded(NamedTuple):
    """A value as it travels."""

    content_type: str
    content_encoding: str
    data: bytes


class Signer(Protocol):
    """Signs and verifies bodies; `aqueue.signing.Auth` speaks Celery's ``auth`` format."""

    def sign(self, body: Encoded) -> bytes: ...

    def verify(self, data: bytes) -> Encoded:
        """The signed body. Raises BadMessage ``bad_signature``."""
        ...


class Limits(msgspec.Struct, frozen=True):
    """How large a message may be, in both directions. Sizes are in bytes."""

    message: int = 1024 * 1024
    decompressed: int = 16 * 1024 * 1024
    headers: int = 64 * 1024
    #: Nesting of lists and objects.
    depth: int = 200


DEFAULT_LIMITS: Final = Limits()


class Serializer:
    """Writes with any known serializer, reads only the content types that the app accepts."""

    def __init__(
        self, accept: Iterable[str] = ("json",), limits: Limits = DEFAULT_LIMITS, signer: Signer | None = None
    ) -> None:
        self.limits = limits
        self._signer = signer
        self._accept = frozenset(_content_type_of(name) for name in accept)
        if DATA in self._accept and signer is None:
            raise ConfigurationError("accept_content lists 'auth', but the settings have no signer to verify with")

    def dumps(self, value: Any, serializer: str) -> Encoded:
        """Encode a value; ``serializer`` is one of the names of `CONTENT_TYPES`.

        Raises EncodeError for a value the serializer can't write, ConfigurationError for an unknown one.
        """
        if serializer == "auth":
            if self._signer is None:
                raise ConfigurationError("serializer 'auth' needs a signer in the app's settings")
            return Encoded(DATA, "utf-8", self._signer.sign(self.dumps(value, "json")))
        content_type = _content_type_of(serializer)
        written = _FORMATS[content_type]
        try:
            data = written.dumps(value)
            written.check(data, self.limits)
        except ConfigurationError:
            raise
        except Exception as error:  # the methods of a value may raise anything
            raise EncodeError(f"can't be written as {serializer}: {error}") from error
        return Encoded(content_type, written.encoding, data)

    def dumps_call(self, args: Sequence[Any], kwargs: Mapping[str, Any], embed: Any, serializer: str) -> Encoded:
        """Encode the body of a task message; like `dumps`, in a third of the time when all arguments are plain."""
        if (
            serializer == "json"
            and _PLAIN.issuperset(map(type, args))
            and _PLAIN.issuperset(map(type, kwargs.values()))
        ):
            with suppress(ValueError, OverflowError):  # lone surrogates, huge numbers
                return Encoded(JSON, "utf-8", _encode_plain_json((args, kwargs, embed)))
        return self.dumps([args, kwargs, embed], serializer)

    def loads(self, data: bytes, content_type: str, content_encoding: str | None) -> Any:
        """Decode bytes of an accepted content type. Raises BadMessage."""
        if content_type not in self._accept:
            raise BadMessage("content_refused", f"content type {content_type[:80]!r} is not in accept_content")
        if content_type == DATA:
            assert self._signer is not None, "checked when the serializer was made"
            content_type, content_encoding, data = self._signer.verify(data)
            if content_type not in _FORMATS or (content_type == PICKLE and PICKLE not in self._accept):
                raise BadMessage("content_refused", f"content type {content_type[:80]!r} in a signed body")
        return _FORMATS[content_type].loads(data, content_encoding, self.limits)

    def check_size(self, size: int, what: str) -> None:
        """Raise MessageTooLarge when ``size`` bytes are over the limit for a message."""
        if size > self.limits.message:
            raise MessageTooLarge(
                f"{what} is {size:,} bytes, the limit is {self.limits.message:,}. "
                "Send a reference to the data instead, compress it, or raise Limits(message=...) on both sides"
            )


def _content_type_of(name: str) -> str:
    if name in CONTENT_TYPES:
        return CONTENT_TYPES[name]
    if name in CONTENT_TYPES.values():
        return name
    raise ConfigurationError(f"unknown serializer {name!r}; use one of {', '.join(sorted(CONTENT_TYPES))}")


#: Encodings of text that a message may declare; Python knows others that cost much time, or are no text.
_CHARSETS: Final = frozenset(
    "utf-8 utf8 utf-8-sig utf-16 utf-16-le utf-16-be utf-32 utf-32-le utf-32-be "
    "ascii us-ascii latin-1 latin1 iso-8859-1 iso-8859-15 cp1252 windows-1252".split()
)


def text_of(data: bytes, content_encoding: str | None) -> str:
    """Bytes to text by their declared encoding; utf-8 when none is declared. Raises BadMessage."""
    name = content_encoding or "utf-8"
    charset = "utf-8" if name == "binary" else name.lower().replace("_", "-")
    if charset not in _CHARSETS:
        raise BadMessage("bad_encoding", f"content encoding {name[:80]!r} is not accepted")
    try:
        return data.decode(charset)
    except ValueError as error:
        raise BadMessage("bad_encoding", f"content encoding {name[:80]!r}: {error}") from error


# --- JSON -------------------------------------------------------------------------------------------

#: Exponents past this make `int()` of a Decimal hold the interpreter for seconds.
_MAX_EXPONENT = 6144
#: Texts, also one that doesn't end, are passed over in one go.
_NESTING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[{]|[\]}]', re.DOTALL)
#: An extended type's marker, or ASCII written as an escape, behind which one could hide.
_MAYBE_EXTENDED = re.compile(rb"__type__|\\u00[2-7]")
_decode_plain_json = msgspec.json.Decoder().decode
_encode_plain_json = msgspec.json.Encoder().encode
#: Types that every JSON encoder writes alike.
_PLAIN: Final = frozenset((int, str, bool, type(None)))


def check_depth(data: bytes, limit: int) -> None:
    """Raise BadMessage ``too_deep`` when JSON text nests deeper than ``limit``, before it is parsed."""
    if len(data) <= limit or data.count(b"[") + data.count(b"{") <= limit:
        return
    depth = 0
    for token in _NESTING.finditer(data):
        mark = data[token.start()]
        if mark in b"[{":
            depth += 1
            if depth > limit:
                raise BadMessage("too_deep", f"nested deeper than {limit}")
        elif mark in b"]}":
            depth -= 1


def loads_json(data: bytes, depth: int, *, extended: bool = True) -> Any:
    """Decode JSON as Celery's reader does. Raises BadMessage.

    Plain text goes through the fast decoder; what that one refuses though Celery accepts it (NaN, lone
    surrogates) or may hold an extended type goes through the standard library's. Without ``extended``
    such types stay the objects they are written as.
    """
    check_depth(data, depth)
    if not extended or _MAYBE_EXTENDED.search(data) is None:
        try:
            return _decode_plain_json(data)
        except (msgspec.DecodeError, UnicodeError, RecursionError):
            pass
    try:
        return json.loads(data.decode(), object_hook=_from_extended if extended else None)
    except RecursionError as error:
        raise BadMessage("too_deep", "nested too deep to be read") from error
    except ValueError as error:
        reason = "number_too_large" if "integer string conversion" in str(error) else "undecodable"
        raise BadMessage(reason, f"not readable as JSON: {error}") from error


def _decimal(value: Any) -> Decimal:
    number = Decimal(_expect(str, value))
    if number.is_finite() and abs(number.adjusted()) > _MAX_EXPONENT:
        raise BadMessage("number_too_large", f"decimal exponent is over {_MAX_EXPONENT}")
    return number


def _expect(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"expected {kind.__name__}, got {type(value).__name__}")
    return value


def _uuid(value: Any) -> UUID:
    if set(_expect(dict, value)) != {"hex"}:
        raise ValueError("expected exactly the key 'hex'")
    return UUID(hex=_expect(str, value["hex"]))


_EXTENDED: dict[str, Callable[[Any], Any]] = {
    "datetime": lambda value: datetime.fromisoformat(_expect(str, value)),
    "date": lambda value: datetime.fromisoformat(_expect(str, value)).date(),
    "time": lambda value: time.fromisoformat(_expect(str, value)),
    "decimal": _decimal,
    "uuid": _uuid,
    "bytes": lambda value: _expect(str, value).encode(),
    "base64": lambda value: base64.b64decode(_expect(str, value), validate=True),
}


def _from_extended(found: dict[str, Any]) -> Any:
    """Celery's typed values; any other object, also one with an unknown type name, stays what it is."""
    if len(found) != 2 or "__type__" not in found or "__value__" not in found:
        return found
    name = found["__type__"]
    if not isinstance(name, str) or name not in _EXTENDED:
        return found
    try:
        return _EXTENDED[name](found["__value__"])
    except (ValueError, ArithmeticError) as error:
        raise BadMessage("undecodable", f"bad extended value of type {name!r}: {error}") from error


def _to_extended(value: Any) -> Any:
    """What JSON can't say by itself, in Celery's envelope. Called by the encoder for unknown types."""
    match value:
        case datetime():
            return {"__type__": "datetime", "__value__": value.isoformat()}
        case date():
            return {"__type__": "date", "__value__": value.isoformat()}
        case time():
            return {"__type__": "time", "__value__": value.isoformat()}
        case Decimal():
            return {"__type__": "decimal", "__value__": str(value)}
        case UUID():
            return {"__type__": "uuid", "__value__": {"hex": value.hex}}
        case bytes() | bytearray():
            return _bytes_to_extended(bytes(value))
        case _ if hasattr(value, "__json__"):
            return value.__json__()
        case _:
            raise TypeError(f"a {type(value).__qualname__} has no JSON form")


def _bytes_to_extended(value: bytes) -> dict[str, str]:
    try:
        return {"__type__": "bytes", "__value__": value.decode()}
    except UnicodeDecodeError:
        return {"__type__": "base64", "__value__": base64.b64encode(value).decode()}


_encode_json = json.JSONEncoder(default=_to_extended, allow_nan=False).encode


def dumps_json(value: Any) -> bytes:
    """Extended JSON, ASCII only. Raises TypeError or ValueError for what JSON can't say (NaN too)."""
    return _encode_json(value).encode()


def dumps_headers(value: dict[str, Any]) -> bytes:
    """JSON of what travels beside a body. Never fails for what was read from JSON before, lone surrogates included."""
    try:
        return _encode_plain_json(value)
    except (UnicodeEncodeError, OverflowError):
        return json.dumps(value).encode()


def _load_json(data: bytes, content_encoding: str | None, limits: Limits) -> Any:
    if content_encoding not in ("utf-8", None):
        data = text_of(data, content_encoding).encode("utf-8", "surrogatepass")
    return loads_json(data, limits.depth)


# --- the other formats ------------------------------------------------------------------------------


def _driver(name: str) -> Any:
    """A format's module, imported by its first use: apps that only speak JSON start sooner without the others."""
    try:
        return import_module(name)
    except ImportError:
        raise ConfigurationError(f"{name} needs a package that is missing: pip install 'aqueue[{name}]'") from None


def _check_built_depth(value: Any, limit: int) -> None:
    level = [value]
    for _ in range(limit + 1):
        level = [
            child
            for item in level
            if is_object(item) or is_list(item)
            for child in (item.values() if is_object(item) else item)
        ]
        if not level:
            return
    raise BadMessage("too_deep", f"nested deeper than {limit}")


def _refuse_extension(code: int, data: bytes) -> Any:
    raise ValueError(f"msgpack extension type {code} is not accepted")


def _load_msgpack(data: bytes, content_encoding: str | None, limits: Limits) -> Any:
    try:
        value = _driver("msgpack").unpackb(data, raw=False, ext_hook=_refuse_extension)
    except Exception as error:  # its errors have no base of their own
        raise BadMessage("undecodable", f"not readable as msgpack: {str(error) or type(error).__name__}") from error
    _check_built_depth(value, limits.depth)
    return value


def _yaml_loader(yaml: Any) -> Any:
    """The safe loader; the one written in C also takes no long time over hostile text."""
    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _dump_yaml(value: Any) -> bytes:
    return bytes(_driver("yaml").safe_dump(value).encode())


def _check_yaml(text: str, limits: Limits) -> None:
    """Raise BadMessage for a text that nests too deep, or whose aliases stand for too much; nothing is built.

    Celery writes an alias where one object stands in two places.
    """
    yaml = _driver("yaml")
    depth = total = 0
    #: How much each finished anchor stands for, and where those that are still open began.
    sizes: dict[str | None, int] = {}
    began: list[tuple[str | None, int]] = []
    for event in yaml.parse(text, _yaml_loader(yaml)):
        match event:
            case yaml.AliasEvent():
                if event.anchor not in sizes:
                    raise BadMessage("undecodable", "a yaml alias of nothing, or of what holds it")
                total += sizes[event.anchor]
            case yaml.ScalarEvent():
                total += 1 + len(event.value)
                sizes[event.anchor] = 1 + len(event.value)
            case yaml.CollectionStartEvent():
                depth += 1
                began.append((event.anchor, total))
                sizes.pop(event.anchor, None)
            case yaml.CollectionEndEvent():
                depth -= 1
                anchor, start = began.pop()
                total += 1
                sizes[anchor] = total - start
            case _:
                pass
        if depth > limits.depth:
            raise BadMessage("too_deep", f"nested deeper than {limits.depth}")
        if total > limits.decompressed:
            raise BadMessage("too_large", "yaml aliases stand for too much")


def _load_yaml(data: bytes, content_encoding: str | None, limits: Limits) -> Any:
    text = text_of(data, content_encoding)
    yaml = _driver("yaml")
    try:
        _check_yaml(text, limits)
        return yaml.load(text, _yaml_loader(yaml))
    except BadMessage:
        raise
    except Exception as error:  # the driver's own constructors raise anything on bad scalars
        raise BadMessage("undecodable", f"not readable as yaml: {str(error) or type(error).__name__}") from error


def _load_pickle(data: bytes, content_encoding: str | None, limits: Limits) -> Any:
    try:
        return _driver("pickle").loads(data)  # only reached when the app lists pickle in accept_content
    except Exception as error:
        raise BadMessage("undecodable", f"not readable as pickle: {error!r}") from error


class _Format(msgspec.Struct, frozen=True):
    encoding: str
    dumps: Callable[[Any], bytes]
    loads: Callable[[bytes, str | None, Limits], Any]
    #: Raises BadMessage for what was written, but would be refused by `loads`.
    check: Callable[[bytes, Limits], object]


_FORMATS: Mapping[str, _Format] = {
    JSON: _Format("utf-8", dumps_json, _load_json, lambda data, limits: check_depth(data, limits.depth)),
    MSGPACK: _Format(
        "binary",
        lambda value: _driver("msgpack").packb(value, use_bin_type=True),
        _load_msgpack,
        lambda data, limits: _load_msgpack(data, None, limits),
    ),
    YAML: _Format("utf-8", _dump_yaml, _load_yaml, lambda data, limits: _load_yaml(data, None, limits)),
    PICKLE: _Format(
        "binary", lambda value: _driver("pickle").dumps(value, protocol=4), _load_pickle, lambda data, limits: None
    ),
}


def decode_base64(text: str) -> bytes:
    """Strict base64. Raises BadMessage ``bad_encoding``."""
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except (binascii.Error, ValueError) as error:
        raise BadMessage("bad_encoding", f"body is not base64: {error}") from error


def is_finite_number(value: object) -> TypeGuard[float]:
    """Whether a decoded value is a real, finite number (``True`` and ``False`` are none)."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # past every float
        return False
