"""Checks of an app, its tasks, its servers and its machine: before a worker starts, and by ``aqueue doctor``.

What is checked at a start takes a few round trips. The source of the tasks and what lies in the queues are looked at
by the doctor alone. `aqueue.findings` has the rules.
"""

import asyncio
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from aqueue.app import AQueue
from aqueue.checks.configuration import configuration_findings
from aqueue.checks.contents import contents_findings
from aqueue.checks.machine import Machine, machine_findings
from aqueue.checks.source import source_findings
from aqueue.checks.tasks import task_findings
from aqueue.errors import BrokerUnavailable, ConfigurationError, StoreUnavailable
from aqueue.findings import SEVERITIES, Checked, Finding, Use
from aqueue.task import Kind

__all__ = ["Machine", "at_start", "everything", "without_servers"]

logger = logging.getLogger("aqueue.checks")

#: Seconds that a worker's start waits for servers to answer.
_PATIENCE: Final = 2.0
#: No task's id.
_NOBODY: Final = "aqueue-doctor"
#: Findings about a server after which there is nothing to see in its queues.
_BLIND: Final = ("AQ103", "AQ104")
_LEVELS: Final = {"refuse": logging.ERROR, "warn": logging.WARNING, "info": logging.INFO}


async def at_start(app: AQueue, queues: Sequence[str], slots: Mapping[Kind, int], *, force: bool = False) -> None:
    """Check before a worker begins, and log what is found.

    Raises ConfigurationError for what is refused, unless there is ``force``. Servers that are away are not checked.
    """
    producer, use = app.producer(), _use(app, queues)
    of_broker, of_store = await asyncio.gather(
        _unless_away(producer.broker, use, app.servers.broker_name),
        _unless_away(producer.store, use, app.servers.store_name),
    )
    found = _ordered(app, [*without_servers(app, queues, slots, Machine.here()), *of_broker, *of_store])
    for finding in found:
        logger.log(_LEVELS[finding.severity], "%s", finding)
    refused = [finding for finding in found if finding.severity == "refuse"]
    if refused and not force:
        raise ConfigurationError(f"{refused[0]} (docs/doctor.md; --force starts all the same)")


async def everything(app: AQueue, queues: Sequence[str], slots: Mapping[Kind, int], machine: Machine) -> list[Finding]:
    """All that can be found; AQ001 and AQ002 say that a server can't be reached."""
    found = [*without_servers(app, queues, slots, machine), *source_findings(app.tasks.values())]
    async with app:
        of_broker, of_store = await asyncio.gather(_broker(app, queues), _store(app, queues))
    return _ordered(app, [*found, *of_broker, *of_store])


def without_servers(
    app: AQueue, queues: Sequence[str], slots: Mapping[Kind, int], machine: Machine
) -> Iterable[Finding]:
    """What settings, tasks and the machine show by themselves."""
    yield from configuration_findings(app, queues)
    yield from task_findings(app)
    yield from machine_findings(machine, slots)


async def _broker(app: AQueue, queues: Sequence[str]) -> list[Finding]:
    try:
        found = [*await _of(app.producer().broker, _use(app, queues, contents=True))]
        if not any(finding.rule in _BLIND for finding in found):
            found += await contents_findings(app, queues)
        return found
    except BrokerUnavailable as error:
        what = f"the broker {app.servers.broker_name} can't be reached: {error}"
        return [Finding("AQ001", what, "start it, or put its URL right")]


async def _store(app: AQueue, queues: Sequence[str]) -> Sequence[Finding]:
    try:
        store = app.producer().store
        if not store.reply_to:
            await store.get(_NOBODY)  # whether it answers; not every store is `Checked`
        return await _of(store, _use(app, queues))
    except StoreUnavailable as error:
        what = f"the result store {app.servers.store_name} can't be reached: {error}"
        return [Finding("AQ002", what, "start it, or put its URL right")]


async def _unless_away(server: object, use: Use, shown: str) -> Sequence[Finding]:
    try:
        async with asyncio.timeout(_PATIENCE):
            return await _of(server, use)
    except (BrokerUnavailable, StoreUnavailable, TimeoutError) as error:
        logger.info("%s is away and was not checked: %s", shown, str(error) or f"no answer in {_PATIENCE:g} s")
        return ()


async def _of(server: object, use: Use) -> Sequence[Finding]:
    return await server.check(use) if isinstance(server, Checked) else ()


def _use(app: AQueue, queues: Sequence[str], *, contents: bool = False) -> Use:
    longest = dict.fromkeys(queues, 0.0)
    for task in app.tasks.values():
        queue = app.queue_of(task)
        if queue in longest:
            longest[queue] = max(longest[queue], task.definition.timeout or app.settings.timeout)
    return Use(queues=longest, default_priority=app.settings.default_priority, contents=contents)


def _ordered(app: AQueue, found: Iterable[Finding]) -> list[Finding]:
    """Each once, the worst first, without those that are known."""
    kept = [finding for finding in dict.fromkeys(found) if finding.rule not in app.settings.ignored_checks]
    return sorted(kept, key=lambda finding: (SEVERITIES.index(finding.severity), finding.rule))
