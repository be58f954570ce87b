"""What an app decides once, for all its tasks. Times are in seconds, sizes in bytes."""

from collections.abc import Mapping, Sequence

import msgspec

from aqueue.broker import Queue
from aqueue.errors import ConfigurationError
from aqueue.findings import RULES
from aqueue.options import Options, is_seconds
from aqueue.protocol import MAX_PRIORITY
from aqueue.serialization import Limits, Signer

#: Where a task goes: a queue, or options such as ``{"queue": "feeds", "priority": 5}``.
Route = str | Options


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of an `AQueue`; every default is what a Celery fleet expects, or safer."""

    #: For tasks that nothing routes elsewhere.
    default_queue: str = "celery"
    #: 0 to 9, higher is more urgent. On a Redis shared with Celery clients that set no priority, 9 puts ours
    #: among theirs: without one theirs are the most urgent there.
    default_priority: int = 0
    #: Task name, with ``*`` and ``?``, to where it goes; the first that fits counts.
    routes: Mapping[str, Route] = msgspec.field(default_factory=dict[str, Route])
    #: Queues (globs) that only Celery workers consume: their ETAs are sent for those workers to hold.
    eta_queues: Sequence[str] = ()
    #: Queue, with ``*`` and ``?``, to how it is declared on RabbitMQ; the exact name counts first.
    queues: Mapping[str, Queue] = msgspec.field(default_factory=dict[str, Queue])
    #: ``quorum`` or ``classic``: of what the queues of RabbitMQ's delays are made, where they aren't there yet.
    delayed_queue_type: str = "quorum"
    #: Modules to import before a worker starts.
    include: Sequence[str] = ()

    serializer: str = "json"
    compression: str | None = None
    accept_content: Sequence[str] = ("json",)
    #: For the ``auth`` serializer, see `aqueue.signing.Auth`.
    signer: Signer | None = None
    limits: Limits = msgspec.field(default_factory=Limits)

    #: Keep no results, unless a task says otherwise.
    ignore_result: bool = False
    result_serializer: str = "json"
    result_accept_content: Sequence[str] | None = None
    result_compression: str | None = None
    #: How long results are kept; None keeps them for ever.
    result_expires: float | None = 86400.0
    #: Store name, arguments, worker, retries and queue with each result.
    result_extended: bool = False
    #: Record each sent task as PENDING, so that an unknown id can be told from a waiting one.
    track_sent: bool = True
    #: Record STARTED when a task begins.
    track_started: bool = False

    #: All that `send` may take, connecting included.
    send_timeout: float = 5.0
    #: How long a claim lasts without being renewed; the same for every worker of a queue.
    lease: float = 30.0
    #: How long it is remembered that a task was cancelled; longer than any task waits for its time.
    cancel_expires: float = 86400.0
    #: A task without a `timeout` of its own may run this long.
    timeout: float = 3600.0
    #: A run that was told to end has this long to do so; then a child process is killed, and anything else that
    #: still runs is reported as stuck.
    kill_after: float = 5.0
    #: A child process makes way for a fresh one after so many tasks; None lets it live.
    process_max_tasks: int | None = None
    #: And when it still takes more memory (bytes, resident) after a task.
    process_max_memory: int | None = None
    #: A message whose holder was lost this often is buried.
    max_deliveries: int = 5
    #: Rules of ``aqueue doctor``, such as ``AQ503``, that are known to be broken here and not told of.
    ignored_checks: Sequence[str] = ()
    #: A message whose task no worker here knows waits this long for one that does, then it is buried.
    unknown_grace: float = 3600.0

    def __post_init__(self) -> None:
        priority: object = self.default_priority
        if type(priority) is not int or not 0 <= priority <= MAX_PRIORITY:
            raise ConfigurationError(f"default_priority is 0 to {MAX_PRIORITY}, got {priority!r}")
        _check_count("max_deliveries", self.max_deliveries)
        for name in ("process_max_tasks", "process_max_memory"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        if self.delayed_queue_type not in ("quorum", "classic"):
            raise ConfigurationError(f"delayed_queue_type is quorum or classic, got {self.delayed_queue_type!r}")
        if self.result_serializer == "auth":
            raise ConfigurationError("results are not signed; choose another result_serializer")
        for name in ("send_timeout", "lease", "timeout", "kill_after", "cancel_expires"):
            if not is_seconds(getattr(self, name)) or not getattr(self, name):
                raise ConfigurationError(f"{name} is a number of seconds over 0, got {getattr(self, name)!r}")
        _check_rules(self.ignored_checks)
        if not is_seconds(self.unknown_grace):
            raise ConfigurationError(f"unknown_grace is a number of seconds, got {self.unknown_grace!r}")
        if self.result_expires is not None and not is_seconds(self.result_expires):
            raise ConfigurationError(f"result_expires is a number of seconds or None, got {self.result_expires!r}")


def _check_count(name: str, count: object) -> None:
    if type(count) is not int or count < 1:
        raise ConfigurationError(f"{name} is an integer, 1 or more; got {count!r}")


def _check_rules(rules: Sequence[str]) -> None:
    unknown = [rule for rule in rules if rule not in RULES]
    if unknown:
        raise ConfigurationError(f"ignored_checks: there is no rule {unknown[0]!r:.40}; docs/doctor.md lists them")
