"""The reference of the command line, made from its own help: `python -m meshd.cli.document`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import click

from meshd.cli import cli

WIDTH: Final = 88

_HEAD: Final = """\
# The command line

`meshd` talks to the daemon on this machine through its Unix socket. This page is made from the
commands' own help by `python -m meshd.cli.document > docs/cli.md`; a test checks that it is current.

Answers and tables go to standard output, everything else to standard error. `--json`, before or after
the command, prints JSON for scripts. One event a line print `meshd ask --json` (see [api.md](api.md)) and, with what
came of it as the last line, `meshd model add`, `bench` and `verify`; one change a line `meshd peers --watch --json`.

## Exit statuses

| status | meaning |
|---|---|
| 0 | done |
| 1 | failed: the message says how |
| 2 | wrong usage: an option, a setting, a malformed name, or a request that nobody can serve as it is |
| 3 | the daemon cannot be reached: not running, no permission, or no answer |
| 4 | nobody serves that name, or it does not exist |
| 5 | refused: busy, stopping, or not allowed; nothing was done |
| 6 | the deadline passed |
| 7 | the answer broke off after it had begun: what was printed is not complete |
| 78 | of `meshd run`: it cannot start as it is set up (no mesh, a port in use, a plugin unknown) |
| 130 | Ctrl-C (before a command begins, SIGINT itself, which a shell shows so too); an ask is cancelled on every node (`meshd peers --watch` ends so by design, with 0) |

Two commands answer with their status as well: `meshd store diff` has 1 when the stores differ, and `meshd
doctor` has 0 when all is well or there are only notes, 1 when the worst is a warning, 2 when it is an error, as
monitoring programs expect of a check.

## Names

A name with constraints needs quotes in a shell (`'knowledge.gpt/general?context>=8192'`), unless its
operators are written as letters and its constraints follow a comma:
`knowledge.gpt/general,context.ge=8192,zone=lab`. After `meshd resolve` they may be words of their own.

## Completion

    meshd completion bash > ~/.local/share/bash-completion/completions/meshd
    meshd completion zsh  > "${fpath[1]}/_meshd"
    meshd completion fish > ~/.config/fish/completions/meshd.fish

Names complete from the running daemon.

## Commands
"""


def reference() -> str:
    """The whole page, in Markdown."""
    sections = [
        f"### {path}\n\n```\n{help_text}\n```\n" for path, help_text in _commands(cli, None)
    ]
    return _HEAD + "\n" + "\n".join(sections)


def _commands(command: click.Command, parent: click.Context | None) -> Iterator[tuple[str, str]]:
    name = "meshd" if parent is None else str(command.name)
    context = click.Context(
        command,
        parent=parent,
        info_name=name,
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        help_option_names=command.context_settings.get("help_option_names"),
    )
    lines = command.get_help(context).splitlines()
    yield context.command_path, "\n".join(line.rstrip() for line in lines)
    if isinstance(command, click.Group):
        for member in sorted(command.commands):
            yield from _commands(command.commands[member], context)


if __name__ == "__main__":
    click.echo(reference(), nl=False)
