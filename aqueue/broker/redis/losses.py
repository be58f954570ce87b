"""Who lost a message on Redis, and how it died before: one field of ``aqueue:lost`` (tend.lua writes most of it).

::

    <losses since it was sent or replayed> \\n <deaths, as JSON, or nothing> \\n
    <receipt> \\t <worker> \\t <claimed (ms)> \\t <lost (ms)> \\t <cause, or nothing> \\n

The last line once for each of the last losses. The name of the field is the sha1 of the bytes of the message, so that
nothing has to be added to them.
"""

from collections.abc import AsyncIterator, Collection
from typing import Final

from aqueue.broker.history import History, Loss, decode, encode
from aqueue.broker.redis.keys import Keys
from aqueue.broker.redis.scripts import EXPLAIN
from aqueue.drivers.redis_link import RedisLink, raising
from aqueue.errors import BrokerUnavailable
from aqueue.saferepr import printable

#: Losses and deaths are forgotten this long (seconds) after the last of any message.
LOSSES_TTL: Final = 7 * 86400
_PAGE: Final = 500


def read_history(field: bytes) -> tuple[int, History]:
    """How often the message was lost, and what is remembered of it."""
    count, _, rest = field.decode(errors="replace").partition("\n")
    deaths, _, losses = rest.partition("\n")
    return int(count), History(tuple(map(_loss, losses.splitlines())), decode(deaths).deaths)


def _loss(line: str) -> Loss:
    receipt, worker, claimed, lost, cause = line.split("\t")
    return Loss(worker, int(claimed) / 1000, int(lost) / 1000, cause, receipt)


def deaths_of(history: History) -> bytes:
    """As retry_dead.lua takes them."""
    return encode(History(deaths=history.deaths)) or b""


class RedisLosses:
    """`aqueue.broker.Losses` on Redis."""

    def __init__(self, link: RedisLink, keys: Keys) -> None:
        self._link = link
        self._keys = keys

    async def explain(self, receipts: Collection[str], cause: str) -> None:
        with raising(BrokerUnavailable):
            missing = await self._explain(dict.fromkeys(receipts, ""), cause)
            if missing:  # no longer held, so lost, or settled
                await self._explain(await self._fields_of(missing), cause)

    async def _explain(self, fields: dict[str, str], cause: str) -> list[str]:
        """Returns the receipts that were not found."""
        if not fields:
            return []
        pairs = [word for pair in fields.items() for word in pair]
        keys = self._keys.ours("leased", "lost", "nothing")
        missing: list[bytes] = await self._link.run(EXPLAIN, keys, (printable(cause, 200), *pairs))
        return [receipt.decode() for receipt in missing]

    async def _fields_of(self, receipts: list[str]) -> dict[str, str]:
        """Where the losses of these claims are. Rarely asked, so nothing is kept to find them by."""
        begins = {f"\n{receipt}\t".encode(): receipt for receipt in receipts}
        found: dict[str, str] = {}
        async for name, field in self._fields():
            found |= {receipt: name for begin, receipt in begins.items() if begin in field}
        return found

    async def _fields(self) -> AsyncIterator[tuple[str, bytes]]:
        cursor = 0
        while True:
            cursor, page = await self._link.call("HSCAN", self._keys.ours("lost")[0], cursor, "COUNT", _PAGE)
            for name, field in zip(page[::2], page[1::2], strict=True):
                yield name.decode(), field
            cursor = int(cursor)
            if not cursor:
                return

    async def give_back_untaken(self) -> None:
        """Nothing to do: Redis pushes no messages."""
