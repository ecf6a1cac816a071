#!/usr/bin/env python3
"""Is any answer lost, cut or wrong while many clients stream from three models, of which two may run?

The clients ask for one of the models by chance, each time a prompt of a fixed set, at temperature 0. Afterwards a
llama-server started by hand, with the same command line, answers the same prompts alone, and every streamed answer
must have been the same, byte for byte. For that each model has one slot and no prompt is cached: in llama.cpp the
tokens that are computed in one batch change the last bits of each other's results.

Counted are answers that did not come (lost), that ended without their last event or an error event (cut), errors by
status, wrong answers, swaps, and how the supervisor's memory grows, over the second half of the run.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
from common import (
    REPOSITORY,
    Json,
    RawServer,
    Supervisor,
    machine_state,
    model_file,
    parser,
    run_main,
    server_of,
    supervisor,
    warm_page_cache,
)

sys.path.insert(0, str(REPOSITORY / "tests"))  # there is another file of that name here
import tiny_models

ANSWER_SECONDS = 600.0
"""After so long an answer is lost."""

PAUSE = 0.05
"""Most seconds between an answer and the client's next request."""

SAMPLE_SECONDS = 1.0

Answers = dict[tuple[str, int], Counter[str]]
"""How often each text came, by model and number of the prompt."""


@dataclass
class Tally:
    """What the clients saw."""

    complete: int = 0
    lost: int = 0
    cut: int = 0
    broken: int = 0  # ended with an error event
    statuses: Counter[int] = field(default_factory=Counter)
    answers: Answers = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    samples: list[tuple[float, int]] = field(default_factory=list)  # when, and the supervisor's memory in bytes


def body(model: str, number: int, tokens: int) -> Json:
    """Return the request for a prompt."""
    prompt = f"{number}. A short story about {number % 7 + 2} animals in a small town begins like this: "
    fixed = {"temperature": 0, "cache_prompt": False, "stream": True, "n_predict": tokens}
    return {"model": model, "prompt": prompt} | fixed


def text_of(events: list[Json]) -> str:
    return "".join(str(event.get("content", "")) for event in events)


def parse(lines: bytes) -> list[Json]:
    """Return the events of a stream, leaving out one that is not whole."""
    found = []
    for line in lines.split(b"\n\n"):
        if line.startswith(b"data: {"):
            with contextlib.suppress(ValueError):
                found.append(json.loads(line[6:]))
    return found


async def client(number: int, url: str, options: Json, tally: Tally, until: float) -> None:
    """Ask one request after the other."""
    chance = random.Random(number)
    timeout = aiohttp.ClientTimeout(total=ANSWER_SECONDS)
    async with aiohttp.ClientSession(timeout=timeout) as http:
        while time.monotonic() < until:
            model, prompt = chance.choice(options["models"]), chance.randrange(options["prompts"])
            await ask(http, url, (model, prompt), options["tokens"], tally)
            await asyncio.sleep(chance.random() * PAUSE)


async def ask(http: aiohttp.ClientSession, url: str, what: tuple[str, int], tokens: int, tally: Tally) -> None:
    """Read one answer to its end and count it."""
    began = time.monotonic()
    got, status = b"", 0
    try:
        async with http.post(url + "/completion", json=body(*what, tokens)) as response:
            status = response.status
            async for piece in response.content.iter_any():
                got += piece
    except (aiohttp.ClientError, TimeoutError, OSError):
        if status != 200:
            tally.lost += 1
            return
    tally.statuses[status] += 1
    if status != 200:
        return
    events = parse(got)
    if events and events[-1].get("stop") is True:
        tally.complete += 1
        tally.seconds.append(time.monotonic() - began)
        tally.answers.setdefault(what, Counter())[text_of(events)] += 1
    elif events and "error" in events[-1]:
        tally.broken += 1
    else:
        tally.cut += 1


async def watch(pid: int, tally: Tally, until: float) -> None:
    """Note the supervisor's memory now and then."""
    process = psutil.Process(pid)
    while time.monotonic() < until:
        tally.samples.append((time.monotonic(), process.memory_info().rss))
        await asyncio.sleep(SAMPLE_SECONDS)


async def load(running: Supervisor, options: Json, minutes: float) -> Tally:
    """Let all clients run for so long."""
    tally = Tally()
    until = time.monotonic() + minutes * 60
    work = [client(number, running.url, options, tally, until) for number in range(options["clients"])]
    await asyncio.gather(watch(running.process.pid, tally, until), *work)
    return tally


def slope(samples: list[tuple[float, int]]) -> float:
    """Return how the memory grows over the second half of the samples, in MiB an hour."""
    half = samples[len(samples) // 2 :]
    if len(half) < 3:
        return 0.0
    return statistics.linear_regression([when for when, _ in half], [rss for _, rss in half]).slope * 3600 / 2**20


def direct(running: Supervisor, model: str, numbers: list[int], tokens: int) -> dict[int, str]:
    """Return what a llama-server started by hand answers to these prompts, one after the other."""
    running.call("POST", "/completion", body(model, 0, 1) | {"stream": False})  # so that it is loaded
    command = running.child_command(model)
    running.unload(model)
    server = RawServer(command, running.workspace.temp)
    try:
        server.until_healthy()
        found = {}
        for number in numbers:
            with contextlib.closing(server.connect()) as connection:
                asked = json.dumps(body(model, number, tokens)).encode()
                connection.request("POST", "/completion", asked, {"Content-Type": "application/json"})
                found[number] = text_of(parse(connection.getresponse().read()))
        return found
    finally:
        server.stop()


def compare(running: Supervisor, options: Json, answers: Answers) -> int:
    """Return how many answers were not what a direct run says."""
    wrong = 0
    for model in options["models"]:
        numbers = sorted(number for name, number in answers if name == model)
        expected = direct(running, model, numbers, options["tokens"])
        for number in numbers:
            texts = answers[model, number]
            wrong += texts.total() - texts[expected[number]]
    return wrong


def report(tally: Tally, wrong: int, status: Json, options: Json) -> Json:
    """Return the figures."""
    seconds = sorted(tally.seconds) or [0.0]
    return {
        "clients": options["clients"],
        "complete": tally.complete,
        "lost": tally.lost,
        "cut": tally.cut,
        "ended_with_an_error": tally.broken,
        "status_5xx": sum(n for status, n in tally.statuses.items() if status >= 500),
        "other_errors": {str(status): n for status, n in tally.statuses.items() if 200 != status < 500},
        "unlike_a_direct_run": wrong,
        "compared": tally.complete,
        "starts": status,
        "seconds_p50": round(statistics.median(seconds), 2),
        "seconds_p99": round(seconds[int(len(seconds) * 0.99)], 2),
        "supervisor_mib": [round(rss / 2**20, 1) for _, rss in (tally.samples[0], tally.samples[-1])],
        "supervisor_mib_an_hour": round(slope(tally.samples), 1),
    }


def starts(running: Supervisor) -> Json:
    """Return how often each model was started."""
    with contextlib.closing(running.connect()) as connection:
        connection.request("GET", "/metrics")
        lines = connection.getresponse().read().decode().splitlines()
    prefix = "llama_supervisor_model_starts_total{"
    told = (line.removeprefix(prefix).split("} ") for line in lines if line.startswith(prefix))
    return {label.split('"')[1]: int(float(number)) for label, number in told}


def main() -> int:
    """Run it; 0 when nothing was lost, cut or wrong."""
    made = parser(__doc__)
    made.add_argument("--model-a", type=model_file, required=True, help="GGUF file, as SmolLM2")
    made.add_argument("--model-b", type=model_file, required=True, help="GGUF file, as Gemma 3 270M")
    made.add_argument("--minutes", type=float, default=10)
    made.add_argument("--clients", type=int, default=64)
    made.add_argument("--prompts", type=int, default=12, help="different ones for each model")
    made.add_argument("--tokens", type=int, default=16, help="of an answer")
    made.add_argument(
        "--threads", type=int, default=1, help="of a model: two that share the cores slow each other down"
    )
    made.add_argument("--min-residency", type=float, default=5, help="inference.min_residency_seconds")
    given = made.parse_args()
    server, before = server_of(given), machine_state()
    with tempfile.TemporaryDirectory(prefix="lsb") as folder:
        tiny = tiny_models.make(Path(folder) / "tiny.gguf", "llama")
        models = {"a": given.model_a, "b": given.model_b, "tiny": tiny}
        for path in models.values():
            warm_page_cache(path)
        options = {"models": [*models], **{key: getattr(given, key) for key in ("clients", "prompts", "tokens")}}
        overlay: Json = {
            "models": {"max_loaded_models": 2},
            "performance": {"context_size": 2048, "parallel": 1, "threads": given.threads},
            "inference": {"min_residency_seconds": given.min_residency},
            "api": {"require_keys": False},
        }
        with supervisor(models, server, overlay) as running:
            tally = asyncio.run(load(running, options, given.minutes))
            begun = starts(running)
            result = report(tally, compare(running, options, tally.answers), begun, options)
    good = not any(result[key] for key in ("lost", "cut", "ended_with_an_error", "status_5xx", "unlike_a_direct_run"))
    result |= {"good": good, "machine": {"before": before, "after": machine_state()}}
    print(json.dumps(result, indent=None if given.json else 2))
    return 0 if good and tally.complete else 1


if __name__ == "__main__":
    run_main(main)
