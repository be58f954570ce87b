"""A broadcast of either client is run once by every worker of a mixed fleet."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.interop.conftest import SOON, Connect, working
from tests.interop.workers import QUICK, Site, celery_worker
from tests.kit.rabbitmq import RabbitServer
from tests.kit.waiting import until


async def test_every_worker_of_a_mixed_fleet_runs_every_broadcast_once(
    rabbit_server: RabbitServer,
    rabbit_site: Site,
    connect: Connect,
    celery_client: Callable[..., Any],
    tmp_path: Path,
    key: str,
) -> None:
    site = rabbit_site
    vhost = urlsplit(site.rabbit).path[1:]
    queues = {key: {"broadcast": True}}
    app = await connect(site, queues=queues)
    client = celery_client(site, queues=queues)
    conf = {"queues": queues}
    with celery_worker(tmp_path, site.broker, site.results, "-P", "solo", *QUICK, queues=key, settings=conf):
        async with working(await connect(site, queues=queues), key), working(await connect(site, queues=queues), key):

            async def is_bound() -> bool:
                bindings = await asyncio.to_thread(rabbit_server.ctl, "list_bindings", "-p", vhost, "source_name")
                return bindings.split().count(key) == 3

            await until(is_bound, "every worker has its queue", timeout=SOON)
            for number in range(5):
                ours = await app.send_task("interop.count", [site.port, f"{key}-ours-{number}"], queue=key)
                theirs = client.send_task("interop.count", [site.port, f"{key}-theirs-{number}"], queue=key)
                await ours.get(SOON)
                theirs.forget()
            names = [f"{key}-{who}-{number}" for who in ("ours", "theirs") for number in range(5)]
            await until(lambda: all(site.runs(name) == 3 for name in names), "each was run three times", timeout=SOON)
            who = [sorted(site.traces.lrange(f"who:{name}", 0, -1)) for name in names]
            assert who == [["celery", "in-process", "in-process"]] * 10
