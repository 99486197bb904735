"""What `meshd config show` prints, and the example file that is made from the same descriptions."""

from __future__ import annotations

import dataclasses
import json
import re
import tomllib
from pathlib import Path

import pytest

from meshd.config import Machine, describe, load
from meshd.config.example import example
from meshd.config.fields import about_of
from meshd.config.redaction import is_secret_name
from meshd.config.sections import SECTIONS

COMMITTED = Path(__file__).resolve().parents[2] / "deploy" / "meshd.example.toml"


def lines_of(path: Path | None = None) -> dict[str, dict[str, object]]:
    machine = Machine(
        environment={}, host_name="pi", user_id=0, home=Path("/root"), system_config=Path("/absent")
    )
    return {
        str(line["key"]): dict(line)
        for line in describe(load([path] if path else [], machine=machine))
    }


def test_every_setting_is_shown_with_its_origin(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text("[http]\nport = 1\n[gossip]\npreset = 'wan'\n[gossip.overrides]\nstall_s = 2\n")
    lines = lines_of(path)
    expected = {
        f"{name}.{field.name}"
        for name, section in SECTIONS.items()
        for field in dataclasses.fields(section)
        if field.name not in ("overrides", "tables")
    }
    assert expected <= set(lines)
    assert lines["http.port"] == {**lines["http.port"], "value": 1, "origin": str(path)}
    assert lines["node.name"]["origin"] == "host name"
    assert lines["limits.queue_max"]["origin"] == "default"
    assert lines["gossip.overrides.stall_s"] == {
        **lines["gossip.overrides.stall_s"],
        "value": 2.0,
        "origin": str(path),
    }
    assert lines["gossip.overrides.probe_interval_s"]["origin"] == "preset wan"
    json.dumps(lines)


def test_secrets_of_plugins_are_redacted_at_any_depth(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text(
        """[plugins.cloud]
api_key = "s3cret-1"
base = "https://user:s3cret-2@host/v1"
providers = [{ name = "one", auth = { access_token = "s3cret-3" } }]
tokens_max = 5
[plugins.cloud.deep]
password = "s3cret-4"
"""
    )
    lines = lines_of(path)
    assert "s3cret" not in json.dumps(lines)
    assert lines["plugins.cloud.api_key"]["value"] == "[redacted]"
    assert lines["plugins.cloud.deep.password"]["value"] == "[redacted]"
    assert lines["plugins.cloud.base"]["value"] == "https://[redacted]@host/v1"
    assert lines["plugins.cloud.tokens_max"]["value"] == 5
    assert lines["plugins.cloud.tokens_max"]["origin"] == str(path)


@pytest.mark.parametrize(
    "name",
    ["api_key", "apiKey", "hf_token", "X-Auth-Token", "PASSWORD", "client_secret", "rootKey"],
)
def test_secret_names(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["tokens", "tokens_per_s", "kv_key", "key", "public_key"])
def test_harmless_names(name: str) -> None:
    assert not is_secret_name(name)


def test_committed_example_is_current() -> None:
    assert COMMITTED.read_text() == example(), (
        "run: python -m meshd.config.example > deploy/meshd.example.toml"
    )


def test_example_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text(example())
    as_written = {key: line["value"] for key, line in lines_of(path).items()}
    assert as_written == {key: line["value"] for key, line in lines_of().items()}


def test_example_with_every_key_switched_on_loads_and_is_the_defaults(tmp_path: Path) -> None:
    text = re.sub(r"^#(?=[a-z_]+ = |\[)", "", example(), flags=re.MULTILINE)
    path = tmp_path / "m.toml"
    path.write_text(text)
    document = tomllib.loads(text)
    for name, section in SECTIONS.items():
        for field in dataclasses.fields(section):
            if field.name not in ("overrides", "tables", "rules"):
                assert field.name in document[name], f"{name}.{field.name} is not in the example"
    switched_on, default = lines_of(path), lines_of()
    derived = {"node.name"}  # a placeholder stands in the example
    assert {k: v["value"] for k, v in switched_on.items() if k not in derived} == {
        k: v["value"] for k, v in default.items() if k not in derived
    }


def test_plugin_tables_of_the_example_are_toml() -> None:
    block = example().partition("[plugins]")[2]
    text = "\n".join(line[6:] for line in block.splitlines() if line.startswith("#     "))
    tables = tomllib.loads(text)["plugins"]
    assert {"llama", "document"} <= set(tables)
    assert tables["llama"]["models"][0]["path"].endswith(".gguf")


def test_every_setting_is_described() -> None:
    for section in SECTIONS.values():
        for field in dataclasses.fields(section):
            doc = about_of(field.metadata).doc
            assert len(doc) > 15, field.name
            assert doc.endswith("."), field.name
