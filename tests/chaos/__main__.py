"""``make chaos``: many seeds on every broker, a run without faults, the planted bugs, others under the same plans.

Every run leaves a folder below ``.chaos`` with its plan, histories, logs and verdict; those that passed leave the plan
and the verdict.
"""

import argparse
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec

from tests.chaos.checker import Verdict
from tests.chaos.conftest import SHARED
from tests.chaos.ground import Ground, RabbitGround, RabbitHost, RedisGround, SqliteGround
from tests.chaos.peers import PEERS, Peer
from tests.chaos.plan import Plan, make_plan, shrink
from tests.chaos.report import Row, table, write
from tests.chaos.run import ROOT, Run
from tests.kit.rabbitmq import RabbitServer

PLACE: Final = ROOT / ".chaos"
GUARANTEES: Final = ROOT / "docs" / "guarantees.md"
#: What peers are sent: they have no retries and delays in common.
_SIMPLE: Final = {"quick": 0.75, "nap": 0.25}


class Runs:
    """Makes grounds, one RabbitMQ for all of its runs, and keeps what they leave."""

    def __init__(self) -> None:
        self._host: RabbitHost | None = None
        self._number = 0

    def go(self, plan: Plan, peer: Peer | None = None, mix: dict[str, float] | None = None) -> Verdict:
        """One run; its line is printed."""
        self._number += 1
        who = peer.name if peer is not None else "aqueue-worker" if plan.supervised else "aqueue"
        folder = PLACE / f"{self._number:03}-{who}-{plan.broker}-{plan.seed}"
        folder.mkdir(parents=True)
        began = time.monotonic()
        with self._ground(plan.broker, folder) as ground:
            judged = Run(plan, ground, folder, peer=peer).go(mix)
        print(f"{who} {plan.broker} seed {plan.seed} ({time.monotonic() - began:.0f} s): {judged.line}", flush=True)
        if judged.word == "pass" or peer is not None:
            _forget(folder)
        else:
            print(f"  see {folder}; again: make chaos ARGS='--replay {folder / 'plan.json'}'", flush=True)
        return judged

    @contextmanager
    def _ground(self, broker: str, folder: Path) -> Iterator[Ground]:
        ground: Ground
        if broker == "rabbitmq":
            if self._host is None:
                self._host = RabbitHost(RabbitServer(PLACE / "rabbitmq"))
            ground = RabbitGround(folder, self._host)
        else:
            ground = SqliteGround(folder) if broker == "sqlite" else RedisGround(folder)
        try:
            yield ground
        finally:
            ground.close()

    def close(self) -> None:
        if self._host is not None:
            self._host.server.stop()


def _forget(folder: Path) -> None:
    """All but the plan and the verdict."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        elif path.name not in ("plan.json", "verdict.json"):
            with suppress(FileNotFoundError):
                path.unlink()


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="runs with faults on each broker")
    parser.add_argument("--first", type=int, default=1, help="the first seed")
    parser.add_argument("--seconds", type=float, default=60.0, help="of load in each run")
    parser.add_argument("--brokers", default=",".join(SHARED))
    parser.add_argument("--supervised-seeds", type=int, default=5, help="runs of `aqueue worker` on each broker")
    parser.add_argument("--peers", default=",".join(PEERS), help="baselines on Redis; '' for none")
    parser.add_argument("--peer-seeds", type=int, default=5)
    parser.add_argument("--fast", action="store_true", help="without the faults that take RabbitMQ long")
    parser.add_argument("--no-mutants", action="store_true", help="don't plant bugs")
    parser.add_argument("--no-report", action="store_true", help="leave docs/guarantees.md as it is")
    parser.add_argument("--replay", type=Path, help="carry out a saved plan, and nothing else")
    parser.add_argument("--shrink", action="store_true", help="with --replay: find fewer faults that do it, too")
    return parser.parse_args()


def main() -> int:
    chosen = options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # no process of a run outlives it
    if chosen.replay is None:
        shutil.rmtree(PLACE, ignore_errors=True)
    runs = Runs()
    try:
        return _replay(runs, chosen) if chosen.replay is not None else _all(runs, chosen)
    finally:
        runs.close()


def _replay(runs: Runs, chosen: argparse.Namespace) -> int:
    plan = Plan.load(chosen.replay)
    judged = runs.go(plan)
    if chosen.shrink and judged.word == "fail":
        smallest = shrink(plan, lambda tried: runs.go(tried).word == "fail")
        smallest.save(PLACE / "smallest.json")
        print(f"{PLACE / 'smallest.json'}: {msgspec.to_builtins(smallest)}")
    return int(judged.word != "pass")


def _all(runs: Runs, chosen: argparse.Namespace) -> int:
    rows: list[Row] = []
    seeds = range(chosen.first, chosen.first + chosen.seeds)
    for broker in chosen.brokers.split(","):
        quiet, broken = Row("aqueue, no faults", broker), Row("aqueue", broker)
        rows += [quiet, broken]
        quiet.verdicts.append(runs.go(make_plan(broker, 0, seconds=min(chosen.seconds, 20.0), faults=False, lease=2.0)))
        for seed in seeds:
            broken.verdicts.append(runs.go(make_plan(broker, seed, seconds=chosen.seconds, slow=not chosen.fast)))
        if chosen.supervised_seeds:
            rows.append(_supervised(runs, broker, chosen))
    ours = [row for row in rows if not row.is_peer]
    rows += _baselines(runs, chosen)
    found = "not planted" if chosen.no_mutants else _mutants()
    note = (
        f"{time.strftime('%Y-%m-%d', time.gmtime())}, Python {platform.python_version()}: seeds {seeds.start} to "
        f"{seeds.stop - 1}, {chosen.seconds:g} s of load each, a lease of 1 s. Planted bugs: {found}."
    )
    text = table(rows, [note])
    print(text)
    if not chosen.no_report:
        write(GUARANTEES, text)
    well = all(judged.word == "pass" for row in ours for judged in row.verdicts)
    return int(not well or found.startswith("NOT"))


def _supervised(runs: Runs, broker: str, chosen: argparse.Namespace) -> Row:
    """As people start it; of claims and settles nothing is known here."""
    row = Row("aqueue worker", broker)
    for seed in range(chosen.first, chosen.first + chosen.supervised_seeds):
        plan = make_plan(broker, seed, seconds=chosen.seconds, slow=not chosen.fast)
        row.verdicts.append(runs.go(msgspec.structs.replace(plan, supervised=True)))
    return row


def _baselines(runs: Runs, chosen: argparse.Namespace) -> list[Row]:
    """Others, and ourselves with the same tasks."""
    rows: list[Row] = []
    names = [name for name in chosen.peers.split(",") if name]
    for name in ["aqueue", *names] if names else []:
        peer = PEERS.get(name)
        if peer is not None:
            peer.prepare()
        row = Row(name if peer else "aqueue, same tasks", "redis")
        rows.append(row)
        for seed in range(chosen.first, chosen.first + chosen.peer_seeds):
            plan = msgspec.structs.replace(make_plan("redis", seed, seconds=chosen.seconds), repeats=False)
            row.verdicts.append(runs.go(plan, peer, _SIMPLE))
    return rows


def _mutants() -> str:
    command = [sys.executable, "-m", "pytest", "-q", "tests/chaos/test_mutants.py", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    last = done.stdout.strip().splitlines()[-1:] or [""]
    return "each turns the verdict red" if done.returncode == 0 else f"NOT all found: {last[0]}"


if __name__ == "__main__":
    sys.exit(main())
