"""What is remembered of a message beside its bytes: who lost it, and how it died before.

It is kept beside the message, so that the bytes go back to their queue as they came.
"""

from typing import Final

import msgspec

#: Of losses, and of earlier deaths, the last so many are kept.
KEPT: Final = 5
#: A cause by which a worker says that memory ran out; a message that is buried for it has the reason ``oom``.
OUT_OF_MEMORY: Final = "out of memory"


class Loss(msgspec.Struct, frozen=True):
    """A claim whose holder was lost. Times are unix times, by the broker's clock."""

    #: ``worker@host``; empty where the server doesn't tell.
    worker: str
    #: None where the server doesn't tell.
    claimed: float | None
    #: When the message was taken back.
    lost: float
    #: Why, in a few words, once somebody has said: see `aqueue.broker.Losses.explain`.
    cause: str = ""
    #: The claim.
    receipt: str = ""


class Death(msgspec.Struct, frozen=True):
    """An earlier death of a message that was replayed. Times are unix times."""

    #: Of the dead letter that it was.
    id: str
    reason: str
    detail: str
    died: float
    replayed: float
    deliveries: int
    worker: str
    losses: tuple[Loss, ...] = ()


class History(msgspec.Struct, frozen=True):
    """The last losses since it was sent or replayed, and the last deaths, the oldest first."""

    losses: tuple[Loss, ...] = ()
    deaths: tuple[Death, ...] = ()

    def after_loss(self, loss: Loss) -> "History":
        return History((*self.losses, loss)[-KEPT:], self.deaths)

    def explained(self, receipt: str, cause: str) -> "History":
        """With the cause of one loss, if it is among these."""
        losses = [
            msgspec.structs.replace(loss, cause=cause) if loss.receipt == receipt else loss for loss in self.losses
        ]
        return History(tuple(losses), self.deaths)

    @property
    def cause(self) -> str:
        """The last cause that is known, or nothing."""
        return next((loss.cause for loss in reversed(self.losses) if loss.cause), "")


NO_HISTORY: Final = History()

_decoder: Final = msgspec.json.Decoder(History)


def encode(history: History) -> bytes | None:
    """JSON; None for no history."""
    return msgspec.json.encode(history) if history.losses or history.deaths else None


def decode(document: bytes | str | None) -> History:
    """The other way round; what can't be read is no history."""
    if not document:
        return NO_HISTORY
    try:
        return _decoder.decode(document)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return NO_HISTORY
