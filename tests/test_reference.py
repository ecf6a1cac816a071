"""Are the schema and the generated pages of docs/ what the settings are?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from supervisor import config, reference, settings
from supervisor.config import Config
from supervisor.errors import ConfigError

ROOT = Path(__file__).parent.parent


def test_schema_describes_the_default_file() -> None:
    schema = config.schema()
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert set(schema["properties"]) == set(Config.model_fields)
    assert schema["additionalProperties"] is False
    json.dumps(schema)


def test_documentation_is_up_to_date() -> None:
    stale = reference.stale(ROOT / "docs")
    assert not stale, f"out of date: {stale}; run scripts/docs"


def test_documentation_names_every_setting_and_variable() -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    for row in settings.show(settings.load(ROOT / "config.json", None, {})):
        assert f"`{row.key.partition('.')[2]}`" in page
        assert f"`LLAMA_SUPERVISOR_{row.key.replace('.', '__').upper()}`" in page


def test_page_without_markers_is_refused() -> None:
    with pytest.raises(ValueError, match="markers"):
        reference.filled("nothing here", "text")


def test_docs_are_rewritten_where_stale(tmp_path: Path) -> None:
    for name in ("configuration.md", "cli.md"):
        (tmp_path / name).write_text(f"# Title\n\n{reference.BEGIN}\nold\n{reference.END}\n", encoding="utf-8")
    assert len(reference.stale(tmp_path)) == 2
    assert len(reference.stale(tmp_path, write=True)) == 2
    assert reference.stale(tmp_path) == []


def test_examples_on_the_page_are_true(tmp_path: Path) -> None:
    page = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    example = tmp_path / "config.json"
    example.write_text(page.split("```json\n")[1].split("```")[0], encoding="utf-8")
    assert settings.load(example, None, {}).config.server.port == 9000
    told = [line.strip() for line in page.split("```text\n")[1].split("```")[0].splitlines()[1:]]
    example.write_text('{"server": {"prot": 1}, "models": {"max_loaded_models": "3"}}', encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        settings.load(example, None, {"LLAMA_SUPERVISOR_LOGGING__LEVEL": "verbose"})
    assert [problem.replace(f"{tmp_path}/", "") for problem in caught.value.problems] == told
