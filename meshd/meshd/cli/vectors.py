"""`meshd embed` and `meshd rerank`: what programs ask for by `/v1/embeddings` and `/v1/rerank`, to try out."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Final

import click

from meshd.cli import complete
from meshd.cli.failures import CommandError, Exit, ServerError
from meshd.cli.render import Column, plain, rows_of, table, terminal_width
from meshd.cli.settings import Settings, json_option, pass_settings, print_json

if TYPE_CHECKING:
    from meshd_plugins.api import Value

ANSWER_S: Final = 120.0  # when no deadline is given
GRACE_S: Final = 5.0  # for the daemon to say that time is up
TOO_LONG: Final = "context_length_exceeded"
IN_THE_API: Final = "send truncate: true"  # of which people here type another thing
_SHOWN: Final = 3  # numbers of a vector

_privacy = click.option(
    "--privacy",
    type=click.Choice(["local", "lan", "mesh", "cloud"]),
    help="How far the texts may travel; else the node's default.",
)
_deadline = click.option(
    "--deadline",
    type=click.FloatRange(0.001, 86_400),
    help=f"Seconds for the whole answer. [default: {ANSWER_S:g}]",
)
_truncate = click.option("--truncate", is_flag=True, help="Cut texts that are too long.")


@click.command()
@click.argument("target", metavar="NAME|auto", shell_complete=complete.targets)
@click.argument("text", nargs=-1, required=True)
@click.option("--dimensions", type=click.IntRange(min=1), help="Numbers of a vector; else all.")
@_truncate
@_deadline
@_privacy
@json_option
@pass_settings
def embed(
    settings: Settings,
    /,
    target: str,
    text: tuple[str, ...],
    dimensions: int | None,
    truncate: bool,
    deadline: float | None,
    privacy: str | None,
) -> None:
    """Make vectors of texts.

    Each TEXT is one; '-' reads one a line from standard input. Shown is how near each is to the first (1 is
    the same, 0 is unrelated); --json has the vectors.
    """
    payload: dict[str, Value] = {"model": target, "input": _texts(text)}
    if dimensions is not None:
        payload["dimensions"] = dimensions
    answer = _post(settings, "embeddings", payload, truncate, deadline, privacy)
    if settings.as_json:
        print_json(answer)
        return
    vectors = [_numbers(row.get("embedding")) for row in rows_of(answer, "data")]
    rows: list[Mapping[str, Value]] = [
        {
            "near": f"{_cosine(vectors[0], vector):.3f}",
            "vector": " ".join(f"{number:+.3f}" for number in vector[:_SHOWN])
            + (" …" if len(vector) > _SHOWN else ""),
            "dimensions": len(vector),
            "text": each,
        }
        for each, vector in zip(_texts_sent(payload), vectors, strict=True)
    ]
    columns = (
        Column("near", "to first", right=True),
        Column("dimensions", "numbers", right=True, optional=True),
        Column("vector", "vector", optional=True),
        Column("text", "text"),
    )
    click.echo(table(rows, columns, terminal_width()))


@click.command()
@click.argument("target", metavar="NAME|auto", shell_complete=complete.targets)
@click.argument("query")
@click.argument("document", nargs=-1, required=True)
@click.option("--top", "top_n", type=click.IntRange(min=1), help="Show the best so many only.")
@_truncate
@_deadline
@_privacy
@json_option
@pass_settings
def rerank(
    settings: Settings,
    /,
    target: str,
    query: str,
    document: tuple[str, ...],
    top_n: int | None,
    truncate: bool,
    deadline: float | None,
    privacy: str | None,
) -> None:
    """Sort documents by how well they answer a query.

    Each DOCUMENT is one; '-' reads one a line from standard input.
    """
    payload: dict[str, Value] = {"model": target, "query": query, "documents": _texts(document)}
    payload["return_documents"] = True
    if top_n is not None:
        payload["top_n"] = top_n
    answer = _post(settings, "rerank", payload, truncate, deadline, privacy)
    if settings.as_json:
        print_json(answer)
        return
    rows: list[Mapping[str, Value]] = []
    for row in rows_of(answer, "results"):
        score, found = row.get("relevance_score"), row.get("document")
        rows.append(
            {
                "score": f"{score:.3f}" if isinstance(score, float) else plain(score),
                "index": row.get("index"),
                "text": found.get("text") if isinstance(found, Mapping) else None,
            }
        )
    columns = (
        Column("score", "score", right=True),
        Column("index", "#", right=True, optional=True),
        Column("text", "document"),
    )
    click.echo(table(rows, columns, terminal_width()))


def _texts(given: Sequence[str]) -> list[Value]:
    texts = list(given)
    try:
        if texts == ["-"]:
            lines = sys.stdin.buffer.read().decode().splitlines()
            texts = [line for line in lines if line.strip()]
        for text in texts:
            text.encode()  # arguments that were no UTF-8 hold surrogates
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise click.UsageError(f"a text is not UTF-8: {error.reason}") from error
    if not texts or not all(texts):
        raise click.UsageError("a text is empty")
    return list(texts)


def _texts_sent(payload: Mapping[str, Value]) -> list[str]:
    sent = payload["input"]
    assert isinstance(sent, list)
    return [str(text) for text in sent]


def _post(
    settings: Settings,
    endpoint: str,
    payload: dict[str, Value],
    truncate: bool,
    deadline: float | None,
    privacy: str | None,
) -> Mapping[str, Value]:
    """Ask, and return the answer. Raises CommandError."""
    extension: dict[str, Value] = {"deadline_s": deadline or ANSWER_S}
    if truncate:
        extension["truncate"] = True
    if privacy is not None:
        extension["privacy"] = privacy
    payload["meshd"] = extension
    timeout_s = (deadline or ANSWER_S) + GRACE_S
    try:
        return settings.client().infer(endpoint, payload, timeout_s=timeout_s)
    except ServerError as error:
        if error.error.get("code") == TOO_LONG:
            message = error.message.replace(IN_THE_API, "give --truncate")
            raise CommandError(message, Exit.USAGE) from error
        raise


def _numbers(value: Value) -> list[float]:
    return (
        [float(number) for number in value if isinstance(number, int | float)]
        if isinstance(value, list)
        else []
    )


def _cosine(one: Sequence[float], other: Sequence[float]) -> float:
    length = math.hypot(*one) * math.hypot(*other)
    return sum(a * b for a, b in zip(one, other, strict=True)) / length if length else 0.0
