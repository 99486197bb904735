"""The command line as a client of a daemon elsewhere: which daemon, with which key, and never by accident."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
from click.testing import CliRunner

from meshd.cli import cli
from meshd.cli.failures import CommandError, Exit
from meshd.cli.remote import Remote, config_file, read_config, read_key, unreachable
from meshd.cli.settings import Settings

URL = "https://192.0.2.1:8642"
KEY = "sk-meshd-abcdefgh-" + "a" * 32
PIN = "sha256//" + "A" * 43 + "="


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    path = config_file()
    assert path == tmp_path / "meshd" / "client.toml"
    path.parent.mkdir()
    path.write_text(f'url = "{URL}"\nkey = "{KEY}"\nfingerprint = "{PIN}"\n')
    path.chmod(0o600)
    return path


@pytest.fixture
def no_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No daemon of this machine is found."""
    monkeypatch.setenv("MESHD_HTTP_SOCKET", str(tmp_path / "none.sock"))


def test_the_file_names_the_daemon_where_there_is_none_here(config: Path, no_socket: None) -> None:
    client = Settings().client()
    assert client.remote == Remote(URL, KEY, PIN)
    assert client.where == URL
    assert KEY not in repr(client.remote)


def test_a_daemon_here_comes_first(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "meshd.sock"
    here.touch()
    monkeypatch.setenv("MESHD_HTTP_SOCKET", str(here))
    assert Settings().client().remote is None
    assert Settings(socket=tmp_path / "other.sock").client().remote is None


def test_options_win_and_a_key_goes_to_its_own_daemon_only(config: Path, tmp_path: Path) -> None:
    assert Settings(url=URL + "/").client().remote == Remote(URL + "/", KEY, PIN)
    other = "https://198.51.100.1:8642"
    assert Settings(url=other).client().remote == Remote(other, "", "")
    file = tmp_path / "key"
    file.write_text(KEY.replace("a", "b") + "\n")
    file.chmod(0o600)
    remote = Settings(key_file=file).client().remote
    assert remote == Remote(URL, KEY.replace("a", "b"), PIN)


def test_secrets_that_others_can_read_are_not_used(config: Path, tmp_path: Path) -> None:
    config.chmod(0o640)
    with pytest.raises(CommandError, match=r"chmod 600 .*client\.toml"):
        read_config(config)
    file = tmp_path / "key"
    file.write_text(KEY)
    file.chmod(0o604)
    with pytest.raises(CommandError, match="chmod 600"):
        read_key(file)
    with pytest.raises(CommandError, match="there is no key file"):
        read_key(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("url = ", "no TOML"),
        ("", "url among them"),
        (f'url = "{URL}"\nkeys = "x"', "not 'keys'"),
        ("url = 5", "takes texts"),
        ('url = "x"\nkey = "\\u0000', "no TOML"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(config: Path, text: str, says: str) -> None:
    config.write_text(text)
    with pytest.raises(CommandError, match=says) as refused:
        read_config(config)
    assert refused.value.exit_code == Exit.USAGE
    config.write_bytes(b"\xff")
    with pytest.raises(CommandError, match="is no text"):
        read_config(config)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://192.0.2.1:8642", "would show the API key to the network"),
        ("http://board.local", "would show the API key"),
        ("http://localhost.evil.example", "would show the API key"),
        ("ftp://board", "no URL of a daemon"),
        ("board:8642", "no URL of a daemon"),
        ("https://", "no URL of a daemon"),
        ("https://board:x", "no URL of a daemon"),
        ("https://board/v1", "no URL of a daemon"),
    ],
)
def test_addresses_that_cannot_be_used_are_named(url: str, says: str) -> None:
    with pytest.raises(CommandError, match=says):
        Remote(url, KEY).connection(1.0)


def test_a_tunnel_on_this_machine_may_be_plain() -> None:
    for url in ("http://localhost:9000", "http://127.0.0.1:9000", "http://[::1]:9000"):
        connection = Remote(url, KEY).connection(1.0)
        assert (connection.port, type(connection).__name__) == (9000, "HTTPConnection")
    assert Remote("https://board.local", KEY).connection(1.0).port == 8642


def test_nobody_there_is_told_in_words(config: Path, no_socket: None) -> None:
    config.write_text('url = "http://127.0.0.1:1"\n')
    result = CliRunner().invoke(cli, ["status"])
    assert result.exit_code == Exit.UNREACHABLE
    assert "no daemon at http://127.0.0.1:1: Connection refused" in result.stderr
    assert result.exit_code == CliRunner().invoke(cli, ["doctor"]).exit_code
    error = ssl.SSLCertVerificationError("x")
    error.verify_message = "self-signed certificate"
    assert "give the fingerprint" in unreachable(URL, error).message


def test_keys_are_made_on_the_file_where_no_daemon_runs(
    tmp_path: Path, no_socket: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MESHD_NODE_STATE_DIR", str(tmp_path / "state"))
    run = CliRunner().invoke
    made = run(cli, ["key", "create", "ci", "--rate", "5/min", "--models", "auto,knowledge.gpt/**"])
    assert made.exit_code == 0, made.stderr
    assert made.stdout.startswith("sk-meshd-")
    assert "not shown again" in made.stderr
    assert "ci" in run(cli, ["key", "list"]).stdout
    assert made.stdout.strip() not in run(cli, ["key", "list", "--json"]).stdout
    wrong = run(cli, ["key", "create", "ci"])
    assert (wrong.exit_code, "there is a key 'ci'" in wrong.stderr) == (Exit.FAILED, True)
    wrong = run(cli, ["key", "create", "x", "--rate", "often"])
    assert "'often' is no rate" in wrong.stderr
    gone = run(cli, ["key", "revoke", "ci"])
    assert gone.stdout == "revoked ci\n"
    assert "that was the last key" in gone.stderr
    assert "no keys" in run(cli, ["key", "list"]).stderr
