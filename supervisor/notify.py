"""How does systemd learn how the supervisor does? The protocol of sd_notify(3): lines of text in a datagram.

Without systemd, that is without NOTIFY_SOCKET in the environment, nothing is sent.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import MutableMapping
from typing import Final

log = logging.getLogger(__name__)

STATUS_SECONDS: Final = 10.0
"""Pause between two reports where no watchdog asks for more."""

ROOM_SECONDS: Final = 2.0
"""How long a change of state waits while the manager's queue is full; reports come again and do not wait."""


class Notifier:
    """Tells the service manager, if there is one. Its variables are taken out of the environment: no child needs them.

    `pause` is how many seconds may pass between two calls of `alive`.
    """

    def __init__(self, environ: MutableMapping[str, str] = os.environ) -> None:
        address = environ.pop("NOTIFY_SOCKET", "")
        microseconds, pid = environ.pop("WATCHDOG_USEC", ""), environ.pop("WATCHDOG_PID", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._watched = microseconds.isdecimal() and pid in ("", str(os.getpid()))
        self.pause = min(STATUS_SECONDS, int(microseconds) / 1e6 / 3) if self._watched else STATUS_SECONDS

    @property
    def is_on(self) -> bool:
        """Whether somebody listens."""
        return bool(self._address)

    def ready(self, status: str) -> None:
        """The start, or a reload, is done."""
        self._send("READY=1", f"STATUS={status}", wait=ROOM_SECONDS)

    def reloading(self) -> None:
        """A reload begins; `ready` ends it."""
        self._send(
            "RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}", "STATUS=reloading", wait=ROOM_SECONDS
        )

    def alive(self, status: str) -> None:
        """All is well."""
        self._send(*(["WATCHDOG=1"] if self._watched else []), f"STATUS={status}")

    def ill(self, status: str) -> None:
        """Something is wrong; the watchdog hears nothing, and restarts us if that lasts."""
        self._send(f"STATUS={status}")

    def stopping(self, status: str) -> None:
        """The end begins."""
        self._send("STOPPING=1", f"STATUS={status}", wait=ROOM_SECONDS)

    def _send(self, *lines: str, wait: float = 0) -> None:
        if not self._address:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(wait)
                sender.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            log.warning("systemd cannot be told %s: %s", lines[0], error.strerror or error)
