"""The docs name every route and every error code."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

from aiohttp import web

from supervisor import errors
from supervisor.metrics import FleetCollector, Metrics
from supervisor.routes import admin, atlas, karen, models, native, openapi, streams
from supervisor.scheduler import Limits, Scheduler
from supervisor.usage import Tokens

DOCS = Path(__file__).parent.parent / "docs"


def routes() -> set[tuple[str, str]]:
    app = web.Application()
    for family in (native, atlas, streams, models, karen, admin, openapi):
        family.add(app)
    found = set()
    for route in app.router.routes():
        assert route.resource is not None
        path = re.sub(r"\{(\w+):[^}]+\}", r"{\1}", route.resource.canonical)
        found.add((route.method, path))
    return found


def test_every_route_is_documented_and_every_documented_route_exists():
    text = (DOCS / "api.md").read_text()
    documented = set(re.findall(r"`(GET|POST|DELETE) (/[^`?]*)`", text))
    there = {(method, path) for method, path in routes() if method not in ("HEAD", "OPTIONS")}
    assert documented == there


def test_every_error_code_is_documented():
    text = (DOCS / "api.md").read_text()
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and hasattr(kind, "status")]
    for kind in kinds:
        if kind.code:
            assert re.search(rf"\| {kind.status} \| `{kind.code}` \|", text), kind


def test_every_metric_is_documented_and_every_documented_metric_exists():
    documented = dict(
        re.findall(r"^\| `(llama_supervisor_\w+)` \| ([^|]*) \|", (DOCS / "api.md").read_text(), re.MULTILINE)
    )
    made, scheduler = Metrics(), Scheduler(Limits(budget={"ram": 1}))
    scheduler.entry("m")
    size = SimpleNamespace(predicted={"ram": 1}, needs={"ram": 1}, peak={"ram": 1})
    sizing = SimpleNamespace(sizes={"m": size})
    fleet = SimpleNamespace(
        scheduler=scheduler, children={"m": Process()}, queue_ages=lambda: {"m": 0.0}, sizing=sizing
    )
    made.registry.register(FleetCollector(fleet))
    made.of("m").count("/x", 200, waited=0.0, took=0.0, first=0.0, tokens=Tokens(1, 1, 1))
    made.errors.labels("x").inc()
    made.retries.labels("m").inc()
    made.load.labels("m").observe(1)
    made.slots_saved.labels("m").inc()
    made.slots_restored.labels("m").inc()
    made.slot_failures.labels("m", "save").inc()
    there = {"llama_supervisor_model_scraped": "`model`"}
    for family in made.registry.collect():
        if not family.name.startswith("process_"):
            labels = ", ".join(f"`{label}`" for label in family.samples[0].labels if label != "le")
            there[family.name + ("_total" if family.type == "counter" else "")] = labels
    assert documented == there


class Process:
    def rss(self) -> int:
        return 1


def test_local_links_lead_somewhere():
    root = DOCS.parent
    for page in [root / "README.md", *DOCS.glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
