"""The supervisor's process: what starts in which order, and what stops in which order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import platformdirs
from aiohttp import web

from supervisor import logs
from supervisor.access import Access
from supervisor.config import Config
from supervisor.errors import MethodNotAllowed, NotFound, SupervisorError
from supervisor.fleet import Fleet
from supervisor.live import LIVE, Live
from supervisor.metrics import METRICS
from supervisor.models.catalog import Catalog, Change
from supervisor.relay import error_response
from supervisor.routes import admin, atlas, gate, karen, models, openapi, streams
from supervisor.routes import native as native_routes
from supervisor.routes.keys import ACCESS, CATALOG, CONVERSATIONS, FLEET, SWITCHES, TURNS, URLS, Switches
from supervisor.runtime import Runtime
from supervisor.settings import Settings
from supervisor.setup import native
from supervisor.setup.fetch import SetupError
from supervisor.tls import Tls
from supervisor.turns import Turns

log = logging.getLogger(__name__)

Load = Callable[[], Settings]

HEADER_LIMIT = 64 * 1024
"""Longest request line and header field in bytes."""


MAX_SETTLE = 2.0
"""Longest wait in seconds at the start for files that may still be copied."""


async def unrouted(request: web.Request) -> web.StreamResponse:
    """Answer unknown paths and methods with an error envelope, as every other error.

    A route of its own, not a middleware, for that would be in every request's way.
    """
    allowed: set[str] = set()
    for resource in request.app.router.resources():
        if resource is not request.match_info.route.resource:
            allowed |= (await resource.resolve(request))[1]
    if not allowed:
        return error_response(request, NotFound("File Not Found"))
    names = ", ".join(sorted(allowed))
    response = error_response(request, MethodNotAllowed(f"{request.path} takes {names}"))
    response.headers["Allow"] = names
    return response


def make_app(live: Live, catalog: Catalog, fleet: Fleet, access: Access) -> web.Application:
    """Return the front: all routes over `catalog` and `fleet`, for those whom `access` lets in."""
    limit = int(live.settings.config.api.max_body_mb * 1024 * 1024)
    app = web.Application(client_max_size=limit, middlewares=[gate.middleware(access)])
    app[ACCESS] = access
    app[CATALOG], app[FLEET], app[LIVE] = catalog, fleet, live
    app[METRICS] = fleet.metrics
    app[CONVERSATIONS] = OrderedDict()
    app[TURNS] = Turns()
    native_routes.add(app)
    atlas.add(app)
    streams.add(app)
    models.add(app)
    karen.add(app)
    admin.add(app)
    openapi.add(app)
    app.router.add_route("*", "/{path:.*}", unrouted)
    return app


@contextlib.asynccontextmanager
async def supervisor(settings: Settings, load: Load | None = None) -> AsyncIterator[Supervisor]:
    """Run a supervisor for as long as the context lasts; `load` reads its settings anew."""
    running = Supervisor(settings, load)
    try:
        await running.startup()
        yield running
    finally:
        await running.shutdown()


class Supervisor:
    """Everything that runs in one process. `startup`, then `shutdown`, once each."""

    def __init__(self, settings: Settings, load: Load | None = None) -> None:
        self.live = Live(settings, load, self._apply_settings)
        self.urls: list[str] = []
        config = settings.config
        self.switches = Switches(config.karen)
        self.runtime = Runtime(config.server.runtime_dir)
        self.access = Access(config.api)
        self.tls = Tls(config.server)
        self.catalog = Catalog(config.models, self._on_change)
        self.fleet = Fleet(
            config,
            self.catalog,
            self.runtime,
            binary=lambda: self.config.server.llama_server or native.find_server(),
            log_folder=log_folder(config),
            patches=native.patch_series(),
        )
        self._runner: web.AppRunner | None = None
        self._sites: list[web.TCPSite] = []

    async def startup(self) -> None:
        """Listen first, so that a port in use is found at once; then look for models and preload.

        Raises `KeysFileError`, `CertificateError`, `RuntimeFolderError` and `OSError` when it cannot.
        """
        self.access.start()
        self.tls.start()
        self.runtime.open()
        await self.fleet.slots.open()
        app = make_app(self.live, self.catalog, self.fleet, self.access)
        app[URLS], app[SWITCHES] = self.urls, self.switches
        self._runner = web.AppRunner(
            app,
            handler_cancellation=True,
            access_log=None,
            handle_signals=False,
            shutdown_timeout=1.0,
            keepalive_timeout=self.config.api.idle_seconds,
            max_line_size=HEADER_LIMIT,
            max_field_size=HEADER_LIMIT,
        )
        await self._runner.setup()
        await self.catalog.start()
        if self.catalog.copying and not self.catalog.models:  # a model that was pulled a moment ago
            await asyncio.sleep(min(self.config.models.settle_seconds, MAX_SETTLE))
            await self.catalog.rescan()
        for host in self.config.server.host.split(","):
            port, context = self.config.server.port, self.tls.context
            site = web.TCPSite(self._runner, host.strip(), port, backlog=1024, ssl_context=context)
            await site.start()
            self._sites.append(site)
        self.access.follow()
        self.tls.follow()
        self.live.follow()
        self.fleet.binary_version = await asyncio.to_thread(self._binary_version)
        secure = self.tls.context is not None
        self.urls += [url_of(address, secure=secure) for address in self._runner.addresses]
        for name in self.config.models.preload:
            try:
                self.fleet.load(self.catalog.resolve(name).id)
            except SupervisorError as error:
                log.error("models.preload: %s", error.message)

    async def shutdown(self) -> None:
        """Stop accepting, drain, stop the children, close what is left, remove the runtime folder."""
        for site in self._sites:
            with contextlib.suppress(RuntimeError):
                await site.stop()
        await self.fleet.close()
        if self._runner is not None:
            await self._runner.cleanup()
        await self.live.stop()
        await self.catalog.stop()
        await self.access.stop()
        await self.tls.stop()
        self.runtime.close()

    def _binary_version(self) -> native.ServerVersion | None:
        binary = self.fleet.launch.binary()
        if binary is None:
            log.warning("there is no llama-server yet: run `llama-supervisor build`")
            return None
        try:
            return native.server_version(binary)
        except (OSError, ValueError, SetupError) as error:
            log.warning("%s does not say its version: %s", binary, error)
            return None

    @property
    def config(self) -> Config:
        """The configuration in force."""
        return self.live.settings.config

    async def _apply_settings(self, settings: Settings) -> list[str]:
        """See `Live`. The models come first: this may fail, and a child's command line has their aliases."""
        config, before = settings.config, self.catalog.settings
        self.catalog.settings = config.models
        try:
            await self.catalog.rescan()
        except BaseException:
            self.catalog.settings = before
            raise
        logs.set_level(config.logging)
        self.access.open_models = config.api.open_models
        if config.karen != self.fleet.config.karen:  # else what POST /karen/config set stays
            self.switches.karen = config.karen
        return self.fleet.apply_settings(config)

    def _on_change(self, change: Change) -> None:
        self.fleet.apply_change(change)


def url_of(address: tuple[Any, ...], *, secure: bool = False) -> str:
    """Return the URL of a socket's address, as `getsockname` gives it."""
    host, port = address[:2]
    return f"http{'s' * secure}://{f'[{host}]' if ':' in host else host}:{port}"


def log_folder(config: Config) -> Path | None:
    """Return the folder of the children's logs, made if need be; None when it cannot be."""
    folder = config.logging.directory or Path(platformdirs.user_state_dir("llama-supervisor")) / "logs"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        log.warning("no log files: %s: %s", folder, error.strerror or error)
        return None
    return folder
