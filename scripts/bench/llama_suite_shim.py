"""Stands where llama-server's test suite expects llama-server: starts it, or the supervisor in front of it.

`llama_suite.py` makes the suite run this with the file of its settings in $LLAMA_SUITE. In both modes a model of
the hub becomes a local file. In proxy mode the supervisor gets a models folder with that one model, and the rest
of the command line becomes `models.overrides`. A command line without a model starts llama-server's own router: in
proxy mode too, unless the settings say that the supervisor stands in for it.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

VALUES = {
    "--host": "host",
    "--port": "port",
    "--model": "model",
    "-m": "model",
    "--alias": "alias",
    "--hf-repo": "repo",
    "--hf-file": "file",
    "--model-url": "url",
    "--models-max": "models_max",
}
"""Flags that are taken off the command line, with their values."""

MODELS = {
    "bert-bge-small": "tiny-bert.gguf",
    "split/stories15M": "tiny-split-00001-of-00003.gguf",
    "tinygemma3": "tiny-gemma3.gguf",
}
"""Which local file stands for a model of the hub: the first whose name is in repository and file."""

OTHER_MODEL = "tiny-llama.gguf"
PROJECTOR = {"tiny-gemma3.gguf": "mmproj-tiny-gemma3.gguf"}
LOCAL_ONLY = ("--tools", "--mcp-servers-config", "--mcp-servers-json")
"""Flags that make llama-server's default for --cors-origins `localhost` instead of `*`."""


@dataclass
class CommandLine:
    """What the suite wants to start."""

    taken: dict[str, str] = field(default_factory=dict)
    rest: list[str] = field(default_factory=list)

    @property
    def has_model(self) -> bool:
        return not self.taken.keys().isdisjoint(("model", "repo", "file", "url"))

    def model(self, folder: Path) -> Path:
        """Return the local model file."""
        if "model" in self.taken:
            return Path(self.taken["model"])
        wanted = "/".join(self.taken[key] for key in ("repo", "file", "url") if key in self.taken)
        return folder / next((file for name, file in MODELS.items() if name in wanted), OTHER_MODEL)

    def projector(self, model: Path) -> Path | None:
        """Return the projector that the hub would have delivered with the model."""
        name = PROJECTOR.get(model.name)
        return model.with_name(name) if name and "--no-mmproj" not in self.rest else None


def parse(arguments: list[str]) -> CommandLine:
    """Split a command line of llama-server."""
    line = CommandLine()
    left = iter(arguments)
    for argument in left:
        if argument in VALUES:
            line.taken[VALUES[argument]] = next(left)
        else:
            line.rest.append(argument)
    if line.has_model and "--offline" in line.rest:
        line.rest.remove("--offline")  # about the hub
    return line


def direct_command(server: str, line: CommandLine, models: Path) -> list[str]:
    """Return the command that starts llama-server itself."""
    command = [server]
    for key in ("host", "port", "alias", "models_max"):
        if key in line.taken:
            command += [f"--{key.replace('_', '-')}", line.taken[key]]
    if line.has_model:
        model = line.model(models)
        command += ["--model", str(model)]
        if projector := line.projector(model):
            command += ["--mmproj", str(projector)]
    return command + line.rest


def stock_with_one(line: CommandLine, models: Path, shelf: Path) -> dict[str, Any]:
    """Put the one model into the models folder `shelf`; returns the configuration's section `models`."""
    file = line.model(models)
    aliases = sorted(line.taken["alias"].split(",")) if "alias" in line.taken else [file.stem.split("-00001-of-")[0]]
    name = aliases[0]  # llama-server's choice too: it keeps aliases in order
    stem, shard, _ = file.stem.partition("-00001-of-")
    for part in file.parent.glob(f"{stem}-*-of-*.gguf") if shard else [file]:
        (shelf / part.name.replace(stem, name, 1)).symlink_to(part)
    if projector := line.projector(file):
        (shelf / f"mmproj-{name}.gguf").symlink_to(projector)
    # llama-server's default, where the supervisor's is stricter
    args = [] if any(flag in line.rest for flag in ("--cors-origins", *LOCAL_ONLY)) else ["--cors-origins", "*"]
    return {
        "unknown_model": "default",
        "preload": [name],
        "overrides": {name: {"args": args + line.rest, "aliases": aliases[1:]}},
    }


def stock_as_router(line: CommandLine, models: Path, shelf: Path) -> dict[str, Any]:
    """Put what the hub's cache holds into the models folder `shelf`; returns the section `models`."""
    name = "ggml-org/tinygemma3-GGUF:Q8_0"
    folder = shelf / name.partition("/")[0]
    folder.mkdir()
    for place in (shelf, folder):  # a second file with that name makes the folder a part of the id
        (place / f"{name.partition('/')[2]}.gguf").symlink_to(models / "tiny-gemma3.gguf")
    (folder / f"mmproj-{name.partition('/')[2]}.gguf").symlink_to(models / PROJECTOR["tiny-gemma3.gguf"])
    section: dict[str, Any] = {"overrides": {name: {"args": [arg for arg in line.rest if arg != "--offline"]}}}
    if "models_max" in line.taken:
        section["max_loaded_models"] = int(line.taken["models_max"])
    return section


def supervisor_config(server: str, line: CommandLine, models: Path, folder: Path) -> dict[str, Any]:
    """Make a models folder below `folder` and return the supervisor's configuration."""
    shelf = folder / "models"
    shelf.mkdir()
    stock = stock_with_one if line.has_model else stock_as_router
    return {
        "server": {
            "host": line.taken.get("host", "127.0.0.1"),
            "port": int(line.taken.get("port", "8080")),
            "drain_seconds": 0.5,
            "stop_seconds": 2,
            "llama_server": server,
            "runtime_dir": str(folder / "run"),
        },
        "models": {"directory": str(shelf), **stock(line, models, shelf)},
        "monitoring": {"child_metrics": False},  # as asked for by the suite, with --metrics
        "logging": {"directory": str(folder / "logs")},
    }


def main() -> None:
    settings = json.loads(Path(os.environ["LLAMA_SUITE"]).read_text())
    root, models, server = Path(settings["root"]), Path(settings["models"]), settings["server"]
    line = parse(sys.argv[1:])
    command = direct_command(server, line, models)
    if not line.has_model:
        with (root / "router.txt").open("a") as file:
            file.write(os.environ.get("PYTEST_CURRENT_TEST", "?").rpartition(" ")[0] + "\n")
    if settings["mode"] == "proxy" and (line.has_model or settings["router"] == "supervisor"):
        folder = Path(tempfile.mkdtemp(prefix="start-", dir=root))
        config = folder / "config.json"
        config.write_text(json.dumps(supervisor_config(server, line, models, folder), indent=1))
        command = [sys.executable, "-m", "supervisor", "start", "--config", str(config)]
        os.environ["PYTHONPATH"] = settings["repository"]
    print("shim:", *command, file=sys.stderr, flush=True)
    os.execv(command[0], command)


if __name__ == "__main__":
    main()
