"""What a check finds: a rule that is broken, what is wrong here, and what to change. ``docs/doctor.md`` explains each.

Rules are kept here, by numbers that never change their meaning: 1xx servers, 2xx results, 3xx settings, 4xx tasks,
5xx the machine, 6xx what lies in the queues.
"""

from collections.abc import Mapping, Sequence
from typing import Final, Literal, Protocol, runtime_checkable

import msgspec

#: ``refuse``: work would be lost or could not be done, so a worker does not start. ``warn``: something to change.
#: ``info``: something to know.
Severity = Literal["refuse", "warn", "info"]

SEVERITIES: Final[Sequence[Severity]] = ("refuse", "warn", "info")

#: Seconds that something may be overdue while a worker lives.
PATIENCE: Final = 60.0

RULES: Final[Mapping[str, Severity]] = {
    "AQ001": "warn",  # the broker can't be reached
    "AQ002": "warn",  # the result store can't be reached
    "AQ003": "info",  # the server doesn't let us look
    "AQ101": "refuse",  # Redis evicts messages
    "AQ102": "warn",  # Redis keeps nothing on disk
    "AQ103": "refuse",  # Redis is a replica
    "AQ104": "refuse",  # Redis denies scripts or keys
    "AQ105": "refuse",  # Redis is too old
    "AQ106": "warn",  # Redis with known holes in Lua
    "AQ107": "warn",  # clocks differ
    "AQ108": "info",  # Celery's messages are more urgent
    "AQ109": "warn",  # Redis evicts results
    "AQ110": "warn",  # Redis' memory is nearly full
    "AQ121": "warn",  # a queue exists with other arguments
    "AQ122": "warn",  # a quorum queue drops what it gives up
    "AQ123": "warn",  # the consumer timeout is shorter than a task's
    "AQ124": "info",  # the usual consumer timeout is shorter than a task's
    "AQ125": "warn",  # RabbitMQ is too old
    "AQ141": "refuse",  # SQLite on a network file system
    "AQ142": "warn",  # the disk is nearly full
    "AQ201": "warn",  # results are kept for ever
    "AQ202": "warn",  # results that nobody else can see
    "AQ203": "info",  # results for the sender alone
    "AQ204": "refuse",  # results that the app itself refuses
    "AQ301": "refuse",  # messages that the app itself refuses
    "AQ302": "warn",  # pickle is accepted
    "AQ303": "warn",  # certificates are not verified
    "AQ304": "warn",  # a short lease
    "AQ305": "warn",  # a long send timeout
    "AQ306": "warn",  # a password on the command line
    "AQ307": "warn",  # a queue that no task uses
    "AQ308": "info",  # a route that fits no task
    "AQ309": "info",  # a task whose queue is not served here
    "AQ310": "warn",  # one lost worker buries a task
    "AQ311": "warn",  # no time for a rolling deploy
    "AQ312": "warn",  # signed, and unsigned as well
    "AQ313": "warn",  # the server's delivery limit comes first
    "AQ401": "warn",  # names that differ in case alone
    "AQ402": "warn",  # one function, two names
    "AQ403": "warn",  # more than a day for one run
    "AQ404": "warn",  # a retry that never happens
    "AQ405": "warn",  # expired before it starts
    "AQ406": "warn",  # an argument that can't travel
    "AQ407": "warn",  # a call that blocks the event loop
    "AQ408": "warn",  # cancellation is swallowed
    "AQ409": "warn",  # a soft timeout that comes too late
    "AQ410": "warn",  # no tasks
    "AQ501": "warn",  # too few open files
    "AQ502": "warn",  # too few threads
    "AQ503": "info",  # root
    "AQ504": "info",  # no uvloop
    "AQ505": "warn",  # the clock is wrong
    "AQ601": "warn",  # names that nobody serves
    "AQ602": "info",  # dead letters
    "AQ603": "warn",  # messages that nobody can read
    "AQ604": "info",  # a queue that the app doesn't name
    "AQ605": "warn",  # ended leases that nobody takes back
    "AQ606": "warn",  # overdue messages that nobody moves
    "AQ607": "info",  # messages in the hands of Celery workers
}


class Finding(msgspec.Struct, frozen=True):
    """One broken rule: ``what`` is a sentence about here, ``step`` says what to change."""

    rule: str
    what: str
    step: str

    @property
    def severity(self) -> Severity:
        return RULES[self.rule]

    def __str__(self) -> str:
        return f"{self.rule}: {self.what}; {self.step}"


class Use(msgspec.Struct, frozen=True, kw_only=True):
    """What an app asks of a server."""

    #: Queues it works on, to the longest time (seconds) that a task of theirs may run.
    queues: Mapping[str, float]
    #: Of what is sent without one.
    default_priority: int = 0
    #: Whether to look at what lies in the queues, too.
    contents: bool = False


@runtime_checkable
class Checked(Protocol):
    """A broker or a result store that can tell whether its server is fit for it."""

    async def check(self, use: Use) -> Sequence[Finding]:
        """In a few round trips. Raises BrokerUnavailable or StoreUnavailable."""
        ...
