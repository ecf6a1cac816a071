"""Which request is this about? One id goes from the client to the child, the answer and the log."""

from __future__ import annotations

import itertools
import re
import secrets
from contextvars import ContextVar
from typing import Final

from aiohttp import web

HEADER: Final = "X-Request-Id"

_ID: Final = web.RequestKey("request_id", str)
_good = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}").fullmatch
_process = secrets.token_hex(4)
_count = itertools.count(1)
_current: ContextVar[str | None] = ContextVar("request_id", default=None)


def id_of(request: web.Request) -> str:
    """Return the id of a request: the client's own if it is fit for a log, else a new one. Log lines name it."""
    try:
        return request[_ID]
    except KeyError:
        sent = request.headers.get(HEADER)
        found = sent if sent is not None and _good(sent) else f"{_process}-{next(_count):x}"
        request[_ID] = found
        _current.set(found)
        return found


def current() -> str | None:
    """Return the id of the request that the running task serves, None outside of one."""
    return _current.get()
