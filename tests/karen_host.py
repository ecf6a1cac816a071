"""KAREN's two extension hosts, as far as an extension can tell: written from the rules of both.

They execute `handler.py` from its file without putting it into `sys.modules`, check that the class is a subclass of
their own base, call `initialize()` twice, and run hooks under a time limit: who raises or is late is left out silently.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import logging
import sys
import types
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

BASE_A = "ai_karen_engine.extension_host.base"
BASE_B = "ai_karen_engine.extensions.platform.core.host.base"
BASE_B_AGAIN = "extensions.core.host.base"
"""The newer host's other name: the same file executed once more, so that its classes are others."""

EXTENSION = Path(__file__).parents[1] / "karen_ext"

GENERATIONS = ("A", "B", "B, two names")

LEGACY = {"plugin_api_version", "entry_point", "module", "intent", "plugin_type"}
MANIFESTS_B = ("plugin_manifest.json", "extension_manifest.json", "extension.json", "manifest.json")

Json = dict[str, Any]


class HookPoint(str, Enum):  # noqa: UP042 (as KAREN has it)
    PRE_INTENT_DETECTION = "pre_intent_detection"
    PRE_MEMORY_RETRIEVAL = "pre_memory_retrieval"
    POST_MEMORY_RETRIEVAL = "post_memory_retrieval"
    PRE_LLM_PROMPT = "pre_llm_prompt"
    POST_LLM_RESULT = "post_llm_result"
    POST_RESPONSE = "post_response"


class Role(str, Enum):  # noqa: UP042
    SYSTEM = "system"
    ADMIN = "admin"
    DEVELOPER = "developer"
    USER = "user"
    GUEST = "guest"


class HookContext:
    """What a hook gets: no dict. `data` is shared by all extensions and may be changed."""

    def __init__(self, hook_point: HookPoint, data: Json, user_context: Json | None = None) -> None:
        self.hook_point = hook_point
        self.data = data
        self.user_context = user_context or {}

    def get_data(self, key: str, default: Any = None) -> Any:
        return self.data.get(key, default)

    def set_data(self, key: str, value: Any) -> None:
        self.data[key] = value


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Rbac(BaseModel):
    allowed_roles: list[Role] = []
    default_enabled: bool = True


class StrictRbac(Strict):
    allowed_roles: Annotated[list[str], Field(min_length=1)]
    default_enabled: bool = True


class PromptFiles(Strict):
    system: str | None = None
    user: str | None = None
    assistant: str | None = None


class PermissionsA(Strict):
    memory_read: bool = False
    memory_write: bool = False
    tools: list[str] = []


class ConfigSchema(BaseModel):
    type: str = "object"
    properties: Json = {}
    required: list[str] = []


HookName = Literal[
    "pre_intent_detection",
    "pre_memory_retrieval",
    "post_memory_retrieval",
    "pre_llm_prompt",
    "post_llm_result",
    "post_response",
]


class SchemaA(Strict):
    """What the older host's JSON schema lets in: no other key."""

    id: str = Field(pattern=r"^[a-z][a-z0-9_.]*[a-z0-9]$")
    name: str = Field(min_length=1)
    version: str = Field(pattern=r"^[0-9]+\.[0-9]+\.[0-9]+(-[a-z0-9]+)?$")
    entrypoint: str = Field(pattern=r"^[a-zA-Z_][a-zA-Z0-9_]*:[a-zA-Z_][a-zA-Z0-9_]*$")
    description: str = Field(min_length=1)
    hook_points: Annotated[list[HookName], Field(min_length=1)]
    prompt_files: PromptFiles = PromptFiles()
    config_schema: Json = {}
    permissions: PermissionsA = PermissionsA()
    rbac: StrictRbac | None = None
    dependencies: list[str] = []
    author: str = ""
    homepage: str = ""


class ManifestA(BaseModel):
    """The object that the older host makes of it."""

    id: str
    name: str
    version: str
    entrypoint: str
    hook_points: list[HookPoint]
    config_schema: ConfigSchema | None = None
    rbac: Rbac = Rbac()


Network = Literal["outbound_http", "outbound_https", "inbound", "webhook"]


class PermissionsB(BaseModel):
    network_access: list[Network] = []


class DependenciesB(BaseModel):
    plugins: list[str] = []


class ManifestB(BaseModel):
    """The newer host's manifest: more has to be there, and anything else may."""

    model_config = ConfigDict(extra="allow")

    name: str = Field(pattern=r"^[a-z][a-z0-9]*(-[a-z0-9]+)*$", max_length=50)
    version: str = Field(pattern=r"^\d+\.\d+\.\d+$")
    display_name: str
    description: str
    author: str
    license: str
    category: str
    entrypoint: str | None = None
    hook_points: list[HookPoint] = []
    config_schema: ConfigSchema | None = None
    permissions: PermissionsB = PermissionsB()
    dependencies: DependenciesB = DependenciesB()
    rbac: Rbac = Rbac()


@dataclass
class ExtensionContext:
    """What the newer host hands to the constructor."""

    plugin_router: Any = None
    db_session: Any = None
    app_instance: Any = None
    extension_dir: Path | None = None
    config: Json | None = None


class LoadError(Exception):
    """The host refuses an extension."""


def base_module(name: str) -> types.ModuleType:
    """Return a module that has the host's ExtensionBase."""

    class ExtensionBase(ABC):
        def __init__(self, manifest: Any, context: Any) -> None:
            self.manifest = manifest
            self.context = context
            self.logger = logging.getLogger(f"extension.{manifest.name}")
            self._is_initialized = False
            self._is_shutdown = False
            self.enabled = manifest.rbac.default_enabled

        @abstractmethod
        async def initialize(self) -> None: ...

        @abstractmethod
        async def shutdown(self) -> None: ...

        @abstractmethod
        async def execute_hook(self, hook_point: HookPoint, context: HookContext) -> Json: ...

    module = types.ModuleType(name)
    ExtensionBase.__module__ = name
    module.ExtensionBase = ExtensionBase  # type: ignore[attr-defined]
    return module


class Host:
    """One generation of KAREN over one folder of extensions."""

    def __init__(self, folder: Path, generation: str, config: Json | None = None, timeout: float = 15.0) -> None:
        self.folder = folder
        self.generation = generation
        self.config = config or {}
        self.timeout = timeout
        self.loaded: list[Any] = []
        self.modules = {name: base_module(name) for name in self._names()}

    def _names(self) -> list[str]:
        return {"A": [BASE_A], "B": [BASE_B], "B, two names": [BASE_B, BASE_B_AGAIN]}[self.generation]

    @contextmanager
    def importable(self) -> Iterator[None]:
        """Have the host's modules loaded, as they are in KAREN's process."""
        packages = {".".join(name.split(".")[:n]) for name in self.modules for n in range(1, name.count(".") + 1)}
        own = {name: types.ModuleType(name) for name in packages} | self.modules
        before = {name: sys.modules.get(name) for name in own}
        sys.modules.update(own)
        try:
            yield
        finally:
            for name, module in before.items():
                if module is None:
                    del sys.modules[name]
                else:
                    sys.modules[name] = module

    def discover(self) -> list[Path]:
        if self.generation == "A":
            found = [one for one in self.folder.iterdir() if one.is_dir() and not one.name.startswith("_")]
            return [one for one in found if (one / "extension_manifest.json").exists()]
        found = [one for one in self.folder.rglob("*") if one.is_dir() and not one.name.startswith("_")]
        return [one for one in found if any((one / name).exists() for name in MANIFESTS_B)]

    def manifest(self, folder: Path) -> Any:
        """Read and check a manifest. Raises `ValidationError` and `LoadError`."""
        if self.generation == "A":
            raw = json.loads((folder / "extension_manifest.json").read_text())
            SchemaA.model_validate(raw)
            return ManifestA(**raw)
        raw = json.loads(next(folder / name for name in MANIFESTS_B if (folder / name).exists()).read_text())
        if LEGACY & set(raw):
            raise LoadError("the legacy plugin contract")
        return ManifestB(**raw)

    def load(self, folder: Path) -> Any:
        """Load one extension. Raises `LoadError`."""
        manifest = self.manifest(folder)
        with self.importable():
            sys.path.insert(0, str(folder))
            try:
                spec = importlib.util.spec_from_file_location(f"{folder.name}_handler", folder / "handler.py")
                assert spec is not None and spec.loader is not None
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
            finally:
                sys.path.remove(str(folder))
        module_name, _, class_name = manifest.entrypoint.partition(":")
        if module_name != "handler" or not hasattr(module, class_name):
            raise LoadError(f"no {manifest.entrypoint}")
        found = getattr(module, class_name)
        base = self.modules[self._names()[-1]].ExtensionBase
        if not issubclass(found, base):
            raise LoadError("not a subclass of ExtensionBase")
        context: Any = self.config
        if self.generation != "A":
            context = ExtensionContext(extension_dir=folder, config=self.config)
        extension = found(manifest, context)
        self.loaded.append(extension)
        return extension

    async def start(self) -> Any:
        """Load all extensions and initialize them, twice as KAREN does; return the last one."""
        for folder in self.discover():
            extension = self.load(folder)
            await extension.initialize()
            await extension.initialize()
            extension._is_initialized = True
        return self.loaded[-1]

    async def stop(self) -> None:
        for extension in self.loaded:
            await extension.shutdown()
            await extension.shutdown()

    async def run(self, hook: str, data: Json, user: Json | None = None, role: str | None = "user") -> Json:
        """Run one hook in all extensions: `{name: result}`, without those that are not allowed, raise, or are late."""
        point = HookPoint(hook)
        results: Json = {}
        for extension in self.loaded:
            roles = [one.value for one in extension.manifest.rbac.allowed_roles]
            if not extension.enabled or (role or "guest") not in roles:
                continue
            if point not in extension.manifest.hook_points:
                results[extension.manifest.name] = {"error": "Extension does not support this hook point"}
                continue
            try:
                context = HookContext(point, data, user)
                result = await asyncio.wait_for(extension.execute_hook(point, context), self.timeout)
            except Exception:
                continue
            results[extension.manifest.name] = result if isinstance(result, dict) else {"data": result}
        return results

    async def chat(self, data: Json, remote: Any = None, user: Json | None = None, role: str | None = "user") -> Json:
        """One turn of KAREN's chat: both hooks around a remote model that answers `remote`; return the last results."""
        await self.run("pre_llm_prompt", data, user, role)
        if remote is not None:
            data["result"] = remote
        return await self.run("post_llm_result", data, user, role)


def names_of(extension: Any) -> Any:
    """Return what the extension's handler.py defines, by attribute: it is in no list of modules."""
    return types.SimpleNamespace(**type(extension).execute_hook.__globals__)
