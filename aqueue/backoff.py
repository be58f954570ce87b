"""How long to wait before something that has failed is tried again."""

import random
from typing import Final

#: Doublings after which every pause is at its longest; numbers end somewhere, outages last for hours.
_MOST_DOUBLINGS: Final = 60


def pause(failures: int, *, first: float = 0.05, longest: float = 2.0) -> float:
    """Seconds: twice ``first`` after one failure, doubled by each further one up to ``longest``.

    Shortened at random by up to a half, so that those who failed together don't come back together.
    """
    return min(longest, first * 2.0 ** min(failures, _MOST_DOUBLINGS)) * random.uniform(0.5, 1.0)
