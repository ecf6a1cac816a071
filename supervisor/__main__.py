"""`python -m supervisor` is `llama-supervisor`."""

from supervisor.cli import main

main()
