"""What is going on? The supervisor's own series, and those of the running children with a `model` label.

Requests are counted as they pass; everything else is read from the scheduler and the children when somebody asks.
Nothing here takes a lease, so a scrape neither loads a model nor keeps it awake.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Final

from aiohttp import web
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from supervisor import __version__
from supervisor.scheduler import Entry, State
from supervisor.upstream import UpstreamClosed
from supervisor.usage import Tokens

if TYPE_CHECKING:
    from supervisor.child import Child
    from supervisor.fleet import Fleet

PREFIX: Final = "llama_supervisor_"
SCRAPE_SECONDS: Final = 1.0
"""How long a child may take to tell its own metrics; one that hangs is left out."""

disable_created_metrics()  # type: ignore[no-untyped-call]  # a gauge beside each counter that says when it began, in every process anew

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_BY_MODEL: Final = ("model",)

Families = list[Metric]


class Metrics:
    """What is counted while requests pass, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter(
            "requests",
            "Requests that a child was asked; status 499: the client left first.",
            "model",
            "route",
            "status",
        )
        self.errors = self._counter("errors", "Errors of the supervisor itself, by the code in their envelope.", "code")
        self.retries = self._counter(
            "retries", "Requests that were asked again because a child died before it answered.", "model"
        )
        self.tokens = self._counter(
            "tokens", "Tokens that answers told of, by kind: prompt (computed), cached, generated.", "model", "kind"
        )
        self.queue = self._histogram("queue_seconds", "Wait of a request for its model, loading included.")
        self.first_token = self._histogram(
            "time_to_first_token_seconds", "From the request to the first event of its stream, waiting included."
        )
        self.duration = self._histogram("request_seconds", "From the request to the end of its answer.")
        self.load = self._histogram("model_load_seconds", "From the start of a child until it could serve.")
        self._series: dict[str, ModelSeries] = {}
        ProcessCollector(registry=self.registry)

    def of(self, model: str) -> ModelSeries:
        """Return the series of one model."""
        series = self._series.get(model)
        if series is None:
            series = self._series[model] = ModelSeries(self, model)
        return series

    def _counter(self, name: str, help_: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, help_, labels, registry=self.registry)

    def _histogram(self, name: str, help_: str) -> Histogram:
        return Histogram(PREFIX + name, help_, _BY_MODEL, buckets=_SECONDS, registry=self.registry)


METRICS: Final = web.AppKey("metrics", Metrics)


class ModelSeries:
    """One model's counters with their labels bound: binding takes longer than counting."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._queue = metrics.queue.labels(model)
        self._first_token = metrics.first_token.labels(model)
        self._duration = metrics.duration.labels(model)
        self._tokens = tuple(metrics.tokens.labels(model, kind) for kind in Tokens._fields)
        self._requests: dict[tuple[str, int], Counter] = {}

    def count(
        self, route: str, status: int, *, waited: float, took: float, first: float | None, tokens: Tokens
    ) -> None:
        """Count a request that has ended; `waited`, `took` and `first` in seconds since it came."""
        counter = self._requests.get((route, status))
        if counter is None:
            counter = self._requests[route, status] = self._metrics.requests.labels(self._model, route, str(status))
        counter.inc()
        self._queue.observe(waited)
        self._duration.observe(took)
        if first is not None:
            self._first_token.observe(first)
        for series, number in zip(self._tokens, tokens, strict=True):
            if number:
                series.inc(number)


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
        yield self._evictions()
        yield self._states()
        memory = GaugeMetricFamily(PREFIX + "model_memory_bytes", "Resident memory of a child.", labels=_BY_MODEL)
        for model, child in self._fleet.children.items():
            if (rss := child.rss()) is not None:
                memory.add_metric([model], rss)
        yield memory

    def _evictions(self) -> Metric:
        told = "Children stopped because they were idle for long (idle), or to make room for another model (room)."
        family = CounterMetricFamily(PREFIX + "evictions", told, labels=["model", "reason"])
        for entry in self._fleet.scheduler.entries.values():
            family.add_metric([entry.model, "room"], entry.made_room)
            family.add_metric([entry.model, "idle"], entry.idled_out)
        return family

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
