"""What do libraries load that a server never uses? `start` stays in memory, and leaves it out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

NOT_NEEDED: Final = {
    # aiohttp makes a client's TLS context when it is imported, with all authorities that the system knows: 2 MiB
    "SSL_CERT_FILE": os.devnull,
    "SSL_CERT_DIR": os.devnull,
    # of all extensions only this one needs the C++ library, 1 MiB; its lists are those of an application's middlewares
    "FROZENLIST_NO_EXTENSIONS": "1",
}
"""Variables that libraries look at while they are imported."""


@contextmanager
def imports() -> Iterator[None]:
    """Set `NOT_NEEDED` for the imports within; what people set themselves comes back afterwards.

    A process that imported aiohttp here cannot be a client of HTTPS with aiohttp's defaults: it trusts nobody.
    """
    before = {name: os.environ.get(name) for name in NOT_NEEDED}
    os.environ |= NOT_NEEDED
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
