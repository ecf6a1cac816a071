"""What `start` leaves out of memory, and that nobody else notices."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from supervisor import lean

LOADED = """
import gc, json, ssl, sys
from supervisor import lean
{how}
contexts = [one for one in gc.get_objects() if isinstance(one, ssl.SSLContext)]
print(json.dumps({{
    "contexts": len(contexts),
    "authorities": sum(one.cert_store_stats()["x509"] for one in contexts),
    "modules": sorted(sys.modules),
}}))
"""


def loaded(how: str) -> dict:
    environ = {name: value for name, value in os.environ.items() if name not in lean.NOT_NEEDED}
    done = subprocess.run(
        [sys.executable, "-c", LOADED.format(how=how)], env=environ, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_a_server_loads_no_authorities_and_no_cpp_library():
    plain = loaded("import supervisor.process")
    spare = loaded("with lean.imports():\n    import supervisor.process")
    assert spare["contexts"] == plain["contexts"] > 0
    assert spare["authorities"] == 0
    assert "frozenlist._frozenlist" in set(plain["modules"]) - set(spare["modules"])


def test_the_environment_is_as_before(monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/etc/my.pem")
    monkeypatch.delenv("FROZENLIST_NO_EXTENSIONS", raising=False)
    before = dict(os.environ)
    with lean.imports():
        assert os.environ["FROZENLIST_NO_EXTENSIONS"] == "1"
    assert dict(os.environ) == before
