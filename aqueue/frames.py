"""Where code is: the line of it that a person looks for."""

import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType
from typing import Final

#: Where code of ours and of the interpreter lies, and where what is installed does: not what a person looks for.
_OURS: Final = (str(Path(__file__).parent), sysconfig.get_path("stdlib"), "<")
_INSTALLED: Final = (*_OURS, sysconfig.get_path("purelib"))


def place(frames: Iterable[FrameType]) -> str:
    """File, line and function; of frames, the innermost first, the first of the application's own code.

    Where there is none, the first of what is installed, or of any; empty without frames.
    """
    found = list(frames)
    for folders in (_INSTALLED, _OURS, ()):
        for frame in found:
            if not frame.f_code.co_filename.startswith(folders):
                return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
    return ""


def callers(frame: FrameType | None) -> Iterator[FrameType]:
    """A frame, who has called it, and so on."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def awaited(waits: object) -> list[FrameType]:
    """What a suspended coroutine waits for, the innermost first, as far as it can be followed."""
    found: list[FrameType] = []
    while isinstance(frame := getattr(waits, "cr_frame", None), FrameType):
        found.insert(0, frame)
        waits = getattr(waits, "cr_await", None)
    return found
