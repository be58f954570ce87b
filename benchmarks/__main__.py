"""``make bench``: everything in one run, peers in turn on one Redis; writes README.md and chart.svg beside this file.

python -m benchmarks [--rounds 3] [--only throughput,latency] [--peers aqueue,celery] [--no-report]
"""

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from benchmarks import figures
from benchmarks.report import Report
from benchmarks.setting import PEERS, Peer, Server

SENDS = {"aqueue": 20_000, "celery": 2_000, "taskiq": 3_000, "arq": 3_000, "saq": 3_000, "dramatiq": 3_000}


@dataclass(frozen=True)
class Run:
    """One run of the benchmarks."""

    server: Server
    peers: Sequence[Peer]
    rounds: int
    report: Report

    @property
    def aqueue(self) -> Peer:
        return next(peer for peer in PEERS if peer.name == "aqueue")

    def throughput(self) -> None:
        runs: dict[str, Callable[[], float]] = {
            peer.name: partial(figures.throughput, self.server, peer) for peer in self.peers
        }
        runs["floor"] = partial(figures.floor, self.server)
        self.report.throughput = in_turn("tasks/s", self.rounds, runs)

    def latency(self) -> None:
        for _ in range(self.rounds):
            for peer in self.peers:
                if not peer.has_round_trips:
                    continue
                found = figures.latency(self.server, peer)
                say(f"round trip {peer.name}: p50 {found['p50']:.2f} ms, p99 {found['p99']:.2f} ms")
                self.report.latencies[peer.name].append((found["p50"], found["p99"]))

    def sends(self) -> None:
        runs = {peer.name: partial(figures.sends, self.server, peer, SENDS[peer.name]) for peer in self.peers}
        self.report.sends = in_turn("sends/s", self.rounds, runs)

    def threads(self) -> None:
        runs = {
            peer.name: partial(figures.throughput, self.server, peer, task="thread_nop", threads=True)
            for peer in self.peers
            if peer.thread_worker
        }
        self.report.threads = in_turn("tasks/s in threads", self.rounds, runs)

    def sqlite(self) -> None:
        runs = {"aqueue on SQLite": partial(figures.sqlite_throughput, self.server, self.aqueue)}
        (self.report.single["sqlite"],) = in_turn("tasks/s", self.rounds, runs).values()

    def asleep(self) -> None:
        self.report.single |= figures.asleep(self.server, self.aqueue)

    def idle(self) -> None:
        self.report.single |= figures.idle(self.server, self.aqueue)

    def start(self) -> None:
        self.report.single |= figures.import_time()

    def depth(self) -> None:
        self.report.single["depth"] = figures.depth(self.server)


PARTS: dict[str, Callable[[Run], None]] = {
    "throughput": Run.throughput,
    "latency": Run.latency,
    "sends": Run.sends,
    "threads": Run.threads,
    "sqlite": Run.sqlite,
    "asleep": Run.asleep,
    "idle": Run.idle,
    "import": Run.start,
    "depth": Run.depth,
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--only", default=",".join(PARTS))
    arguments.add_argument("--peers", default=",".join(peer.name for peer in PEERS))
    arguments.add_argument("--no-report", action="store_true")
    given = arguments.parse_args()
    peers = [peer for peer in PEERS if peer.name in given.peers.split(",")]
    for peer in peers:
        peer.prepare()
    server = Server()
    report = Report(server.version, {peer.name: peer.version() for peer in peers})
    run = Run(server, peers, given.rounds, report)
    try:
        for part in given.only.split(","):
            PARTS[part](run)
    finally:
        server.stop()
    print(report.text())
    if not given.no_report:
        report.write()


def in_turn(what: str, rounds: int, runs: Mapping[str, Callable[[], float]]) -> dict[str, float]:
    """Medians of several rounds, in each of which everybody has a turn."""
    found: defaultdict[str, list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(run())
            say(f"{what} {name}: {found[name][-1]:,.0f}")
    return {name: statistics.median(values) for name, values in found.items()}


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
