"""Commands about KAREN: put the extension into it, and see what it would see."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from supervisor.cli_options import KEY_VARIABLE, client, client_options, example
from supervisor.console import print_json, say, table

if TYPE_CHECKING:
    from supervisor.setup.karen import Trial

FAILED = 1
POLICIES = ("off", "fallback", "prefer_local", "hybrid")


@click.group("karen", epilog=example("karen install ~/AI-Karen", "karen check"))
def karen() -> None:
    """Answer KAREN's prompts here: set its extension up and try it."""


@karen.command(
    epilog=example(
        "karen install ~/AI-Karen",
        "karen install ~/AI-Karen --policy hybrid --model tiny",
        "karen install --link ~/AI-Karen/src/extensions",
    )
)
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--link", is_flag=True, help="Link to the extension here instead of copying it.")
@click.option("--policy", type=click.Choice(POLICIES), help="When to answer here.  [default: fallback]")
@click.option("--model", "-m", metavar="MODEL", help="Which model answers.  [default: auto]")
@click.option("--api-key-file", metavar="FILE", help="File that holds the API key, where one is needed.")
@client_options
def install(
    *, path: Path, link: bool, url: str | None, config: Path | None, as_json: bool, **options: str | None
) -> None:
    """Put the extension into KAREN, whose folder is PATH, and try it.

    PATH may also be KAREN's folder of extensions. What is there already is brought up to date; its config.json and
    prompt.txt stay, with the options given here changed.
    """
    import asyncio  # noqa: PLC0415 (help needs none of it)

    from supervisor.setup import karen as setup  # noqa: PLC0415

    given = {key: value for key, value in options.items() if value is not None}
    if "api_key_file" in given:
        given["api_key_file"] = str(Path(given["api_key_file"]).expanduser().absolute())
    if link and given:
        raise click.UsageError("a link has no settings of its own: set LLAMACPP_KAREN_... for KAREN instead")
    here = client(url, config).url
    installed = setup.install(path, given | {"url": here}, link=link)
    trial = asyncio.run(setup.try_out(installed.folder, {"url": here} if link else {}, "Say hello."))
    if as_json:
        print_json({"folder": str(installed.folder), "linked": link, "kept": installed.kept, "trial": _document(trial)})
        return
    say(f"{installed.folder}: {'linked' if link else 'installed'}")
    if installed.kept:
        say(f"kept as they were: {', '.join(installed.kept)}")
    if link:
        say(f"set LLAMACPP_KAREN_URL={here} for KAREN, if that is not its default")
    _show(trial)
    say("restart KAREN to load it")


@karen.command(epilog=example("karen check", "karen check ~/AI-Karen", "karen check --prompt Hello --json"))
@click.argument("path", required=False, type=click.Path(path_type=Path), metavar="[PATH]")
@click.option("--prompt", default="Say hello.", show_default=True, metavar="TEXT", help="What to ask.")
@client_options
def check(*, path: Path | None, prompt: str, url: str | None, config: Path | None, as_json: bool) -> int:
    """Run both hooks with a remote model that fails, and show what KAREN would see: exit with 1 without an answer.

    PATH is KAREN's folder, or the extension's in it, for what is set there; without it the extension is tried as it
    comes.
    """
    import asyncio  # noqa: PLC0415 (help needs none of it)

    from supervisor.setup import karen as setup  # noqa: PLC0415

    folder = setup.folder_in(path) if path is not None else setup.shipped_folder()
    options = {"url": client(url, config).url} if url or path is None else {}
    if path is None:
        setup.use_key(KEY_VARIABLE)
    trial = asyncio.run(setup.try_out(folder, options, prompt))
    if as_json:
        print_json(_document(trial))
    else:
        _show(trial)
    return 0 if trial.answer is not None else FAILED


def _document(trial: Trial) -> dict[str, Any]:
    return asdict(trial) | {"folder": str(trial.folder)}


def _show(trial: Trial) -> None:
    for line in trial.warnings:
        say(f"warning: {line}")
    rows = []
    for name, result in trial.hooks.items():
        did = "answered here" if result.get("local_inference_used") else "changed nothing"
        rows.append([name, did, f"{result.get('hook_ms', 0):.1f} ms", str(result.get("reason", ""))])
    table(["HOOK", "DID", ">TOOK", "WHY"], rows)
    if trial.answer is not None:
        model = (trial.hooks["post_llm_result"].get("local_inference") or {}).get("model")
        say(f"where the remote model fails, KAREN gets from {model}: {trial.answer}")
    else:
        say("where the remote model fails, KAREN gets nothing from here")
