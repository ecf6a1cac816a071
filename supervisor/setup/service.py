"""What does a systemd unit for the supervisor look like, and where does it go?

The unit of the system keeps the file system out of reach but for what the supervisor writes; that of a user has only
what needs no rights. Neither takes devices away, for a GPU is one.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from supervisor.settings import Settings

SYSTEM_FOLDER: Final = Path("/etc/systemd/system")

STOP_MARGIN: Final = 15
"""Seconds that the unit gives beyond what draining, saving and stopping may take."""

_PLAIN: Final = {
    "NoNewPrivileges": "yes",
    "UMask": "0077",
    "LockPersonality": "yes",
    "RestrictRealtime": "yes",
    "RestrictSUIDSGID": "yes",
    "RestrictAddressFamilies": "AF_UNIX AF_INET AF_INET6 AF_NETLINK",
    "SystemCallArchitectures": "native",
}
_SYSTEM: Final = {
    "CapabilityBoundingSet": "",
    "PrivateTmp": "yes",
    "ProtectSystem": "strict",
    "ProtectHome": "read-only",
    "ProtectControlGroups": "yes",
    "ProtectHostname": "yes",
    "ProtectKernelLogs": "yes",
    "ProtectKernelModules": "yes",
    "ProtectKernelTunables": "yes",
    "RestrictNamespaces": "yes",
}


@dataclass(frozen=True)
class Service:
    """A unit to be made. `run_as` is the user of a system's unit; None: a unit of the user who calls."""

    name: str
    settings: Settings
    run_as: str | None

    @property
    def path(self) -> Path:
        """Where its file goes."""
        return (SYSTEM_FOLDER if self.run_as else user_folder()) / f"{self.name}.service"

    @property
    def next_steps(self) -> list[str]:
        """The commands that take it into use."""
        manager = "systemctl" if self.run_as else "systemctl --user"
        steps = [f"{manager} daemon-reload", f"{manager} enable --now {self.name}"]
        return steps if self.run_as else [*steps, "loginctl enable-linger  # to run without a login"]

    def text(self) -> str:
        """Return the unit file."""
        sections = {
            "Unit": {
                "Description": "llama-supervisor: local models at one OpenAI-compatible address",
                "After": "network-online.target" if self.run_as else "",
                "Wants": "network-online.target" if self.run_as else "",
                "StartLimitIntervalSec": "300",
                "StartLimitBurst": "10",
            },
            "Service": self._service() | _PLAIN | (self._system() if self.run_as else {}),
            "Install": {"WantedBy": "multi-user.target" if self.run_as else "default.target"},
        }
        parts = []
        for title, lines in sections.items():
            kept = [f"{key}={value}" for key, value in lines.items() if value or key == "CapabilityBoundingSet"]
            parts.append("\n".join([f"[{title}]", *kept]))
        return "\n\n".join(parts) + "\n"

    def _service(self) -> dict[str, str]:
        config = self.settings.config
        command = [sys.executable, "-m", "supervisor", "start"]
        if self.settings.path is not None:
            command += ["--config", str(self.settings.path)]
        stop = config.server.drain_seconds + config.server.stop_seconds + config.atlas.save_seconds + STOP_MARGIN
        return {
            "Type": "notify",
            "NotifyAccess": "main",
            "ExecStart": " ".join(map(quoted, command)),
            "ExecReload": "/bin/kill -HUP $MAINPID",
            "WorkingDirectory": escaped(str(self.settings.base)),
            "Restart": "on-failure",
            "RestartSec": "2",
            "RestartPreventExitStatus": "2 78",  # a wrong command line or configuration stays wrong
            "WatchdogSec": "60",
            "TimeoutStartSec": "180",  # what a killed supervisor left may still save its memory
            "TimeoutStopSec": f"{stop:.0f}",
            "KillMode": "mixed",  # the children are the supervisor's to stop
            "OOMPolicy": "continue",  # the kernel may kill a child; the supervisor starts it again
            "LimitNOFILE": "65536",
        }

    def _system(self) -> dict[str, str]:
        config = self.settings.config
        written = [config.server.runtime_dir, config.logging.directory, config.atlas.memory_directory]
        written.append(config.models.slot_cache_directory)
        own = "" if config.server.runtime_dir else " LLAMA_SUPERVISOR_SERVER__RUNTIME_DIR=%t/llama-supervisor"
        return {
            "User": escaped(self.run_as or ""),
            "StateDirectory": "llama-supervisor",
            "StateDirectoryMode": "0700",
            "RuntimeDirectory": "" if config.server.runtime_dir else "llama-supervisor",
            "RuntimeDirectoryMode": "0700",
            "Environment": f"XDG_STATE_HOME=%S{own}",
            **_SYSTEM,
            "ReadWritePaths": " ".join(quoted(f"-{path}") for path in written if path is not None),
        }


def user_folder() -> Path:
    """Return the folder of the user's own units."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "systemd" / "user"


def escaped(text: str) -> str:
    """Return `text` so that systemd finds no specifier in it."""
    return text.replace("%", "%%")


def quoted(word: str) -> str:
    """Return one word of a command line or a list, as systemd.service(5) has it."""
    word = escaped(word).replace("\\", "\\\\").replace('"', '\\"').replace("$", "$$")
    return f'"{word}"' if not word or any(letter in word for letter in " \t;'\\\"") else word
