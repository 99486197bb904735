"""What reaches the log, in which form, and what never does."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from meshd.config import LogFormat, LogLevel, LogSection
from meshd.shell.logs import CONTENT_NAMES, configure_logs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)
    structlog.reset_defaults()


def read(stream: io.StringIO) -> list[dict[str, object]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_json_line_carries_event_node_level_and_time() -> None:
    stream = io.StringIO()
    configure_logs(LogSection(), "kitchen", stream=stream).info(
        "member.joined", peer=b"\x01\x02", age_s=0.5
    )
    (line,) = read(stream)
    assert line.pop("timestamp")
    assert line == {
        "event": "member.joined",
        "peer": "0102",
        "age_s": 0.5,
        "this_node": "kitchen",
        "level": "info",
    }


def test_a_terminal_gets_lines_for_people_and_a_file_gets_json() -> None:
    terminal, file = Terminal(), io.StringIO()
    configure_logs(LogSection(), "kitchen", stream=terminal).info("member.joined", peer="ada")
    assert "member.joined" in terminal.getvalue()
    assert not terminal.getvalue().startswith("{")
    configure_logs(LogSection(format=LogFormat.JSON), "kitchen", stream=Terminal())
    configure_logs(LogSection(format=LogFormat.CONSOLE), "kitchen", stream=file).info(
        "member.joined", peer="ada"
    )
    assert "\x1b" not in file.getvalue()
    assert "peer=ada" in file.getvalue()


def test_level_holds_for_loggers_made_before() -> None:
    stream = io.StringIO()
    early = structlog.get_logger()
    configure_logs(LogSection(level=LogLevel.WARNING), "kitchen", stream=stream)
    early.info("member.joined")
    early.warning("member.suspected")
    assert [line["event"] for line in read(stream)] == ["member.suspected"]


@pytest.mark.parametrize("name", sorted(CONTENT_NAMES))
def test_contents_are_only_measured(name: str) -> None:
    stream = io.StringIO()
    configure_logs(LogSection(), "kitchen", stream=stream).info(
        "request.ended", **{name: "tell nobody"}
    )
    assert "nobody" not in stream.getvalue()
    assert read(stream)[0][name] == "[redacted 11]"


def test_secrets_and_contents_are_taken_out_at_any_depth() -> None:
    stream = io.StringIO()
    log = configure_logs(LogSection(), "kitchen", stream=stream)
    log.info(
        "request.ended",
        request={"api_key": "s3cret", "list": [{"messages": [{"content": "s3cret"}]}]},
        authorization="Bearer s3cret",
        datagram_key=b"s3cret",
        url="http://user:s3cret@host/",
        prompt_tokens=3,
        first_token_s=0.1,
    )
    assert "s3cret" not in stream.getvalue()
    assert b"s3cret".hex() not in stream.getvalue()
    (line,) = read(stream)
    assert (line["prompt_tokens"], line["first_token_s"]) == (3, 0.1)


@pytest.mark.parametrize("form", [LogFormat.CONSOLE, LogFormat.JSON])
def test_tracebacks_show_no_local_variables(form: LogFormat) -> None:
    stream = io.StringIO()
    log = configure_logs(LogSection(format=form), "kitchen", stream=stream)

    def answer(prompt: str) -> None:
        raise RuntimeError(f"broke after {len(prompt)}")

    try:
        answer("tell " + "nobody")
    except RuntimeError:
        log.error("request.failed", exc_info=True)
    assert "RuntimeError: broke after 11" in stream.getvalue()
    assert "tell nobody" not in stream.getvalue()


def test_lines_of_libraries_take_the_same_way() -> None:
    stream = io.StringIO()
    configure_logs(LogSection(), "kitchen", stream=stream)
    logging.getLogger("zeroconf").warning("cannot bind %s", "eth0")
    logging.getLogger("zeroconf").info("chatter")
    (line,) = read(stream)
    assert line.pop("timestamp")
    assert line == {
        "event": "library.logged",
        "message": "cannot bind eth0",
        "logger": "zeroconf",
        "this_node": "kitchen",
        "level": "warning",
    }


def test_a_second_configuration_replaces_the_first() -> None:
    first, second = io.StringIO(), io.StringIO()
    configure_logs(LogSection(), "one", stream=first)
    configure_logs(LogSection(), "two", stream=second)
    logging.getLogger("hypercorn").warning("bound")
    structlog.get_logger().info("daemon.started")
    assert first.getvalue() == ""
    assert [line["this_node"] for line in read(second)] == ["two", "two"]
