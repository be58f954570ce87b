"""Arguments and results by their annotations: checked and made plain at send, rebuilt at run.

A parameter annotated with a scalar costs one type check. Anything richer (dataclass, pydantic model,
Enum, UUID, datetime, Decimal, bytes, and containers of those) goes through msgspec: to plain values that
Celery's JSON carries, and back. Without an annotation a value travels as it is.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from datetime import date, datetime, time
from decimal import Decimal
from types import SimpleNamespace
from typing import Any, Final, get_type_hints
from uuid import UUID

import msgspec

from aqueue.errors import EncodeError, InvalidArguments

#: Types that a serializer writes by itself; everything else is made plain before.
_NATIVE: Final[Mapping[str, tuple[type, ...]]] = {
    "json": (datetime, date, time, Decimal, UUID, bytes, bytearray),
    "auth": (datetime, date, time, Decimal, UUID, bytes, bytearray),
    "msgpack": (bytes, bytearray),
    "yaml": (datetime, date, bytes),
}
#: Types that every serializer writes by itself.
PLAIN_TYPES: Final = frozenset((int, float, str, bool, type(None)))
_POSITIONAL: Final = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_KEYWORD: Final = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class ArgumentCodec:
    """Knows one task's parameters. ``skip`` of them, at the start, are filled in by the worker."""

    def __init__(self, function: Callable[..., Any], name: str, skip: int = 0) -> None:
        self._name = name
        signature = inspect.signature(function)
        parameters = list(signature.parameters.values())[skip:]
        self._signature = signature.replace(parameters=parameters)
        types = {p.name: _type_of(function, p.annotation) for p in parameters}
        self._returns: Any = _type_of(function, signature.return_annotation)
        self._positional = [(p.name, types[p.name]) for p in parameters if p.kind in _POSITIONAL]
        self._keywords = {p.name: types[p.name] for p in parameters if p.kind in _KEYWORD}
        #: How many positional arguments make a call complete without any keyword.
        self._enough = _enough(parameters)
        self._rest_name = next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), "")
        self._rest: Any = types.get(self._rest_name, Any)
        self._rest_keywords = next((types[p.name] for p in parameters if p.kind is p.VAR_KEYWORD), Any)

    def encode(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], serializer: str
    ) -> tuple[list[Any], dict[str, Any]]:
        """Check a call and make its arguments plain. Raises InvalidArguments, which names the parameter."""
        self.check_call(args, kwargs)
        return (
            [
                value if type(value) is kind and kind in PLAIN_TYPES else self._to_wire(name, kind, value, serializer)
                for (name, kind), value in zip(self._kinds(len(args)), args, strict=True)
            ],
            {key: self._to_wire(key, self._of(key), value, serializer) for key, value in kwargs.items()},
        )

    def decode(self, args: list[Any], kwargs: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Rebuild arguments at run. Raises InvalidArguments."""
        self.check_call(args, kwargs)
        if args:
            args = [
                value if type(value) is kind and kind in PLAIN_TYPES else self._from_wire(name, kind, value)
                for (name, kind), value in zip(self._kinds(len(args)), args, strict=True)
            ]
        if kwargs:
            kwargs = {key: self._from_wire(key, self._of(key), value) for key, value in kwargs.items()}
        return args, kwargs

    def check_call(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Whether a call fits the signature. Raises InvalidArguments."""
        if not kwargs and len(args) in self._enough:
            return
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise InvalidArguments(f"{self._name}{self._signature}: {error}") from None

    def encode_result(self, value: Any, serializer: str) -> Any:
        """A result made plain. Raises EncodeError."""
        if type(value) in PLAIN_TYPES or serializer == "pickle":
            return value
        try:
            return _plain(value, serializer)
        except Exception as error:  # the methods of a value may raise anything
            raise EncodeError(f"the result of {self._name} can't be stored: {error}") from error

    def decode_result(self, value: Any) -> Any:
        """A result rebuilt by the return annotation; as it came when it doesn't fit."""
        if self._returns is Any or (type(value) in PLAIN_TYPES and self._returns is type(value)):
            return value
        try:
            return msgspec.convert(value, self._returns, strict=False, str_keys=True, dec_hook=_rebuild)
        except (msgspec.ValidationError, TypeError, ValueError, RecursionError):
            return value

    @property
    def required(self) -> Mapping[str, Any]:
        """Types of the parameters that every call gives."""
        types = dict(self._positional) | self._keywords
        return {
            name: types[name]
            for name, p in self._signature.parameters.items()
            if p.default is p.empty and name in types
        }

    def _kinds(self, count: int) -> list[tuple[str, Any]]:
        """Names and types of the first ``count`` positional arguments."""
        named = self._positional[:count]
        rest = range(count - len(named))
        return named + [(f"*{self._rest_name}[{number}]", self._rest) for number in rest] if rest else named

    def _of(self, name: str) -> Any:
        return self._keywords.get(name, self._rest_keywords)

    def _to_wire(self, name: str, kind: Any, value: Any, serializer: str) -> Any:
        if type(value) is kind and kind in PLAIN_TYPES:
            return value
        if kind is Any or serializer == "pickle":
            return value
        try:
            plain = _plain(value, serializer)
            if kind in PLAIN_TYPES:
                return msgspec.convert(plain, kind)
            msgspec.convert(plain, kind, str_keys=True, dec_hook=_rebuild)
            return plain
        except Exception as error:  # noqa: BLE001 - the methods of a value may raise anything
            raise InvalidArguments(f"{self._name}: argument {name!r}: {_sentence(error)}") from None

    def _from_wire(self, name: str, kind: Any, value: Any) -> Any:
        if kind is Any or (type(value) is kind and kind in PLAIN_TYPES):
            return value
        try:
            return msgspec.convert(value, kind, strict=False, str_keys=True, dec_hook=_rebuild)
        except Exception as error:  # noqa: BLE001 - a class may do anything when it is made
            raise InvalidArguments(f"{self._name}: argument {name!r}: {_sentence(error)}") from None


def as_call(args: Sequence[Any] | None, kwargs: Mapping[str, Any] | None) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Arguments given as a sequence and a mapping, as such. Raises InvalidArguments."""
    if isinstance(args, str | bytes | Mapping):
        raise InvalidArguments(f"args is a list or a tuple of arguments; got {args!r:.80}. For one, write (x,)")
    try:
        return list(args or ()), dict(kwargs or {})
    except (TypeError, ValueError):
        raise InvalidArguments(
            f"args is a list or a tuple, kwargs a mapping of arguments; got {args!r:.80} and {kwargs!r:.80}"
        ) from None


def _enough(parameters: Sequence[inspect.Parameter]) -> range:
    if any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
        return range(0)
    positional = [p for p in parameters if p.kind in _POSITIONAL]
    return range(sum(p.default is p.empty for p in positional), len(positional) + 1)


def resolved(function: Callable[..., Any], annotation: Any) -> Any:
    """The type that one annotation of a function stands for; Any when only a type checker can say."""
    if annotation is inspect.Signature.empty:
        return Any
    try:
        hints = get_type_hints(
            SimpleNamespace(__annotations__={"it": annotation}),
            globalns=getattr(inspect.unwrap(function), "__globals__", {}),
            include_extras=True,
        )
    except Exception:  # noqa: BLE001 - an annotation is code, and may be any text
        return Any
    return hints["it"]


def _type_of(function: Callable[..., Any], annotation: Any) -> Any:
    """What an annotation asks for: Any when only a type checker can say, `object` when msgspec can't."""
    kind = resolved(function, annotation)
    asked: list[Any] = []
    try:
        msgspec.convert(object(), kind, dec_hook=lambda kind, _: asked.append(kind))
    except TypeError:  # such as a union of two types that look alike in JSON
        return object
    except Exception:  # noqa: BLE001, S110 - it doesn't fit, or a class it is made of isn't there yet
        pass
    is_generic = bool(asked) and not isinstance(asked[0], type)  # such as Callable[[], int]
    return object if is_generic else kind


def _plain(value: Any, serializer: str) -> Any:
    native = _NATIVE.get(serializer, ())
    if serializer == "yaml":
        return msgspec.to_builtins(value, builtin_types=native, enc_hook=_take_apart)
    try:
        return msgspec.to_builtins(value, builtin_types=native, str_keys=True, enc_hook=_take_apart)
    except TypeError:  # keys of those types become text only when the values do
        native = tuple(kind for kind in native if kind in (bytes, bytearray))
        return msgspec.to_builtins(value, builtin_types=native, str_keys=True, enc_hook=_take_apart)


def _take_apart(value: Any) -> Any:
    """Objects that msgspec doesn't know: pydantic models, and what says how it becomes JSON."""
    if hasattr(value, "model_dump"):
        return value.model_dump(by_alias=True)  # `model_validate` reads those names
    if hasattr(value, "__json__"):
        return value.__json__()
    raise TypeError(f"a {type(value).__qualname__} can't travel in a message")


def _rebuild(kind: type[Any], value: Any) -> Any:
    if hasattr(kind, "model_validate"):
        return kind.model_validate(value)
    if isinstance(value, kind):
        return value
    raise TypeError(f"expected {kind.__qualname__}, got {type(value).__qualname__}")


def _sentence(error: Exception) -> str:
    """msgspec's "Expected `int`, got `str` - at `$.id`" as people say it."""
    what, _, where = str(error).partition(" - at ")
    where = where.strip("`").removeprefix("$").lstrip(".")
    what = what.replace("`", "")
    return (what[:1].lower() + what[1:]) + (f" at {where}" if where else "")
