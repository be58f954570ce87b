"""Short, safe texts of values: `argsrepr` and `kwargsrepr` (celery-protocol 1.6), and log fields.

A text is about ``limit`` characters long at most and ``levels`` deep, and making one never raises,
whatever a value's own ``repr`` does.
"""

from typing import Any

from aqueue.shapes import is_object

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


def saferepr(value: Any, limit: int = LIMIT, levels: int = LEVELS) -> str:
    """A Python-like text of a value; what doesn't fit is ``...``, and open brackets are closed."""
    if _is_short(value):
        return repr(value)
    writer = _Writer(limit)
    writer.value(value, levels)
    return "".join(writer.out)


def _is_short(value: tuple[Any, ...] | dict[str, Any]) -> bool:
    """Most calls: a few numbers, or nothing."""
    if type(value) is tuple:
        return len(value) < 16 and _SHORT.issuperset(map(type, value))
    return type(value) is dict and not value


def printable(text: object, limit: int = 200) -> str:
    """One line of printable text for logs: control characters escaped, cut at ``limit``."""
    line = str(text)[: limit + 1]
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
            self._text("set()" if isinstance(value, set) else brackets[0] + brackets[1])
        elif levels <= 0:
            self._text(f"{brackets[0]}...{brackets[1]}")
        else:
            self._container(value, brackets, levels - 1)

    def _container(self, value: Any, brackets: tuple[str, str], levels: int) -> None:
        self._text(brackets[0])
        number = 0
        for number, item in enumerate(value):
            if self.full:
                break
            if number:
                self._text(", ")
            if is_object(value):
                self._scalar(item)
                self._text(": ")
                self.value(value[item], levels)
            else:
                self.value(item, levels)
        lone = type(value) is tuple and number == 0
        self.out.append("," + brackets[1] if lone else brackets[1])

    def _scalar(self, value: Any) -> None:
        if isinstance(value, str):
            text = repr(value[: self.room + 2] if len(value) > self.room else value)
            if len(text) > self.room and not self.full:
                text, self.full = text[: self.room + 1] + "...'", True
                self.out.append(text)
                return
        else:
            text = _guarded_repr(value)
        self._text(text)

    def _text(self, text: str) -> None:
        if self.full:
            return
        if len(text) > self.room:
            self.out.append(", ...")
            self.full = True
            return
        self.out.append(text)
        self.room -= len(text)


def _guarded_repr(value: Any) -> str:
    try:
        return repr(value)
    except Exception as error:  # noqa: BLE001 - a repr may do anything
        return f"<{type(value).__qualname__} whose repr raised {type(error).__name__}>"
