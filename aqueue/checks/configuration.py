"""What an app's settings and URLs show by themselves."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Final

from aqueue.app import AQueue
from aqueue.findings import Finding
from aqueue.settings import Settings
from aqueue.url import RABBITMQ_SCHEMES, Url

_SHORTEST_LEASE: Final = 5.0
_LONGEST_SEND: Final = 30.0
_SHORTEST_GRACE: Final = 60.0


def configuration_findings(app: AQueue, queues: Sequence[str]) -> Iterator[Finding]:
    """``queues`` are those that the worker serves."""
    yield from _formats(app)
    yield from _times(app.settings)
    yield from _results(app)
    yield from _tls(app.servers.broker_url, app.servers.store_url)
    yield from _queues(app, queues)
    yield from _routes(app)


def _formats(app: AQueue) -> Iterator[Finding]:
    settings = app.settings
    accepted = ", ".join(settings.accept_content)
    senders = {"Settings.serializer": settings.serializer}
    for name, task in app.tasks.items():
        if "serializer" in task.definition.options:
            senders[f"task {name}"] = task.definition.options["serializer"]
    for who, serializer in senders.items():
        if serializer not in settings.accept_content:
            what = (
                f"{who} is {serializer}, but a worker of this app accepts {accepted} only and would bury the messages"
            )
            yield Finding("AQ301", what, f"add {serializer!r} to Settings.accept_content")
    if "pickle" in settings.accept_content:
        step = "take pickle out of Settings.accept_content as soon as nobody sends it any more"
        yield Finding("AQ302", "pickle is accepted: who can write to the broker can run code in every worker", step)
    if "auth" in settings.accept_content and len(settings.accept_content) > 1:
        what = f"signed messages are accepted, and unsigned ones as well ({accepted}): a forger just does not sign"
        yield Finding("AQ312", what, 'Settings(accept_content=("auth",)) when every sender signs')
    if settings.signer is not None and "auth" not in settings.accept_content:
        what = f"there is a signer, but messages are accepted without a signature ({accepted}), and signed ones are not"
        yield Finding("AQ312", what, 'Settings(serializer="auth", accept_content=("auth",)), or no signer')
    readable = settings.result_accept_content or settings.accept_content
    if settings.result_serializer not in readable and not settings.ignore_result:
        what = f"results are written as {settings.result_serializer}, but only {', '.join(readable)} is read"
        yield Finding("AQ204", what, f"add {settings.result_serializer!r} to Settings.result_accept_content")


def _times(settings: Settings) -> Iterator[Finding]:
    if settings.lease < _SHORTEST_LEASE:
        what = f"a lease lasts {settings.lease:g} s: a short pause of a machine or a network makes tasks run twice"
        yield Finding("AQ304", what, "Settings(lease=30.0)")
    if settings.send_timeout >= _LONGEST_SEND:
        what = f"a send may take {settings.send_timeout:g} s: while the broker is away every request hangs as long"
        yield Finding("AQ305", what, "Settings(send_timeout=5.0)")
    if settings.max_deliveries == 1:
        what = "max_deliveries is 1: a worker that is killed, even by a deploy, buries the tasks it held"
        yield Finding("AQ310", what, "Settings(max_deliveries=5)")
    if settings.unknown_grace < _SHORTEST_GRACE:
        what = f"unknown_grace is {settings.unknown_grace:g} s: a rolling deploy buries what old workers don't know"
        yield Finding("AQ311", what, "Settings(unknown_grace=3600.0)")
    if settings.result_expires is None and not settings.ignore_result:
        step = "Settings(result_expires=86400.0), or ignore_result for tasks whose result nobody asks for"
        yield Finding("AQ201", "results are kept for ever, and fill the result store", step)


def _results(app: AQueue) -> Iterator[Finding]:
    broker, store = app.servers.broker_url, app.servers.store_url
    if broker is None or store is None or app.settings.ignore_result:
        return
    if store.scheme == "memory" and broker.scheme != "memory":
        what = f"results are in the memory of each process, but tasks travel by {broker}: who sent them never sees one"
        yield Finding("AQ202", what, "name a backend that all share, or Settings(ignore_result=True)")
    if store.scheme in RABBITMQ_SCHEMES:
        what = "a result goes to the process that sent the task, and to nobody else; it is gone when that process ends"
        yield Finding(
            "AQ203", what, "if anybody else asks for results, name a backend such as redis:// or db+postgresql://"
        )


def _tls(*urls: Url | None) -> Iterator[Finding]:
    for url in dict.fromkeys(urls):
        wanted = "" if url is None else url.query.get("ssl_cert_reqs", "").lower()
        if url is not None and wanted.removeprefix("cert_") in ("none", "optional"):
            what = f"{url} is encrypted, but whoever sits in between may pass for the server"
            yield Finding("AQ303", what, "take ssl_cert_reqs out of the URL, and name the authority by ssl_ca_certs")


def _queues(app: AQueue, served: Sequence[str]) -> Iterator[Finding]:
    used = {*app.queues(), *served}
    for name in app.settings.queues:
        if not _is_glob(name) and name not in used:
            what = f"Settings.queues has {name}, to which no task goes: a worker without -Q does not serve it"
            yield Finding("AQ307", what, "is it spelled as in the tasks? Else take it out, or name it with -Q")
    for name, declared in app.settings.queues.items():
        limit = declared.arguments.get("x-delivery-limit")
        if isinstance(limit, int) and limit <= app.settings.max_deliveries:
            what = f"queue {name} gives a message up after {limit} deliveries, before max_deliveries says so"
            step = f"x-delivery-limit {2 * app.settings.max_deliveries}, so that workers bury it with its reason"
            yield Finding("AQ313", what, step)
    homeless = {app.queue_of(task): name for name, task in sorted(app.tasks.items(), reverse=True)}
    for queue, task in sorted(homeless.items()):
        if queue not in served:
            what = f"queue {queue}, to which task {task} goes, is not served by this worker"
            yield Finding("AQ309", what, f"have a worker with -Q {queue}, or leave out -Q")


def _routes(app: AQueue) -> Iterator[Finding]:
    for glob in app.settings.routes:
        if not any(fnmatchcase(name, glob) for name in app.tasks):
            step = "is it spelled as in `aqueue tasks`? For tasks of other programs it is right"
            yield Finding("AQ308", f"no task of this app fits the route {glob!r}", step)


def _is_glob(name: str) -> bool:
    return any(letter in name for letter in "*?[")
