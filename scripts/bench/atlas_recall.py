#!/usr/bin/env python3
"""Does a model still find what it read 2K to 8K tokens ago, when it writes and not only when it is scored?

Seeded documents of real filler text hold ten facts each (codes, cities, list items) in their first part; each question
is the start of the sentence that states a fact, put at the end, at least 2,048 tokens behind it; greedy, over HTTP.
With the memory on (`--atlas`, 1,024 cells), off (`--atlas --atlas-cells 0`, window only), and full attention
(`-c 16384`). Reported: share answered right with a 95 % interval, and the share where the right answer is likelier than
nine wrong ones (by the first token, in which the ten differ). The questions of a document share its text, so that a
prompt cache can serve them; the interval takes them as independent.
Target: more is answered right with the memory than without, the intervals apart.
"""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from atlas_common import CORPUS, TEXTS, Server, corpus, place, share, steps
from common import BenchError, Json, machine_state, model_file, parser, print_machine, run_main, server_of

NAMES = "Alice Bruno Clara David Emma Felix Grace Henry Irene Jacob Karen Louis Maria Oscar Paula Simon".split()
CITIES = "Paris London Rome Berlin Madrid Vienna Tokyo Moscow Boston Chicago".split()
ITEMS = "bread soap rope candles milk honey paper salt wine cheese".split()
KINDS = ("code", "code", "code", "code", "city", "city", "city", "item", "item", "item")

ASKED = {"temperature": 0, "n_predict": 8, "n_probs": 500, "cache_prompt": True}
"""Fields of the request that asks a question."""


@dataclass(frozen=True)
class Question:
    """A question at the end of a document: the start of a sentence, what must follow, what else might."""

    document: str
    kind: str
    start: str
    answer: str
    wrong: tuple[str, ...]
    distance: int
    """Tokens between the fact and the question."""

    @property
    def prompt(self) -> str:
        """The text to be continued."""
        return self.document + self.start

    @property
    def tail(self) -> str:
        """What is asked with it: a code's space, which is a token where digits are tokens of their own."""
        return " " if self.kind == "code" else ""


class Reader(Protocol):
    """A server that can tell the tokens of a text."""

    def tokens(self, text: str) -> list[int]:
        """Return them, without the BOS."""


def fact(kind: str, name: str, rng: random.Random, taken: set[str]) -> tuple[str, str, tuple[str, ...]]:
    """Return the start of a sentence, the answer that ends it, and nine wrong answers that begin differently.

    The answer is none of those `taken` by other facts, so that to mix facts up is never right, and is added to them.
    """
    if kind == "code":
        codes = [f"{first}{rng.randrange(1000):03}" for first in rng.sample(range(10), 10)]
        return f"The secret code of {name} is", codes[0], tuple(codes[1:])
    if kind == "city":
        cities = sorted(rng.sample(CITIES, 10), key=taken.__contains__)
        taken.add(cities[0])
        return f"The aunt of {name} lives in the city of", cities[0], tuple(cities[1:])
    items = sorted(rng.sample(ITEMS, 10), key=taken.__contains__)
    taken.add(items[0])
    return f"On the list of {name} the first is {items[9]} and the second is", items[0], tuple(items[1:])


def document(seed: int, filler: list[tuple[str, int]], tokens: tuple[int, int], nearest: int) -> list[Question]:
    """Return the questions of one document, made from paragraphs of `filler` (text, tokens).

    It has between `tokens` tokens, by the seed; every fact is more than `nearest` tokens before the end.
    """
    rng = random.Random(seed)
    length = rng.randint(*tokens)
    at = rng.randrange(len(filler))
    paragraphs: list[tuple[str, int]] = []
    while (size := sum(n for _, n in paragraphs)) < length:
        paragraphs.append(filler[(at + len(paragraphs)) % len(filler)])
    names = rng.sample(NAMES, len(KINDS))
    taken: set[str] = set()
    facts = [(kind, *fact(kind, name, rng, taken)) for kind, name in zip(KINDS, names, strict=True)]
    places = sorted((rng.uniform(0.02 * size, size - nearest), number) for number, _ in enumerate(facts))
    text, read = "", 0
    behind: dict[int, int] = {}
    for paragraph, n in paragraphs:
        while places and places[0][0] <= read:
            number = places.pop(0)[1]
            text += f"{facts[number][1]} {facts[number][2]}.\n\n"
            behind[number] = size - read
        text += paragraph + "\n\n"
        read += n
    return [Question(text, kind, start, answer, wrong, behind[number])
            for number, (kind, start, answer, wrong) in enumerate(facts)]  # fmt: skip


def main() -> int:
    """Run the benchmark; 0 when the target is met, 1 when it is not."""
    options = parser(__doc__)
    options.add_argument("--model", type=model_file, required=True, help="GGUF file")
    options.add_argument("--modes", nargs="*", default=["full", "window", "atlas"], choices=["full", "window", "atlas"])
    options.add_argument("--base-server", type=Path, help="llama-server for the full mode; default: --server")
    options.add_argument("--documents", type=int, default=20, help="ten questions each")
    options.add_argument("--tokens", type=int, nargs=2, default=[2600, 8000], metavar=("LEAST", "MOST"))
    options.add_argument("--nearest", type=int, default=2048, help="tokens between the nearest fact and the question")
    options.add_argument("--cells", type=int, default=1024)
    options.add_argument("--full", type=int, default=16384, help="context of the full mode")
    options.add_argument("--filler", default="glossary", metavar="FILE[:OFFSET]")
    options.add_argument("--corpus", type=Path, default=CORPUS, help="folder of the default texts")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument(
        "--atlas", default="", metavar="WORDS", help="more words for the memory, e.g. '--atlas-refresh 32'"
    )
    given = options.parse_args()
    before = machine_state()
    server = server_of(given)
    spec = place(given.filler, corpus(given.corpus) if given.filler.partition(":")[0] in TEXTS else {})
    cells = ["-c", str(given.cells), "--atlas"]
    arguments = {
        "full": ["-c", str(given.full)],
        "window": [*cells, "--atlas-cells", "0"],
        "atlas": [*cells, *given.atlas.split()],
    }
    questions: list[Question] = []
    answers: dict[str, list[Json]] = {}
    for mode in given.modes:
        binary = (given.base_server or server) if mode == "full" else server
        with Server(binary, given.model, arguments[mode]) as running:
            if not questions:
                filler = paragraphs(running, spec, given.documents * given.tokens[1])
                for number in range(given.documents):
                    made = document(given.seed * 1000 + number, filler, tuple(given.tokens), given.nearest)
                    questions += made
                check_candidates(running, questions[: len(KINDS)])
            answers[mode] = [_ask(running, question) for question in steps(questions, mode)]
    return _report(questions, answers, before, given.json)


def paragraphs(running: Reader, spec: str, tokens: int) -> list[tuple[str, int]]:
    """Return paragraphs of a text, each with its number of tokens, enough for `tokens` tokens if it has them."""
    path, _, offset = spec.rpartition(":")
    text = (Path(path).read_text(errors="replace") if path else Path(spec).read_text(errors="replace"))[
        int(offset) if path else 0 :
    ]
    found = [" ".join(part.split()) for part in re.split(r"\n\s*\n", text)]
    found = [part for part in found if 150 < len(part) < 2000][: tokens // 80 + 50]
    if len(found) < 20:
        raise BenchError(f"{spec}: too little text between empty lines for a filler")
    return [(part, len(running.tokens(part + "\n\n"))) for part in found]


def first_token(running: Reader, question: Question, answer: str) -> int:
    """Return the first token of an answer to a question; for a code, behind the space that is asked with it."""
    # the token is that of the answer in its place: digits may be a token of their own behind a space
    start = running.tokens(question.start)
    whole = running.tokens(f"{question.start} {answer}")
    rest = whole[len(start) :]
    return rest[0] if question.kind != "code" else whole[-len(answer)]


def check_candidates(running: Reader, questions: list[Question]) -> None:
    """Raise `BenchError` when the candidates of a question cannot be told apart by their first token."""
    for question in questions:
        first = {first_token(running, question, answer) for answer in (question.answer, *question.wrong)}
        if len(first) != 10:
            raise BenchError(f"the candidates of a {question.kind} do not differ in their first token")


def _ask(running: Server, question: Question) -> Json:
    answer = running.call("/completion", {"prompt": question.prompt + question.tail, **ASKED})
    return score(running, question, answer)


def score(running: Reader, question: Question, answer: Json) -> Json:
    """Return how an answer is judged; a candidate's likelihood is that of its first token."""
    said = answer["content"].strip()
    right = re.match(re.escape(question.answer) + r"(?![0-9A-Za-z])", said) is not None
    likely = {top["id"]: top["logprob"] for top in answer["completion_probabilities"][0]["top_logprobs"]}
    ranks = [likely.get(first_token(running, question, one), -1e9) for one in (question.answer, *question.wrong)]
    return {
        "right": right,
        "likeliest": ranks[0] > max(ranks[1:]),
        "said": said[:40],
        "prompt_ms": answer["timings"]["prompt_ms"],
    }


def _report(questions: list[Question], answers: dict[str, list[Json]], before: Json, as_json: bool) -> int:
    rows = []
    groups = {"all": lambda q: True} | {kind: (lambda q, kind=kind: q.kind == kind) for kind in dict.fromkeys(KINDS)}
    for low, high in ((0, 3000), (3000, 5000), (5000, 1 << 40)):
        groups[f"{low}+ tokens back"] = lambda q, low=low, high=high: low <= q.distance < high
    for mode, given_answers in answers.items():
        for group, belongs in groups.items():
            chosen = [answer for question, answer in zip(questions, given_answers, strict=True) if belongs(question)]
            for measure in ("right", "likeliest"):
                p, low, high = share(sum(answer[measure] for answer in chosen), len(chosen))
                rows.append({"mode": mode, "group": group, "measure": measure, "questions": len(chosen)})
                rows[-1] |= {"share": round(p, 4), "interval": [round(low, 4), round(high, 4)]}
    total = {row["mode"]: row for row in rows if row["group"] == "all" and row["measure"] == "right"}
    recovered = met = None
    if {"atlas", "window"} <= total.keys():
        met = total["atlas"]["interval"][0] > total["window"]["interval"][1]
    if len(total) == 3 and (gain := total["full"]["share"] - total["window"]["share"]) > 0:
        recovered = (total["atlas"]["share"] - total["window"]["share"]) / gain
    if as_json:
        details = [
            {"kind": q.kind, "start": q.start, "answer": q.answer, "distance": q.distance}
            | {mode: given_answers[number] for mode, given_answers in answers.items()}
            for number, q in enumerate(questions)
        ]
        result = {"benchmark": "atlas recall", "rows": rows, "recovered": recovered, "met": met, "questions": details}
        print(json.dumps(result | {"machine": {"before": before, "after": machine_state()}}, indent=2))
        return 1 if met is False else 0
    print_shares(rows, met)
    if recovered is not None:
        print(f"recovered of full over window: {recovered:.0%}")
    print_machine(before)
    return 1 if met is False else 0


def print_shares(rows: list[Json], met: bool | None) -> None:
    """Print a line for each share, and whether the memory's is above the window's."""
    for row in rows:
        low, high = row["interval"]
        print(
            f"{row['mode']:8}{row['group']:20}{row['measure']:10}{row['share']:7.1%}"
            f" [{low:.1%}, {high:.1%}] of {row['questions']}"
        )
    if met is not None:
        print(f"target, the memory's interval above the window's: {'met' if met else 'MISSED'}")


if __name__ == "__main__":
    run_main(main)
