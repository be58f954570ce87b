"""What a process of a run is told, as one JSON argument."""

import msgspec


class WorkerConfig(msgspec.Struct, kw_only=True):
    """Of a worker."""

    #: ``w0.2`` is the third process of the first worker.
    name: str
    folder: str
    broker: str
    results: str
    queue: str
    lease: float
    max_deliveries: int = 5
    send_timeout: float = 2.0
    concurrency: int = 8
    grace: float = 5.0
    failpoints: list[str] = msgspec.field(default_factory=list[str])
    #: A planted bug, see `tests.chaos.mutants`.
    mutant: str = ""


class ProducerConfig(msgspec.Struct, kw_only=True):
    """Of a producer: ``rate`` tasks a second for ``seconds``."""

    name: str
    folder: str
    broker: str
    results: str
    queue: str
    lease: float
    seed: int
    rate: float
    seconds: float
    send_timeout: float = 2.0
    #: Task name to its share of what is sent.
    mix: dict[str, float]
    #: Send once more, with its id, what was sent without an answer.
    repeats: bool = False
    failpoints: list[str] = msgspec.field(default_factory=list[str])
    mutant: str = ""
