"""``make bench``: everything in one run, peers in turn on one Redis and one RabbitMQ.

Writes README.md and chart.svg beside this file.

python -m benchmarks [--rounds 3] [--only throughput,latency] [--peers aqueue,celery] [--no-report]
"""

import argparse
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from benchmarks import figures
from benchmarks.report import Report
from benchmarks.setting import PEERS, PLACE, OnRabbitMQ, OnRpc, Peer, Server
from tests.kit.rabbitmq import RabbitServer

SENDS = {"aqueue": 20_000, "celery": 2_000, "taskiq": 3_000, "arq": 3_000, "saq": 3_000, "dramatiq": 3_000}


#: What it is called, who it is, and its command.
RoundTrip = tuple[str, Peer, str]


@dataclass
class Run:
    """One run of the benchmarks."""

    server: Server
    peers: Sequence[Peer]
    rounds: int
    report: Report
    #: What is to be stopped at the end.
    ends: ExitStack

    @property
    def aqueue(self) -> Peer:
        return next(peer for peer in PEERS if peer.name == "aqueue")

    @cached_property
    def rabbitmq(self) -> OnRabbitMQ:
        """Started by the first who needs it, so that it takes nothing from what is measured on Redis."""
        folder = self.ends.enter_context(tempfile.TemporaryDirectory(dir=PLACE))
        node = RabbitServer(Path(folder))
        self.ends.callback(node.stop)
        started = OnRabbitMQ(self.server, node)
        self.report.versions["RabbitMQ"] = started.version
        return started

    @cached_property
    def rpc(self) -> OnRpc:
        return OnRpc(self.server, self.rabbitmq.node)

    def throughput(self) -> None:
        runs = self._throughputs(self.server, self.peers)
        runs["floor"] = partial(figures.floor, self.server)
        self.report.rates["throughput"] = in_turn("tasks/s", self.rounds, runs)

    def latency(self) -> None:
        runs = [(peer.name, peer, "latency") for peer in self.peers if peer.has_round_trips]
        self._round_trips("latency", self.server, runs)

    def sends(self) -> None:
        self.report.rates["sends"] = in_turn("sends/s", self.rounds, self._sends(self.server, self.peers))

    def threads(self) -> None:
        runs = self._in_threads(self.server, self.peers)
        self.report.rates["threads"] = in_turn("tasks/s in threads", self.rounds, runs)

    def on_rabbitmq(self) -> None:
        runs = self._throughputs(self.rabbitmq, self._peers_on("rabbitmq"))
        runs["floor"] = partial(figures.floor_of_rabbitmq, self.rabbitmq)
        self.report.rates["rabbitmq"] = in_turn("tasks/s on RabbitMQ", self.rounds, runs)

    def with_rpc(self) -> None:
        runs = self._throughputs(self.rpc, self._peers_on("rpc"))
        self.report.rates["rpc"] = in_turn("tasks/s by rpc", self.rounds, runs)

    def rabbitmq_latency(self) -> None:
        runs: list[RoundTrip] = []
        for peer in self._peers_on("rabbitmq"):
            runs.append((peer.name, peer, "latency"))
            if peer.round_trip_variant is not None:
                name, command = peer.round_trip_variant
                runs.append((name, peer, command))
        self._round_trips("rabbitmq_latency", self.rabbitmq, runs)

    def rpc_latency(self) -> None:
        self._round_trips("rpc_latency", self.rpc, [(peer.name, peer, "latency") for peer in self._peers_on("rpc")])

    def rabbitmq_sends(self) -> None:
        runs = self._sends(self.rabbitmq, self._peers_on("rabbitmq"))
        runs["floor"] = partial(figures.floor_of_rabbitmq_sends, self.rabbitmq)
        self.report.rates["rabbitmq_sends"] = in_turn("confirmed sends/s", self.rounds, runs)

    def rabbitmq_threads(self) -> None:
        runs = self._in_threads(self.rabbitmq, self._peers_on("rabbitmq"))
        self.report.rates["rabbitmq_threads"] = in_turn("tasks/s in threads on RabbitMQ", self.rounds, runs)

    def link(self) -> None:
        found = [figures.codec(self.rabbitmq) for _ in range(self.rounds)]
        for figure in found[0]:
            names = found[0][figure]
            self.report.link[figure] = {name: statistics.median(one[figure][name] for one in found) for name in names}

    def _peers_on(self, where: str) -> list[Peer]:
        return [peer for peer in self.peers if where in peer.also_on]

    def _throughputs(self, server: Server, peers: Sequence[Peer]) -> dict[str, Callable[[], float]]:
        return {peer.name: partial(figures.throughput, server, peer) for peer in peers}

    def _sends(self, server: Server, peers: Sequence[Peer]) -> dict[str, Callable[[], float]]:
        return {peer.name: partial(figures.sends, server, peer, SENDS[peer.name]) for peer in peers}

    def _in_threads(self, server: Server, peers: Sequence[Peer]) -> dict[str, Callable[[], float]]:
        return {
            peer.name: partial(figures.throughput, server, peer, task="thread_nop", threads=True)
            for peer in peers
            if peer.thread_worker
        }

    def _round_trips(self, section: str, server: Server, runs: Sequence[RoundTrip]) -> None:
        times: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
        for _ in range(self.rounds):
            for name, peer, command in runs:
                found = figures.latency(server, peer, command)
                say(f"{section} {name}: p50 {found['p50']:.2f} ms, p99 {found['p99']:.2f} ms")
                times[name].append((found["p50"], found["p99"]))
        self.report.round_trips[section] = dict(times)

    def sqlite(self) -> None:
        runs = {"aqueue on SQLite": partial(figures.sqlite_throughput, self.server, self.aqueue)}
        (self.report.single["sqlite"],) = in_turn("tasks/s", self.rounds, runs).values()

    def asleep(self) -> None:
        self.report.single |= figures.asleep(self.server, self.aqueue)

    def idle(self) -> None:
        self.report.single |= figures.idle(self.server, self.aqueue)

    def start(self) -> None:
        self.report.single |= figures.import_time()

    def recovery(self) -> None:
        runs = {"lease of 5 s": partial(figures.recovery, self.server, 5.0)}
        (self.report.single["short_recovery"],) = in_turn("seconds", self.rounds, runs).values()
        self.report.single["recovery"] = figures.recovery(self.server, 30.0)

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
    "recovery": Run.recovery,
    "depth": Run.depth,
    "rabbitmq": Run.on_rabbitmq,
    "rpc": Run.with_rpc,
    "rabbitmq-latency": Run.rabbitmq_latency,
    "rpc-latency": Run.rpc_latency,
    "rabbitmq-sends": Run.rabbitmq_sends,
    "rabbitmq-threads": Run.rabbitmq_threads,
    "link": Run.link,
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
    with ExitStack() as ends:
        server = Server()
        ends.callback(server.stop)
        report = Report({"Redis": server.version} | {peer.name: peer.version() for peer in peers})
        run = Run(server, peers, given.rounds, report, ends)
        for part in given.only.split(","):
            PARTS[part](run)
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
