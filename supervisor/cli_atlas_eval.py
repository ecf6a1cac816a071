"""`atlas eval`: does the long-context memory help on this text and model?"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import click

from supervisor.cli_options import config_option, example, json_option
from supervisor.console import console, print_json, say, table
from supervisor.errors import SupervisorError

Json = dict[str, Any]

MODES = ("full", "window", "atlas", "shuffled")
STOP_SECONDS = 5.0
TOOL_VARIABLE = "LLAMA_SUPERVISOR_ATLAS_EVAL"
"""Environment variable that names another evaluation program."""


class EvaluationFailed(SupervisorError):
    """The evaluation program could not be run or gave up."""

    type = "evaluation_failed"


class NoSuchModel(SupervisorError):
    """Neither a file nor a model in the models folder."""

    code = "model_not_found"


@click.command("eval", epilog=example("atlas eval --model m.gguf --text a.txt --copy passage.txt filler.txt"))
@config_option
@click.option("--model", "-m", required=True, metavar="MODEL", help="An id in the models folder, or a GGUF file.")
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False),
    metavar="FILE",
    help="A text; repeatable.",
)
@click.option(
    "--copy",
    "copies",
    multiple=True,
    nargs=2,
    type=click.Path(exists=True, dir_okay=False),
    metavar="PASSAGE FILLER",
    help="Passage, filler, passage again: the second reading counts; repeatable.",
)
@click.option("--tokens", type=click.IntRange(16), default=2048, show_default=True, help="Tokens of each text.")
@click.option("--cells", type=click.IntRange(64), default=512, show_default=True, help="Cells of the context.")
@click.option("--memory-cells", type=click.IntRange(1), help="Cells that hold memory.")
@click.option("--recall", type=click.FloatRange(0, 1), help="Share of the memory cells that is recalled.")
@click.option("--refresh", type=click.IntRange(1), help="Tokens between refreshes.")
@click.option("--modes", default=",".join(MODES), show_default=True, help="What to compare.")
@click.option("--cache-type", metavar="TYPE", help="Type of keys and values: f16, q8_0, ...")
@click.option("--threads", type=click.IntRange(1), help="CPU threads.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Write the plot as PNG.")
@json_option
def evaluate(config: Path | None, model: str, modes: str, plot: Path | None, as_json: bool, **options: Any) -> None:
    """Compare full attention, a plain window, and the memory on texts."""
    chosen = modes.split(",")
    if wrong := [mode for mode in chosen if mode not in MODES]:
        raise click.UsageError(f"no such mode: {', '.join(wrong)}; there are {', '.join(MODES)}")
    if not options["texts"] and not options["copies"]:
        raise click.UsageError("give at least one --text or --copy")
    if plot is not None:
        _pyplot()  # missing: say so before minutes of work
    command = [str(_tool()), *_arguments(_model(model, config), chosen, options)]
    settings, results = run(command, quiet=as_json)
    if plot is not None:
        _write_png(plot, results)
    if as_json:
        print_json({"config": settings, "results": results, "summary": summary(results)})
        return
    _print(results)


def _arguments(model: Path, modes: Sequence[str], options: Json) -> list[str]:
    args = ["-m", str(model), "-c", str(options["cells"]), "-n", str(options["tokens"]), "--modes", ",".join(modes)]
    for text in options["texts"]:
        args += ["--text", text]
    for passage, filler in options["copies"]:
        args += ["--copy", passage, filler]
    flags = {"memory_cells": ["--atlas-cells"], "recall": ["--atlas-recall"], "refresh": ["--atlas-refresh"]}
    flags |= {"cache_type": ["-ctk", "-ctv"], "threads": ["-t"]}
    for name, both in flags.items():
        if options[name] is not None:
            for flag in both:
                args += [flag, str(options[name])]
    return args


def _tool() -> Path:
    from supervisor.setup import native  # noqa: PLC0415 (only this command needs it)

    given = os.environ.get(TOOL_VARIABLE)
    tool = Path(given) if given else native.find_tool(native.EVAL)
    if tool is None:
        raise EvaluationFailed("llama-atlas-eval is not built: run llama-supervisor build")
    return tool


def _model(name: str, config: Path | None) -> Path:
    if Path(name).is_file():
        return Path(name)
    from supervisor.models.catalog import find  # noqa: PLC0415 (only this command needs it)
    from supervisor.settings import load  # noqa: PLC0415 (pydantic is slow to import)

    settings = load(config).config.models
    model = find(settings, name)
    if model is None:
        raise NoSuchModel(f"{name!r} is neither a file nor a model in {settings.directory}")
    if model.error is not None:
        raise EvaluationFailed(f"model {model.id!r} cannot be used: {model.error}")
    return model.path


def run(command: list[str], *, quiet: bool) -> tuple[Json, list[Json]]:
    """Run the evaluation program; return its settings and results. Ctrl-C ends it too."""
    settings: Json = {}
    results: list[Json] = []
    finished = False
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        try:
            child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, errors="replace")
        except OSError as error:
            raise EvaluationFailed(f"{command[0]} cannot be run: {error}") from error
        try:
            _follow(child, settings, results, quiet)
            finished = True
        finally:
            if not finished:
                child.terminate()
            try:
                code = child.wait(STOP_SECONDS if not finished else None)
            except subprocess.TimeoutExpired:
                child.kill()
                code = child.wait()
        if code != 0:
            raise EvaluationFailed(f"the evaluation ended with code {code}: {_last_line(log)}")
    if not results:
        raise EvaluationFailed(f"{command[0]} ended without a result")
    return settings, results


def _follow(child: subprocess.Popen[str], settings: Json, results: list[Json], quiet: bool) -> None:
    """Read the events until the program closes its output."""
    from rich.progress import Progress, TaskID  # noqa: PLC0415 (slow to import)

    assert child.stdout is not None
    tasks: dict[tuple[str, str], TaskID] = {}
    with Progress(console=console(stderr=True, quiet=quiet)) as bar:
        for line in child.stdout:
            try:
                event = json.loads(line)
            except ValueError as error:
                raise EvaluationFailed(f"the evaluation printed no JSON: {line.strip()[:200]!r}") from error
            match event.pop("event", None):
                case "config":
                    settings.update(event)
                case "result":
                    results.append(event)
                case "error":
                    raise EvaluationFailed(str(event.get("message")))
                case "progress":
                    key = (str(event["test"]), str(event["mode"]))
                    if key not in tasks:
                        tasks[key] = bar.add_task(" ".join(key).replace("[", "("), total=event["total"])
                    bar.update(tasks[key], completed=event["done"])


def _last_line(log: IO[str]) -> str:
    log.seek(0)
    lines = log.read().strip().splitlines()
    return lines[-1] if lines else "it said nothing"


def summary(results: Sequence[Json]) -> list[Json]:
    """Return NLL by mode and the gap recovered for each test, and the sums over texts in the last row."""
    rows: dict[str, Json] = {}
    for result in results:
        row = rows.setdefault(result["test"], {"test": result["test"], "kind": result["kind"], "nll": {}})
        row["nll"][result["mode"]] = result["nll"]
    texts = [row for row in rows.values() if row["kind"] == "text"]
    if len(texts) > 1:
        common = set.intersection(*(set(row["nll"]) for row in texts))
        sums = {mode: sum(row["nll"][mode] for row in texts) for mode in MODES if mode in common}
        rows["\0sum"] = {"test": "sum of texts", "kind": "sum", "nll": sums}
    return [{**row, "gap_recovered": gap_recovered(row["nll"])} for row in rows.values()]


def gap_recovered(nll: dict[str, float]) -> float | None:
    """Return (window - atlas) / (window - full); None without a gap or one of the modes."""
    if not {"full", "window", "atlas"} <= nll.keys() or nll["window"] <= nll["full"]:
        return None
    return (nll["window"] - nll["atlas"]) / (nll["window"] - nll["full"])


def _print(results: list[Json]) -> None:
    present = [mode for mode in MODES if any(result["mode"] == mode for result in results)]
    rows = []
    for row in summary(results):
        gap = row["gap_recovered"]
        values = [f"{row['nll'][mode]:.4f}" if mode in row["nll"] else "-" for mode in present]
        rows.append([row["test"], *values, "-" if gap is None else f"{100 * gap:.0f} %"])
    table(["TEST", *(f">{mode.upper()}" for mode in present), ">GAP RECOVERED"], rows)
    if sys.stdout.isatty():
        for name in dict.fromkeys(result["test"] for result in results):
            say("")
            for line in drawing(name, [result for result in results if result["test"] == name]):
                say(line)


def drawing(title: str, results: Sequence[Json], width: int = 72, height: int = 14) -> list[str]:
    """Return a plot of NLL by position as lines of text, a letter for each mode."""
    curves = {result["mode"]: smooth(result["by_position"]) for result in results if result["by_position"]}
    points = [point for curve in curves.values() for point in curve]
    if not points:
        return []
    last = max(x for x, _ in points) or 1
    low, high = min(y for _, y in points), max(y for _, y in points)
    grid = [[" "] * width for _ in range(height)]
    for mode, curve in curves.items():
        for x, y in curve:
            level = (y - low) / (high - low) if high > low else 0.5
            grid[round((1 - level) * (height - 1))][round(x / last * (width - 1))] = mode[0]
    labels = {0: f"{high:8.3f}", height - 1: f"{low:8.3f}"}
    lines = [f"{labels.get(row, ' ' * 8)} |{''.join(cells).rstrip()}" for row, cells in enumerate(grid)]
    return [f"{title}: NLL by position (0 to {last}), {', '.join(f'{m[0]} = {m}' for m in curves)}", *lines]


def smooth(points: Sequence[Sequence[float]], reach: int = 2) -> list[tuple[float, float]]:
    """Return the points averaged with `reach` neighbours on either side."""
    smoothed = []
    for i, (x, *_) in enumerate(points):
        near = [y for _, y in points[max(0, i - reach) : i + reach + 1]]
        smoothed.append((x, sum(near) / len(near)))
    return smoothed


def _pyplot() -> Any:
    try:
        import matplotlib  # noqa: PLC0415 (optional, slow)

        matplotlib.use("Agg")
        from matplotlib import pyplot  # noqa: PLC0415
    except ImportError as error:
        raise EvaluationFailed("--plot needs matplotlib: run pip install 'llama-supervisor[plot]'") from error
    return pyplot


def _write_png(path: Path, results: Sequence[Json]) -> None:
    pyplot = _pyplot()
    names = list(dict.fromkeys(result["test"] for result in results))
    rows = max(len(names), 1)
    figure, axes = pyplot.subplots(rows, 2, squeeze=False, figsize=(12, 3 * rows))
    for (whole, above), name in zip(axes, names, strict=False):
        curves = {r["mode"]: smooth(r["by_position"]) for r in results if r["test"] == name and r["by_position"]}
        full = curves.get("full")
        for number, (mode, points) in enumerate(curves.items()):
            whole.plot(*zip(*points, strict=True), label=mode, color=f"C{number}")
            if full is not None:
                # modes differ by less than the text does from place to place
                difference = [(x, y - base) for (x, y), (_, base) in zip(points, full, strict=True)]
                above.plot(*zip(*difference, strict=True), label=mode, color=f"C{number}")
        whole.set(title=Path(name).name, xlabel="position", ylabel="NLL")
        above.set(title="lost against full attention", xlabel="position", ylabel="NLL - full")
        for axis in (whole, above):
            if axis.lines:
                axis.legend()
    figure.tight_layout()
    figure.savefig(path, format="png")
    pyplot.close(figure)
