#!/usr/bin/env python3
"""What does a model know of a text that it has read into a session, after the server was restarted?

Twenty facts (codes, cities, list items) stand at random places of texts of 8K tokens and of one of 30K, all further
back than the context. Each text is read once into a session of 1,024 cells; the server is stopped and started; then
each fact is asked by the start of its sentence, of the session as its file has it, which no question changes. Reported:
the share where the right answer is likelier than nine wrong ones (by their first tokens), which is 10 % by chance, and
the share where the model says it, greedily; with the memory (`atlas`), without it (`window`: `--atlas-cells 0`), and
with full attention, without a session, where text and question fit into the context that the model was trained with.
Target: the memory's share above the window's, their 95 % intervals apart.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from atlas_common import CORPUS, TEXTS, Server, corpus, place, progress, share, steps
from atlas_recall import ASKED, NAMES, Question, check_candidates, fact, paragraphs, print_shares, score
from atlas_server import MemoryServer, workplace
from common import BenchError, Json, machine_state, model_file, parser, print_machine, run_main, server_of

KINDS = ("code",) * 8 + ("city",) * 6 + ("item",) * 6
MODES = ("atlas", "window", "full")
AFTER = 64
"""Tokens that question and answer may have."""


@dataclass(frozen=True)
class Text:
    """A text with facts; the tokens are what a session reads, its questions have no document of their own."""

    name: str
    tokens: list[int]
    questions: list[Question]


def text_with_facts(
    running: MemoryServer,
    name: str,
    seed: int,
    filler: list[tuple[str, int]],
    length: int,
    nearest: int,
    kinds: tuple[str, ...] = KINDS,
) -> Text:
    """Return a text of about `length` tokens made from paragraphs of `filler` (text, tokens).

    Facts of all `kinds` are in it at random places, more than `nearest` tokens before its end.
    """
    rng = random.Random(seed)
    at, read = rng.randrange(len(filler)), 0
    starts, chosen = [], []
    while read < length - 24 * len(kinds):  # which is for the facts
        starts.append(read)
        chosen.append(filler[(at + len(chosen)) % len(filler)])
        read += chosen[-1][1]
    taken: set[str] = set()
    who = {kind: rng.sample(NAMES, kinds.count(kind)) for kind in dict.fromkeys(kinds)}
    facts = [(kind, *fact(kind, who[kind].pop(), rng, taken)) for kind in kinds]
    rng.shuffle(facts)
    before = Counter(rng.choices([n for n, start in enumerate(starts) if read - start > nearest], k=len(facts)))
    text, questions = "", []
    behind: list[tuple[int, Question]] = []
    for number, (paragraph, _) in enumerate(chosen):
        for _ in range(before[number]):
            kind, start, answer, wrong = facts.pop()
            text += f"{start} {answer}.\n\n"
            behind.append((len(text), Question("", kind, start, answer, wrong, 0)))
        text += paragraph + "\n\n"
    whole = running.tokens(text)
    for end, question in behind:
        distance = len(running.tokens(text[end:]))
        if distance <= nearest - 64:
            raise BenchError(f"{name}: a fact is only {distance} tokens back")
        questions.append(Question("", question.kind, question.start, question.answer, question.wrong, distance))
    return Text(name, whole, questions)


def read_all(running: MemoryServer, texts: list[Text], note: str = "") -> dict[str, str]:
    """Read each text into a session of its name; return the hashes of the files."""
    for number, text in enumerate(texts):
        progress(f"{note} reads {text.name}", number, len(texts))
        answer = running.want(running.complete(text.tokens, 0, memory_file=text.name, append=False, reset="hard"))
        if "bytes" not in (answer["atlas"]["saved"] or {}):
            raise BenchError(f"{text.name} is not saved: {answer['atlas']}")
    progress("")
    return hashes(running, texts)


def hashes(running: MemoryServer, texts: list[Text]) -> dict[str, str]:
    """Return the hash of each session's file."""
    paths = {text.name: running.memory / f"{text.name}.atlas" for text in texts}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in paths.items()}


def ask_session(running: MemoryServer, text: Text, question: Question) -> Json:
    """Ask a question of a session as its file has it."""
    loaded = running.want(running.ask("POST", "/v1/atlas/memory/load", {"filename": text.name}))
    if loaded["n_tokens"] != len(text.tokens):
        raise BenchError(f"{text.name} has {loaded['n_tokens']} tokens, not {len(text.tokens)}")
    body: Json = {"prompt": running.tokens(question.start + question.tail), **ASKED}
    body["atlas"] = {"memory_file": text.name, "append": True, "save_memory": False}
    answer = running.want(running.ask("POST", "/completion", body))
    running.want(running.ask("DELETE", "/v1/atlas/memory/reset", {"reset_type": "hard"}))  # or it would be saved later
    return score(running, question, answer)


def with_sessions(
    server: Path, model: Path, folder: Path, words: list[str], texts: list[Text], note: str
) -> list[list[Json]]:
    """Read the texts into sessions, restart, and ask; return the answers by text. Raises `BenchError`."""
    with MemoryServer(server, model, folder, *words) as running:
        before = read_all(running, texts, note)
    with MemoryServer(server, model, folder, *words) as running:
        answers = [
            [ask_session(running, text, question) for question in steps(text.questions, f"{note}, {text.name}")]
            for text in texts
        ]
    if hashes(running, texts) != before:
        raise BenchError("the questions have changed a session's file")
    return answers


def _in_full(running: Server, texts: list[Text], limit: int) -> list[list[Json]]:
    answers = []
    for text in texts:
        fits = len(text.tokens) + AFTER <= limit
        given = []
        for question in steps(text.questions if fits else [], f"full, {text.name}"):
            prompt = text.tokens + running.tokens(question.start + question.tail)
            given.append(score(running, question, running.call("/completion", {"prompt": prompt, **ASKED})))
        answers.append(given)
    return answers


def main() -> int:
    """Run the benchmark; 0 when the target is met, 1 when it is not."""
    options = parser(__doc__)
    options.add_argument("--model", type=model_file, required=True, help="GGUF file")
    options.add_argument("--modes", nargs="*", default=list(MODES), choices=MODES)
    options.add_argument("--base-server", type=Path, help="llama-server for the full mode; default: --server")
    options.add_argument(
        "--lengths", type=int, nargs="*", default=[7900, 7900, 7900, 30000], help="tokens of the texts"
    )
    options.add_argument("--cells", type=int, default=1024, help="context")
    options.add_argument("--filler", default="glossary", metavar="FILE[:OFFSET]")
    options.add_argument("--corpus", type=Path, default=CORPUS, help="folder of the default texts")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--words", default="", help="more words for llama-server")
    given = options.parse_args()
    before, server = machine_state(), server_of(given)
    spec = place(given.filler, corpus(given.corpus) if given.filler.partition(":")[0] in TEXTS else {})
    words = ["-c", str(given.cells), "-np", "1", *given.words.split()]
    answers: dict[str, list[list[Json]]] = {}
    with workplace() as folder:
        with MemoryServer(server, given.model, folder, *words) as running:
            filler = paragraphs(running, spec, sum(given.lengths))
            texts = [
                text_with_facts(running, f"text{number}", given.seed * 1000 + number, filler, length, given.cells)
                for number, length in enumerate(given.lengths)
            ]
            for text in texts:
                check_candidates(running, text.questions)
            trained = running.want(running.ask("GET", "/v1/models"))["data"][0]["meta"]["n_ctx_train"]
        for mode in given.modes:
            if mode == "full":
                context = max((len(text.tokens) for text in texts if len(text.tokens) + AFTER <= trained), default=0)
                full = ["-c", str(context + AFTER), *given.words.split()]
                with Server(given.base_server or server, given.model, full) as plain:
                    answers[mode] = _in_full(plain, texts, trained)
            else:
                cells = ["--atlas-cells", "0"] if mode == "window" else []
                answers[mode] = with_sessions(server, given.model, folder, [*words, *cells], texts, mode)
    return _report(texts, answers, before, given.json)


def _report(texts: list[Text], answers: dict[str, list[list[Json]]], before: Json, as_json: bool) -> int:
    rows = []
    lengths = sorted({round(len(text.tokens), -3) for text in texts})
    groups = {"all": set(range(len(texts)))} | {
        f"{length} tokens": {n for n, text in enumerate(texts) if round(len(text.tokens), -3) == length}
        for length in lengths
    }
    for mode, by_text in answers.items():
        for group, numbers in groups.items():
            chosen = [answer for number in sorted(numbers) for answer in by_text[number]]
            for measure in ("likeliest", "right") if chosen else ():
                p, low, high = share(sum(answer[measure] for answer in chosen), len(chosen))
                row = {"mode": mode, "group": group, "measure": measure, "questions": len(chosen)}
                rows.append(row | {"share": round(p, 4), "interval": [round(low, 4), round(high, 4)]})
    total = {row["mode"]: row for row in rows if row["group"] == "all" and row["measure"] == "likeliest"}
    met = None
    if {"atlas", "window"} <= total.keys():
        met = total["atlas"]["interval"][0] > total["window"]["interval"][1]
    if as_json:
        details = [
            {"text": text.name, "tokens": len(text.tokens), "kind": question.kind, "start": question.start}
            | {"answer": question.answer, "distance": question.distance}
            | {mode: by_text[number][place] for mode, by_text in answers.items() if by_text[number]}
            for number, text in enumerate(texts)
            for place, question in enumerate(text.questions)
        ]
        result = {"benchmark": "atlas facts", "rows": rows, "met": met, "questions": details}
        print(json.dumps(result | {"machine": {"before": before, "after": machine_state()}}, indent=2))
        return 1 if met is False else 0
    print_shares(rows, met)
    print_machine(before)
    return 1 if met is False else 0


if __name__ == "__main__":
    run_main(main)
