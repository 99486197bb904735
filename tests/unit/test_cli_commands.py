"""The command line without a daemon: parsing, exit statuses, help, completion."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from meshd.cli import cli
from meshd.cli.failures import CommandError, Exit, ServerError
from meshd.cli.look import with_constraints
from meshd.cli.settings import Settings

HEAVY = ("trio", "hypercorn", "starlette", "cryptography", "structlog", "msgpack", "asyncio")
COMMANDS = ["status", "peers", "caps", "plugins", "leave"]


@pytest.mark.parametrize("command", [*([name] for name in COMMANDS), ["ask", "auto", "Hi"]])
def test_without_a_daemon_the_way_out_is_named(tmp_path: Path, command: list[str]) -> None:
    path = tmp_path / "meshd.sock"
    result = CliRunner().invoke(cli, ["--socket", str(path), *command])
    assert result.exit_code == Exit.UNREACHABLE
    assert str(path) in result.stderr
    assert "`meshd run`" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_dead_socket_reads_the_same(tmp_path: Path) -> None:
    path = tmp_path / "meshd.sock"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(os.fspath(path))
    result = CliRunner().invoke(cli, ["--socket", str(path), "status"])
    assert (result.exit_code, "not running" in result.stderr) == (Exit.UNREACHABLE, True)


def test_a_mute_daemon_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "meshd.sock"
    with socket.socket(socket.AF_UNIX) as mute:
        mute.bind(os.fspath(path))
        mute.listen()
        with pytest.raises(CommandError, match="does not answer within") as caught:
            Settings(socket=path).client().get("status", timeout_s=0.05)
    assert caught.value.exit_code == Exit.UNREACHABLE


def test_a_refused_user_is_told_the_command_that_mends_it(tmp_path: Path) -> None:
    from meshd.cli.failures import not_permitted

    error = not_permitted(tmp_path)
    assert "sudo usermod -aG meshd" in error.message
    assert "log in again" in error.message
    assert error.exit_code == Exit.UNREACHABLE


@pytest.mark.parametrize(
    "arguments",
    [
        ["ask"],
        ["ask", "auto"],
        ["ask", "auto", "Hi", "--max-tokens", "0"],
        ["ask", "auto", "Hi", "--privacy", "moon"],
        ["init"],
        ["init", "home", "another"],
        ["join"],
        ["join", "token", "--pin", "481-516"],
        ["join", "token", "--at", "127.0.0.1:1"],
        ["join", "--pin", "481-51"],
        ["join", "meshd1-abc", "--name", "x" * 64],
        ["join", "--pin", "481-516", "--at", "nowhere"],
        ["join", "--token-file", "no-such-file"],
        ["invite", "--ttl", "soon"],
        ["invite", "--uses", "0"],
        ["invite", "--pin", "--uses", "2"],
        ["invite", "--role", "king"],
        ["ask", "auto", "Hi", "--json", "--output", "f"],
        ["run", "--set", "nonsense"],
        ["run", "--set", "node.nmae=x"],
        ["run", "--set", "http.port=many"],
        ["nothing"],
        ["completion", "tcsh"],
    ],
)
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(cli, arguments).exit_code == Exit.USAGE


def test_an_unknown_key_names_the_nearest() -> None:
    result = CliRunner().invoke(cli, ["run", "--set", "node.nmae=x"])
    assert "node.name" in result.stderr or "name" in result.stderr


@pytest.mark.parametrize(
    ("name", "words", "query"),
    [
        ("knowledge.gpt/general", (), "knowledge.gpt/general"),
        (
            "knowledge.gpt/x",
            ("context.ge=8192", "zone=lab"),
            "knowledge.gpt/x?context.ge=8192&zone=lab",
        ),
        ("knowledge.gpt/x?zone=lab", ("slots.ge=2",), "knowledge.gpt/x?zone=lab&slots.ge=2"),
        ("knowledge.gpt/x,zone=lab", ("slots.ge=2",), "knowledge.gpt/x,zone=lab&slots.ge=2"),
    ],
)
def test_constraints_may_be_words(name: str, words: tuple[str, ...], query: str) -> None:
    assert with_constraints(name, words) == query


@pytest.mark.parametrize(
    ("status", "begun", "exit_status"),
    [
        (400, False, Exit.USAGE),
        (404, False, Exit.NOT_SERVED),
        (429, False, Exit.REFUSED),
        (504, False, Exit.DEADLINE),
        (502, False, Exit.FAILED),
        (502, True, Exit.BROKEN),
    ],
)
def test_exit_statuses(status: int, begun: bool, exit_status: Exit) -> None:
    assert ServerError(status, {"message": "m"}, begun=begun).exit_code == exit_status


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts(shell: str) -> None:
    result = CliRunner().invoke(cli, ["completion", shell])
    assert result.exit_code == 0
    assert "_MESHD_COMPLETE" in result.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, meshd.cli\n"
        "try: meshd.cli.cli(['--help'])\n"
        "except SystemExit: pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_command_and_option_has_help() -> None:
    def commands(command: click.Command) -> list[click.Command]:
        members = command.commands.values() if isinstance(command, click.Group) else ()
        return [command, *(inner for member in members for inner in commands(member))]

    for command in commands(cli):
        assert command.help, command.name
        for param in command.params:
            if isinstance(param, click.Option):
                assert param.help, f"{command.name} {param.name}"


def test_init_founds_and_never_overwrites(tmp_path: Path) -> None:
    run = CliRunner()
    founded = run.invoke(cli, ["init", "home", "--state-dir", str(tmp_path)])
    assert founded.exit_code == 0, founded.output
    assert founded.stdout.startswith("mesh home, node ")
    again = run.invoke(cli, ["init", "other", "--state-dir", str(tmp_path)])
    assert again.exit_code == Exit.FAILED
    assert len(again.stderr.splitlines()) == 1


def test_a_token_that_is_none_reaches_nobody(tmp_path: Path) -> None:
    folder = ["--state-dir", str(tmp_path / "state")]
    for token, said in (
        ("hello", "no token"),
        ("meshd1-abc", "cut short"),
        ("meshd9-abc", "release"),
    ):
        tried = CliRunner().invoke(cli, ["join", token, *folder])
        assert (tried.exit_code, said in tried.stderr) == (Exit.USAGE, True), tried.output
        assert len(tried.stderr.splitlines()) == 1
    tried = CliRunner().invoke(cli, ["join", "-", *folder], input="")
    assert "there is no token" in tried.stderr
    assert not (tmp_path / "state").exists()


def test_the_reference_is_current() -> None:
    from meshd.cli.document import reference

    page = Path(__file__).parents[2] / "docs" / "cli.md"
    assert page.read_text() == reference(), "run: python -m meshd.cli.document > docs/cli.md"
