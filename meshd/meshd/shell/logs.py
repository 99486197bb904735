"""Logs: one structlog chain for our own lines and for those of libraries, to standard error.

On a terminal a line is for people, otherwise it is a JSON object. Every line carries the node's name
as `this_node`. What people ask and what is answered, and every secret, is taken out here by the name of
its key, so that no call elsewhere has to remember it. A traceback has no local variables, for the same
reason.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Final, TextIO, cast

import structlog

from meshd.config.redaction import REDACTED, is_secret_name, without_url_user
from meshd.config.sections import LogFormat, LogLevel, LogSection

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor, WrappedLogger

    from meshd_plugins.api import Logger

CONTENT_NAMES: Final = frozenset(
    [
        "answer",
        "answers",
        "arguments",
        "body",
        "chunk",
        "completion",
        "content",
        "data",
        "input",
        "messages",
        "output",
        "piece",
        "prompt",
        "prompts",
        "question",
        "response_text",
        "text",
    ]
)
"""Keys that hold what people ask or are answered: only its length is logged."""

_DEPTH_MAX: Final = 6
_LEVELS: Final = {
    LogLevel.DEBUG: logging.DEBUG,
    LogLevel.INFO: logging.INFO,
    LogLevel.WARNING: logging.WARNING,
    LogLevel.ERROR: logging.ERROR,
}


def configure_logs(section: LogSection, node_name: str, *, stream: TextIO | None = None) -> Logger:
    """Set up logging for this process and return a logger; a second call replaces the first.

    Lines go to `stream`, by default the standard error of the moment of this call.
    """
    target = stream if stream is not None else sys.stderr
    console = section.format is LogFormat.CONSOLE or (
        section.format is LogFormat.AUTO and target.isatty()
    )
    level = _LEVELS[section.level]
    chain: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _with_node(node_name),
        structlog.processors.format_exc_info,
        redact,
    ]
    render = _console(target) if console else _json()
    target = cast("TextIO", _Forgiving(target))
    structlog.configure(
        processors=[*chain, render],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.WriteLoggerFactory(file=target),
        cache_logger_on_first_use=False,
    )
    _route_standard_logging(target, level, chain, render)
    return cast("Logger", structlog.get_logger())


class _Forgiving:
    """Where lines go: a full disk or a reader that has gone loses lines, and ends nothing else."""

    def __init__(self, target: TextIO) -> None:
        self._target = target

    def write(self, line: str) -> None:
        with suppress(OSError, ValueError):  # ValueError: it is closed
            self._target.write(line)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._target.flush()


def redact(logger: WrappedLogger, method: str, event_dict: EventDict) -> EventDict:
    """Take contents and secrets out, at any depth, by the names of their keys."""
    del logger, method
    return {
        name: value
        if name == "event" and isinstance(value, str)
        else _safe(name, value, _DEPTH_MAX)
        for name, value in event_dict.items()
    }


def _safe(name: str, value: object, depth: int) -> object:
    if value is None or isinstance(value, (bool, int, float)):
        return value  # counts and times: prompt_tokens, token_count, first_token_s
    if name.lower() in CONTENT_NAMES:
        size = (
            f" {len(cast('Sequence[object]', value))}"
            if isinstance(value, (str, bytes, list, tuple, dict))
            else ""
        )
        return f"{REDACTED[:-1]}{size}]"
    if is_secret_name(name):
        return REDACTED
    if depth == 0:
        return "..."
    match value:
        case str():
            return without_url_user(value)
        case bytes():
            return value.hex()
        case Mapping():
            table = cast("Mapping[object, object]", value)
            return {str(key): _safe(str(key), inner, depth - 1) for key, inner in table.items()}
        case list() | tuple() | set() | frozenset():
            return [_safe("", inner, depth - 1) for inner in cast("Sequence[object]", value)]
        case _:
            return str(value)


def _with_node(node_name: str) -> Processor:
    def add_node(logger: WrappedLogger, method: str, event_dict: EventDict) -> EventDict:
        del logger, method
        event_dict["this_node"] = node_name  # `node` is free for the peer that a line is about
        return event_dict

    return add_node


def _json() -> Processor:
    return structlog.processors.JSONRenderer(sort_keys=False)


def _console(target: TextIO) -> Processor:
    return structlog.dev.ConsoleRenderer(
        colors=target.isatty(), exception_formatter=structlog.dev.plain_traceback, sort_keys=False
    )


def _route_standard_logging(
    target: TextIO, level: int, chain: list[Processor], render: Processor
) -> None:
    """Lines of libraries (zeroconf, hypercorn) through the same chain; theirs start at WARNING."""
    handler = logging.StreamHandler(target)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[structlog.stdlib.add_logger_name, *chain],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                _as_library_line,
                render,
            ],
        )
    )
    root = logging.getLogger()
    for old in [
        each
        for each in root.handlers
        if isinstance(each.formatter, structlog.stdlib.ProcessorFormatter)
    ]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level if level in (logging.DEBUG, logging.ERROR) else logging.WARNING)
    logging.captureWarnings(True)


def _as_library_line(logger: WrappedLogger, method: str, event_dict: EventDict) -> EventDict:
    """Our events are constants; a library's free text becomes the field `message`."""
    del logger, method
    event_dict["message"] = str(event_dict.get("event", ""))
    event_dict["event"] = "library.logged"
    return event_dict
