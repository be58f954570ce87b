"""Bells that ring while others are being hung up."""

import asyncio
import threading
from pathlib import Path

from aqueue.drivers.doorbell import Doorbell
from tests.kit.waiting import until


async def test_who_begins_to_listen_while_it_rings_hears_the_next_ring(tmp_path: Path) -> None:
    """No ring may take its pipe for that of a dead listener, and remove it."""
    bell = Doorbell(tmp_path / "bells", "messages")
    ended = threading.Event()

    def ring() -> None:
        while not ended.is_set():
            bell.ring()

    ringers = [threading.Thread(target=ring) for _ in range(2)]
    for ringer in ringers:
        ringer.start()
    try:
        for _ in range(200):
            heard = asyncio.Event()
            stop = bell.listen(heard.set)
            await until(heard.is_set, "it rings")
            stop()
    finally:
        ended.set()
        for ringer in ringers:
            ringer.join()
