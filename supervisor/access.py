"""Who asks, and may they? The keys in force, what each has used, and the file that they come from."""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Final

from aiohttp import web

from supervisor import api_keys
from supervisor.api_keys import ApiKey, KeysFile, KeysFileError, Scope
from supervisor.config import ApiSection
from supervisor.errors import InvalidApiKey, MissingScope, ModelNotAllowed, RateLimited
from supervisor.followed_file import Follower, Signature, signature
from supervisor.models.catalog import Model
from supervisor.rate import Bucket

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0
"""How often to look whether the keys file changed."""

LONGEST = 256
"""Longest key in characters; ours have 47."""

OWNER_HEADER: Final = "X-Atlas-Owner"
"""Tells a child whose ATLAS sessions a request may reach. Only the supervisor may send it."""

CREDENTIALS: Final = frozenset(("authorization", "x-api-key"))
"""Headers that may hold a key."""


class Caller:
    """One key in force, and what it has used of its rates."""

    __slots__ = ("_clock", "_requests", "_tokens", "digest", "key")

    def __init__(self, key: ApiKey, clock: Callable[[], float], before: Caller | None = None) -> None:
        self.key = key
        self.digest = bytes.fromhex(key.hash)
        self._clock = clock
        self._requests: Bucket | None = _bucket(key.requests_per_minute, before._requests if before else None, clock())
        self._tokens: Bucket | None = _bucket(key.tokens_per_minute, before._tokens if before else None, clock())

    @property
    def owner(self) -> str:
        """Whose ATLAS sessions and conversations this key reaches."""
        return self.key.owner

    @property
    def counts_tokens(self) -> bool:
        """Whether somebody has to count the tokens of this key's answers."""
        return self._tokens is not None

    def need(self, scope: Scope) -> None:
        """Raise `MissingScope` unless the key has `scope`."""
        if not self.key.has(scope):
            raise MissingScope(f"the API key {self.key.name!r} lacks the scope {scope!r} that this needs")

    def may_use(self, model: Model) -> bool:
        """Tell whether the key may use `model`, which its list names by id or alias."""
        allowed = self.key.models
        return allowed is None or model.id in allowed or not set(allowed).isdisjoint(model.aliases)

    def begin(self) -> None:
        """Count a request. Raises `RateLimited`, and then it does not count."""
        now = self._clock()
        for bucket, unit in ((self._tokens, "tokens"), (self._requests, "requests")):
            if bucket is not None and (wait := bucket.wait(now)) > 0:
                raise RateLimited(
                    f"the API key {self.key.name!r} has used up its {bucket.per_minute} {unit} a minute",
                    retry_after=wait,
                )
        if self._requests is not None:
            self._requests.take(1, now)

    def charge(self, tokens: int) -> None:
        """Count the tokens of an answer; the next requests wait until they are paid."""
        if self._tokens is not None:
            self._tokens.take(tokens, self._clock())


def _bucket(per_minute: int | None, before: Bucket | None, now: float) -> Bucket | None:
    if per_minute is None or before is None:
        return Bucket(per_minute, now) if per_minute is not None else None
    if before.per_minute != per_minute:
        before.resize(per_minute, now)
    return before


_CALLER: Final = web.RequestKey("caller", Caller)


class Access:
    """Whether keys are required, and which are good.

    `on` never turns false while the supervisor runs. A keys file that turns bad changes nothing, one that goes away
    takes all keys with it, and where there was none before, even a bad one makes keys required. `problems` says what is
    wrong with it now.
    """

    def __init__(
        self, api: ApiSection, wall: Callable[[], float] = time.time, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.path = api_keys.path_of(api)
        self.open_models = api.open_models
        self.on = api_keys.required(api, there=False)
        self.problems: list[str] = []
        self._off_for_good = api.require_keys is False
        self._wall = wall
        self._clock = clock
        self._salt = b""
        self._callers: dict[bytes, Caller] = {}
        self._seen: Signature | None = None
        self._follower = Follower([self.path], self.look)

    # Requests

    def identify(self, headers: Mapping[str, str]) -> Caller:
        """Return who sends these headers. Raises `InvalidApiKey`.

        The hash is looked up by a prefix, and only then compared, in constant time. The time of the look-up tells
        nothing of use: without the salt nobody can choose a hash.
        """
        secret = secret_in(headers)
        if secret is None:
            raise InvalidApiKey("this needs an API key: send the header 'Authorization: Bearer <key>'")
        digest = api_keys.digest(self._salt, secret[:LONGEST])
        caller = self._callers.get(digest[:8])
        if caller is None or not hmac.compare_digest(caller.digest, digest):
            raise InvalidApiKey("the API key is not valid")
        expires = caller.key.expires
        if expires is not None and self._wall() >= expires:
            raise InvalidApiKey(f"the API key {caller.key.name!r} expired at {datetime.fromtimestamp(expires, UTC)}")
        return caller

    # The file

    def start(self) -> None:
        """Read the keys. Raises `KeysFileError` when the file is bad, for then nobody may start."""
        if self._off_for_good:
            return
        self._seen = signature(self.path)
        self._take_over(api_keys.load(self.path))

    def follow(self) -> None:
        """From now on take over what changes in the file, until `stop`."""
        if not self._off_for_good:
            self._follower.start(POLL_SECONDS)

    async def stop(self) -> None:
        """Look at the file no more."""
        await self._follower.stop()

    async def look(self) -> None:
        """Take over the file if it changed. A bad one is logged."""
        if self._off_for_good:
            return
        try:
            now = await asyncio.to_thread(signature, self.path)
            if now == self._seen:
                return
            self._seen = now
            self._take_over(await asyncio.to_thread(api_keys.load, self.path))
        except KeysFileError as error:
            state = f"the {len(self._callers)} API keys from before stay in force" if self.on else "no API key is valid"
            self.on = True
            self.problems = error.problems
            for problem in error.problems:
                log.error("%s", problem)
            log.error("the keys file is bad: %s", state)

    def _take_over(self, file: KeysFile | None) -> None:
        self.problems = []
        if file is None:
            if self._callers:
                self.problems = [f"{self.path} is gone: no API key is valid until it is back"]
                log.warning("%s", self.problems[0])
            self._callers = {}
            return
        before = {caller.key.id: caller for caller in self._callers.values()}
        callers = (Caller(key, self._clock, before.get(key.id)) for key in file.keys)
        self._callers = {caller.digest[:8]: caller for caller in callers}
        self._salt = bytes.fromhex(file.salt)
        self.on = True
        log.info("API keys are required; %d in force, from %s", len(self._callers), self.path)

    def warning(self, loopback: bool) -> str | None:
        """Return what a person should know about this at the start, or None."""
        if self.on:
            return None if self._callers else "no API key is valid yet: `llama-supervisor key add` makes one"
        if self._off_for_good and self.path.exists():
            return f"API keys are not required, though {self.path} is there: api.require_keys is false"
        if not loopback:
            return "whoever reaches this address may use it: `llama-supervisor key add` makes API keys required"
        return None


def secret_in(headers: Mapping[str, str]) -> str | None:
    """Return the key in a request's headers: OpenAI's `Authorization: Bearer`, else Anthropic's `x-api-key`."""
    scheme, _, secret = headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not secret.strip():
        secret = headers.get("x-api-key", "")
    return secret.strip() or None


def caller_of(request: web.Request) -> Caller | None:
    """Return who sent a request; None when keys are not required, or it needs none."""
    return request.get(_CALLER)


def set_caller(request: web.Request, caller: Caller) -> None:
    """Note who sent a request."""
    request[_CALLER] = caller


def permit(request: web.Request, model: Model) -> None:
    """Raise `ModelNotAllowed` when the request's key may not use `model`."""
    caller = caller_of(request)
    if caller is not None and not caller.may_use(model):
        raise ModelNotAllowed(f"the API key {caller.key.name!r} may not use the model {model.id!r}", param="model")
