"""Which settings hold now, and how do they change while models run? A change is taken over as a whole or not at all."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Final

from aiohttp import web

from supervisor.config import Config
from supervisor.errors import ConfigError, ConfigInvalid
from supervisor.followed_file import Follower, Signature, signature
from supervisor.settings import Settings, changed

log = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""How often to look at the file. A change counts once two looks find the same: one alone may find half a file."""

FIXED: Final = (
    ("server", "host"),
    ("server", "port"),
    ("server", "tls_cert"),
    ("server", "tls_key"),
    ("server", "runtime_dir"),
    ("models", "slot_cache_directory"),
    ("api", "keys_file"),
    ("api", "require_keys"),
    ("api", "max_body_mb"),
    ("api", "idle_seconds"),
    ("logging", "directory"),
)
"""Settings that only a new start takes over."""


@dataclass(frozen=True)
class Outcome:
    """What a reload did: which settings changed, which models start anew for it, what needs a new start of ours."""

    changed: list[str] = field(default_factory=list)
    restarted: list[str] = field(default_factory=list)
    restart_needed: list[str] = field(default_factory=list)


class Live:
    """The settings in force. `problems` says what is wrong with the file now; then those from before stay in force."""

    def __init__(
        self,
        settings: Settings,
        load: Callable[[], Settings] | None,
        apply: Callable[[Settings], Awaitable[list[str]]],
    ) -> None:
        """`load` reads the settings anew; `apply` takes them over, and returns the models that start anew for it."""
        self.settings = settings
        self.problems: list[str] = []
        self.restart_needed: list[str] = []
        self._load = load
        self._apply = apply
        self._lock = asyncio.Lock()
        self._seen: Signature | None = None
        self._moving = False
        self._follower = Follower([settings.path] if settings.path is not None else [], self._look)

    async def reload(self, reason: str) -> Outcome:
        """Read the settings anew and take them over. Raises `ConfigInvalid`, and then nothing has changed."""
        async with self._lock:
            if self._load is None:
                return Outcome()
            try:
                found = await asyncio.to_thread(self._load)
            except ConfigError as error:
                self.problems = error.problems
                for problem in error.problems:
                    log.error("%s", problem)
                log.error("%s: the configuration is bad, and the one from before stays in force", reason)
                raise ConfigInvalid(error.problems) from None
            self.problems = []
            return await self._take_over(found, reason)

    async def _take_over(self, found: Settings, reason: str) -> Outcome:
        old = self.settings
        config, self.restart_needed = held(old.config, found.config)
        sources = found.sources | {key: old.sources.get(key, "default") for key in self.restart_needed}
        differing = changed(old.config, config)
        self.settings = replace(found, config=config, sources=sources)
        try:
            restarted = await self._apply(self.settings) if differing else []
        except BaseException:
            self.settings = old
            raise
        log.info("%s; changed settings: %s", reason, ", ".join(differing) or "none")
        if restarted:
            log.info("these models start anew, after their running answers: %s", ", ".join(restarted))
        if self.restart_needed:
            log.warning("only a new start takes over: %s", ", ".join(self.restart_needed))
        return Outcome(differing, restarted, self.restart_needed)

    # The file

    def follow(self) -> None:
        """From now on take over what changes in the file, until `stop`."""
        if self.settings.path is not None and self._load is not None:
            self._seen = signature(self.settings.path)
            self._follower.start(POLL_SECONDS)

    async def stop(self) -> None:
        """Look at the file no more."""
        await self._follower.stop()

    async def _look(self) -> None:
        with suppress(ConfigInvalid):  # logged, and in `problems`
            await self.look()

    async def look(self) -> None:
        """Reload when the file changed before the last look and not since. Raises `ConfigInvalid`."""
        path = self.settings.path
        assert path is not None
        now = await asyncio.to_thread(signature, path)
        if now != self._seen:
            self._seen, self._moving = now, True
        elif self._moving:
            self._moving = False
            await self.reload(f"{path.name} changed")


def held(old: Config, new: Config) -> tuple[Config, list[str]]:
    """Return `new` with what only a new start takes over as in `old`, and which of these settings differ."""
    differing = []
    for section, key in FIXED:
        before = getattr(getattr(old, section), key)
        if getattr(getattr(new, section), key) != before:
            differing.append(f"{section}.{key}")
            new = new.model_copy(update={section: getattr(new, section).model_copy(update={key: before})})
    return new, differing


LIVE: Final = web.AppKey("live", Live)


def stall_seconds(request: web.Request) -> float | None:
    """Return how long the client of a request may stand still; None: for ever."""
    live = request.app.get(LIVE)
    return (live.settings.config.api.stall_seconds or None) if live is not None else None
