"""How urgent is a request? What its header says, as far as its key allows it."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from supervisor.access import caller_of
from supervisor.entry import Priority
from supervisor.errors import BadRequest, PriorityNotAllowed

HEADER: Final = "X-Priority"

NAMES: Final = {priority.name.lower(): priority for priority in Priority}


def priority_of(request: web.Request) -> Priority:
    """Return the priority of a request: its header's, else its key's, else normal; without keys anyone may ask for any.

    Raises `BadRequest` for a word that is none, and `PriorityNotAllowed` for more than the key's.
    """
    caller = caller_of(request)
    most = NAMES[caller.key.priority] if caller is not None and caller.key.priority is not None else None
    named = request.headers.get(HEADER)
    if named is None:
        return most if most is not None else Priority.NORMAL
    priority = NAMES.get(named.strip().lower())
    if priority is None:
        raise BadRequest(f"the header {HEADER} must be one of {', '.join(NAMES)}", param=HEADER)
    if caller is not None and priority > (most if most is not None else Priority.NORMAL):
        allowed = caller.key.priority or Priority.NORMAL.name.lower()
        raise PriorityNotAllowed(f"the API key {caller.key.name!r} may ask for priority {allowed!r} at most")
    return priority
