"""The tasks of a run. Their ids begin with their names; what they do is written down around them."""

import asyncio
import os
import time
from typing import Any, Final

from aqueue import AQueue, Context, Retry
from aqueue.errors import ControlFlow
from aqueue.outcome import CallNext
from tests.chaos.failpoints import Failpoints
from tests.chaos.history import Recorder
from tests.chaos.wrapper import RecordingBroker

#: How often a task is tried; the others once.
ATTEMPTS: Final = {"flaky": 3, "stubborn": 3}
#: What a producer sends, and how often.
MIX: Final = {"quick": 0.55, "nap": 0.15, "thread": 0.1, "flaky": 0.1, "fail": 0.03, "stubborn": 0.02, "later": 0.05}
#: Seconds of a nap, in leases: long enough to need renewals.
NAP: Final = 2.2


def declare(app: AQueue, lease: float) -> None:
    """Every task returns ``n``."""

    @app.task(name="quick")
    async def quick(n: int) -> int:
        await asyncio.sleep(0.002)
        return n

    @app.task(name="later")
    async def later(n: int) -> int:
        return n

    @app.task(name="nap")
    async def nap(n: int) -> int:
        await asyncio.sleep(NAP * lease)
        return n

    @app.task(name="thread")
    def thread(n: int) -> int:
        time.sleep(0.01)
        return n

    @app.task(name="flaky", retry=Retry(attempts=ATTEMPTS["flaky"], backoff=0.1, jitter=False))
    async def flaky(ctx: Context, n: int) -> int:
        await asyncio.sleep(0.002)
        if ctx.attempt < 2:
            raise ConnectionError("the first attempt fails")
        return n

    @app.task(name="stubborn", retry=Retry(attempts=ATTEMPTS["stubborn"], backoff=0.1, jitter=False))
    async def stubborn(n: int) -> int:
        raise ValueError(f"no luck with {n}")

    @app.task(name="fail")
    async def fail(n: int) -> int:
        raise ValueError(f"no luck with {n}")

    @app.task(name="poison")
    async def poison(n: int) -> int:
        os._exit(9)


class Watch:
    """Writes down how runs begin and end; a middleware."""

    def __init__(self, record: Recorder, failpoints: Failpoints) -> None:
        self._record = record
        self._failpoints = failpoints
        #: Set when the app has made it.
        self.broker: RecordingBroker | None = None

    async def __call__(self, context: Context, call_next: CallNext) -> Any:
        token = self.broker.begun(context.request.message) if self.broker is not None else ""
        named = {"id": context.id, "attempt": context.attempt, "token": token}
        self._record("START", **named, n=context.deliveries)
        self._failpoints.hit("started")
        try:
            value = await call_next(context)
        except asyncio.CancelledError:
            self._record("CANCEL", **named, why=str(context.cancel_reason))
            raise
        except BaseException as error:
            final = not isinstance(error, ControlFlow) and context.attempt >= context.max_attempts
            self._record("RAISE", **named, why=repr(error), final=final)
            raise
        self._record("END", **named)
        self._failpoints.hit("body_done")
        return value
