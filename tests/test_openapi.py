"""The OpenAPI document names every route of ours, and what it says of them holds for whatever is sent to them."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any
from urllib.parse import quote

from aiohttp import web
from test_gate import CHAT

from supervisor.routes import admin, karen, models, openapi

pytest_plugins = ["test_gate"]

COUNT = 1000
SEED = 20250607
AT_ONCE = 20
ENDLESS = ("GET /models/sse",)


def test_every_route_of_ours_is_in_it_and_no_other():
    app = web.Application()
    for family in (models, karen, admin, openapi):
        family.add(app)
    there = {f"{method} {path}" for method, path, _ in openapi._routes(app) if method not in ("HEAD", "OPTIONS")}
    assert set(openapi.OPERATIONS) == there
    described = openapi.document(app)
    names = {f"{method.upper()} {path}" for path, found in described["paths"].items() for method in found}
    assert names == there
    ids = [one["operationId"] for found in described["paths"].values() for one in found.values()]
    assert len(ids) == len(set(ids))
    assert json.loads(json.dumps(described)) == described


async def test_it_is_served(front):
    key = await front.key("a")
    status, found, _ = await front.ask("GET", openapi.PATH, key)
    assert (status, found["openapi"]) == (200, "3.1.0")
    assert found["paths"]["/models/load"]["post"]["security"] == [{"key": []}]
    assert found["paths"]["/health"]["get"]["security"] == []
    assert (await front.ask("GET", openapi.PATH))[0] == 401


async def test_it_asks_for_no_key_where_none_is_needed(open_front):
    _, found, _ = await open_front.ask("GET", openapi.PATH)
    operations = [one for methods in found["paths"].values() for one in methods.values()]
    assert all(one["security"] == [] and "401" not in one["responses"] for one in operations)


NAMES = ["one", "uno", "two", "auto", "none", "", "ONE", "a/b", "..", "%", "\0", "é", "x" * 3000, " one "]


class Chance(random.Random):
    """What a client may send: by the schema, nearly so, or not at all."""

    def value(self, depth: int = 0) -> Any:
        plain = [None, True, False, 0, -1, 1, 2**70, 1e300, 0.5, *NAMES]
        match self.randrange(8 if depth < 3 else 6):
            case 6:
                return [self.value(depth + 1) for _ in range(self.randrange(4))]
            case 7:
                return {self.choice(NAMES): self.value(depth + 1) for _ in range(self.randrange(4))}
            case _:
                return self.choice(plain)

    def by(self, schema: dict[str, Any]) -> Any:
        """Return a value for `schema`, one in four times any value."""
        if self.random() < 0.25:
            return self.value()
        if "enum" in schema:
            return self.choice(schema["enum"])
        if "anyOf" in schema:
            return self.by(self.choice(schema["anyOf"]))
        kind = schema.get("type")
        match kind[0] if isinstance(kind, list) else kind:
            case "object":
                properties = schema.get("properties", {})
                return {key: self.by(one) for key, one in properties.items() if self.random() < 0.7}
            case "integer" | "number":
                return self.randint(schema.get("minimum", 0), 64)
            case "boolean":
                return self.random() < 0.5
            case "string":
                return self.choice(NAMES)
        return self.value()


def asked(chance: Chance, path: str, operation: dict[str, Any]) -> tuple[str, bytes | None]:
    """Return a target and a body for an operation."""
    query = []
    for parameter in operation["parameters"]:
        value = str(chance.by(parameter["schema"]))
        if parameter["in"] == "path":
            path = path.replace(
                f"{{{parameter['name']}}}", quote(value, safe="" if chance.random() < 0.5 else "/") or "x"
            )
        elif parameter["name"] != "follow":  # such an answer does not end
            query.append(f"{parameter['name']}={quote(value, safe='')}")
    schema = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
    if schema is None:
        return path + ("?" + "&".join(query) if query else ""), None
    body = json.dumps(chance.by(schema)).encode()
    if chance.random() < 0.1:
        body = body[: chance.randrange(len(body) + 1)]
    return path + ("?" + "&".join(query) if query else ""), body


async def test_a_thousand_requests_get_what_it_says(open_front):
    """The answers have the statuses and types that are told there, and errors their envelope."""
    _, found, _ = await open_front.ask("GET", openapi.PATH)
    operations = [
        (method.upper(), path, one)
        for path, methods in found["paths"].items()
        for method, one in methods.items()
        if f"{method.upper()} {path}" not in ENDLESS
    ]
    chance = Chance(SEED)
    base = open_front.supervisor.urls[0]

    async def check(method: str, path: str, one: dict[str, Any]) -> str | None:
        from yarl import URL

        target, body = asked(chance, path, one)
        url = URL(base + target, encoded=True)
        async with open_front.http.request(method, url, data=body) as response:
            content, kind = await response.read(), response.content_type
        where = f"{method} {target} {body!r}: {response.status} {content[:300]!r}"
        if response.status == 404 and "{" in path:
            return None  # the path may have become another one
        if str(response.status) not in one["responses"]:
            return f"{where}: an unknown status"
        if kind not in one["responses"][str(response.status)]["content"]:
            return f"{where}: an unknown type {kind}"
        if response.status >= 400 and path != "/readyz" and not json.loads(content)["error"]["message"]:
            return f"{where}: an error without a message"
        if response.status == 502 and path == "/inference":
            return None  # the fake child echoes, and that is no chat
        return f"{where}: an error of ours" if response.status in (500, 501, 502, 504) else None

    wrong: list[str] = []
    async with asyncio.timeout(200):
        for _ in range(COUNT // AT_ONCE):
            chosen = [chance.choice(operations) for _ in range(AT_ONCE)]
            wrong += filter(None, await asyncio.gather(*(check(*one) for one in chosen)))
    assert not wrong, "\n".join(wrong[:10])
    assert open_front.supervisor.fleet.problems() == []
    assert (await open_front.ask("POST", CHAT, None, {"model": "one"}))[0] == 200
