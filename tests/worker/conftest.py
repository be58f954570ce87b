"""An app and its worker, in the test's own process and on the loop of the test."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from msgspec.structs import replace

from aqueue import AQueue, Settings
from aqueue.url import Url
from aqueue.worker import Worker

#: Short times, so that tests see leases end and deadlines pass.
QUICK = Settings(lease=0.6, send_timeout=4.0, timeout=10.0)

MakeApp = Callable[..., AQueue]
StartWorker = Callable[..., Awaitable[Worker]]


@pytest.fixture
def make_app(url: Url) -> MakeApp:
    """An app on the broker under test; keyword arguments are settings."""

    def make(**settings: Any) -> AQueue:
        return AQueue("test", broker=url.reveal(), settings=replace(QUICK, **settings))

    return make


@pytest_asyncio.fixture
async def app(make_app: MakeApp) -> AsyncIterator[AQueue]:
    async with make_app() as made:
        yield made


@asynccontextmanager
async def running(app: AQueue, **options: Any) -> AsyncIterator[Worker]:
    """A worker that runs meanwhile and is stopped at the end; what it raises is raised here."""
    async with Worker(app, **{"grace": 5.0, **options}).running() as worker:
        yield worker


@pytest_asyncio.fixture
async def start_worker() -> AsyncIterator[StartWorker]:
    async with AsyncExitStack() as stack:

        async def start(app: AQueue, **options: Any) -> Worker:
            return await stack.enter_async_context(running(app, **options))

        yield start


# --- workers as processes ---


@pytest_asyncio.fixture
async def client(url: Url) -> AsyncIterator[AQueue]:
    """Sends to worker processes whose lease is a second, too."""
    async with AQueue("client", broker=url.reveal(), settings=Settings(lease=1.0)) as app:
        yield app


@pytest.fixture
def ran(tmp_path: Path) -> Callable[[], list[str]]:
    """What tasks of worker processes have noted in the file ``ran``, line by line."""

    def lines() -> list[str]:
        file = tmp_path / "ran"
        return file.read_text().splitlines() if file.exists() else []

    return lines
