"""A FastAPI app that sends tasks and serves their results.

uvicorn examples.fastapi_app:web
aqueue worker examples.fastapi_app:tasks
"""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel

from aqueue import AQueue, EnqueueFailed, Retry, TaskFailed

tasks = AQueue("reports", broker=os.environ.get("BROKER", "redis://localhost"))


class Order(BaseModel):
    customer: str
    items: list[int]


@tasks.task(retry=Retry(attempts=3), timeout=60)
async def report(order: Order) -> dict[str, int]:
    await asyncio.sleep(0.01)  # a query, say
    return {order.customer: sum(order.items)}


@asynccontextmanager
async def lifespan(web: FastAPI) -> AsyncIterator[None]:
    async with tasks:
        yield


web = FastAPI(lifespan=lifespan)


@web.post("/reports", status_code=202)
async def create(order: Order) -> dict[str, str]:
    try:
        result = await report.send(order)
    except EnqueueFailed as error:
        raise HTTPException(503, "try again later") from error
    return {"id": result.id, "url": f"/reports/{result.id}"}


@web.get("/reports/{task_id}")
async def read(task_id: str) -> dict[str, Any]:
    result = report.result(task_id)
    state = await result.state()
    if state == "UNKNOWN":
        raise HTTPException(404, "no such report")
    if not await result.ready():
        return {"state": state}
    try:
        return {"state": state, "report": await result.get()}
    except TaskFailed as failure:
        return {"state": state, "error": f"{failure.type}: {failure.message}"}
