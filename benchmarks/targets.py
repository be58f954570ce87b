"""What aqueue must reach on RabbitMQ: shares and multiples of what others reach in the same run."""

from collections.abc import Callable, Iterator, Mapping

Rates = Mapping[str, Mapping[str, float]]
Medians = Callable[[str], Mapping[str, tuple[float, float]]]


def rabbitmq_targets(rates: Rates, medians: Medians) -> list[str]:
    """Rows of measured, must and aim, for what a run has measured."""
    return [*_rates(rates), *_round_trips(medians)]


def _rates(rates: Rates) -> Iterator[str]:
    tasks = rates.get("rabbitmq", {})
    if "aqueue" in tasks:
        must = _share(
            5, "the best peer", max((tasks[name] for name in tasks.keys() - {"aqueue", "floor"}), default=None)
        )
        aim = _share(0.5, "the floor", tasks.get("floor"))
        yield _row("tasks/s on RabbitMQ, results in Redis", f"{tasks['aqueue']:,.0f}", must, aim)
    rpc = rates.get("rpc", {})
    if "aqueue" in rpc:
        must = _share(4, "celery", rpc.get("celery"))
        yield _row("tasks/s on RabbitMQ, results by rpc", f"{rpc['aqueue']:,.0f}", must)
    sends = rates.get("rabbitmq_sends", {})
    if "aqueue" in sends:
        must = _share(0.8, "the floor", sends.get("floor"))
        yield _row("confirmed concurrent sends a second", f"{sends['aqueue']:,.0f}", must)


def _round_trips(medians: Medians) -> Iterator[str]:
    theirs = medians("rabbitmq_latency").get("dramatiq")
    must = "under dramatiq's" if theirs is None else f"under dramatiq's {theirs[0]:.2f}"
    for section, results in (("rabbitmq_latency", "in Redis"), ("rpc_latency", "by rpc")):
        found = medians(section).get("aqueue")
        if found is not None:
            yield _row(f"round trip p50, results {results}, ms", f"{found[0]:.2f}", must, "0.50")


def _share(part: float, whose: str, rate: float | None) -> str:
    """What has to be reached, and, where that one was measured, how much it is."""
    times = f"{part:g} x {whose}" if part >= 1 else f"{part:.0%} of {whose}"
    return times if rate is None else f"{times}: {part * rate:,.0f}"


def _row(what: str, measured: str, must: str, aim: str = "") -> str:
    return f"| {what} | {measured} | {must} | {aim} |"
