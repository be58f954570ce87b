"""Code that holds the interpreter: no other thread of the process does anything meanwhile."""

import re
import time


def hold(length: int) -> None:
    """Twice as long for each one more."""
    re.fullmatch("(a+)+b", "a" * length)


def length_for(seconds: float) -> int:
    """The argument of `hold` that takes at least so long here."""
    length, took = 18, 0.0
    while took < 0.1:
        length += 1
        started = time.monotonic()
        hold(length)
        took = time.monotonic() - started
    while took < seconds:
        length += 1
        took *= 1.9
    return length
