"""What is going on? The supervisor's own series, and those of the running children with a `model` label.

Requests are counted as they pass; everything else is read from the scheduler and the children when somebody asks.
Nothing here takes a lease, so a scrape neither loads a model nor keeps it awake.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Final

from aiohttp import web
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from supervisor import __version__
from supervisor.entry import Entry, State
from supervisor.upstream import UpstreamClosed
from supervisor.usage import Tokens

if TYPE_CHECKING:
    from supervisor.child import Child
    from supervisor.fleet import Fleet

PREFIX: Final = "llama_supervisor_"
SCRAPE_SECONDS: Final = 1.0
"""How long a child may take to tell its own metrics; one that hangs is left out."""

disable_created_metrics()  # type: ignore[no-untyped-call]  # a gauge beside each counter that says when it began, in every process anew

BOUNDS: Final = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds of the histograms' buckets in seconds."""

_BY_MODEL: Final = ("model",)

Families = list[Metric]


class Metrics:
    """What is counted while requests pass, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.errors = Counter(
            PREFIX + "errors",
            "Errors of the supervisor itself, by the code in their envelope.",
            ["code"],
            registry=None,
        )
        self.retries = Counter(
            PREFIX + "retries", "Requests that were sent again, as their child died.", _BY_MODEL, registry=None
        )
        self.load = Histogram(
            PREFIX + "model_load_seconds",
            "From the start of a child until it could serve.",
            _BY_MODEL,
            registry=None,
            buckets=BOUNDS,
        )
        self.slots_saved = Counter(
            PREFIX + "slot_cache_saved", "Prompts saved before a child was stopped.", _BY_MODEL, registry=None
        )
        self.slots_restored = Counter(
            PREFIX + "slot_cache_restored", "Prompts restored into a child.", _BY_MODEL, registry=None
        )
        self.slot_failures = Counter(
            PREFIX + "slot_cache_failures",
            "Children whose prompts could not be saved (save) or restored (restore).",
            ["model", "action"],
            registry=None,
        )
        self.slot_bytes = Gauge(PREFIX + "slot_cache_bytes", "Size of the saved prompts on disk.", registry=None)
        self.series: dict[str, ModelSeries] = {}
        slots = (self.slots_saved, self.slots_restored, self.slot_failures, self.slot_bytes)
        for collector in (self.errors, self.retries, self.load, *slots, RequestCollector(self)):
            self.registry.register(collector)
        ProcessCollector(registry=self.registry)

    def of(self, model: str) -> ModelSeries:
        """Return the series of one model."""
        series = self.series.get(model)
        if series is None:
            series = self.series[model] = ModelSeries()
        return series


METRICS: Final = web.AppKey("metrics", Metrics)


class Tally:
    """A histogram: how many values fell under each of `BOUNDS` but not the one before, and their sum."""

    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(BOUNDS, value)] += 1
        self.total += value


class ModelSeries:
    """What is counted for one model on each request's way: plain numbers, for the library's take ten times as long."""

    def __init__(self) -> None:
        self.requests: dict[tuple[str, int], int] = {}  # by route and status
        self.tokens = [0, 0, 0]  # as in Tokens
        self.queue, self.first_token, self.duration = Tally(), Tally(), Tally()

    def count(
        self, route: str, status: int, *, waited: float, took: float, first: float | None, tokens: Tokens
    ) -> None:
        """Count a request that has ended; `waited`, `took` and `first` in seconds since it came."""
        key = route, status
        self.requests[key] = self.requests.get(key, 0) + 1
        self.queue.add(waited)
        self.duration.add(took)
        if first is not None:
            self.first_token.add(first)
        for kind, number in enumerate(tokens):
            self.tokens[kind] += number


class RequestCollector(Collector):
    """The series that are counted while requests pass."""

    def __init__(self, metrics: Metrics) -> None:
        self._series = metrics.series

    def collect(self) -> Iterator[Metric]:
        """Yield the families."""
        requests = CounterMetricFamily(
            PREFIX + "requests",
            "Requests that a child was asked; status 499: the client left first.",
            labels=["model", "route", "status"],
        )
        tokens = CounterMetricFamily(
            PREFIX + "tokens",
            "Tokens that answers told of, by kind: prompt (computed), cached, generated.",
            labels=["model", "kind"],
        )
        for model, series in self._series.items():
            for (route, status), number in series.requests.items():
                requests.add_metric([model, route, str(status)], number)
            for kind, number in zip(Tokens._fields, series.tokens, strict=True):
                tokens.add_metric([model, kind], number)
        yield requests
        yield tokens
        for name, told, tally in _TALLIES:
            family = HistogramMetricFamily(PREFIX + name, told, labels=_BY_MODEL)
            for model, series in self._series.items():
                found = tally(series)
                sums = zip([*map(str, BOUNDS), "+Inf"], accumulate(found.counts), strict=True)
                family.add_metric([model], list(sums), found.total)
            yield family


_TALLIES: tuple[tuple[str, str, Callable[[ModelSeries], Tally]], ...] = (
    ("queue_seconds", "Wait of a request for its model, loading included.", lambda series: series.queue),
    ("time_to_first_token_seconds", "From a request to its stream's first event.", lambda series: series.first_token),
    ("request_seconds", "From the request to the end of its answer.", lambda series: series.duration),
)

_Value = Callable[[Entry], float]

_GAUGES: tuple[tuple[str, str, _Value], ...] = (
    ("requests_in_flight", "Requests that a child is busy with.", lambda entry: len(entry.leases)),
    ("requests_waiting", "Requests that wait for their model.", lambda entry: len(entry.waiters)),
)
_COUNTERS: tuple[tuple[str, str, _Value], ...] = (
    ("model_starts", "Starts of a child.", lambda entry: entry.starts),
    ("model_start_failures", "Children that did not become ready.", lambda entry: entry.start_failures),
    ("model_restarts", "Children that died after they were ready.", lambda entry: entry.restarts),
)
_BY_REASON: tuple[tuple[str, str, dict[str, _Value]], ...] = (
    (
        "queue_refusals",
        "Requests refused as the queue was full (full), or as they had waited for too long (timeout).",
        {"full": lambda entry: entry.turned_away, "timeout": lambda entry: entry.timed_out},
    ),
    (
        "evictions",
        "Children stopped because they were idle for long (idle), or to make room for another model (room).",
        {"room": lambda entry: entry.made_room, "idle": lambda entry: entry.idled_out},
    ),
)


class FleetCollector(Collector):
    """The series that are read from the fleet when somebody asks."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    def collect(self) -> Iterator[Metric]:
        """Yield the families."""
        entries = self._fleet.scheduler.entries.values()
        info = GaugeMetricFamily(PREFIX + "info", "Always 1; the version is a label.", labels=["version"])
        info.add_metric([__version__], 1)
        yield info
        kinds = ((GaugeMetricFamily, _GAUGES), (CounterMetricFamily, _COUNTERS))
        for kind, table in kinds:
            for name, help_, value in table:
                family = kind(PREFIX + name, help_, labels=_BY_MODEL)
                for entry in entries:
                    family.add_metric([entry.model], value(entry))
                yield family
        yield self._queue_ages()
        yield from self._by_reason()
        yield self._states()
        memory = GaugeMetricFamily(PREFIX + "model_memory_bytes", "Resident memory of a child.", labels=_BY_MODEL)
        for model, child in self._fleet.children.items():
            if (rss := child.rss()) is not None:
                memory.add_metric([model], rss)
        yield memory
        yield from self._sizes()

    def _sizes(self) -> Iterator[Metric]:
        labels = ["model", "pool"]
        predicted = GaugeMetricFamily(PREFIX + "model_memory_predicted_bytes", "Memory by the estimate.", labels=labels)
        counted = GaugeMetricFamily(PREFIX + "model_memory_counted_bytes", "Memory that is counted.", labels=labels)
        peak = GaugeMetricFamily(PREFIX + "model_memory_peak_bytes", "Most memory that a child took.", labels=labels)
        for model, size in self._fleet.sizing.sizes.items():
            for family, numbers in ((predicted, size.predicted), (counted, size.needs), (peak, size.peak)):
                for pool, number in numbers.items():
                    family.add_metric([model, pool], number)
        budget = GaugeMetricFamily(PREFIX + "memory_budget_bytes", "Most memory of all children.", labels=["pool"])
        for pool, number in self._fleet.scheduler.limits.budget.items():
            budget.add_metric([pool], number)
        yield from (predicted, counted, peak, budget)

    def _queue_ages(self) -> Metric:
        told = "How long the oldest request has waited for its model; 0: none waits."
        family = GaugeMetricFamily(PREFIX + "queue_oldest_seconds", told, labels=_BY_MODEL)
        for model, age in self._fleet.queue_ages().items():
            family.add_metric([model], age)
        return family

    def _by_reason(self) -> Iterator[Metric]:
        for name, told, reasons in _BY_REASON:
            family = CounterMetricFamily(PREFIX + name, told, labels=["model", "reason"])
            for entry in self._fleet.scheduler.entries.values():
                for reason, value in reasons.items():
                    family.add_metric([entry.model, reason], value(entry))
            yield family

    def _states(self) -> Metric:
        labels = ["model", "state"]
        family = GaugeMetricFamily(PREFIX + "model_state", "1 for the state that a model is in.", labels=labels)
        for entry in self._fleet.scheduler.entries.values():
            for state in State:
                family.add_metric([entry.model, str(state)], float(entry.state is state))
        return family


# The children's own


async def exposition(metrics: Metrics, fleet: Fleet) -> bytes:
    """Return everything in Prometheus' text format."""
    running = {model: fleet.children[model] for model in fleet.running() if model in fleet.children}
    texts = dict(zip(running, await asyncio.gather(*map(_scrape, running.values())), strict=True))
    scraped = GaugeMetricFamily(PREFIX + "model_scraped", "Whether a child told its own metrics.", labels=_BY_MODEL)
    for model, text in texts.items():
        scraped.add_metric([model], float(text is not None))
    told = {model: text for model, text in texts.items() if text is not None}
    return generate_latest(_Families([*metrics.registry.collect(), scraped, *labelled(told)]))


class _Families(CollectorRegistry):
    """Families at hand, in the shape that `generate_latest` takes."""

    def __init__(self, families: Families) -> None:
        super().__init__()
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)


async def _scrape(child: Child) -> str | None:
    try:
        status, body = await asyncio.wait_for(child.call("GET", "/metrics"), SCRAPE_SECONDS)
    except (OSError, UpstreamClosed, TimeoutError):
        return None
    return body.decode("utf-8", "replace") if status == 200 else None


def labelled(texts: dict[str, str]) -> Families:
    """Return the families in the children's texts by model, with a label for it; a text that is none is left out."""
    families: dict[str, Metric] = {}
    for model, text in texts.items():
        try:
            found = list(text_string_to_metric_families(text))
        except ValueError:
            continue
        for one in found:
            # the library adds _total to a counter that has none, as llama-server's n_tokens_max; it keeps its name here
            renamed = one.type == "counter" and f"# TYPE {one.name} counter" in text
            family = families.setdefault(
                one.name, Metric(one.name, one.documentation, "unknown" if renamed else one.type)
            )
            for sample in one.samples:
                name = sample.name.removesuffix("_total") if renamed else sample.name
                family.add_sample(name, {**sample.labels, "model": model}, sample.value)
    return list(families.values())
