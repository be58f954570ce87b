"""Short, safe texts of values: `argsrepr` and `kwargsrepr` (celery-protocol 1.6), and log fields.

A text is about ``limit`` characters long at most and ``levels`` deep, and making one never raises,
whatever a value's own ``repr`` does.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any, cast

LIMIT = 1024
LEVELS = 3

_SHORT = frozenset((int, float, bool, type(None)))
_BRACKETS: dict[object, tuple[str, str]] = {
    list: ("[", "]"),
    tuple: ("(", ")"),
    dict: ("{", "}"),
    set: ("{", "}"),
    frozenset: ("frozenset({", "})"),
}
_EMPTY: dict[object, str] = {set: "set()", frozenset: "frozenset()"}
#: Behind these a value stands, so that no comma is needed to say that it is left out.
_BEFORE_VALUES = frozenset([", ", ": ", *(opening for opening, _ in _BRACKETS.values())])


def saferepr(value: Any, limit: int = LIMIT, levels: int = LEVELS) -> str:
    """A Python-like text of a value; what doesn't fit is ``...``, and open brackets are closed."""
    if _is_short(value):
        with suppress(ValueError):  # a number that Python refuses to show
            text = repr(value)
            if len(text) <= limit:
                return text
    writer = _Writer(limit)
    writer.value(value, levels)
    return "".join(writer.out)


def _is_short(value: Any) -> bool:
    """Most calls: a few numbers, or nothing."""
    if type(value) is tuple:
        return len(value) < 16 and _SHORT.issuperset(map(type, value))  # pyright: ignore[reportUnknownArgumentType]
    return type(value) is dict and not value


def printable(value: object, limit: int = 200) -> str:
    """One line of printable text for logs: control characters escaped, cut at ``limit``."""
    line = (value if type(value) is str else _guarded(str, value))[: limit + 1]
    line = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in line)
    return line if len(line) <= limit else line[: limit - 1] + "…"


class _Writer:
    """Writes until the room is used up; from then on only closing brackets get through."""

    def __init__(self, room: int) -> None:
        self.out: list[str] = []
        self.room = room
        self.full = False

    def value(self, value: object, levels: int) -> None:
        brackets = _BRACKETS.get(type(value))
        if brackets is None:
            self._scalar(value)
        elif not value:
            self._text(_EMPTY.get(type(value)) or "".join(brackets))
        elif levels <= 0:
            self._text(f"{brackets[0]}...{brackets[1]}")
        else:
            self._container(value, brackets, levels - 1)

    def _container(self, value: Any, brackets: tuple[str, str], levels: int) -> None:
        if not self._text(brackets[0]):
            return
        kind = cast(object, type(value))
        number = 0
        for number, item in enumerate(value):
            if self.full:
                break
            if number:
                self._text(", ")
            if kind is dict:
                self._scalar(item)
                self._text(": ")
                self.value(value[item], levels)
            else:
                self.value(item, levels)
        lone = kind is tuple and number == 0
        self.out.append("," + brackets[1] if lone else brackets[1])

    def _scalar(self, value: Any) -> None:
        if type(value) is not str:
            self._text(_guarded(repr, value))
            return
        text = repr(value[: self.room + 2])
        if len(text) > self.room and not self.full:
            text, self.full = text[: self.room + 1] + "...'", True
            self.out.append(text)
            return
        self._text(text)

    def _text(self, text: str) -> bool:
        """Write if there is room; False when nothing more will be written."""
        if self.full:
            return False
        if len(text) > self.room:
            self.out.append("..." if not self.out or self.out[-1] in _BEFORE_VALUES else ", ...")
            self.full = True
            return False
        self.out.append(text)
        self.room -= len(text)
        return True


def _guarded(show: Callable[[Any], str], value: Any) -> str:
    """``str`` or ``repr`` of a value, whatever the value's own methods do."""
    try:
        return show(value)
    except Exception as error:  # noqa: BLE001 - they may do anything
        return f"<{type(value).__qualname__} whose text raised {type(error).__name__}>"
