"""The docs name every route and every error code."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

from aiohttp import web
from prometheus_client import Counter, Histogram

from supervisor import errors
from supervisor.metrics import FleetCollector, Metrics
from supervisor.routes import admin, atlas, models, native, streams
from supervisor.scheduler import Limits, Scheduler

DOCS = Path(__file__).parent.parent / "docs"


def routes() -> set[tuple[str, str]]:
    app = web.Application()
    for family in (native, atlas, streams, models, admin):
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
    made = Metrics()
    fleet = SimpleNamespace(scheduler=Scheduler(Limits()), children={})
    made.registry.register(FleetCollector(fleet))
    there = {one.name + ("_total" if one.type == "counter" else "") for one in made.registry.collect()}
    there = {name for name in there if not name.startswith("process_")} | {"llama_supervisor_model_scraped"}
    assert documented.keys() == there
    for name, counter in vars(made).items():
        if isinstance(counter, Counter | Histogram):
            labels = ", ".join(f"`{label}`" for label in counter._labelnames)
            assert labels in documented.values(), name


def test_local_links_lead_somewhere():
    root = DOCS.parent
    for page in [root / "README.md", *DOCS.glob("*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
