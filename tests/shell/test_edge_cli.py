"""The `meshd` command as a process, against the real edge over a fake mesh, on a Unix socket."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshd.cli.failures import Exit

ROOT = Path(__file__).parents[2]
TIME_S = 20


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a running fake."""
    path = tmp_path_factory.mktemp("edge") / "meshd.sock"
    with _fake(path) as process:
        yield path
        process.kill()


def _fake(path: Path, *options: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.shell.support_fake_mesh", str(path), *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def meshd(path: Path, *arguments: str, stdin: str = "") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "from meshd.cli import main; main()",
            "--socket",
            str(path),
            *arguments,
        ],
        input=stdin.encode(),
        capture_output=True,
        timeout=TIME_S,
        check=False,
    )


def test_ask_prints_the_answer_and_nothing_else(daemon: Path) -> None:
    done = meshd(daemon, "ask", "knowledge.gpt/general", "What", "is", "it?")
    assert (done.returncode, done.stdout, done.stderr) == (0, "Hello, wörld\n".encode(), b"")


def test_ask_says_who_why_and_how_long_on_standard_error(daemon: Path) -> None:
    done = meshd(daemon, "ask", "-v", "auto", "-", stdin="What is it?")
    assert done.stdout.decode() == "Hello, wörld\n"
    assert done.stderr.decode().splitlines() == [
        "plan: single (asked by name)",
        "→ pi (least loaded)",
        "✓ pi  0.42 s  first 0.08 s  5+3 tokens  rate 7.1",
    ]


def test_ask_shows_calls_as_the_answer_and_thoughts_beside_it(daemon: Path) -> None:
    done = meshd(daemon, "ask", "-v", "knowledge.gpt/thinker", "What?")
    assert done.stdout.decode() == 'Let me see.\nf {"a": 1}\ng {}\n'
    assert "Hm, a tool.\n" in done.stderr.decode()
    quiet = meshd(daemon, "ask", "-q", "knowledge.gpt/thinker", "What?")
    assert (quiet.stdout, quiet.stderr) == (done.stdout, b"")
    told = meshd(daemon, "ask", "--json", "knowledge.gpt/thinker", "What?").stdout.splitlines()
    pieces = [event for event in map(json.loads, told) if event["event"] == "piece"]
    assert pieces[0]["reasoning"] == "Hm, "
    assert pieces[0]["logprobs"][0]["token"] == "Hm"
    assert pieces[2]["tool_calls"] == [{"index": 0, "id": "call_1", "name": "f", "arguments": ""}]


def test_ask_as_json(daemon: Path) -> None:
    done = meshd(daemon, "ask", "--json", "knowledge.gpt/general", "Hi")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["event"] for event in events] == [
        "planned",
        "routed",
        "piece",
        "piece",
        "piece",
        "subtask_done",
        "answered",
    ]
    assert (events[3]["text"], events[3]["token_ids"], events[3]["seed"]) == (", ", [1], 7)
    broken = meshd(daemon, "--json", "ask", "knowledge.gpt/torn", "Hi")
    assert json.loads(broken.stdout.splitlines()[-1])["event"] == "error"
    assert broken.returncode == Exit.BROKEN


def test_why_another_one_was_asked(daemon: Path) -> None:
    done = meshd(daemon, "ask", "-v", "knowledge.gpt/second", "Hi")
    lines = done.stderr.decode().splitlines()
    assert [line.partition(" ")[0] for line in lines] == ["plan:", "→", "✗", "→", "✓"]
    assert lines[2].startswith("✗ pi: refused (busy): all")
    assert lines[2].endswith("slots are taken")
    assert "\x1b" not in lines[2]
    assert "attempt 2" in lines[3]
    assert meshd(daemon, "ask", "-q", "knowledge.gpt/second", "Hi").stderr == b""
    told = meshd(daemon, "ask", "--json", "knowledge.gpt/second", "Hi").stdout.splitlines()
    failed = json.loads(told[2])
    assert (failed["event"], failed["code"], failed["node_name"]) == (
        "attempt_failed",
        "busy",
        "pi",
    )
    [part] = json.loads(told[-1])["parts"]
    assert part["failed"][0]["reason"] == failed["reason"]


@pytest.mark.parametrize(
    ("label", "status", "says"),
    [
        ("busy", Exit.REFUSED, "all slots are taken"),
        ("gone", Exit.NOT_SERVED, "no peer serves"),
        ("late", Exit.DEADLINE, "too late"),
        ("died", Exit.FAILED, "the worker died"),
        ("words", Exit.USAGE, "no calculation"),
        ("torn", Exit.BROKEN, "the peer died"),
        ("torn", Exit.BROKEN, "the answer is not complete"),
        ("unended", Exit.BROKEN, "before it was complete"),
    ],
)
def test_failures_can_be_told_apart(daemon: Path, label: str, status: Exit, says: str) -> None:
    done = meshd(daemon, "ask", f"knowledge.gpt/{label}", "Hi")
    assert done.returncode == status
    assert says in done.stderr.decode()
    assert len(done.stderr.splitlines()) == 1


def test_data_is_printed_as_text_or_written_to_a_file(daemon: Path, tmp_path: Path) -> None:
    assert meshd(daemon, "ask", "data.gpt/document").stdout.decode() == "héllo\n"
    refused = meshd(daemon, "ask", "data.gpt/picture")
    assert refused.returncode == Exit.USAGE
    assert "image/png: give --output FILE" in refused.stderr.decode()
    file = tmp_path / "picture.png"
    assert meshd(daemon, "ask", "data.gpt/picture", "--output", str(file)).returncode == 0
    assert file.read_bytes() == b"\x89PNG\x00\xff"
    assert meshd(daemon, "ask", "data.gpt/picture", "--output", "-").stdout == file.read_bytes()
    torn = tmp_path / "torn.txt"
    meshd(daemon, "ask", "knowledge.gpt/torn", "Hi", "--output", str(torn))
    assert list(tmp_path.iterdir()) == [file]


def test_what_nobody_serves_has_no_column_at_fault(daemon: Path) -> None:
    done = meshd(daemon, "ask", "knowledge.gpt/gone", "Hi")
    assert done.stderr.decode().startswith("meshd: no peer serves")


def test_an_unknown_model_is_told_the_command_that_lists_them(daemon: Path) -> None:
    done = meshd(daemon, "ask", "SmolLM2-135M", "Hi")
    assert done.returncode == Exit.NOT_SERVED
    assert "did you mean 'SmolLM2-135M-Instruct'? `meshd caps`" in done.stderr.decode()


def test_auto_is_no_name_to_resolve(daemon: Path) -> None:
    done = meshd(daemon, "resolve", "auto")
    assert done.returncode == Exit.USAGE
    assert "`meshd ask -v auto QUESTION`" in done.stderr.decode()


def test_a_question_that_is_no_text_is_refused_before_it_is_asked(daemon: Path) -> None:
    command = [sys.executable, "-c", "from meshd.cli import main; main()", "--socket", str(daemon)]
    done = subprocess.run(
        [*command, "ask", "auto", "-"],
        input=b"\xff\xfe",
        capture_output=True,
        timeout=TIME_S,
        check=False,
    )
    assert done.returncode == Exit.USAGE
    assert "not UTF-8 text" in done.stderr.decode()
    done = subprocess.run(
        [*map(os.fsencode, command), b"ask", b"auto", b"\xff"],
        capture_output=True,
        timeout=TIME_S,
        check=False,
    )
    assert done.returncode == Exit.USAGE
    assert "not UTF-8 text" in done.stderr.decode()


def test_a_terminal_without_utf8_still_gets_its_answer(
    daemon: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONIOENCODING", "iso8859-5")  # has no ö
    done = meshd(daemon, "ask", "-v", "knowledge.gpt/general", "Hi")
    assert (done.returncode, done.stdout) == (0, b"Hello, w?rld\n")


@pytest.mark.parametrize("command", [["caps"], ["ask", "knowledge.gpt/general", "Hi"]])
def test_a_full_disk_is_one_line(daemon: Path, command: list[str]) -> None:
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                "from meshd.cli import main; main()",
                "--socket",
                str(daemon),
                *command,
            ],
            stdin=subprocess.DEVNULL,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=TIME_S,
            check=False,
        )
    assert done.returncode != 0
    assert done.stderr.decode().splitlines()[0] == "meshd: cannot write: No space left on device"
    assert b"Traceback" not in done.stderr


def test_views(daemon: Path) -> None:
    status = meshd(daemon, "status").stdout.decode()
    assert "uptime   1 h 2 min" in status
    assert "counters" not in status
    assert "counters" in meshd(daemon, "status", "-v").stdout.decode()
    peers = meshd(daemon, "peers").stdout.decode().splitlines()
    assert peers[0].split()[:4] == ["NODE", "STATE", "SINCE", "ADDRESS"]
    assert peers[1].split()[:5] == ["pi", "alive", "12", "s", "127.0.0.1:7946"]
    assert json.loads(meshd(daemon, "caps", "--json").stdout)[0]["name"].startswith("computation")
    assert "SmolLM2" in meshd(daemon, "caps").stdout.decode()
    assert "echo" in meshd(daemon, "plugins").stdout.decode()
    assert meshd(daemon, "config", "show").stdout.decode().splitlines()[1].split() == [
        "http.port",
        "8642",
        "default",
    ]


def test_resolve_explains(daemon: Path) -> None:
    short = meshd(daemon, "resolve", "knowledge.gpt/general", "context.ge=8192")
    assert short.returncode == 0
    assert "serves it exactly" in short.stdout.decode()
    assert "nano" not in short.stdout.decode()
    query = json.loads(
        meshd(daemon, "--json", "resolve", "knowledge.gpt/general", "context.ge=8192").stdout
    )["query"]
    assert query == "knowledge.gpt/general?context.ge=8192"
    long = meshd(daemon, "resolve", "--explain", "knowledge.gpt/general").stdout.decode()
    assert "context 2048 is below 8192" in long
    nobody = meshd(daemon, "resolve", "knowledge.gpt/nothing")
    assert nobody.returncode == Exit.NOT_SERVED
    assert "nearest: knowledge.gpt/general" in nobody.stderr.decode()


def test_a_malformed_name_has_a_caret(daemon: Path) -> None:
    done = meshd(daemon, "resolve", "knowledge/math")
    assert done.returncode == Exit.USAGE
    lines = done.stderr.decode().splitlines()
    assert lines[:2] == ["  knowledge/math", "           ^"]
    assert 'nearest: "knowledge.gpt/x"' in lines[2]


def test_names_complete_from_the_daemon(daemon: Path, tmp_path: Path) -> None:
    def complete(path: Path) -> list[str]:
        environment = {
            **os.environ,
            "_MESHD_COMPLETE": "bash_complete",
            "COMP_WORDS": f"meshd --socket {path} ask k",
            "COMP_CWORD": "4",
        }
        done = subprocess.run(
            [sys.executable, "-c", "from meshd.cli import main; main()"],
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIME_S,
            check=False,
        )
        assert done.stderr == ""
        return done.stdout.split()

    assert complete(daemon) == ["plain,knowledge.gpt/general"]
    assert complete(tmp_path / "none.sock") == []


def test_leave(daemon: Path) -> None:
    done = meshd(daemon, "leave")
    assert done.returncode == 0, done.stderr.decode()
    assert b"left the mesh" in done.stdout


def test_ctrl_c_cancels_the_ask(tmp_path: Path) -> None:
    path = tmp_path / "meshd.sock"
    with _fake(path, "--once") as fake:
        assert fake.stdout is not None
        command = "from meshd.cli import main; main()"
        asking = subprocess.Popen(
            [
                sys.executable,
                "-c",
                command,
                "--socket",
                str(path),
                "ask",
                "knowledge.gpt/silent",
                "Hi",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        with asking:
            assert fake.stdout.readline() == "asked\n"
            asking.send_signal(signal.SIGINT)
            assert asking.wait(TIME_S) == Exit.INTERRUPTED
            assert asking.stderr is not None
            assert asking.stderr.read() == b""
        assert fake.stdout.readline() == "cancelled\n"
        assert fake.wait(TIME_S) == 0
