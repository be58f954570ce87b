"""A script: send a batch, with a worker in the same program, and print what comes back.

python examples/script.py
"""

import asyncio
import time

from aqueue import AQueue

app = AQueue("script", broker="memory://")


@app.task
async def fetch(page: int) -> str:
    await asyncio.sleep(0.01)  # an HTTP request, say
    return f"page {page}"


@app.task
def shrink(text: str) -> str:
    time.sleep(0.01)  # something that would hold up the loop
    return text.upper()


async def main() -> None:
    async with app.worker(concurrency=50, threads=8):
        pages = [await result.get(timeout=10) for result in await app.send_many([fetch.s(n) for n in range(100)])]
        for result in await app.send_many([shrink.s(page) for page in pages[:5]]):
            print(await result.get(timeout=10))


if __name__ == "__main__":
    asyncio.run(main())
