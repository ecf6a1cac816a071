"""HTTPS: commands and clients reach the front by it, a renewed certificate is taken over, a bad one is refused."""

from __future__ import annotations

import asyncio
import logging
import shutil
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from pydantic import ValidationError

from supervisor import tls
from supervisor.app import supervisor
from supervisor.client import Client, NoSupervisor
from supervisor.config import Config, ServerSection
from supervisor.settings import Settings

DATA = Path(__file__).parent / "data"
CERT, KEY, RENEWED = DATA / "tls-cert.pem", DATA / "tls-key.pem", DATA / "tls-renewed.pem"


def settings(folder: Path, **server: Any) -> Settings:
    config = {
        "server": {"port": 0, "runtime_dir": folder / "run"} | server,
        "models": {"directory": folder / "models", "slot_cache_directory": folder / "slots"},
        "api": {"require_keys": False},
        "logging": {"directory": folder / "logs"},
    }
    (folder / "models").mkdir(exist_ok=True)
    return Settings(Config.model_validate(config), None, folder, {})


async def subject(url: str) -> str:
    """Return the name in the certificate that is served at `url`."""
    host, port = url.removeprefix("https://").split(":")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    for path in (CERT, RENEWED):
        context.load_verify_locations(path)
    _, writer = await asyncio.open_connection(host, int(port), ssl=context)
    found = writer.get_extra_info("peercert")
    writer.close()
    return dict(pair for parts in found["subject"] for pair in parts)["commonName"]


async def test_the_commands_client_trusts_the_configured_certificate_only(short_tmp):
    async with supervisor(settings(short_tmp, tls_cert=CERT, tls_key=KEY)) as running:
        (url,) = running.urls
        assert url.startswith("https://127.0.0.1:")
        status = await asyncio.to_thread(Client(url, cert=CERT).get, "/api/v1/status")
        assert status["models"] == []
        for client in (Client(url), Client(url, cert=RENEWED)):
            with pytest.raises(NoSupervisor, match=r"CERTIFICATE_VERIFY_FAILED|certificate verify failed"):
                await asyncio.to_thread(client.get, "/api/v1/status")
        with pytest.raises(NoSupervisor):
            await asyncio.to_thread(Client(url.replace("https", "http")).get, "/api/v1/status")


async def test_streams_go_through_it(start, smollm2):
    running = await start({"a": smollm2}, server={"tls_cert": CERT, "tls_key": KEY})
    context = tls.client_context(CERT)
    body = {"messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8, "stream": True}
    async with running.http.post(running.url + "/v1/chat/completions", json=body, ssl=context) as answer:
        text = await answer.text()
    assert answer.status == 200
    assert text.endswith("data: [DONE]\n\n")
    assert text.count("data: ") > 2
    with pytest.raises(aiohttp.ClientConnectorCertificateError):
        await running.http.get(running.url + "/health")


async def test_a_renewed_certificate_holds_for_the_next_connections(short_tmp, caplog):
    cert = short_tmp / "cert.pem"
    cert.write_bytes(CERT.read_bytes() + KEY.read_bytes())
    async with supervisor(settings(short_tmp, tls_cert=cert)) as running:
        (url,) = running.urls
        assert await subject(url) == "llama-supervisor tests"
        with caplog.at_level(logging.ERROR):
            cert.write_bytes(RENEWED.read_bytes()[:700])  # half written
            await running.tls.look()
        assert "stays in force" in caplog.text
        assert await subject(url) == "llama-supervisor tests"
        shutil.copy(RENEWED, cert)
        await running.tls.look()
        assert await subject(url) == "llama-supervisor tests, renewed"


BAD = {
    "missing": (None, "No such file"),
    "no key": (CERT.read_bytes(), "no certificate with its key"),
    "nonsense": (b"nonsense", "no certificate with its key"),
    "another's key": (CERT.read_bytes() + RENEWED.read_bytes().partition(b"-----BEGIN PRIVATE")[2], "no certificate"),
}


@pytest.mark.parametrize("case", BAD)
async def test_a_bad_certificate_is_refused_at_the_start(short_tmp, case):
    content, words = BAD[case]
    path = short_tmp / "bad.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(tls.CertificateError, match=words) as raised:
        async with supervisor(settings(short_tmp, tls_cert=path)):
            pass
    assert str(path) in raised.value.problems[0]
    assert not list((short_tmp / "run").glob("*/"))


def test_a_key_of_another_certificate_is_refused():
    with pytest.raises(tls.CertificateError, match="key values mismatch"):
        tls.server_context(RENEWED, KEY)


def test_a_key_needs_a_certificate():
    with pytest.raises(ValidationError, match="tls_cert must name that"):
        ServerSection(tls_key=KEY)
