"""Every code block of README and docs runs, in order, in a folder of its own.

A Python block whose first line is ``# name.py`` is saved under that name, and run by the console block that
names it. Other Python blocks are run whole; a ``main`` or a ``test_...`` in them is awaited. Lines of console
blocks that begin with ``$`` are run by a shell; what stands below must be what they print.
"""

import asyncio
import inspect
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from aqueue import Options, Settings

ROOT = Path(__file__).parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: What needs the repository itself, or a fresh virtual environment; CI runs them as its own steps.
ELSEWHERE = ("make ", "python3 -m venv", "source .venv")


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    for found in BLOCK.finditer(page.read_text()):
        yield found[1], found[2]


@pytest.fixture
def shell(tmp_path: Path) -> Iterator["Shell"]:
    started = Shell(tmp_path)
    yield started
    started.close()


class Shell:
    """Runs commands in one folder; what ends in ``&`` goes on until the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        self.background: list[subprocess.Popen[bytes]] = []

    def run(self, command: str) -> str:
        if command.endswith("&"):
            log = (self.folder / f"background-{len(self.background)}.log").open("wb")
            self.background.append(
                subprocess.Popen(command[:-1].split(), cwd=self.folder, env=self.env, stdout=log, stderr=log)
            )
            log.close()
            return ""
        done = subprocess.run(
            command, shell=True, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    def close(self) -> None:
        for process in self.background:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


@pytest.mark.parametrize("page", [pytest.param(page, id=page.stem) for page in PAGES])
def test_every_block_runs(page: Path, shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(shell.folder)
    ran = 0
    for language, text in blocks(page):
        if language == "python":
            run_python(text, shell)
        elif language == "console":
            run_console(text, shell)
        else:
            pytest.fail(f"{page.name}: a block of {language!r} that nothing runs")
        ran += 1
    if page.name in ("README.md", "tutorial.md", "how-to.md"):
        assert ran > 3


def run_python(text: str, shell: Shell) -> None:
    name = re.match(r"# (\w+\.py)\n", text)
    if name:
        (shell.folder / name[1]).write_text(text)
        compile(text, name[1], "exec")
        return
    namespace: dict[str, object] = {"__name__": "a_block"}
    # In a file, so that tracebacks and annotations find their source.
    exec(compile(text, "a block", "exec"), namespace)
    for found in list(namespace.values()):
        if inspect.iscoroutinefunction(found) and (found.__name__ == "main" or found.__name__.startswith("test_")):
            asyncio.run(found())


def run_console(text: str, shell: Shell) -> None:
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if not line.startswith("$ ") or any(word in line for word in ELSEWHERE):
            continue
        wanted = []
        for following in lines[number + 1 :]:
            if following.startswith("$ "):
                break
            wanted.append(following)
        printed = shell.run(line.removeprefix("$ "))
        if wanted:
            assert printed.splitlines() == wanted


def test_links_lead_somewhere() -> None:
    pages = [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
    links = [(page, target) for page in pages for target in re.findall(r"\]\(([^)#]+)", page.read_text())]
    assert [f"{p.name}: {to}" for p, to in links if "://" not in to and not (p.parent / to).exists()] == []


def test_every_reason_a_message_can_be_buried_for_is_documented() -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "aqueue").rglob("*.py"))
    reasons = set(re.findall(r'(?:BadMessage|Dead|Bury)\(\s*"(\w+)"', source))
    reference = (ROOT / "docs" / "reference.md").read_text()
    assert {reason for reason in reasons if f"`{reason}`" not in reference} == set()


def test_every_setting_and_option_is_documented() -> None:
    reference = (ROOT / "docs" / "reference.md").read_text()
    names = list(Settings.__struct_fields__) + list(Options.__annotations__)
    assert [name for name in names if f"`{name}`" not in reference] == []


def test_every_test_named_by_the_guarantees_exists() -> None:
    """A name without a path is in the file named before it."""
    named = re.findall(r"`([\w/]+\.py)?(?:::(test_\w+))?`", (ROOT / "docs" / "guarantees.md").read_text())
    path, missing, found = "", [], 0
    for file, name in named:
        path = file or path
        source = ROOT / path if path.startswith("tests/") else ROOT / "tests" / path
        found += bool(name)
        if not source.is_file() or (name and f"def {name}(" not in source.read_text()):
            missing.append(f"{path}::{name}")
    assert found > 40
    assert missing == []
