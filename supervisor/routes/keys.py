"""What the handlers find in the application."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

from aiohttp import web

from supervisor.access import Access
from supervisor.config import KarenSection
from supervisor.fleet import Fleet
from supervisor.models.catalog import Catalog
from supervisor.turns import Turns


class Conversation(NamedTuple):
    """Which model answers a conversation, and whose it is; None where no keys are required."""

    model: str
    owner: str | None


@dataclass
class Switches:
    """What KAREN's extension may do now: the section `karen`, as it was changed since the start."""

    karen: KarenSection


ACCESS = web.AppKey("access", Access)
CATALOG = web.AppKey("catalog", Catalog)
FLEET = web.AppKey("fleet", Fleet)
SWITCHES = web.AppKey("switches", Switches)
TURNS = web.AppKey("turns", Turns)
CONVERSATIONS: web.AppKey[OrderedDict[str, Conversation]] = web.AppKey("conversations", OrderedDict)
URLS: web.AppKey[list[str]] = web.AppKey("urls", list)
