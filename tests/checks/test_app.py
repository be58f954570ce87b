"""Rules about settings, tasks, their source and the machine: what breaks each, and an app that breaks none."""

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from time import sleep as rest
from typing import Any

import pytest
from msgspec.structs import replace
from pydantic import BaseModel

from aqueue import AQueue, ConfigurationError, Context, Queue, Retry, Settings
from aqueue.checks import Machine, everything, without_servers
from aqueue.checks.source import source_findings
from aqueue.findings import RULES, Finding
from aqueue.serialization import Signer
from aqueue.signing import Auth

FINE = Machine(user=1000, files=None, threads=None, uvloop=True, now=time.time())
SLOTS: dict[Any, int] = {"coroutine": 100, "thread": 16}


def app_with(*, broker: str = "redis://localhost", backend: str | None = None, **settings: Any) -> AQueue:
    app = AQueue("shop", broker=broker, backend=backend, settings=Settings(**settings))

    @app.task(name="shop.add")
    def add(x: int) -> int:
        return x

    return app


def findings(app: AQueue, *queues: str, machine: Machine = FINE) -> list[Finding]:
    return [*without_servers(app, queues or app.queues(), SLOTS, machine), *source_findings(app.tasks.values())]


def rules(app: AQueue, *queues: str, machine: Machine = FINE) -> list[str]:
    return [finding.rule for finding in findings(app, *queues, machine=machine)]


class Model(BaseModel):
    x: int


@dataclass
class Record:
    x: int


async def test_a_clean_app_breaks_no_rule(tmp_path: Path) -> None:
    app = AQueue(
        "shop",
        broker=f"sqlite:///{tmp_path / 'shop.db'}",
        settings=Settings(routes={"shop.*": "orders"}, queues={"orders": Queue(max_priority=9), "x.*": Queue()}),
    )

    @app.task(name="shop.charge", retry=Retry(attempts=3, on=(OSError,)), timeout=30, soft_timeout=20)
    async def charge(ctx: Context, order: int, model: Model, record: list[Record], *, later: Any = None) -> None:
        try:
            await asyncio.sleep(0)
        except BaseException:
            raise
        await asyncio.to_thread(time.sleep, 0)

        def in_a_thread() -> None:
            time.sleep(0)

        await asyncio.to_thread(in_a_thread)

    @app.task(name="shop.resize", expires=60.0, countdown=1.0)
    def resize(path: str, size: tuple[int, int] = (1, 1), file: BytesIO | None = None) -> None:
        time.sleep(0)

    async with app:
        await charge.send(1, Model(x=1), [])
        assert await everything(app, app.queues(), SLOTS, FINE) == []


def signer() -> Signer:
    folder = Path(__file__).parent.parent / "wire" / "auth"
    return Auth(folder / "worker.key", folder / "worker.pem", folder / "*.pem")


RABBIT = "amqp://localhost"
SETTINGS: list[tuple[str, Callable[[], AQueue], str]] = [
    ("AQ201", lambda: app_with(result_expires=None), "kept for ever"),
    ("AQ202", lambda: app_with(backend="memory://"), "tasks travel by redis://localhost"),
    ("AQ203", lambda: app_with(broker=RABBIT), "to nobody else"),
    ("AQ204", lambda: app_with(result_serializer="pickle"), "written as pickle, but only json is read"),
    ("AQ301", lambda: app_with(serializer="msgpack"), "Settings.serializer is msgpack"),
    ("AQ302", lambda: app_with(accept_content=("json", "pickle")), "run code in every worker"),
    ("AQ303", lambda: app_with(broker="rediss://:hidden@host/0?ssl_cert_reqs=none"), "rediss://:***@host"),
    ("AQ304", lambda: app_with(lease=2.0), "lasts 2 s"),
    ("AQ305", lambda: app_with(send_timeout=30.0), "may take 30 s"),
    ("AQ307", lambda: app_with(queues={"pictures": Queue()}), "Settings.queues has pictures"),
    ("AQ308", lambda: app_with(routes={"shop.sub": "x"}), "route 'shop.sub'"),
    ("AQ310", lambda: app_with(max_deliveries=1), "buries the tasks it held"),
    ("AQ311", lambda: app_with(unknown_grace=10.0), "is 10 s"),
    ("AQ312", lambda: app_with(accept_content=("auth", "json"), signer=signer()), "just does not sign"),
    ("AQ312", lambda: app_with(signer=signer()), "there is a signer"),
    ("AQ313", lambda: app_with(queues={"q*": Queue(arguments={"x-delivery-limit": 5})}), "after 5 deliveries"),
    ("AQ403", lambda: app_with(timeout=90_000.0), "every task without a timeout of its own may run 25 hours"),
    ("AQ410", lambda: AQueue("empty", broker="redis://localhost"), "app empty has no tasks"),
]


@pytest.mark.parametrize(("rule", "make", "text"), SETTINGS)
def test_a_setting_breaks_its_rule_and_no_other(rule: str, make: Callable[[], AQueue], text: str) -> None:
    (found,) = findings(make())
    assert found.rule == rule
    assert text in found.what
    assert "hidden" not in str(found)


def test_a_queue_that_this_worker_does_not_serve() -> None:
    app = app_with(routes={"shop.add": "pictures"})
    assert rules(app) == []
    (found,) = findings(app, "celery")
    assert found.rule == "AQ309"
    assert "queue pictures, to which task shop.add goes" in found.what
    app = app_with(queues={"spare": Queue()})
    assert rules(app, "celery", "spare") == []


def task_app(**options: Any) -> tuple[AQueue, Callable[[Callable[..., Any]], Any]]:
    app = AQueue("shop", broker="redis://localhost")
    return app, app.task(name="shop.work", **options)


@pytest.mark.parametrize(
    ("rule", "options"),
    [
        ("AQ301", {"serializer": "yaml"}),
        ("AQ403", {"timeout": 100_000}),
        ("AQ404", {"retry": Retry(attempts=3, on=())}),
        ("AQ404", {"retry": Retry(attempts=3, on=OSError, never=OSError)}),
        ("AQ404", {"retry": Retry(attempts=3, never=Exception)}),
        ("AQ405", {"expires": 10.0, "countdown": 10}),
        ("AQ409", {"timeout": 10, "soft_timeout": 10}),
    ],
)
def test_an_option_breaks_its_rule(rule: str, options: dict[str, Any]) -> None:
    app, task = task_app(**options)

    @task
    def work() -> None: ...

    assert rules(app) == [rule]


def test_names_that_are_taken_for_each_other() -> None:
    app = AQueue("shop", broker="redis://localhost")

    def work() -> None: ...

    app.task(name="shop.work")(work)
    app.task(name="Shop.work")(lambda_like)
    assert rules(app) == ["AQ401"]


def test_a_module_that_was_imported_by_two_names(tmp_path: Path) -> None:
    source = compile("def work():\n    pass\n", str(tmp_path / "tasks.py"), "exec")
    app = AQueue("shop", broker="redis://localhost")
    for module in ("shop.tasks", "tasks"):
        namespace: dict[str, Any] = {"__name__": module}
        exec(source, namespace)
        app.task(namespace["work"])
    (found,) = findings(app)
    assert found.rule == "AQ402"
    assert "is task shop.tasks.work and task tasks.work: its module was imported as shop.tasks and tasks" in found.what


@pytest.mark.parametrize(("name", "wanted"), [("shop", ["AQ402"]), ("program", [])])
def test_a_task_of_the_program_itself(
    tmp_path: Path, name: str, wanted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)  # as of `python program.py`
    app = AQueue(name, broker="redis://localhost")
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile("def work():\n    pass\n", str(tmp_path / "program.py"), "exec"), namespace)
    app.task(namespace["work"])
    found = findings(app)
    assert [finding.rule for finding in found] == wanted
    assert all("task shop.work is declared" in one.what and "calls it program.work" in one.what for one in found)


def test_tasks_that_are_made_in_a_loop_are_several() -> None:
    app = AQueue("shop", broker="redis://localhost")
    for number in range(3):

        def work() -> None: ...

        app.task(name=f"shop.work{number}")(work)
    assert rules(app) == []


def lambda_like() -> None: ...


def test_arguments_that_can_not_travel() -> None:
    app, task = task_app()

    @task
    def work(
        one: BytesIO, two: list[complex], three: Model, four: Record, five: Any, six: object, *, seven: Path
    ) -> None: ...

    found = findings(app)
    assert {finding.rule for finding in found} == {"AQ406"}
    assert [finding.what.partition("parameter ")[2].split(",")[0] for finding in found] == [
        "one is a _io.BytesIO",
        "two is a builtins.complex",
        "seven is a pathlib.Path",
    ]


def test_calls_that_stop_the_event_loop() -> None:
    app, task = task_app()

    @task
    async def work(path: str) -> None:
        time.sleep(0)
        rest(0)
        subprocess.run(["true"], check=False)
        from urllib.request import urlopen  # noqa: PLC0415

        import requests as r  # noqa: PLC0415

        r.get(path)
        urlopen(path)
        with open(path) as file:  # noqa: PTH123
            file.read()
        for _ in range(3):
            open(path).close()  # noqa: PTH123

    first = work.function.__code__.co_firstlineno
    found = findings(app)
    assert {finding.rule for finding in found} == {"AQ407"}
    assert [(finding.what.split()[4], int(finding.what.split(":")[1].split(")")[0]) - first) for finding in found] == [
        ("time.sleep", 2),
        ("time.sleep", 3),
        ("subprocess.run", 4),
        ("requests.get", 9),
        ("urllib.request.urlopen", 10),
        ("open", 14),
    ]
    assert __file__ in found[0].what


def test_a_thread_task_may_block() -> None:
    app, task = task_app()

    @task
    def work() -> None:
        time.sleep(0)

    assert rules(app) == []


@pytest.mark.parametrize("kind", ["", "BaseException", "asyncio.CancelledError", "(ValueError, BaseException)"])
def test_a_handler_that_swallows_the_end_of_the_run(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = f"import asyncio\n\nasync def work():\n    try:\n        pass\n    except {kind}:\n        pass\n"
    (tmp_path / "swallow.py").write_text(source)
    namespace: dict[str, Any] = {}
    exec(compile(source, str(tmp_path / "swallow.py"), "exec"), namespace)
    app, task = task_app()
    task(namespace["work"])
    (found,) = findings(app)
    assert found.rule == "AQ408"
    assert "swallow.py:6" in found.what


@pytest.mark.parametrize(
    ("rule", "change", "text"),
    [
        ("AQ306", {"words": ("doctor", "redis://u:hidden@host")}, "redis://u:***@host"),
        ("AQ501", {"files": 256}, "256 files; 116 tasks at once may need 296"),
        ("AQ502", {"threads": 40}, "may have 40 processes"),
        ("AQ503", {"user": 0}, "is root"),
        ("AQ504", {"uvloop": False}, "uvloop is not installed"),
        ("AQ505", {"now": 0.0}, "clock says 1970"),
    ],
)
def test_the_machine_breaks_its_rule(rule: str, change: dict[str, Any], text: str) -> None:
    (found,) = findings(app_with(), machine=replace(FINE, **change))
    assert found.rule == rule
    assert text in found.what
    assert "hidden" not in str(found)


def test_this_machine_can_be_looked_at() -> None:
    machine = Machine.here()
    assert abs(machine.now - time.time()) < 60
    assert machine.files is None or machine.files > 0


def test_a_rule_that_is_ignored_must_be_one() -> None:
    with pytest.raises(ConfigurationError, match="there is no rule 'AQ999'"):
        Settings(ignored_checks=("AQ999",))


def test_every_rule_is_broken_by_a_test_and_explained() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text()
    assert [rule for rule in RULES if f'"{rule}"' not in tests] == []
    assert re.findall(r"^\| (AQ\d+) \|", page, re.MULTILINE) == list(RULES)
    severities = dict(re.findall(r"^\| (AQ\d+) \| (\w+) \|", page, re.MULTILINE))
    assert severities == dict(RULES)
