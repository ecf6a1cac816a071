"""Finding out which model a request means, without a server."""

from __future__ import annotations

import pytest
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st

from supervisor.errors import BadRequest
from supervisor.routes.native import model_in_form, model_in_json, model_of

FORM = (
    b'--xyz\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\n'
    b'RIFF name="model"\r\n\r\n--xy\r\n--xyz\r\nContent-Disposition: form-data; name="model"\r\n\r\n'
    b"whisper\r\n--xyz--\r\n"
)


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b'{"model": "a"}', "a"),
        (b'{"messages": [{"model": "inner"}], "model": "outer"}', "outer"),
        (b'{"model": "first", "model": "last"}', "last"),  # as llama-server reads it
        (b'{"model": null}', None),
        (b"{}", None),
        (b"[]", None),
        (b'[{"id": 0, "scale": 0.5}]', None),
        (b'"text"', None),
        (b"5", None),
        ('{"model": "Modèle \\u00e9"}'.encode(), "Modèle é"),
    ],
)
def test_model_in_json(body: bytes, model: str | None):
    assert model_in_json(body) == model


@pytest.mark.parametrize("body", [b"{", b"[1,", b'{"model": "a"} x', b"nul", b'{"a": 01}', b"\xff", b"[" * 100_000])
def test_broken_json(body: bytes):
    with pytest.raises(BadRequest):
        model_in_json(body)


def test_model_in_a_form():
    assert model_in_form(FORM, "multipart/form-data; boundary=xyz") == "whisper"
    assert model_in_form(FORM, 'multipart/form-data; boundary="xyz"') == "whisper"
    assert model_in_form(b"", "multipart/form-data; boundary=xyz") is None
    with pytest.raises(BadRequest):
        model_in_form(FORM, "multipart/form-data")


@given(st.binary(max_size=300), st.text(max_size=60))
def test_no_form_is_too_strange(body: bytes, boundary: str):
    try:
        model_in_form(body, "multipart/form-data; boundary=" + boundary)
    except BadRequest:
        pass


@given(st.binary(max_size=300))
def test_no_json_is_too_strange(body: bytes):
    try:
        model_in_json(body)
    except BadRequest:
        pass


def test_the_body_wins_over_the_query():
    request = make_mocked_request("POST", "/tokenize?model=query")
    assert model_of(request, b'{"model": "body"}') == "body"
    assert model_of(request, b"{}") == "query"
    assert model_of(request, b"") == "query"
    request = make_mocked_request("POST", "/a", headers={"Content-Type": "Multipart/Form-Data; boundary=xyz"})
    assert model_of(request, FORM) == "whisper"
