"""A scripted llama-atlas-eval: speaks its contract; FAKE_EVAL says how it misbehaves."""

import itertools
import json
import os
import sys
import time
from pathlib import Path

args = sys.argv[1:]
fault = os.environ.get("FAKE_EVAL", "")
tests = [(value, "text") for flag, value in itertools.pairwise(args) if flag == "--text"]
tests += [(value, "copy") for flag, value in itertools.pairwise(args) if flag == "--copy"]
modes = args[args.index("--modes") + 1].split(",")
NLL = {"full": 2.0, "window": 2.4, "atlas": 2.1, "shuffled": 2.5}


def tell(event: str, **more: object) -> None:
    print(json.dumps({"event": event, **more}), flush=True)


print("loading the model", file=sys.stderr)
if fault == "error":
    tell("error", message="this model cannot shift its cache")
    sys.exit(1)
tell("config", model="m", arch="llama", args=args)
for test, kind in tests:
    for mode in modes:
        tell("progress", test=test, mode=mode, done=512, total=1024)
        if fault == "crash":
            print("assertion failed", file=sys.stderr)
            os.abort()
        if fault == "garbage":
            print("not JSON", flush=True)
        if fault == "hang":
            Path(os.environ["FAKE_EVAL_PID"]).write_text(str(os.getpid()))
            time.sleep(60)
        points = [[i * 64, NLL[mode] + 1 / (i + 1)] for i in range(16)]
        tell("result", test=test, kind=kind, mode=mode, nll=NLL[mode], n_tokens=1024, by_position=points, stats={})
