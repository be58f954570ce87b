"""The figures as a page and a chart."""

import os
import platform
import statistics
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent

#: figure -> (what it is, must, aim)
SINGLE = {
    "sqlite": ("tasks/s on a SQLite file, results stored", "8,000", "20,000", "{:,.0f}"),
    "of_ideal": ("10,000 coroutines asleep at once: part of the ideal rate", "90%", "", "{:.0%}"),
    "kilobytes_each": ("memory of one of them, kB", "10", "", "{:.1f}"),
    "megabytes": ("resident memory of an idle worker on Redis, MB", "45", "35", "{:.1f}"),
    "commands": ("commands to Redis from an idle worker, a second", "1", "", "{:.2f}"),
    "import": ("`import aqueue`, ms", "150", "80", "{:.0f}"),
    "asyncio": ("of which `import asyncio`, ms", "", "", "{:.0f}"),
    "depth": ("fetch rate with 1 million messages waiting against 1 thousand", "0.9", "1.0", "{:.2f}"),
}


@dataclass
class Report:
    """What one run has found."""

    redis: str
    versions: dict[str, str]
    throughput: dict[str, float] = field(default_factory=dict)
    latencies: "defaultdict[str, list[tuple[float, float]]]" = field(default_factory=lambda: defaultdict(list))
    sends: dict[str, float] = field(default_factory=dict)
    threads: dict[str, float] = field(default_factory=dict)
    single: dict[str, float] = field(default_factory=dict)

    def write(self) -> None:
        (HERE / "README.md").write_text(self.text())
        (HERE / "chart.svg").write_text(self.chart())

    def text(self) -> str:
        parts = [self._head()]
        if self.throughput:
            parts.append(
                self._rates("Tasks a second", self.throughput, "One worker process, no-op tasks, results stored.")
            )
        if self.latencies:
            parts.append(self._round_trips())
        if self.sends:
            text = "Awaited sends a second, concurrent where the peer can."
            parts.append(self._rates("Sends a second", self.sends, text))
        if self.threads:
            parts.append(
                self._rates("Plain functions in threads, a second", self.threads, "No-op functions in 16 threads.")
            )
        if self.single:
            parts.append(self._singles())
        return "\n\n".join(parts) + "\n"

    def _head(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        return (
            "# Benchmarks\n\nWritten by `make bench`: all in one run, in turn, on one local Redis; medians. Machines "
            "differ and are noisy: the ratios say more than the figures.\n\n![chart](chart.svg)\n\n"
            f"{date.today():%Y-%m-%d}, {os.cpu_count()} cores ({_processor()}), Python {platform.python_version()}, "  # noqa: DTZ011
            f"Redis {self.redis}, {versions}. "
            "`floor` does the same Redis work as aqueue (fenced claim and settle, results, one asyncio task and one "
            "timeout a message) with no framework around it: [floor.py](floor.py)."
        )

    def _rates(self, title: str, rates: dict[str, float], text: str) -> str:
        ours = rates.get("aqueue", 0.0)
        rows = [
            f"| {name} | {rate:,.0f} | {ours / rate:.1f} |"
            if name != "aqueue"
            else f"| **{name}** | **{rate:,.0f}** | |"
            for name, rate in sorted(rates.items(), key=lambda item: -item[1])
        ]
        return "\n".join([f"## {title}", "", text, "", "| | a second | aqueue is x times |", "|---|--:|--:|", *rows])

    def _round_trips(self) -> str:
        medians = {
            name: (statistics.median(p50 for p50, _ in found), statistics.median(p99 for _, p99 in found))
            for name, found in self.latencies.items()
        }
        rows = [
            f"| {name} | {p50:.2f} | {p99:.2f} |"
            for name, (p50, p99) in sorted(medians.items(), key=lambda item: item[1])
        ]
        head = ["## Round trip", "", "From send to the result in hand, on an idle worker, ms.", ""]
        return "\n".join([*head, "| | p50 | p99 |", "|---|--:|--:|", *rows])

    def _singles(self) -> str:
        rows = [
            f"| {SINGLE[name][0]} | {SINGLE[name][3].format(value)} | {SINGLE[name][1]} | {SINGLE[name][2]} |"
            for name, value in self.single.items()
        ]
        return "\n".join(["## aqueue by itself", "", "| | measured | must | aim |", "|---|--:|--:|--:|", *rows])

    def chart(self) -> str:
        """Bars of the tasks a second; plain SVG, readable on light and dark pages."""
        rates = sorted(self.throughput.items(), key=lambda item: -item[1])
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


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
