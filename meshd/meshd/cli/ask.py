"""`meshd ask`: the answer to standard output while it comes; who, why and how long to standard error."""

from __future__ import annotations

import base64
import codecs
import json
import os
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import click

from meshd.cli import complete
from meshd.cli.failures import CommandError, Exit, ServerError
from meshd.cli.render import duration, harmless, harmless_text, plain
from meshd.cli.settings import Settings, json_option

if TYPE_CHECKING:
    from meshd_plugins.api import Value

_ANSWER: Final = "answer"
_TEXT_TYPES: Final = ("application/json", "application/xml", "application/toml", "application/yaml")
_PROMPT_SHOWN_CHARS: Final = 60


@click.command()
@click.argument("target", metavar="NAME|auto", shell_complete=complete.targets)
@click.argument("prompt", nargs=-1)
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="A picture to ask about: PNG, JPEG, GIF, BMP or WebP. May be given again.",
)
@click.option(
    "--audio",
    "sounds",
    multiple=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="A recording to ask about: WAV, MP3 or FLAC. May be given again.",
)
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer, in tokens.")
@click.option("--temperature", type=click.FloatRange(0, 2), help="0 is the likeliest; 2 is wild.")
@click.option("--seed", type=int, help="Of the sampler: the same gives the same answer.")
@click.option(
    "--deadline", type=click.FloatRange(0.001, 86_400), help="Seconds for the whole answer."
)
@click.option(
    "--privacy",
    type=click.Choice(["local", "lan", "mesh", "cloud"]),
    help="How far the question may travel; else the node's default.",
)
@click.option("--no-split", is_flag=True, help="Do not let `auto` split the question.")
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path, allow_dash=True),
    help="Write the answer to a file, once it is complete; '-' is standard output, raw.",
)
@click.option("-v", "--verbose", is_flag=True, help="Show who does what, on a pipe too.")
@click.option("-q", "--quiet", is_flag=True, help="Show the answer only.")
@json_option
@click.pass_context
def ask(
    ctx: click.Context,
    /,
    target: str,
    prompt: tuple[str, ...],
    images: tuple[Path, ...],
    sounds: tuple[Path, ...],
    output: Path | None,
    verbose: bool,
    quiet: bool,
    **options: object,
) -> None:
    """Ask the mesh.

    The words of PROMPT are joined; '-' reads it from standard input. A data.gpt name needs none. A picture or
    a recording goes to a model that takes it in. With --json every event is printed as one line.
    """
    settings = ctx.ensure_object(Settings)
    if settings.as_json and output is not None:
        raise click.UsageError("--output takes the answer, --json all events: give one of them")
    payload = _payload(target, prompt, images, sounds, options)
    told = (verbose or sys.stderr.isatty()) and not quiet and not settings.as_json
    show = _Show(output, told=told, as_json=settings.as_json)
    try:
        with closing(settings.client().ask(payload)) as events:
            for event in events:
                show.event(event)
        show.finish()
    except ServerError as error:
        show.break_off()
        if settings.as_json:
            click.echo(json.dumps({"event": "error", **error.error}, ensure_ascii=False))
        raise
    except CommandError:
        show.break_off()
        raise
    except KeyboardInterrupt:
        show.break_off()
        ctx.exit(Exit.INTERRUPTED)


def _payload(
    target: str,
    prompt: tuple[str, ...],
    images: tuple[Path, ...],
    sounds: tuple[Path, ...],
    options: Mapping[str, object],
) -> Mapping[str, Value]:
    text = " ".join(prompt)
    try:
        if text == "-":
            text = sys.stdin.buffer.read().decode()
        text.encode()  # arguments that were no UTF-8 hold surrogates
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise click.UsageError(f"the question is not UTF-8 text: {error.reason}") from error
    files = bool(images or sounds)
    if not text.strip() and not files and not target.startswith("data."):
        raise click.UsageError("what is the question? Give PROMPT, or '-' to read it from a pipe")
    payload: dict[str, object] = {"target": target}
    if files:
        from meshd.cli.attach import message_of

        payload["messages"] = [message_of(text, images, sounds)]
    elif text:
        payload["prompt"] = text
    named = {"max_tokens": "max_tokens", "temperature": "temperature", "seed": "seed"}
    for key, option in {**named, "deadline_s": "deadline", "privacy": "privacy"}.items():
        if options.get(option) is not None:
            payload[key] = options[option]
    if options.get("no_split"):
        payload["split"] = False
    return payload  # type: ignore[return-value]  # click's values are plain data


class _Show:
    """Shows the events of one ask."""

    def __init__(self, output: Path | None, *, told: bool, as_json: bool) -> None:
        self._output = output
        self._told = told
        self._as_json = as_json
        self._collected: list[bytes] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._content_type = ""
        self._mid_line = False
        self._many = False
        self._thinking = False  # a thought stands unfinished on standard error
        self._calls = 0

    def event(self, event: Mapping[str, Value]) -> None:
        """Show one event."""
        if self._as_json:
            click.echo(json.dumps(event, ensure_ascii=False))
            return
        match event.get("event"):
            case "planned":
                self._planned(event)
            case "routed":
                attempt = event.get("attempt")
                again = (
                    f"attempt {plain(attempt)}: "
                    if isinstance(attempt, int) and attempt > 1
                    else ""
                )
                self._tell(
                    f"→ {self._of(event)}{_text(event, 'node_name')} ({again}{_text(event, 'reason')})"
                )
            case "attempt_failed":
                how = "refused" if event.get("refused") is True else "failed"
                self._tell(
                    f"✗ {self._of(event)}{_text(event, 'node_name')}: {how} ({_text(event, 'code')}): "
                    f"{_text(event, 'reason')}"
                )
            case "piece" if event.get("subtask") == _ANSWER:
                self._piece(event)
            case "subtask_done":
                self._done(event)
            case "answered" if self._many:
                self._tell(f"✓ all of it  {duration(event.get('total_s'))}")
            case _:
                pass

    def finish(self) -> None:
        """The answer is complete: end its line, or write its file."""
        self._end_line()
        if self._output is None:
            return
        data = b"".join(self._collected)
        if str(self._output) == "-":
            stdout: BinaryIO = sys.stdout.buffer
            stdout.write(data)
            stdout.flush()
            return
        partial = self._output.with_name(f".{self._output.name}.{os.getpid()}.part")
        try:
            partial.write_bytes(data)
            partial.replace(self._output)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise CommandError(
                f"cannot write {self._output}: {error.strerror}", Exit.FAILED
            ) from error
        self._tell(f"✓ {self._output}: {len(data)} bytes")

    def break_off(self) -> None:
        """The answer is not complete: leave the terminal at the start of a line."""
        self._end_line()

    def _planned(self, event: Mapping[str, Value]) -> None:
        subtasks = event.get("subtasks")
        rows = (
            [row for row in subtasks if isinstance(row, Mapping)]
            if isinstance(subtasks, list)
            else []
        )
        self._many = len(rows) > 1
        self._tell(f"plan: {_text(event, 'strategy')} ({_text(event, 'reason')})")
        for row in rows if self._many else ():
            prompt = _text(row, "prompt")
            shown = (
                prompt
                if len(prompt) <= _PROMPT_SHOWN_CHARS
                else prompt[: _PROMPT_SHOWN_CHARS - 1] + "…"
            )
            needs = row.get("needs")
            after = f"  after {plain(needs)}" if needs else ""
            self._tell(f"  {_text(row, 'id')}: {_text(row, 'name')}  “{shown}”{after}")

    def _piece(self, event: Mapping[str, Value]) -> None:
        encoded = event.get("data_base64")
        if isinstance(encoded, str):
            self._data(base64.b64decode(encoded), str(event.get("content_type") or ""))
        thought = event.get("reasoning")
        if isinstance(thought, str) and thought:
            self._think(thought)
        text = event.get("text")
        if isinstance(text, str) and text:
            if self._thinking:
                self._end_thought()
            self._write(text)
        calls = event.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            if isinstance(call, Mapping):
                self._call(call)

    def _think(self, text: str) -> None:
        """What a model thinks is not its answer: it goes where who does what goes."""
        if not self._told:
            return
        if not self._thinking:
            self._end_line()
            self._thinking = True
        click.secho(harmless_text(text), nl=False, err=True, dim=True)

    def _end_thought(self) -> None:
        self._thinking = False
        click.echo(err=True)

    def _call(self, call: Mapping[str, Value]) -> None:
        """A call of a tool is written as `name {arguments}`, a line each."""
        name = call.get("name")
        if isinstance(name, str) and name:
            if self._thinking:
                self._end_thought()
            self._write(f"{chr(10) if self._mid_line or self._calls else ''}{name} ")
            self._calls += 1
        arguments = call.get("arguments")
        if isinstance(arguments, str):
            self._write(arguments)

    def _data(self, data: bytes, content_type: str) -> None:
        self._content_type = self._content_type or content_type
        if self._output is not None:
            self._collected.append(data)
            return
        kind = self._content_type.partition(";")[0].strip().lower()
        if not (
            kind.startswith("text/") or kind in _TEXT_TYPES or kind.endswith(("+json", "+xml"))
        ):
            raise CommandError(
                f"the answer is {harmless(kind) or 'data of no stated type'}: give --output FILE",
                Exit.USAGE,
            )
        self._write(self._decoder.decode(data))

    def _write(self, text: str) -> None:
        if self._output is not None:
            self._collected.append(text.encode("utf-8", "replace"))
            return
        if not text:
            return
        click.echo(harmless_text(text) if sys.stdout.isatty() else text, nl=False)
        sys.stdout.flush()
        self._mid_line = not text.endswith("\n")

    def _done(self, event: Mapping[str, Value]) -> None:
        usage, detail = event.get("usage"), event.get("detail")
        parts = [
            f"✓ {self._of(event)}{_text(event, 'node')}  {duration(event.get('total_s'))}",
            f"first {duration(event.get('first_s'))}",
        ]
        if isinstance(usage, Mapping) and usage.get("completion_tokens"):
            tokens = (plain(usage.get("prompt_tokens")), plain(usage.get("completion_tokens")))
            parts.append(f"{tokens[0]}+{tokens[1]} tokens")
        if isinstance(detail, Mapping) and detail:
            parts.append(plain(detail))
        self._tell("  ".join(parts))

    def _of(self, event: Mapping[str, Value]) -> str:
        return f"{_text(event, 'subtask')}: " if self._many else ""

    def _tell(self, line: str) -> None:
        if self._told:
            self._end_line()
            click.secho(line, err=True, dim=True)

    def _end_line(self) -> None:
        if self._thinking:
            self._end_thought()
        if self._mid_line:
            click.echo()
            self._mid_line = False


def _text(event: Mapping[str, Value], key: str) -> str:
    return harmless(str(event.get(key) or ""))
