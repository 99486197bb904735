"""The table [plugins.adopt]: what it may say, and what it means."""

from __future__ import annotations

import pytest

from meshd_plugins.api import PluginConfigError, Privacy, Value
from meshd_plugins.builtin.adopt.config import Kind, read_settings


def test_without_configuration_the_well_known_ports_are_looked_at() -> None:
    settings = read_settings({})
    assert settings.servers == ()
    assert [str(server.url) for server in settings.probed()] == [
        "http://127.0.0.1:11434",
        "http://127.0.0.1:8080",
        "http://127.0.0.1:8000",
        "http://127.0.0.1:1234",
    ]
    assert all(server.privacy_class is Privacy.MESH for server in settings.probed())


def test_a_configured_port_is_not_looked_at_twice() -> None:
    settings = read_settings({"servers": [{"url": "http://localhost:8080/v1"}]})
    assert [server.url.port for server in settings.probed()] == [11434, 8000, 1234]
    [server] = settings.servers
    assert str(server.url) == "http://localhost:8080"
    far = read_settings({"servers": [{"url": "http://192.0.2.1:8080"}]})
    assert len(far.probed()) == 4


def test_looking_can_be_turned_off_or_told_where() -> None:
    assert read_settings({"probe": False}).probed() == ()
    assert [server.url.port for server in read_settings({"ports": [9, 10]}).probed()] == [9, 10]


def test_a_whole_entry() -> None:
    [server] = read_settings(
        {
            "servers": [
                {
                    "url": "https://llm.example.org/api/v1/",
                    "kind": "openai",
                    "names": {"gpt-*": "knowledge.gpt/big", "*": ["knowledge.gpt/other"]},
                    "models": ["gpt-*"],
                    "api_key_file": "/etc/meshd/key",
                    "slots": 2,
                    "context": 8192,
                    "measure": False,
                    "poll_s": 30,
                }
            ]
        }
    ).servers
    assert str(server.url) == "https://llm.example.org/api"
    assert server.url.port == 443
    assert server.url.authority == "llm.example.org"
    assert server.kind is Kind.OPENAI
    assert server.privacy_class is Privacy.CLOUD
    assert server.names_of("gpt-5", "x") == ("knowledge.gpt/big",)
    assert server.names_of("o1", "x") == ("knowledge.gpt/other",)
    assert (server.is_wanted("gpt-5"), server.is_wanted("o1")) == (True, False)
    assert (server.slots, server.context, server.poll_s) == (2, 8192, 30.0)


@pytest.mark.parametrize(
    ("url", "is_loopback"),
    [
        ("http://127.0.0.1:1", True),
        ("http://127.9.9.9:1", True),
        ("http://[::1]:1", True),
        ("http://localhost:1", True),
        ("http://localhost.example.org:1", False),
        ("http://0.0.0.0:1", False),
        ("http://192.0.2.1:1", False),
        ("http://board:1", False),
        ("http://2130706433:1", False),
    ],
)
def test_what_is_on_this_machine(url: str, *, is_loopback: bool) -> None:
    [server] = read_settings({"servers": [{"url": url}]}).servers
    assert server.url.is_loopback is is_loopback
    assert str(server.url) == url


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ({}, "url"),
        ({"url": 5}, "url"),
        ({"url": "127.0.0.1:11434"}, "url"),
        ({"url": "ftp://127.0.0.1"}, "url"),
        ({"url": "http://a b"}, "url"),
        ({"url": "http://a:99999"}, "url"),
        ({"url": "http://a/?q=1"}, "url"),
        ({"url": "http://bücher.example"}, "url"),
        ({"url": "http://u:secret@a"}, "api_key_file"),
        ({"kind": "olama"}, "kind"),
        ({"privacy": "world"}, "privacy"),
        ({"names": ["x"]}, "names"),
        ({"names": {"x": "general"}}, "general"),
        ({"names": {"x": []}}, "names"),
        ({"models": "x"}, "models"),
        ({"models": [1]}, "models"),
        ({"api_key_file": "key"}, "absolute"),
        ({"slots": -1}, "slots"),
        ({"slots": 1.5}, "slots"),
        ({"slots": True}, "slots"),
        ({"poll_s": 0}, "poll_s"),
        ({"measure": "yes"}, "measure"),
        ({"slot": 1}, "did you mean 'slots'"),
    ],
)
def test_what_is_wrong_is_named(entry: dict[str, Value], word: str) -> None:
    table: dict[str, Value] = {"url": "http://127.0.0.1:1", **entry} if entry else {}
    with pytest.raises(PluginConfigError, match=word) as raised:
        read_settings({"servers": [table]})
    assert "secret" not in str(raised.value)
    assert "plugins.adopt.servers[0]" in str(raised.value)


@pytest.mark.parametrize(
    "table",
    [
        {"servers": "x"},
        {"servers": [1]},
        {"servers": [{"url": "http://a"}] * 2},
        {"servers": [{"url": f"http://a:{n}"} for n in range(1, 18)]},
        {"probe": 1},
        {"ports": []},
        {"ports": ["8080"]},
        {"ports": [0]},
        {"server": []},
    ],
)
def test_what_is_wrong_with_the_whole(table: dict[str, Value]) -> None:
    with pytest.raises(PluginConfigError, match=r"plugins\.adopt"):
        read_settings(table)
