"""Read a folder of files with a worker in another process; no server is needed.

    python examples/demo/demo.py [FOLDER]

One task for each file goes through a SQLite file to ``aqueue worker``. Stop it with Ctrl-C whenever you like
and run it again: what was done is not done twice, what was left is picked up.
"""

import asyncio
import hashlib
import os
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

HERE = Path(__file__).parent
WORKPLACE = Path.cwd() / ".demo"
SUFFIXES = {".py", ".md", ".toml", ".json", ".lua", ".txt", ".cfg", ".yml", ".yaml"}
console = Console()

# The database is named relative to the working directory, which the worker shares.
WORKPLACE.mkdir(exist_ok=True)
sys.path.insert(0, str(HERE))
FOLDER = Path(sys.argv[1] if len(sys.argv) > 1 else HERE.parent.parent).resolve()
os.chdir(WORKPLACE)

from reading import Report, app, read_code, read_text  # noqa: E402 - after the folder is set

from aqueue import AsyncResult, TaskFailed  # noqa: E402


def files() -> list[Path]:
    found = (
        path
        for path in FOLDER.rglob("*")
        if path.suffix in SUFFIXES and path.is_file() and not any(part.startswith(".") for part in path.parts[1:])
    )
    # One that is not there, to see a task fail, be retried, and be reported.
    return [*sorted(found)[:500], FOLDER / "no-such-file.md"]


def task_id(path: Path) -> str:
    """The same file in the same state is the same task: sent again, it is stored once."""
    stat = path.stat() if path.exists() else None
    return hashlib.sha256(f"{path} {stat and stat.st_mtime_ns}".encode()).hexdigest()[:32]


async def send_all(paths: list[Path]) -> list[AsyncResult[Report]]:
    signatures = [
        (read_code if path.suffix == ".py" else read_text).options(task_id=task_id(path)).s(str(path)) for path in paths
    ]
    return await app.send_many(signatures)


async def watch(results: list[AsyncResult[Report]]) -> tuple[list[Report], list[TaskFailed]]:
    """Wait for every result, showing how many there are."""
    reports: list[Report] = []
    failures: list[TaskFailed] = []
    bar = Progress(TextColumn("reading files"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)
    with bar:
        done = bar.add_task("files", total=len(results))

        async def one(result: AsyncResult[Report]) -> None:
            try:
                reports.append(await result.get())
            except TaskFailed as failure:
                failures.append(failure)
            bar.advance(done)

        await asyncio.gather(*map(one, results))
    return reports, failures


def show(reports: list[Report], failures: list[TaskFailed]) -> None:
    table = Table("suffix", title=f"\n{FOLDER}", caption=f"{len(reports)} files read, {len(failures)} failed")
    for column in ("files", "lines", "words", "definitions", "compressed"):
        table.add_column(column, justify="right")
    for suffix in sorted({Path(report.path).suffix for report in reports}):
        rows = [report for report in reports if Path(report.path).suffix == suffix]
        size = sum(report.bytes for report in rows)
        table.add_row(
            suffix,
            f"{len(rows)}",
            f"{sum(report.lines for report in rows):,}",
            f"{sum(report.words for report in rows):,}",
            f"{sum(report.definitions for report in rows):,}" if suffix == ".py" else "",
            f"to {sum(report.compressed for report in rows) / size:.0%}" if size else "",
        )
    console.print(table)
    for failure in failures:
        console.print(f"\n[red]failed[/red] after its retries: {failure.type}: {failure.message}")
        console.print(failure.traceback or "", highlight=False, markup=False)


async def main() -> None:
    paths = files()
    async with app:
        results = await send_all(paths)
        reports, failures = await watch(results)
        show(reports, failures)
        for result in results:  # so that the next run has something to do
            await result.forget()


if __name__ == "__main__":
    console.print("[dim]starting `aqueue worker reading:app` in another process, on .demo/demo.db[/dim]")
    with (WORKPLACE / "worker.log").open("w") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "aqueue", "worker", "reading:app", "--loglevel", "error"],
            env={**os.environ, "PYTHONPATH": str(HERE)},
            stderr=log,
        )
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        console.print("\nstopped; run it again to pick up what is left")
    finally:
        worker.terminate()
        worker.wait()
