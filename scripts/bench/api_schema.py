#!/usr/bin/env python3
"""Does schemathesis find a request that the management API answers otherwise than its OpenAPI document says?

It makes requests from the document, with its schemas and against them, to a real supervisor on a real model. Tests of
our own do that with the same document (`tests/test_openapi.py`); schemathesis knows more tricks, and lives in a virtual
environment of its own because of all that it needs. Exit code: 0 nothing found, 1 something, 2 it could not be run.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from pathlib import Path

from common import (
    REPOSITORY,
    BenchError,
    machine_state,
    model_file,
    parser,
    print_machine,
    run_main,
    server_of,
    supervisor,
)

REQUIREMENT = "schemathesis>=4.10,<5"

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
)

ENDLESS = "/models/sse"
"""Its answer does not end."""

SETTINGS = {"performance": {"context_size": 256, "parallel": 1}}
"""An answer without a limit ends with the context."""


def schemathesis() -> Path:
    """Return the command, installed once. Raises `BenchError`."""
    sys.path.insert(0, str(REPOSITORY))
    from supervisor.setup.files import cache_root

    folder = cache_root() / "schemathesis"
    command = folder / "bin" / "schemathesis"
    if not command.exists():
        print(f"installing {REQUIREMENT} into {folder}", file=sys.stderr)
        venv.create(folder, clear=True, with_pip=True)
        install = [folder / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if subprocess.run([*install, REQUIREMENT], check=False).returncode != 0:
            raise BenchError(f"{REQUIREMENT} cannot be installed")
    return command


def main() -> int:
    """Run it."""
    options = parser(__doc__)
    options.add_argument("--model", type=model_file, required=True, help="GGUF file")
    options.add_argument("--examples", type=int, default=50, help="most random requests for each operation")
    options.add_argument("--seed", type=int, default=1)
    given = options.parse_args()
    before, server = machine_state(), server_of(given)
    command = schemathesis()
    with supervisor({"a": given.model, "b": given.model}, server, SETTINGS) as running:
        arguments = [
            *("--phases", "examples,coverage,fuzzing", "--checks", ",".join(CHECKS), "--exclude-path", ENDLESS),
            *("--max-examples", str(given.examples), "--seed", str(given.seed), "--request-timeout", "60"),
            *("--continue-on-failure", "--no-color"),
        ]
        target = f"{running.url}/api/v1/openapi.json"
        found = subprocess.run([command, "run", target, *arguments], cwd=running.workspace.root, check=False).returncode
        question = {"model": "a", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        running.call("POST", "/v1/chat/completions", question)  # and it still answers
    print_machine(before)
    return found if found in (0, 1) else 2


if __name__ == "__main__":
    run_main(main)
