"""The Celery app: ``celery -A tests.interop.celery_app worker``, and clients made by `make`."""

import json
import os
import time
from typing import Any

from celery import Celery  # type: ignore[import-untyped]

from tests.interop import tasks


def make(broker: str, results: str, **conf: Any) -> Any:
    """An app with all tasks; ``conf`` are Celery's settings."""
    app = Celery("interop", broker=broker, backend=results, set_as_current=False)
    app.conf.update(broker_connection_retry_on_startup=True, task_track_started=True, **conf)
    for name, function in tasks.PLAIN.items():
        app.task(name=name)(function)
    for name, function in tasks.BOUND.items():
        app.task(name=name, bind=True)(function)
    app.task(name="interop.add")(add)
    app.task(name="interop.ignored", ignore_result=True)(tasks.count)
    app.task(name="interop.late", acks_late=True)(tasks.wait_for_flag)
    app.task(name="interop.routed")(tasks.give)
    app.task(name="interop.known_to_celery")(tasks.give)
    app.task(name="interop.sleep")(sleep)

    def send_child(queue: str) -> Any:
        return app.send_task("interop.request", queue=queue).id

    app.task(name="interop.send_child")(send_child)
    app.task(
        name="interop.retry_policy",
        bind=True,
        autoretry_for=(ConnectionError,),
        max_retries=3,
        default_retry_delay=0.2,
    )(retry_policy)
    return app


def add(x: int, y: int) -> int:
    return x + y


def sleep(seconds: float) -> None:
    time.sleep(seconds)


def retry_policy(self: Any, times: int) -> list[Any]:
    """Fail so often before it gives the number of retries."""
    if self.request.retries < times:
        raise ConnectionError(f"try {self.request.retries}")
    return [self.request.retries, tasks.who()]


app = make(
    os.environ.get("INTEROP_BROKER", "memory://"),
    os.environ.get("INTEROP_RESULTS", "cache+memory://"),
    **json.loads(os.environ.get("INTEROP_SETTINGS", "{}")),
)
if app.conf.accept_content == ["auth"]:
    app.setup_security()
