"""Names of keys on Redis: kombu's, which are shared with Celery, and ours (celery-protocol 2.1, 2.4, 2.5)."""

import re
from collections.abc import Iterable
from typing import Final

import msgspec

from aqueue.protocol import MAX_PRIORITY

SEP: Final = "\x06\x16"
#: kombu's priority steps, the most urgent first.
STEPS: Final = (0, 3, 6, 9)


class Keys(msgspec.Struct, frozen=True):
    """Key names under one prefix; see `aqueue.broker.redis` for what each holds."""

    prefix: str

    def ours(self, *names: str) -> list[str]:
        return [f"{self.prefix}aqueue:{name}" for name in names]

    def list_of(self, queue: str, priority: int) -> str:
        """The list for aqueue's priority: 9, the most urgent, is Redis' 0."""
        wire = MAX_PRIORITY - priority
        return self.step_list(queue, max(step for step in STEPS if step <= wire))

    def step_list(self, queue: str, step: int) -> str:
        return f"{self.prefix}{queue}{SEP}{step}" if step else f"{self.prefix}{queue}"

    def lists(self, queues: Iterable[str]) -> list[str]:
        """Every list of some queues, in the order of claiming: each step of all queues before the next."""
        queues = list(queues)
        return [self.step_list(queue, step) for step in STEPS for queue in queues]

    def queue_of(self, list_name: str) -> str:
        """The queue that a list belongs to."""
        queue, _, step = list_name.rpartition(SEP)
        return (queue if queue and step.isdecimal() else list_name).removeprefix(self.prefix)

    def binding(self, exchange: str) -> str:
        return f"{self.prefix}_kombu.binding.{exchange}"

    def permanent_binding(self, exchange: str) -> str:
        return f"{self.prefix}_kombu.binding_permanent.{exchange}"

    def binding_member(self, queue: str) -> str:
        """The binding of a queue to the direct exchange of its own name."""
        return SEP.join((queue, "", queue))


def matching_queues(members: Iterable[bytes], routing_key: str) -> list[str]:
    """The queues of an exchange's binding set that a routing key leads to, direct or topic."""
    found: set[str] = set()
    for key, pattern, queue in map(binding_parts, members):
        if key == routing_key or (pattern and re.match(pattern, routing_key)):
            found.add(queue)
    return sorted(found)


def binding_parts(member: bytes) -> tuple[str, str, str]:
    """Routing key, pattern and queue of one binding."""
    key, pattern, queue = member.decode().split(SEP)
    return key, pattern, queue
