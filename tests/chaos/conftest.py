"""Grounds for runs and directed schedules; RabbitMQ is one for all of them, each has a virtual host of its own."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from tests.chaos.checker import Verdict
from tests.chaos.ground import Ground, RabbitGround, RabbitHost, RedisGround, SqliteGround
from tests.chaos.plan import Plan
from tests.chaos.run import Run
from tests.kit.rabbitmq import RabbitServer

#: Brokers that several processes can share.
SHARED = ("sqlite", "redis", "rabbitmq")


@pytest.fixture(scope="session")
def chaos_rabbit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RabbitServer]:
    """A RabbitMQ that these tests break; each leaves it well."""
    server = RabbitServer(tmp_path_factory.mktemp("chaos-rabbitmq"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def chaos_host(chaos_rabbit: RabbitServer) -> RabbitHost:
    return RabbitHost(chaos_rabbit)


@pytest.fixture(params=SHARED)
def kind(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def ground(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Ground]:
    made: Ground
    if kind == "rabbitmq":
        made = RabbitGround(tmp_path, request.getfixturevalue("chaos_host"))
    else:
        made = SqliteGround(tmp_path) if kind == "sqlite" else RedisGround(tmp_path)
    yield made
    made.close()


#: Makes a run: keyword arguments are the plan's.
MakeRun = Callable[..., Run]


@pytest.fixture
def make_run(ground: Ground, tmp_path: Path) -> MakeRun:
    def make(plan: Plan | None = None, *, patience: float = 20.0, **options: Any) -> Run:
        folder = tmp_path / f"run-{uuid4().hex[:6]}"
        folder.mkdir()
        quick: dict[str, Any] = {"seed": 1, "seconds": 1.0, "lease": 0.5, "workers": 1}
        made = plan or Plan(**{"broker": ground.kind, **quick})
        return Run(msgspec.structs.replace(made, **options), ground, folder, patience)

    return make


def passed(judged: Verdict) -> Verdict:
    """The verdict of a run that must pass; told whole when it doesn't."""
    assert judged.word == "pass", "\n".join(
        (judged.line, *(f"{name}: {text}" for name, texts in judged.problems.items() for text in texts))
    )
    return judged
