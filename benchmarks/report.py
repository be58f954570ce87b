"""The figures as a page and a chart."""

import os
import platform
import statistics
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import NamedTuple

from benchmarks.targets import rabbitmq_targets

HERE = Path(__file__).parent

#: figure -> (what it is, must, aim)
SINGLE = {
    "sqlite": ("tasks/s on a SQLite file, results stored", "8,000", "20,000", "{:,.0f}"),
    "of_ideal": ("10,000 coroutines asleep at once: part of the ideal rate", "90%", "", "{:.0%}"),
    "kilobytes_each": ("memory of one of them, kB", "10", "", "{:.1f}"),
    "megabytes": ("resident memory of an idle worker on Redis, MB", "45", "35", "{:.1f}"),
    "supervisor": ("resident memory of its supervisor, MB", "", "", "{:.1f}"),
    "commands": ("commands to Redis from an idle worker, a second", "1", "", "{:.2f}"),
    "import": ("`import aqueue`, ms", "150", "80", "{:.0f}"),
    "asyncio": ("of which `import asyncio`, ms", "", "", "{:.0f}"),
    "recovery": ("a killed worker's task runs elsewhere, Redis, default lease of 30 s, after s", "55", "", "{:.1f}"),
    "short_recovery": ("the same with a lease of 5 s", "10", "", "{:.1f}"),
    "depth": ("fetch rate with 1 million messages waiting against 1 thousand", "0.9", "1.0", "{:.2f}"),
}


class Section(NamedTuple):
    title: str
    text: str


#: Rates a second.
RATES = {
    "throughput": Section("Tasks a second", "One worker process, no-op tasks, results stored."),
    "sends": Section("Sends a second", "Awaited sends a second, concurrent where the peer can."),
    "threads": Section("Plain functions in threads, a second", "No-op functions in 16 threads."),
    "rabbitmq": Section(
        "Tasks a second on RabbitMQ",
        "One worker process, no-op tasks, classic queues, results in Redis. `floor` takes the same messages and "
        "acknowledges them by hundreds, and does nothing else: what the server delivers at most.",
    ),
    "rpc": Section(
        "Tasks a second on RabbitMQ, results by rpc",
        "Each result is a message for the sender's queue; of the peers only Celery has that, too. Both take the same "
        "calls, and a task is done when its result is in that queue.",
    ),
    "rabbitmq_sends": Section(
        "Confirmed sends a second on RabbitMQ",
        "Persistent messages, each send awaited until the server has confirmed it, concurrent where the peer can. "
        "Celery and dramatiq wait for that only when told to, as they are here. `floor` writes frames made beforehand "
        "to a socket, with no more than 1,000 of them unconfirmed. The tasks keep no result: aqueue would record each "
        "one as sent in the store of results, which none of the others does.",
    ),
    "rabbitmq_threads": Section(
        "Plain functions in threads on RabbitMQ, a second", "No-op functions in 16 threads, results in Redis."
    ),
}

#: Milliseconds.
ROUND_TRIPS = {
    "latency": Section("Round trip", "From send to the result in hand, on an idle worker, ms."),
    "rabbitmq_latency": Section(
        "Round trip on RabbitMQ",
        "From send to the result in hand, on an idle worker, ms; results in Redis. Sends of aqueue and taskiq await "
        "the server's confirm; those of Celery and dramatiq do not, unless told to. aqueue's also record in Redis that "
        "the task was sent, unless told not to (`track_sent`).",
    ),
    "rpc_latency": Section("Round trip on RabbitMQ, results by rpc", "The same by `rpc://`."),
}

#: figure -> what it is
LINK = {
    "write": "a task's message to frames, µs",
    "read": "frames to a task's message, µs",
    "publish": "confirmed publications a second",
    "consume": "deliveries a second",
}


@dataclass
class Report:
    """What one run has found."""

    #: Of servers and peers, by name.
    versions: dict[str, str]
    #: By section and peer.
    rates: dict[str, dict[str, float]] = field(default_factory=dict)
    #: By section and peer: median and 99th percentile of each round.
    round_trips: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)
    single: dict[str, float] = field(default_factory=dict)
    #: By figure and by whose link to RabbitMQ it is.
    link: dict[str, dict[str, float]] = field(default_factory=dict)

    def write(self) -> None:
        (HERE / "README.md").write_text(self.text())
        (HERE / "chart.svg").write_text(self.chart())

    def text(self) -> str:
        parts = [self._head()]
        parts += [self._section(name) for name in ("throughput", "latency", "sends", "threads") if self._has(name)]
        if self.single:
            parts.append(self._singles())
        on_rabbitmq = ("rabbitmq", "rpc", "rabbitmq_latency", "rpc_latency", "rabbitmq_sends", "rabbitmq_threads")
        parts += [self._section(name) for name in on_rabbitmq if self._has(name)]
        if self.link:
            parts.append(self._links())
        targets = rabbitmq_targets(self.rates, self._medians)
        if targets:
            parts.append("\n".join(["## aqueue on RabbitMQ", "", *_MEASURED, *targets]))
        return "\n\n".join(parts) + "\n"

    def _head(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            "# Benchmarks\n\nWritten by `make bench`: all in one run, in turn, on one local Redis and RabbitMQ; "
            "medians. Machines differ and are noisy: the ratios say more than the figures.\n\n![chart](chart.svg)\n\n"
            f"{date.today():%Y-%m-%d}, {os.cpu_count()} cores ({_processor()}), Python {platform.python_version()}, "  # noqa: DTZ011
            f"{versions}. "
            "`floor` does the same Redis work as aqueue (fenced claim and settle, results, one asyncio task and one "
            "timeout a message) with no framework around it: [floor.py](floor.py); on RabbitMQ it is "
            "[rabbitmq_floor.py](rabbitmq_floor.py)."
        )

    def _has(self, section: str) -> bool:
        return bool(self.rates.get(section) or self.round_trips.get(section))

    def _section(self, section: str) -> str:
        if section in RATES:
            return _rates(RATES[section], self.rates[section])
        return _round_trips(ROUND_TRIPS[section], self._medians(section))

    def _medians(self, section: str) -> dict[str, tuple[float, float]]:
        return {
            name: (statistics.median(p50 for p50, _ in found), statistics.median(p99 for _, p99 in found))
            for name, found in self.round_trips.get(section, {}).items()
        }

    def _singles(self) -> str:
        rows = [
            f"| {SINGLE[name][0]} | {SINGLE[name][3].format(value)} | {SINGLE[name][1]} | {SINGLE[name][2]} |"
            for name, value in self.single.items()
        ]
        return "\n".join(["## aqueue by itself", "", *_MEASURED, *rows])

    def _links(self) -> str:
        """aqueue's link to RabbitMQ beside aiormq's."""
        rows = [
            f"| {LINK[name]} | {found['aqueue']:,.0f} | {found['aiormq']:,.0f} |" for name, found in self.link.items()
        ]
        head = [
            "## The link to RabbitMQ",
            "",
            "aqueue's own beside aiormq, which is beneath aio-pika: [codec.py](codec.py).",
        ]
        return "\n".join([*head, "", "| | aqueue | aiormq |", "|---|--:|--:|", *rows])

    def chart(self) -> str:
        """Bars of the tasks a second; plain SVG, readable on light and dark pages."""
        rates = sorted(self.rates.get("throughput", {}).items(), key=lambda item: -item[1])
        most = max((rate for _, rate in rates), default=1.0)
        bars = []
        for row, (name, rate) in enumerate(rates):
            y, width = 40 + row * 30, 460 * rate / most
            colour = {"aqueue": "#2f855a", "floor": "#a0aec0"}.get(name, "#4a5568")
            bars.append(
                f'<text x="90" y="{y + 15}" text-anchor="end">{name}</text>'
                f'<rect x="100" y="{y}" width="{max(width, 1):.1f}" height="20" rx="2" fill="{colour}"/>'
                f'<text x="{106 + width:.1f}" y="{y + 15}">{rate:,.0f}</text>'
            )
        height = 50 + 30 * len(rates)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 {height}" '
            'font-family="sans-serif" font-size="13">'
            f'<rect width="640" height="{height}" fill="#ffffff"/>'
            '<text x="100" y="24" font-weight="bold">tasks a second, one worker on Redis, results stored</text>'
            + "".join(bars)
            + "</svg>\n"
        )


_MEASURED = ("| | measured | must | aim |", "|---|--:|--:|--:|")


def _rates(section: Section, rates: dict[str, float]) -> str:
    ours = rates.get("aqueue", 0.0)
    rows = [
        f"| {name} | {rate:,.0f} | {ours / rate:.1f} |" if name != "aqueue" else f"| **{name}** | **{rate:,.0f}** | |"
        for name, rate in sorted(rates.items(), key=lambda item: -item[1])
    ]
    return "\n".join(
        [f"## {section.title}", "", section.text, "", "| | a second | aqueue is x times |", "|---|--:|--:|", *rows]
    )


def _round_trips(section: Section, medians: dict[str, tuple[float, float]]) -> str:
    rows = [
        f"| {name} | {p50:.2f} | {p99:.2f} |" for name, (p50, p99) in sorted(medians.items(), key=lambda item: item[1])
    ]
    return "\n".join([f"## {section.title}", "", section.text, "", "| | p50 | p99 |", "|---|--:|--:|", *rows])


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
