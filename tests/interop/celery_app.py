"""The Celery app: ``celery -A tests.interop.celery_app worker``, and clients made by `make`."""

import json
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

from tests.interop import tasks
from tests.interop.celery_names import Broadcast, Celery, Exchange, Queue


def make(broker: str, results: str, *, queues: Mapping[str, Mapping[str, Any]] | None = None, **conf: Any) -> Any:
    """An app with all tasks; ``conf`` are Celery's settings, ``queues`` as `aqueue_app.make` takes them."""
    if queues:
        conf["task_queues"] = [queue(name, **made) for name, made in queues.items()]
    app = Celery("interop", broker=broker, backend=results, set_as_current=False)
    app.conf.update(broker_connection_retry_on_startup=True, task_track_started=True, **conf)

    def register(name: str, function: Callable[..., Any], **options: Any) -> None:
        app.task(name=name, shared=False, **options)(function)

    def send_child(queue: str) -> Any:
        return app.send_task("interop.request", queue=queue).id

    for name, function in tasks.PLAIN.items():
        register(name, function)
    for name, function in tasks.BOUND.items():
        register(name, function, bind=True)
    register("interop.add", add)
    register("interop.ignored", tasks.count, ignore_result=True)
    register("interop.late", tasks.wait_for_flag, acks_late=True)
    register("interop.routed", tasks.give)
    register("interop.known_to_celery", tasks.give)
    register("interop.sleep", sleep)
    register("interop.send_child", send_child)
    again: dict[str, Any] = {"autoretry_for": (ConnectionError,), "max_retries": 3, "default_retry_delay": 0.2}
    register("interop.retry_policy", retry_policy, bind=True, **again)
    return app


def queue(
    name: str,
    *,
    exchange: str | None = None,
    exchange_type: str = "direct",
    routing_key: str | None = None,
    max_priority: int | None = None,
    arguments: dict[str, Any] | None = None,
    broadcast: bool = False,
) -> Any:
    """A queue as `aqueue.Queue` would have it."""
    if broadcast:
        return Broadcast(name)
    leads = Exchange(exchange or name, type=exchange_type)
    key = name if routing_key is None else routing_key
    return Queue(name, leads, routing_key=key, max_priority=max_priority, queue_arguments=arguments)


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
