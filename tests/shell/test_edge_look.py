"""Store, doctor and metrics: the endpoints and the commands over them, on a fake mesh."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from tests.shell.support_fake_mesh import FakeMesh, serving
from tests.shell.support_streams import trio_test

from meshd.cli.failures import Exit

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The socket of a running fake."""
    path = tmp_path_factory.mktemp("look") / "meshd.sock"
    command = [sys.executable, "-m", "tests.shell.support_fake_mesh", str(path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield path
        process.kill()


def meshd(path: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "meshd", "--socket", str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_the_store_in_short_and_one_record_in_full(daemon: Path) -> None:
    short = meshd(daemon, "store", "show").stdout.splitlines()
    assert short[0].split()[:6] == ["NODE", "STATE", "EPOCH", "VERSION", "FLOOR", "KEYS"]
    assert short[1].split()[:6] == ["pi", "alive", "7", "12", "3", "1"]
    full = meshd(daemon, "store", "show", "pi").stdout
    assert "floor       3" in full
    assert "(deleted)" in full
    assert json.loads(meshd(daemon, "store", "show", "--json").stdout)[0]["name"] == "pi"
    record = json.loads(meshd(daemon, "store", "show", "pi", "--json").stdout)
    assert record["entries"][0]["value"] == {"name": "pi", "raw": "01"}


def test_a_node_that_is_not_there_is_named(daemon: Path) -> None:
    done = meshd(daemon, "store", "show", "nobody")
    assert done.returncode == Exit.NOT_SERVED
    assert "'nobody'" in done.stderr


def test_a_difference_says_who_is_behind_and_has_a_status_of_its_own(daemon: Path) -> None:
    same = meshd(daemon, "store", "diff", "twin")
    assert (same.returncode, same.stdout) == (0, "in step with twin: 3 records\n")
    differs = meshd(daemon, "store", "diff", "pi")
    assert differs.returncode == Exit.FAILED
    assert "nano" in differs.stdout
    assert "version 5 of epoch 7" in differs.stdout
    assert "nothing" in differs.stdout
    told = json.loads(meshd(daemon, "store", "diff", "pi", "--json").stdout)
    assert told["differences"][0]["behind"] == "there"
    mute = meshd(daemon, "store", "diff", "mute")
    assert mute.returncode == Exit.DEADLINE


def test_the_doctor_says_what_and_what_to_do(daemon: Path) -> None:
    done = meshd(daemon, "doctor")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "warning  clock_off",
        "    This node's clock is 31 s behind.",
        "    Synchronise it.",
        "",
        "1 warning",
    ]
    told = json.loads(meshd(daemon, "doctor", "--json").stdout)
    assert (told["daemon"], told["findings"][0]["code"]) == (True, "clock_off")


def test_status_has_a_line_for_health_and_the_counters_that_tell(daemon: Path) -> None:
    status = meshd(daemon, "status").stdout
    assert "2 warnings: run `meshd doctor`" in status
    assert "rumours sent 41, suspicions raised 2, dropped 3 other_mesh" in status


def test_peers_says_how_old_each_thing_is(daemon: Path) -> None:
    head, row = meshd(daemon, "peers", "--wide").stdout.splitlines()
    assert head.split() == (
        [
            "NODE",
            "STATE",
            "SINCE",
            "ADDRESS",
            "RTT",
            "MS",
            "SERVES",
            "LOAD",
            "LOAD",
            "AGE",
            "HEARD",
            "EPOCH",
            "INC",
            "ID",
        ]
    )
    assert "knowledge/general" in row
    assert "0.50 s" in row
    assert "0.25 s" in row
    assert "epoch" not in meshd(daemon, "peers").stdout.lower()


def request(port: int, target: str) -> tuple[int, str, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", target)
        answer = connection.getresponse()
        return answer.status, str(answer.getheader("content-type")), answer.read().decode()
    finally:
        connection.close()


@trio_test
async def test_metrics_are_text_of_the_exposition_format(tmp_path: Path) -> None:
    async with serving(FakeMesh(), tmp_path) as sockets:
        status, kind, body = await trio.to_thread.run_sync(request, sockets.port, "/metrics")
    assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert 'meshd_members{state="alive"} 2\n' in body
    assert "meshd_gossip_rumours_sent_total 1234567\n" in body
    assert "\nmeshd_http_requests_total 1\n" in body
    assert body.endswith('meshd_http_refused_total{code="version_not_supported"} 0\n')


@trio_test
async def test_a_query_that_names_no_node_or_several_is_refused(tmp_path: Path) -> None:
    async with serving(FakeMesh(), tmp_path) as sockets:
        for target in ("/mesh/v1/store/diff", "/mesh/v1/store?node=a&node=b"):
            status, _, body = await trio.to_thread.run_sync(request, sockets.port, target)
            assert (status, json.loads(body)["error"]["param"]) == (400, "node")


@trio_test
async def test_a_client_that_leaves_ends_the_question_to_the_peer(tmp_path: Path) -> None:
    mesh = FakeMesh()
    async with serving(mesh, tmp_path) as sockets:
        stream = await trio.open_tcp_stream("127.0.0.1", sockets.port)
        await stream.send_all(
            b"GET /mesh/v1/store/diff?node=slow HTTP/1.1\r\nHost: localhost\r\n\r\n"
        )
        await mesh.started.wait()
        await stream.aclose()
        await mesh.cancelled.wait()
