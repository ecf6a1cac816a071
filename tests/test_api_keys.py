"""The keys file and the commands that change it."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from pathlib import Path

import pytest
from fake_supervisor import as_json, run, start_process
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supervisor import api_keys
from supervisor.api_keys import ApiKey, KeysFile, KeysFileError


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the commands keep the keys."""
    file = tmp_path / "folder" / "keys.json"
    monkeypatch.setenv("LLAMA_SUPERVISOR_API__KEYS_FILE", str(file))
    monkeypatch.chdir(tmp_path)
    return file


def stored(path: Path) -> KeysFile:
    file = api_keys.load(path)
    assert file is not None
    return file


def problems(path: Path) -> str:
    with pytest.raises(KeysFileError) as caught:
        api_keys.load(path)
    return "\n".join(caught.value.problems)


def key_of(n: int, **more: object) -> ApiKey:
    values = {"id": f"k{n}", "owner": f"k{n}", "name": f"name{n}", "hash": f"{n:064x}", "scopes": ["infer"]}
    return ApiKey.model_validate(values | {"created": n} | more)


# The commands


def test_a_key_is_shown_once_and_kept_as_a_hash(path):
    result = run("key", "add", "laptop")
    assert result.exit_code == 0
    secret = result.stdout.strip()
    assert secret.startswith("lsk-")
    assert len(secret) == 47
    assert "Authorization: Bearer" in result.stderr
    assert secret not in result.stderr
    text = path.read_text()
    assert secret not in text
    assert secret.removeprefix("lsk-") not in text
    assert stored(path).keys[0].hash == stored(path).digest(secret)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [one.name for one in path.parent.iterdir()] == ["keys.json"]
    for command in (("key", "list"), ("key", "list", "--json"), ("config", "show", "--json")):
        shown = run(*command).stdout
        assert secret not in shown
        assert stored(path).keys[0].hash not in shown


def test_the_same_key_has_another_hash_in_another_file(path, tmp_path):
    run("key", "add", "one")
    other = KeysFile(salt="00" * api_keys.SALT_BYTES)
    assert stored(path).digest("lsk-x") == stored(path).digest("lsk-x") != other.digest("lsk-x")


def test_what_a_key_may_do(path):
    before = int(time.time())
    options = ["--scope", "infer", "--scope", "manage", "--model", "a", "--model", "b", "--expires", "90d"]
    made = as_json(run("key", "add", "ci", *options, "--requests-per-minute", "60", "--json"))
    assert made["scopes"] == ["infer", "manage"]
    assert made["models"] == ["a", "b"]
    assert made["requests_per_minute"] == 60
    assert made["tokens_per_minute"] is None
    assert made["owner"] == made["id"]
    assert 90 * 86400 <= made["expires"] - before < 90 * 86400 + 60
    assert "hash" not in made
    [listed] = as_json(run("key", "list", "--json"))["keys"]
    assert listed == {name: value for name, value in made.items() if name not in ("key", "file")}
    assert "ci    " in run("key", "list").stdout


def test_a_key_like_another_has_its_sessions_and_limits_but_not_its_expiry(path):
    old = as_json(run("key", "add", "old", "--model", "a", "--tokens-per-minute", "9", "--expires", "1d", "--json"))
    new = as_json(run("key", "add", "new", "--like", "old", "--tokens-per-minute", "5", "--json"))
    assert new["owner"] == old["owner"] == old["id"] != new["id"]
    assert (new["models"], new["tokens_per_minute"], new["expires"]) == (["a"], 5, None)
    assert run("key", "revoke", "old").exit_code == 0
    newest = as_json(run("key", "add", "newest", "--like", new["id"], "--json"))
    assert newest["owner"] == old["owner"]


def test_revoke_by_name_and_by_id_and_nothing_is_left(path):
    run("key", "add", "a")
    other = as_json(run("key", "add", "b", "--json"))["id"]
    assert run("key", "revoke", "a").exit_code == 0
    assert [key.name for key in stored(path).keys] == ["b"]
    result = run("key", "revoke", other)
    assert "requests still need one" in result.stdout
    assert stored(path).keys == []
    assert run("key", "list").stdout == f"No keys in {path}.\n"


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["key", "add", "taken"], 1, "there is a key 'taken' already"),
        (["key", "add", "a b"], 2, "a name has 1 to 64"),
        (["key", "add", "x" * 65], 2, "a name has 1 to 64"),
        (["key", "add", "new", "--like", "nobody"], 1, "there is no key 'nobody'; there are: taken"),
        (["key", "add", "new", "--expires", "2001-01-01"], 2, "is over already"),
        (["key", "add", "new", "--expires", "0d"], 2, "is over already"),
        (["key", "add", "new", "--expires", "soon"], 2, "neither a time span like 90d"),
        (["key", "add", "new", "--expires", "999999w"], 2, "neither a time span like 90d"),
        (["key", "add", "new", "--scope", "root"], 2, "'root' is not one of"),
        (["key", "add", "new", "--tokens-per-minute", "0"], 2, "0 is not in the range"),
        (["key", "revoke", "nobody"], 1, "there is no key 'nobody'"),
    ],
)
def test_what_cannot_be_done_changes_nothing(path, command, code, message):
    run("key", "add", "taken")
    before = path.read_bytes()
    result = run(*command)
    assert result.exit_code == code
    assert message in result.stderr
    assert path.read_bytes() == before


def test_commands_refuse_a_bad_file_and_leave_it_as_it_is(path):
    path.parent.mkdir()
    path.write_text("{")
    path.chmod(0o600)
    for command in (["add", "a"], ["list"], ["revoke", "a"]):
        result = run("key", *command)
        assert result.exit_code == 78
        assert str(path) in result.stderr
    assert path.read_text() == "{"


def test_no_supervisor_starts_with_a_bad_file(path, tmp_path):
    path.parent.mkdir()
    path.write_text('{"salt": ""}')
    path.chmod(0o600)
    process = start_process("start", "--port", "0", "--models", str(tmp_path))
    out, told = process.communicate(timeout=60)
    assert (process.returncode, out) == (78, "")
    assert f"{path}: salt: string should match" in told
    assert "Traceback" not in told


def test_who_edits_at_the_same_time_loses_nothing(path):
    def add(name: str) -> None:
        with api_keys.locked(path) as file:
            n = len(file.keys)
            time.sleep(0.01)
            api_keys.save(path, file, [*file.keys, key_of(n, name=name)])

    threads = [threading.Thread(target=add, args=(f"name{n}",)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key.name for key in stored(path).keys} == {f"name{n}" for n in range(8)}


def test_a_link_stays_a_link(path, tmp_path):
    run("key", "add", "a")
    real = tmp_path / "elsewhere.json"
    path.rename(real)
    path.symlink_to(real)
    run("key", "add", "b")
    assert path.is_symlink()
    assert [key.name for key in stored(real).keys] == ["a", "b"]


# The file


@pytest.mark.parametrize("mode", [0o604, 0o602, 0o620, 0o666, 0o777])
def test_a_file_that_others_may_touch_is_refused(path, mode):
    run("key", "add", "a")
    path.chmod(mode)
    assert f"its mode {mode:04o} lets others at it; chmod 600" in problems(path)


@pytest.mark.parametrize("mode", [0o400, 0o600, 0o640, 0o440])
def test_a_group_may_read_it(path, mode):
    run("key", "add", "a")
    path.chmod(mode)
    assert len(stored(path).keys) == 1


def test_a_file_of_another_user_is_refused(path, monkeypatch):
    run("key", "add", "a")
    owner = path.stat().st_uid
    real = os.fstat

    def fstat(descriptor: int) -> os.stat_result:
        found = list(real(descriptor))
        found[4] = owner + 1
        return os.stat_result(found)

    monkeypatch.setattr(os, "fstat", fstat)
    assert "belongs to another user" in problems(path)


def test_what_is_no_file_is_refused_at_once(path):
    path.parent.mkdir()
    os.mkfifo(path, 0o600)
    assert "is not a regular file" in problems(path)
    path.unlink()
    path.mkdir()
    assert str(path) in problems(path)


def test_no_file_is_no_mistake(path, tmp_path):
    assert api_keys.load(path) is None
    (tmp_path / "file").touch()
    assert api_keys.load(tmp_path / "file" / "keys.json") is None


GOOD = json.loads(KeysFile(salt="ab" * 16, keys=[key_of(1), key_of(2)]).model_dump_json())


def change(**more: object) -> dict[str, object]:
    """Return a file whose second key differs."""
    return GOOD | {"keys": [GOOD["keys"][0], GOOD["keys"][1] | more]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", ":1:1: expecting value"),
        (b"\xff", "not UTF-8 text at byte 1"),
        (b'{"a": 1, "a": 2}', "a: appears twice"),
        (b"[" * 100_000, "nested too deeply"),
        (b" " * (api_keys.MAX_BYTES + 1), "larger than 4 MiB"),
        (b"[]", "valid dictionary"),
        (json.dumps({}).encode(), "salt: field required"),
        (json.dumps(GOOD | {"salt": "short"}).encode(), "salt: string should match"),
        (json.dumps(GOOD | {"version": 2}).encode(), "version: input should be 1"),
        (json.dumps(GOOD | {"more": 1}).encode(), "more: unknown field"),
        (json.dumps(change(more=1)).encode(), "keys[1].more: unknown field"),
        (json.dumps(change(id="k1")).encode(), "two keys have the same id"),
        (json.dumps(change(name="name1")).encode(), "two keys have the same name"),
        (json.dumps(change(hash=f"{1:064x}")).encode(), "two keys have the same hash"),
        (json.dumps(change(owner="../../etc")).encode(), "keys[1].owner: string should match"),
        (json.dumps(change(owner="")).encode(), "keys[1].owner: string should match"),
        (json.dumps(change(owner="a\n")).encode(), "keys[1].owner: string should match"),
        (json.dumps(change(scopes=[])).encode(), "keys[1].scopes: list should have at least 1 item"),
        (json.dumps(change(scopes=["root"])).encode(), "keys[1].scopes[0]: input should be 'infer', 'manage'"),
        (json.dumps(change(models=[])).encode(), "keys[1].models: list should have at least 1 item"),
        (json.dumps(change(models="all")).encode(), "keys[1].models: input should be a valid list"),
        (json.dumps(change(requests_per_minute=0)).encode(), "keys[1].requests_per_minute: input should be greater"),
        (json.dumps(change(tokens_per_minute="9")).encode(), "keys[1].tokens_per_minute: input should be a valid int"),
        (json.dumps(change(expires=-1)).encode(), "keys[1].expires: input should be greater"),
        (json.dumps(change(expires="2030")).encode(), "keys[1].expires: input should be a valid integer"),
    ],
)
def test_a_bad_file_is_refused_with_the_place_and_without_the_content(path, content, message):
    path.parent.mkdir()
    path.write_bytes(content)
    path.chmod(0o600)
    told = problems(path)
    assert message in told.replace("Expecting", "expecting")
    assert GOOD["keys"][0]["hash"] not in told


text = st.text('ak1é"\n\0/.', max_size=20)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def almost_good(draw: st.DrawFn) -> bytes:
    """A good file in which one value is replaced, dropped or added, or some bytes differ."""
    data = json.loads(json.dumps(GOOD))
    place = draw(st.sampled_from([data, *data["keys"]]))
    name = draw(st.sampled_from([*place, "other"]))
    if draw(st.booleans()):
        place.pop(name, None)
    else:
        place[name] = draw(junk)
    raw = bytearray(json.dumps(data).encode())
    for _ in range(draw(st.integers(0, 2))):
        raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    return bytes(raw)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.binary(max_size=200) | almost_good())
def test_every_file_is_read_or_refused(tmp_path, raw):
    path = tmp_path / "keys.json"
    path.write_bytes(raw)
    path.chmod(0o600)
    try:
        file = api_keys.load(path)
    except KeysFileError as error:
        assert error.problems
        assert all(str(path) in problem for problem in error.problems)
        return
    assert file is not None
    api_keys.save(path, file, file.keys)
    assert api_keys.load(path) == file


def test_keys_are_long_and_differ():
    found = {api_keys.new_secret() for _ in range(1000)}
    assert len(found) == 1000
    assert {len(one) for one in found} == {47}
