"""What can be set, with which defaults and limits? These models are the schema, the docs and the validation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from supervisor import budget

OWN_FLAGS = frozenset({"-m", "--model", "--host", "--port", "-mm", "--mmproj", "--models-dir", "-hf", "--hf-repo"})
"""Child flags that the supervisor sets itself; `args` may not repeat them."""

ENV_PREFIX = "LLAMA_SUPERVISOR_"
DELIMITER = "__"
"""How the environment's variables are called: the prefix, the section, the delimiter, the key, in capitals."""

Seconds = Annotated[float, Field(ge=0, le=86400 * 365, allow_inf_nan=False)]


class Section(BaseModel):
    """A part of the configuration: unknown keys are refused, values are never coerced across types."""

    model_config = ConfigDict(extra="forbid", strict=False, frozen=True, validate_default=True)


class ServerSection(Section):
    """The front: where it listens, how it stops, which llama-server it runs."""

    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on; several with commas.")
    port: int = Field(8080, ge=0, le=65535, description="TCP port; 0 lets the system choose one.")
    tls_cert: Path | None = Field(None, description="Certificate chain (PEM): the front speaks HTTPS with it.")
    tls_key: Path | None = Field(None, description="Its key (PEM, no password); default: in the same file.")
    drain_seconds: Seconds = Field(30, description="On SIGTERM, how long running answers may go on.")
    stop_seconds: Seconds = Field(5, description="How long a child may take to exit after SIGTERM before SIGKILL.")
    memory_budget: int | str = Field(
        "auto",
        description="Most memory that all models may take: bytes, `12 GiB`, a share like `75%`; `auto`: 80% of it.",
    )
    llama_server: Path | None = Field(
        None, description="The llama-server binary; default: the one that `llama-supervisor build` made."
    )
    runtime_dir: Path | None = Field(
        None, description="Folder for sockets and locks (made 0700); default: the user's runtime folder."
    )

    @model_validator(mode="after")
    def _has_both(self) -> Self:
        if self.tls_key is not None and self.tls_cert is None:
            raise ValueError("tls_key is the key of a certificate: tls_cert must name that")
        return self

    @field_validator("memory_budget")
    @classmethod
    def _is_a_budget(cls, text: int | str) -> int | str:
        budget.parse(text)
        return text


class AtlasValues(Section):
    """What holds for all models and can be set for one; null leaves the choice to the child."""

    cells: int | None = Field(
        None, ge=0, le=1 << 20, multiple_of=16, description="Memory cells, a multiple of 16; 0: the window only."
    )
    window: int | None = Field(
        None, ge=64, le=1 << 27, description="Most recent tokens kept exactly; context - sinks - cells at most."
    )
    recall: float | None = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="Share of the cells that is recalled; the rest survives."
    )
    refresh: int | None = Field(
        None, ge=1, le=256, description="Fill the memory cells anew every so many tokens of an answer."
    )
    blend: float | None = Field(
        None, ge=0, le=1, allow_inf_nan=False, description="Scales the attention on memory cells; 0: never read."
    )
    archive_max_mb: int | None = Field(None, ge=1, le=1 << 24, description="Most memory for the archive, in MiB.")
    memory_backup_count: int | None = Field(
        None, ge=0, le=1000, description="Previous versions of a memory file that are kept; null: 3."
    )
    memory_compress_level: int | None = Field(None, ge=-7, le=19, description="zstd level of memory files; null: 1.")
    memory_max_sessions: int | None = Field(
        None,
        ge=0,
        le=1 << 20,
        description="Most memory files of a model; those used the longest time ago go; 0: any number.",
    )
    memory_max_mb: int | None = Field(
        None, ge=0, le=1 << 24, description="Most MiB of a model's memory files, backups included; 0: any size."
    )
    memory_max_age_hours: int | None = Field(
        None, ge=0, le=24 * 36500, description="Delete memory files that were not used for so long; 0: never."
    )
    auto_save_seconds: int | None = Field(
        None,
        ge=0,
        le=86400 * 365,
        description="How long a changed session may stay unsaved while requests run; 0: for ever; null: 300.",
    )


class AtlasSection(AtlasValues):
    """The long-context memory. Null leaves a parameter to the child, which prints what it chose and why."""

    enabled: Literal["off", "on", "auto"] = Field(
        "off", description="`on` refuses models that cannot have it; `auto` serves them without."
    )
    memory_directory: Path | None = Field(
        None, description="Memory files, in a folder for each model (made 0700); default: in the user's state folder."
    )
    memory_persist: bool = Field(
        False, description="Keep the memory of a model's last request without a session when it stops."
    )
    save_seconds: Seconds = Field(
        30, description="How long a stopping child may take to save its memory, beside server.stop_seconds."
    )


class AtlasOverride(AtlasValues):
    """The long-context memory of one model; null: as in `atlas`."""

    enabled: Literal["off", "on", "auto"] | None = Field(None, description="As in `atlas`.")
    memory_persist: bool | None = Field(None, description="As in `atlas`.")


class ModelOverride(Section):
    """Settings of one model; whatever is not set here comes from the other sections."""

    args: list[str] = Field([], description="llama-server flags, added last so that they win.")
    env: dict[str, str] = Field({}, description="Environment variables for the child.")
    aliases: list[str] = Field([], description="Other names for the model.")
    pin: bool = Field(False, description="Never unload the model to make room for another.")
    idle_unload_seconds: Seconds | None = Field(
        None, description="Unload after so many seconds without a request; 0: never; null: as in `models`."
    )
    context_size: int | None = Field(None, ge=8, description="Context in tokens; null: as in `performance`.")
    slot_cache: bool | None = Field(None, description="Keep its prompts over swaps; null: as in `models`.")
    slot_cache_max_mb: int | None = Field(
        None, ge=0, le=1 << 24, description="Most MiB of its prompts on disk; null: as in `models`."
    )
    atlas: AtlasOverride | None = Field(None, description="Its long-context memory; null: as in `atlas`.")

    @field_validator("args")
    @classmethod
    def _keep_own_flags(cls, args: list[str]) -> list[str]:
        for arg in args:
            if arg.split("=", 1)[0] in OWN_FLAGS:
                raise ValueError(f"{arg.split('=', 1)[0]} is set by the supervisor and cannot be overridden")
        return args


class ModelsSection(Section):
    """Which models there are, and how many run at once."""

    directory: Path = Field(Path("models"), description="Folder scanned for GGUF files; relative to the config file.")
    default_model: str | None = Field(
        None, description="Model used when a request names none or `auto`; default: the only one, else the first."
    )
    unknown_model: Literal["error", "default"] = Field(
        "error", description="A request for an unknown model is a 404 (`error`) or goes to the default model."
    )
    max_loaded_models: int = Field(
        3,
        ge=1,
        le=1024,
        description="Most models that run at the same time; on the CPU one more may still be exiting during a swap.",
    )
    preload: list[str] = Field([], description="Models started with the supervisor.")
    idle_unload_seconds: Seconds = Field(
        0, description="Unload a model after so many seconds without a request; 0: never."
    )
    scan_interval_seconds: Seconds = Field(
        60, description="Rescan at least so often, for file systems that send no events; 0: events only."
    )
    settle_seconds: Seconds = Field(1, description="A file is offered once it has not changed for so many seconds.")
    load_stall_seconds: Seconds = Field(120, description="A load without any progress for so many seconds is given up.")
    slot_cache: bool = Field(
        True, description="Save the prompts in a model's slots before it is stopped, and restore them when it is back."
    )
    slot_cache_max_mb: int = Field(
        512, ge=0, le=1 << 24, description="Most MiB of one model's prompts on disk; the oldest go."
    )
    slot_cache_total_mb: int = Field(
        2048, ge=0, le=1 << 24, description="Most MiB of all models' prompts on disk; the oldest go."
    )
    slot_cache_directory: Path | None = Field(
        None, description="Folder of these prompts (made 0700); default: in the user's state folder."
    )
    overrides: dict[str, ModelOverride] = Field({}, description="Settings per model id.")


class PerformanceSection(Section):
    """How children run; null leaves the choice to the supervisor or to llama-server."""

    threads: int | None = Field(None, ge=1, le=4096, description="CPU threads per child; null: llama-server's.")
    batch_size: int | None = Field(None, ge=1, le=1 << 20, description="Logical batch in tokens.")
    context_size: int | None = Field(
        None, ge=8, le=1 << 27, description="Context in tokens; null: the model's own, cut to fit in memory."
    )
    gpu_layers: Annotated[int, Field(ge=0)] | Literal["auto", "all"] = Field(
        "auto", description="Layers kept on the GPU."
    )
    parallel: int | None = Field(None, ge=1, le=256, description="Slots per child; null: llama-server's.")


class InferenceSection(Section):
    """How requests are matched with running models."""

    max_wait_seconds: Seconds = Field(
        5, description="How long busy models may keep a waiting one out before they are drained for it."
    )
    min_residency_seconds: Seconds = Field(
        5, description="How long a busy model answers after it has loaded before it is drained for a waiting one."
    )
    priority_seconds: Seconds = Field(
        30, description="What a step of X-Priority is worth in seconds of waiting; 0: nothing."
    )
    max_in_flight: int = Field(
        64, ge=1, le=1 << 16, description="Most requests that one model computes at the same time; more wait here."
    )
    queue_limit: int = Field(256, ge=0, le=1 << 20, description="Most requests that wait for one model.")
    queue_timeout_seconds: Seconds = Field(600, description="Longest wait for a model before a 503.")


class KarenSection(Section):
    """What KAREN's extension may do with this supervisor; its own settings are KAREN's (docs/karen.md)."""

    integration_enabled: bool = Field(True, description="Whether the extension may ask models here at all.")
    enable_local_fallback: bool = Field(True, description="Whether it may answer where the remote model failed.")
    context_awareness: bool = Field(True, description="Whether its conversations have long-context memories.")


class ApiSection(Section):
    """The HTTP interface."""

    max_body_mb: float = Field(
        256, gt=0, le=65536, allow_inf_nan=False, description="Largest request body in MiB; more is a 413."
    )
    idle_seconds: Annotated[float, Field(gt=0, le=86400)] = Field(
        75, description="How long a connection may stay open without a whole request head on it."
    )
    stall_seconds: Seconds = Field(
        60,
        description="How long a client may send nothing of a body or take nothing of an answer; 0: for ever.",
    )
    keys_file: Path | None = Field(
        None, description="File of the API keys; default: `keys.json` in the user's configuration folder."
    )
    require_keys: bool | None = Field(
        None, description="Whether requests need a key; null: if `keys_file` is set or the default file is there."
    )
    open_models: bool = Field(True, description="Whether the list of models needs no key.")


class MonitoringSection(Section):
    """What is measured."""

    child_metrics: bool = Field(True, description="Start children with --metrics, so that /metrics has theirs too.")


class LoggingSection(Section):
    """Where the supervisor's own log and its children's logs go."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="Least severe level shown.")
    format: Literal["text", "json"] = Field("text", description="Lines of text, or JSON objects for programs.")
    directory: Path | None = Field(None, description="Folder of the children's logs; default: the user's state folder.")
    max_mb: float = Field(
        16, gt=0, le=65536, allow_inf_nan=False, description="Size at which a child's log is rotated, in MiB."
    )


class Config(Section):
    """The whole configuration: one section a topic."""

    server: ServerSection = Field(ServerSection(), description="The front.")
    models: ModelsSection = Field(ModelsSection(), description="The models.")
    performance: PerformanceSection = Field(PerformanceSection(), description="How children run.")
    inference: InferenceSection = Field(InferenceSection(), description="Requests and queues.")
    atlas: AtlasSection = Field(AtlasSection(), description="Long-context memory.")
    karen: KarenSection = Field(KarenSection(), description="KAREN.")
    api: ApiSection = Field(ApiSection(), description="The HTTP interface.")
    monitoring: MonitoringSection = Field(MonitoringSection(), description="Measurement.")
    logging: LoggingSection = Field(LoggingSection(), description="Logs.")


def schema() -> dict[str, Any]:
    """Return the JSON schema of the configuration file."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}


def sections() -> dict[str, type[Section]]:
    """Return the sections of the configuration by name."""
    found = {}
    for name, field in Config.model_fields.items():
        assert isinstance(field.annotation, type) and issubclass(field.annotation, Section)
        found[name] = field.annotation
    return found
