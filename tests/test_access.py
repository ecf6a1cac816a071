"""Which keys are good, as their file changes and time goes on."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from multidict import CIMultiDict

from supervisor import api_keys
from supervisor.access import Access, Caller, secret_in
from supervisor.api_keys import ApiKey, KeysFile, KeysFileError
from supervisor.config import ApiSection
from supervisor.errors import InvalidApiKey, MissingScope, RateLimited


class World:
    """A keys file, and the clocks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.wall = 1_000_000.0
        self.now = 50.0
        self.secrets: dict[str, str] = {}

    def access(self, **settings: object) -> Access:
        api = ApiSection.model_validate({"keys_file": self.path} | settings)
        return Access(api, lambda: self.wall, lambda: self.now)

    def put(self, name: str, **more: object) -> str:
        """Add a key, or change it; return the secret."""
        with api_keys.locked(self.path) as file:
            secret = self.secrets.setdefault(name, api_keys.new_secret())
            values = {"id": name, "owner": name, "name": name, "hash": file.digest(secret), "scopes": ["infer"]}
            key = ApiKey.model_validate(values | {"created": 0} | more)
            api_keys.save(self.path, file, [*(one for one in file.keys if one.name != name), key])
        return secret

    def drop(self, name: str) -> None:
        with api_keys.locked(self.path) as file:
            api_keys.save(self.path, file, [one for one in file.keys if one.name != name])

    def write(self, text: str) -> None:
        self.path.write_text(text)
        self.path.chmod(0o600)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "keys.json")


def bearer(secret: str) -> CIMultiDict[str]:
    return CIMultiDict({"Authorization": f"Bearer {secret}"})


def good(access: Access, secret: str) -> bool:
    try:
        access.identify(bearer(secret))
    except InvalidApiKey:
        return False
    return True


@pytest.mark.parametrize(
    ("headers", "secret"),
    [
        ([], None),
        ([("Authorization", "Bearer lsk-a")], "lsk-a"),
        ([("authorization", "bearer   lsk-a ")], "lsk-a"),
        ([("X-Api-Key", "lsk-a")], "lsk-a"),
        ([("x-api-key", "other"), ("Authorization", "Bearer lsk-a")], "lsk-a"),
        ([("Authorization", "Basic abc"), ("x-api-key", "lsk-a")], "lsk-a"),
        ([("Authorization", "Bearer "), ("x-api-key", "lsk-a")], "lsk-a"),
        ([("Authorization", "lsk-a")], None),
        ([("Authorization", "Basic lsk-a")], None),
        ([("x-api-key", "  ")], None),
    ],
)
def test_where_a_key_is(headers, secret):
    assert secret_in(CIMultiDict(headers)) == secret


def test_only_the_whole_key_is_good(world):
    secret, access = world.put("a"), world.access()
    access.start()
    assert access.identify(bearer(secret)).key.name == "a"
    stored = api_keys.load(world.path).keys[0].hash
    for wrong in (secret[:-1], secret + "x", secret.lower(), secret[4:], stored, "", "lsk-", "\udcff", "x" * 70_000):
        assert not good(access, wrong)


def test_two_keys_with_the_same_beginning_of_their_hash(world):
    secret, access = world.put("a"), world.access()
    file = api_keys.load(world.path)
    hash_ = file.keys[0].hash
    api_keys.save(
        world.path,
        file,
        [file.keys[0].model_copy(update={"hash": hash_[:-1] + "0123456789abcdef0"[int(hash_[-1], 16) + 1]})],
    )
    access.start()
    assert not good(access, secret)


def test_a_key_expires_by_the_wall_clock(world):
    secret, access = world.put("a", expires=1_000_060), world.access()
    access.start()
    assert good(access, secret)
    world.wall += 59.5
    assert good(access, secret)
    world.wall += 0.5
    with pytest.raises(InvalidApiKey, match="'a' expired at 1970-01-12"):
        access.identify(bearer(secret))


# The file


async def test_keys_come_and_go_while_it_runs(world):
    first, access = world.put("a"), world.access()
    access.start()
    second = world.put("b")
    assert not good(access, second)
    await access.look()
    assert good(access, first)
    assert good(access, second)
    world.drop("a")
    await access.look()
    assert not good(access, first)
    assert good(access, second)
    world.drop("b")
    await access.look()
    assert access.on
    assert not good(access, second)


async def test_it_looks_by_itself(world, monkeypatch):
    monkeypatch.setattr("supervisor.access.POLL_SECONDS", 0.01)
    access = world.access()
    access.start()
    access.follow()
    try:
        secret = world.put("a")
        for _ in range(500):
            await asyncio.sleep(0.01)
            if good(access, secret):
                break
        assert good(access, secret)
    finally:
        await access.stop()


async def test_a_file_that_turns_bad_changes_nothing_until_it_is_good_again(world, caplog):
    secret, access = world.put("a"), world.access()
    access.start()
    content = world.path.read_text()
    for bad in ("", "{", content.replace('"a"', '"A B"'), "[]"):
        world.write(bad)
        caplog.clear()
        await access.look()
        assert good(access, secret)
        assert [record.levelno for record in caplog.records] == [logging.ERROR] * len(caplog.records) != []
        assert str(world.path) in caplog.text
        caplog.clear()
        await access.look()
        assert not caplog.records
    world.write(content)
    world.path.chmod(0o666)
    await access.look()
    assert "chmod 600" in caplog.text
    assert good(access, secret)
    world.path.chmod(0o600)
    world.drop("a")
    await access.look()
    assert not good(access, secret)


async def test_a_file_that_goes_away_takes_the_keys_with_it(world):
    secret, access = world.put("a"), world.access()
    access.start()
    gone = world.path.rename(world.path.with_name("gone"))
    await access.look()
    assert access.on
    assert not good(access, secret)
    gone.rename(world.path)
    await access.look()
    assert good(access, secret)


@pytest.mark.parametrize("content", ["", "{", '{"salt": 1}', "null"])
async def test_a_bad_file_never_opens_the_server(world, monkeypatch, content):
    monkeypatch.setattr(api_keys, "path_of", lambda api: world.path)
    access = world.access(keys_file=None)
    access.start()
    assert not access.on
    world.write(content)
    await access.look()
    assert access.on
    assert not good(access, "")
    with pytest.raises(KeysFileError):
        world.access(keys_file=None).start()
    with pytest.raises(KeysFileError):
        world.access().start()
    secret = api_keys.new_secret()
    assert not good(access, secret)
    world.path.unlink()
    await access.look()
    assert access.on


@pytest.mark.parametrize(
    ("settings", "file", "on"),
    [
        ({}, "none", True),
        ({}, "empty", True),
        ({}, "one", True),
        ({"keys_file": None}, "none", False),
        ({"keys_file": None}, "empty", True),
        ({"keys_file": None}, "one", True),
        ({"keys_file": None, "require_keys": True}, "none", True),
        ({"require_keys": False}, "one", False),
    ],
)
async def test_when_keys_are_required(world, monkeypatch, settings, file, on):
    monkeypatch.setattr(api_keys, "path_of", lambda api: world.path)
    if file == "one":
        world.put("a")
    elif file == "empty":
        api_keys.save(world.path, KeysFile(salt="00" * 16), [])
    access = world.access(**settings)
    access.start()
    assert access.on is on
    world.put("b")
    await access.look()
    assert access.on is (settings.get("require_keys") is not False)


def test_where_the_keys_are_by_default(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert api_keys.path_of(ApiSection()).name == "keys.json"
    assert api_keys.path_of(ApiSection()).parent.name == "llama-supervisor"
    assert api_keys.path_of(ApiSection(keys_file=tmp_path / "k")) == tmp_path / "k"


def test_the_warning_at_the_start(world, monkeypatch):
    monkeypatch.setattr(api_keys, "path_of", lambda api: world.path)
    off = world.access(keys_file=None)
    assert off.warning(loopback=True) is None
    assert "whoever reaches this address may use it" in (off.warning(loopback=False) or "")
    assert "no API key is valid yet" in (world.access().warning(loopback=True) or "")
    world.put("a")
    assert "not required, though" in (world.access(require_keys=False).warning(loopback=True) or "")
    access = world.access()
    access.start()
    assert access.warning(loopback=False) is None


# Rates


def limited(name: str = "a", **limits: int) -> ApiKey:
    values = {"id": name, "owner": name, "name": name, "hash": "0" * 64, "scopes": ["infer"], "created": 0}
    return ApiKey.model_validate(values | limits)


def test_requests_per_minute(world):
    caller = Caller(limited(requests_per_minute=3), lambda: world.now)
    for _ in range(3):
        caller.begin()
    with pytest.raises(RateLimited, match="its 3 requests a minute") as caught:
        caller.begin()
    assert caught.value.retry_after == pytest.approx(20)
    world.now += 20
    caller.begin()
    with pytest.raises(RateLimited):
        caller.begin()


def test_tokens_are_charged_after_and_debts_refused(world):
    caller = Caller(limited(tokens_per_minute=60, requests_per_minute=2), lambda: world.now)
    assert caller.counts_tokens
    caller.begin()
    caller.charge(100)
    for _ in range(3):  # these do not count as requests
        with pytest.raises(RateLimited, match="its 60 tokens a minute") as caught:
            caller.begin()
    assert caught.value.retry_after == pytest.approx(41)
    world.now += 41
    caller.begin()


def test_without_limits_nothing_is_counted(world):
    caller = Caller(limited(), lambda: world.now)
    assert not caller.counts_tokens
    for _ in range(1000):
        caller.begin()
        caller.charge(10**6)


async def test_what_a_key_has_used_survives_a_change_of_the_file(world):
    secret, access = world.put("a", requests_per_minute=2, tokens_per_minute=10), world.access()
    access.start()
    caller = access.identify(bearer(secret))
    caller.begin()
    caller.begin()
    world.put("b")
    await access.look()
    with pytest.raises(RateLimited):
        access.identify(bearer(secret)).begin()
    caller.charge(1000)  # an answer that began before
    world.put("a", requests_per_minute=5, tokens_per_minute=10)
    await access.look()
    with pytest.raises(RateLimited, match="10 tokens"):
        access.identify(bearer(secret)).begin()
    world.put("a", requests_per_minute=5)
    await access.look()
    for _ in range(3):
        access.identify(bearer(secret)).begin()
    with pytest.raises(RateLimited, match="5 requests"):
        access.identify(bearer(secret)).begin()


@pytest.mark.parametrize(
    ("scopes", "has"),
    [(["infer"], {"infer"}), (["manage"], {"manage"}), (["admin"], {"infer", "manage", "admin"})],
)
def test_scopes(scopes, has):
    caller = Caller(limited().model_copy(update={"scopes": scopes}), lambda: 0)
    for scope in ("infer", "manage", "admin"):
        if scope in has:
            caller.need(scope)
        else:
            with pytest.raises(MissingScope, match=f"lacks the scope '{scope}'"):
                caller.need(scope)
