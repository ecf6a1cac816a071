"""Which API keys are there, and how are they kept?

A key holds 256 random bits, so nobody finds it by trying, however fast its hash is: one BLAKE2b with the file's own
salt is enough, where a password would need a slow hash. The file holds the hashes only.
"""

from __future__ import annotations

import base64
import fcntl
import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import msgspec
import platformdirs
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from supervisor.config import ApiSection
from supervisor.config_file import dotted, parse
from supervisor.errors import ConfigError
from supervisor.setup.files import write_atomic

Scope = Literal["infer", "manage", "admin"]
PriorityName = Literal["low", "normal", "high"]

PREFIX = "lsk-"
"""How every key begins, so that people and scanners for leaked secrets know one."""

SALT_BYTES = hashlib.blake2b.SALT_SIZE
DIGEST_BYTES = 32
MAX_BYTES = 4 << 20
"""Largest keys file; a key takes 0.4 KiB."""

OTHERS = stat.S_IWGRP | stat.S_IRWXO
"""What the file's mode must not allow: a group may read it (secrets that Kubernetes mounts), nobody else anything."""

Digest = Annotated[str, Field(pattern=rf"^[0-9a-f]{{{2 * DIGEST_BYTES}}}$")]
Id = Annotated[str, Field(pattern=r"^[a-z0-9]{1,32}$")]
Rate = Annotated[int, Field(ge=1, le=10**9)]
UnixTime = Annotated[int, Field(ge=0, le=253402300799)]  # the year 9999 ends


class Record(BaseModel):
    """A part of the keys file: unknown fields are refused, values are never coerced, nothing of it is printed."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, hide_input_in_errors=True)


class ApiKey(Record):
    """What is known of one key; not the key itself.

    `owner` names whose ATLAS sessions and conversations it reaches; a key made to follow another has its owner.
    `models` holds ids and aliases (None: all), `expires` is in seconds since 1970 (None: never). `priority` is what its
    requests have, and the most that they may ask for (None: normal).
    """

    id: Id
    owner: Id
    name: str = Field(pattern=r"^[A-Za-z0-9._@+-]{1,64}$")
    hash: Digest = Field(repr=False)
    scopes: list[Scope] = Field(min_length=1)
    models: list[str] | None = Field(None, min_length=1)
    requests_per_minute: Rate | None = None
    tokens_per_minute: Rate | None = None
    priority: PriorityName | None = None
    created: UnixTime
    expires: UnixTime | None = None

    def has(self, scope: Scope) -> bool:
        """Tell whether the key may do what needs `scope`; admin may do everything."""
        return scope in self.scopes or "admin" in self.scopes

    def public(self) -> dict[str, Any]:
        """Return what people may see."""
        return self.model_dump(exclude={"hash"})


class KeysFile(Record):
    """The content of a keys file."""

    version: Literal[1] = 1
    salt: str = Field(pattern=rf"^[0-9a-f]{{{2 * SALT_BYTES}}}$", repr=False)
    keys: list[ApiKey] = []

    @model_validator(mode="after")
    def _no_twins(self) -> Self:
        for field in ("id", "name", "hash"):
            values = [getattr(key, field) for key in self.keys]
            if len(values) != len(set(values)):
                raise ValueError(f"two keys have the same {field}")
        return self

    def find(self, name: str) -> ApiKey | None:
        """Return the key with that name or id."""
        named = [key for key in self.keys if key.name == name]
        return next(iter(named or [key for key in self.keys if key.id == name]), None)

    def digest(self, secret: str) -> str:
        """Return the hash of a key, in hex, as this file keeps it."""
        return digest(bytes.fromhex(self.salt), secret).hex()


class KeysFileError(ConfigError):
    """The keys file cannot be used; `problems` say why."""


def digest(salt: bytes, secret: str) -> bytes:
    """Return the salted hash of a key."""
    return hashlib.blake2b(secret.encode("utf-8", "surrogateescape"), digest_size=DIGEST_BYTES, salt=salt).digest()


def new_secret() -> str:
    """Return a new key."""
    return PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(32)).decode().rstrip("=")


def new_id(taken: KeysFile) -> str:
    """Return an id that no key has and no owner had."""
    used = {name for key in taken.keys for name in (key.id, key.owner)}
    return next(name for name in iter(lambda: secrets.token_hex(8), "") if name not in used)


def path_of(api: ApiSection) -> Path:
    """Return where the keys are, or would be."""
    return api.keys_file or platformdirs.user_config_path("llama-supervisor", appauthor=False) / "keys.json"


def required(api: ApiSection, *, there: bool) -> bool:
    """Tell whether requests need a key; `there`: whether the keys file is."""
    if api.require_keys is not None:
        return api.require_keys
    return api.keys_file is not None or there


def load(path: Path) -> KeysFile | None:
    """Return what the file holds; None when there is no file. Raises `KeysFileError`."""
    try:
        text = _text(path)
        data, problems = parse(text)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise KeysFileError([f"{path}: cannot be read: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise KeysFileError([f"{path}: not UTF-8 text at byte {error.start + 1}"]) from None
    except json.JSONDecodeError as error:
        raise KeysFileError([f"{path}:{error.lineno}:{error.colno}: {error.msg}"]) from None
    except RecursionError:
        raise KeysFileError([f"{path}: nested too deeply"]) from None
    if problems:
        raise KeysFileError([f"{path}: {problem}" for problem in problems])
    try:
        return KeysFile.model_validate(data)
    except ValidationError as error:
        raise KeysFileError([_explained(path, dict(item)) for item in error.errors(include_url=False)[:20]]) from None


def _text(path: Path) -> str:
    """Return the file's text, if it is a file that may decide who gets in."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:  # what is looked at is what is read
        if problem := _unsafe(os.fstat(descriptor)):
            raise KeysFileError([f"{path}: {problem}"])
        raw = file.read(MAX_BYTES + 1)
    if len(raw) > MAX_BYTES:
        raise KeysFileError([f"{path}: larger than {MAX_BYTES >> 20} MiB"])
    return raw.decode("utf-8")


def _unsafe(status: os.stat_result) -> str | None:
    if not stat.S_ISREG(status.st_mode):
        return "is not a regular file"
    if status.st_uid not in (os.geteuid(), 0):
        return "belongs to another user; it must belong to the user that runs the supervisor, or to root"
    if status.st_mode & OTHERS:
        return f"its mode {stat.S_IMODE(status.st_mode):04o} lets others at it; chmod 600 corrects that"
    return None


def _explained(path: Path, item: dict[str, Any]) -> str:
    """Return a mistake as a line; the values in the file are nobody's business."""
    place = dotted(tuple(item["loc"]))
    message = "unknown field" if item["type"] == "extra_forbidden" else str(item["msg"]).removeprefix("Value error, ")
    return f"{path}: {f'{place}: ' if place else ''}{message[:1].lower()}{message[1:]}"


@contextmanager
def locked(path: Path) -> Iterator[KeysFile]:
    """Yield what the file holds, or an empty one with a new salt; until the end nobody else may change it.

    The file's folder is made if need be. Raises `KeysFileError` and `OSError`.
    """
    folder = path.resolve().parent
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield load(path) or KeysFile(salt=secrets.token_hex(SALT_BYTES))
    finally:
        os.close(lock)


def save(path: Path, file: KeysFile, keys: list[ApiKey]) -> None:
    """Write `file` with other keys: whole or not at all, with mode 0600. Raises `OSError`."""
    changed = KeysFile(salt=file.salt, keys=keys)
    content = msgspec.json.format(changed.model_dump_json(exclude_none=True).encode(), indent=2)
    write_atomic(path.resolve(), content + b"\n", mode=0o600)
