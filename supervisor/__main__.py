"""`python -m supervisor` is `llama-supervisor`."""

from supervisor.cli import main

try:
    main()
finally:
    # A Ctrl-C inside code from a string (the body of a dataclass while a library is imported, say) makes CPython
    # (3.11 at least) end a module's process by SIGINT, whatever caught it. The next such code takes that back.
    exec("")  # noqa: S102 (a constant)
