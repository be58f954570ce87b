"""A row of ``aqueue_effects``."""

import msgspec


class EffectRow(msgspec.Struct, frozen=True):
    """What is stored of an effect."""

    #: Of task and step, 64 characters: databases compare texts in ways of their own.
    id: str
    task_id: str
    step: str
    #: Of the claim that was first, see `aqueue.Context.token`.
    token: int | None
    made: float
