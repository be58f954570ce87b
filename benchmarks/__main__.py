"""``make bench``: everything in one run, peers in turn on one Redis; writes README.md and chart.svg beside this file.

python -m benchmarks [--rounds 3] [--only throughput,latency] [--peers aqueue,celery] [--no-report]
"""

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable

from benchmarks import figures
from benchmarks.report import Report
from benchmarks.setting import PEERS, Server

SENDS = {"aqueue": 20_000, "celery": 2_000, "taskiq": 3_000, "arq": 3_000, "saq": 3_000, "dramatiq": 3_000}
PARTS = ("throughput", "latency", "sends", "threads", "sqlite", "asleep", "idle", "import", "depth")


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
    aqueue = next(peer for peer in PEERS if peer.name == "aqueue")
    wanted = set(given.only.split(","))
    try:
        if "throughput" in wanted:
            runs: dict[str, Callable[[], float]] = {
                peer.name: (lambda peer=peer: figures.throughput(server, peer)) for peer in peers
            }
            report.throughput = in_turn("tasks/s", given.rounds, {**runs, "floor": lambda: figures.floor(server)})
        if "latency" in wanted:
            for _ in range(given.rounds):
                for peer in peers:
                    found = figures.latency(server, peer)
                    say(f"round trip {peer.name}: p50 {found['p50']:.2f} ms, p99 {found['p99']:.2f} ms")
                    report.latencies[peer.name].append((found["p50"], found["p99"]))
        if "sends" in wanted:
            sending = {peer.name: (lambda peer=peer: figures.sends(server, peer, SENDS[peer.name])) for peer in peers}
            report.sends = in_turn("sends/s", given.rounds, sending)
        if "threads" in wanted:
            threading = {
                peer.name: (lambda peer=peer: figures.throughput(server, peer, task="thread_nop", threads=True))
                for peer in peers
                if peer.thread_worker
            }
            report.threads = in_turn("tasks/s in threads", given.rounds, threading)
        if "sqlite" in wanted:
            found_rates = [figures.sqlite_throughput(server, aqueue) for _ in range(given.rounds)]
            report.single["sqlite"] = statistics.median(found_rates)
        if "asleep" in wanted:
            report.single |= figures.asleep(server, aqueue)
        if "idle" in wanted:
            report.single |= figures.idle(server, aqueue)
        if "import" in wanted:
            report.single["import"] = figures.import_time()
        if "depth" in wanted:
            report.single["depth"] = figures.depth(server)
    finally:
        server.stop()
    print(report.text())
    if not given.no_report:
        report.write()


def in_turn(what: str, rounds: int, runs: dict[str, Callable[[], float]]) -> dict[str, float]:
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
