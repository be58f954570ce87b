"""The demo's tasks: one for each kind of file. `demo.py` sends them, `aqueue worker` runs them."""

import ast
import asyncio
import hashlib
import zlib
from dataclasses import dataclass
from pathlib import Path

from aqueue import AQueue, Context, Retry

#: Beside the database there is nothing else to set up: no server.
app = AQueue("demo", broker="sqlite:///demo.db")


@dataclass
class Report:
    """What a task found in one file."""

    path: str
    lines: int
    words: int
    #: Functions and classes, in Python files.
    definitions: int = 0
    bytes: int = 0
    #: What zlib makes of it.
    compressed: int = 0
    sha256: str = ""


@app.task(retry=Retry(attempts=3, backoff=0.3))
async def read_text(ctx: Context, path: str) -> Report:
    """A coroutine, on the worker's event loop. A file that is not there is tried again, as it may appear."""
    if ctx.attempt > 1:
        ctx.logger.warning("attempt %d to read %s", ctx.attempt, path)
    text = await asyncio.to_thread(Path(path).read_text, errors="replace")
    return Report(path, len(text.splitlines()), len(text.split()))


@app.task
def read_code(path: str) -> Report:
    """A plain function, in a thread: parsing, compressing and hashing would hold up the loop."""
    data = Path(path).read_bytes()
    tree = ast.parse(data)
    return Report(
        path,
        lines=data.count(b"\n"),
        words=len(data.split()),
        definitions=sum(
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) for node in ast.walk(tree)
        ),
        bytes=len(data),
        compressed=len(zlib.compress(data, 9)),
        sha256=hashlib.sha256(data).hexdigest(),
    )
