"""What the handlers find in the application."""

from __future__ import annotations

from collections import OrderedDict

from aiohttp import web

from supervisor.fleet import Fleet
from supervisor.models.catalog import Catalog
from supervisor.settings import Settings

CATALOG = web.AppKey("catalog", Catalog)
FLEET = web.AppKey("fleet", Fleet)
SETTINGS = web.AppKey("settings", Settings)
CONVERSATIONS: web.AppKey[OrderedDict[str, str]] = web.AppKey("conversations", OrderedDict)
URLS: web.AppKey[list[str]] = web.AppKey("urls", list)
