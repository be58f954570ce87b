"""An aiohttp app that sends tasks and waits for their results.

python -m aiohttp.web -P 8080 examples.aiohttp_app:make_app
aqueue worker examples.aiohttp_app:tasks
"""

import hashlib
import os
from collections.abc import AsyncIterator

from aiohttp import web

from aqueue import AQueue, ResultTimeout, ResultUnknown, TaskFailed

tasks = AQueue("digests", broker=os.environ.get("BROKER", "redis://localhost"))


@tasks.task
def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


async def create(request: web.Request) -> web.Response:
    result = await digest.send(await request.text())
    return web.json_response({"id": result.id}, status=202)


async def read(request: web.Request) -> web.Response:
    """The result, waited for as long as ``?wait=`` says (seconds)."""
    result = digest.result(request.match_info["id"])
    try:
        return web.json_response({"digest": await result.get(timeout=float(request.query.get("wait", "0")))})
    except ResultTimeout:
        return web.json_response({"state": await result.state()}, status=202)
    except ResultUnknown as error:
        raise web.HTTPNotFound(text="no such task") from error
    except TaskFailed as failure:
        return web.json_response({"error": f"{failure.type}: {failure.message}"}, status=500)


async def connections(app: web.Application) -> AsyncIterator[None]:
    async with tasks:
        yield


def make_app(argv: list[str] | None = None) -> web.Application:
    app = web.Application()
    app.cleanup_ctx.append(connections)
    app.add_routes([web.post("/digests", create), web.get("/digests/{id}", read)])
    return app
