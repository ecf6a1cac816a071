"""What do the supervisor's own routes take and answer? An OpenAPI 3.1 document, for programs.

Those of llama-server are llama-server's to describe; whatever goes to a model's child is not in here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from aiohttp import web

from supervisor import __version__
from supervisor.config import KarenSection, PerformanceSection
from supervisor.routes.gate import Need, needs
from supervisor.routes.keys import ACCESS

PATH: Final = "/api/v1/openapi.json"

Json = dict[str, Any]

JSON: Final = "application/json"
TEXT: Final = "text/plain"
EVENTS: Final = "text/event-stream"

_NAME: Final = {"type": "string", "minLength": 1}
_FLAG: Final = {"type": "boolean"}
_TEXT: Final = {"type": "string"}
_TEXT_OR_NULL: Final = {"type": ["string", "null"]}


@dataclass(frozen=True)
class Operation:
    """What one route takes and answers.

    `query` has the schemas of its parameters, `body` that of its JSON object; `errors` are the statuses of errors
    beside those that every route of its kind has.
    """

    kinds: tuple[str, ...] = (JSON,)
    query: Json = field(default_factory=dict)
    body: Json | None = None
    errors: tuple[int, ...] = ()


def _object(required: tuple[str, ...] = (), **properties: Any) -> Json:
    return {"type": "object", "properties": properties, "required": list(required)}


def _plain(section: type[PerformanceSection] | type[KarenSection]) -> Json:
    """Return the schema of a section of the configuration, whose keys may all be left out."""
    schema = section.model_json_schema()
    return {key: schema[key] for key in ("type", "properties", "additionalProperties") if key in schema}


_ONE_MODEL: Final = Operation(errors=(404, 422))
_HEALTH: Final = Operation()

OPERATIONS: Final[dict[str, Operation]] = {
    "GET /": Operation(),
    "GET /health": _HEALTH,
    "GET /v1/health": _HEALTH,
    "GET /livez": _HEALTH,
    "GET /readyz": Operation(errors=(503,)),
    "GET /metrics": Operation((TEXT,), {"model": _TEXT}, errors=(404, 422, 501, 502, 503, 504)),
    "GET /v1/models": Operation(query={"reload": _TEXT}),
    "GET /models": Operation(query={"reload": _TEXT}),
    "GET /v1/models/{id}": _ONE_MODEL,
    "POST /models/load": Operation(
        body=_object(("model",), model=_NAME, parameters=_plain(PerformanceSection)), errors=(404, 422, 507)
    ),
    "POST /models/unload": Operation(body=_object(("model",), model=_NAME, force=_FLAG), errors=(404, 422)),
    "POST /models/unload/{id}": _ONE_MODEL,
    "GET /models/sse": Operation((EVENTS,)),
    "GET /api/v1/status": Operation(),
    "GET /api/v1/config": Operation(),
    "POST /api/v1/config/reload": Operation(errors=(422,)),
    "GET /api/v1/models/{id}/logs": Operation(
        (TEXT,),
        {"lines": {"type": "integer", "minimum": 0, "maximum": 999999999}, "follow": {"enum": ["0", "1"]}},
        errors=(400, 404),
    ),
    f"GET {PATH}": Operation(),
    "POST /inference": Operation(
        (JSON, EVENTS),
        body=_object(
            ("prompt",),
            prompt=_NAME,
            model=_TEXT_OR_NULL,
            model_id=_TEXT_OR_NULL,
            parameters={"type": ["object", "null"]},
            stream=_FLAG,
        ),
        errors=(404, 422, 429, 502, 503, 504, 507),
    ),
    "GET /performance": Operation(),
    "GET /karen/config": Operation(query={"model": _TEXT}, errors=(404, 422)),
    "POST /karen/config": Operation(body=_plain(KarenSection)),
}
"""The routes of the families `models`, `karen` and `admin`, and this one."""


def document(app: web.Application, *, keys: bool = True) -> Json:
    """Return the document; the summaries are the first lines of the handlers' docstrings. `keys`: they are required."""
    paths: dict[str, Json] = {}
    by_name = needs()
    for method, path, handler in _routes(app):
        name = f"{method} {path}"
        if (operation := OPERATIONS.get(name)) is not None:
            need = by_name[name] if keys else "nothing"
            paths.setdefault(path, {})[method.lower()] = _describe(name, operation, need, handler)
    return {
        "openapi": "3.1.0",
        "info": {"title": "llama-supervisor", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {"Error": _object(("error",), error=_object(("message", "type"), message=_NAME, type=_NAME))},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _routes(app: web.Application) -> Iterator[tuple[str, str, Any]]:
    for route in app.router.routes():
        if route.resource is not None:
            yield route.method, re.sub(r"\{(\w+):[^}]+\}", r"{\1}", route.resource.canonical), route.handler


def _describe(name: str, operation: Operation, need: Need, handler: Any) -> Json:
    summary = (handler.__doc__ or "").strip().partition("\n")[0].partition(": ")[2]
    parameters = [
        {"name": found, "in": "path", "required": True, "schema": _NAME} for found in re.findall(r"\{(\w+)\}", name)
    ]
    parameters += [{"name": key, "in": "query", "schema": schema} for key, schema in operation.query.items()]
    described: Json = {
        "operationId": re.sub(r"\W+", "_", name).strip("_").lower(),
        "summary": summary or name,
        "parameters": parameters,
        "responses": _responses(operation, open_to_all=need == "nothing"),
        "security": [] if need == "nothing" else [{"key": []}],
    }
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": {JSON: {"schema": operation.body}}}
    return described


def _responses(operation: Operation, *, open_to_all: bool) -> Json:
    wrong = {400, 408, 413} if operation.body is not None else set()
    refused = set() if open_to_all else {401, 403, 429}
    error = {"description": "An error.", "content": {JSON: {"schema": {"$ref": "#/components/schemas/Error"}}}}
    good = {"description": "As asked.", "content": {kind: {} for kind in operation.kinds}}
    statuses = sorted(wrong | refused | set(operation.errors))
    return {"200": good} | {str(status): error for status in statuses}


async def openapi(request: web.Request) -> web.StreamResponse:
    """GET /api/v1/openapi.json: this document."""
    return web.json_response(document(request.app, keys=request.app[ACCESS].on))


def add(app: web.Application) -> None:
    """Add the route."""
    app.router.add_get(PATH, openapi)
