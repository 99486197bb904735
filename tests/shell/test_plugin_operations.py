"""What an administrator has a plugin do: the hook, the edge, and `meshd model` over them."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import pytest
import trio
from click.testing import CliRunner, Result
from tests.shell.support_fake_mesh import FakeMesh
from tests.shell.support_log import KeptLog
from tests.support_daemons import UnixConnection

from meshd.cli import cli
from meshd.cli.failures import Exit
from meshd.cli.progress import progress_text
from meshd.cli.render import cell_width
from meshd.config import HttpSection
from meshd.edge.app import build_app
from meshd.edge.limits import EdgeLimits
from meshd.edge.server import open_edge_sockets, serve_edge
from meshd.orchestrate.audit import Wanted
from meshd_plugins.api import BadRequest, Failed, PluginContext, PluginOperation, Reading, Value
from meshd_plugins.hookspecs import hookimpl
from meshd_plugins.manager import PluginManager
from meshd_plugins.sources import of_objects
from meshd_plugins.testing import fake_context

T = TypeVar("T")
Item = Mapping[str, Value]

ROW: Item = {
    "id": "tiny",
    "origin": "library",
    "state": "serving",
    "reason": "",
    "names": ["knowledge.gpt/general", "knowledge.gpt/x"],
    "size_bytes": 98_400_000,
    "quantisation": "Q4_1",
    "resident_bytes": 240_000_000,
    "prefill_tokens_per_s": 380.5,
    "decode_tokens_per_s": 41.0,
    "load_s": 1.25,
    "family": "Tiny",
}
COMING: Item = {
    "id": "big",
    "origin": "transfer",
    "state": "downloading",
    "reason": "",
    "names": [],
    "arrived_bytes": 43,
    "size_bytes": 100,
}
ILL: Item = {
    "id": "ill",
    "origin": "configuration",
    "state": "quarantined",
    "reason": "it needs 9 GB\x1b[2J and there are 4",
    "names": ["knowledge.gpt/ill"],
}


class Scripted:
    """A plugin whose operations play scripts; `closed` are those that were ended from outside."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Item]] = []
        self.closed = trio.Event()
        self.items: dict[str, list[Item | Exception]] = {}
        self.reading: set[str] = set()  # verbs that change nothing

    def script(self, verb: str) -> PluginOperation:
        async def operation(arguments: Item) -> AsyncGenerator[Item, None]:
            self.asked.append((verb, arguments))
            try:
                for item in self.items[verb]:
                    if isinstance(item, Exception):
                        raise item
                    await trio.lowlevel.checkpoint()
                    yield item
                if verb == "endless":
                    await trio.sleep_forever()
            except trio.Cancelled:
                self.closed.set()
                raise

        return operation

    @hookimpl
    def meshd_operations(self, context: PluginContext) -> Mapping[str, PluginOperation]:
        del context
        return {
            verb: Reading(self.script(verb)) if verb in self.reading else self.script(verb)
            for verb in self.items
        }


class Trail:
    """As much of an `AccessService` as an endpoint of a plugin has to do with."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Value]] = []

    def record(self, kind: str, /, **fields: Value) -> None:
        self.lines.append({"kind": kind, **fields})

    def access(self) -> Mapping[str, Value]:
        return {}

    async def check(self, name: str, caller: str, privacy: str, at: str) -> Mapping[str, Value]:
        raise BadRequest("nobody asks here")

    async def audit(self, wanted: Wanted) -> Mapping[str, Value]:
        raise BadRequest("nobody asks here")

    async def audit_verify(self) -> Mapping[str, Value]:
        raise BadRequest("nobody asks here")


class Scene:
    """An edge on a Unix socket over one scripted plugin."""

    def __init__(self, tmp_path: Path) -> None:
        self.plugin, self.log = Scripted(), KeptLog()
        self.trail = Trail()
        self.socket = tmp_path / "meshd.sock"
        self._manager = PluginManager(
            lambda name: fake_context(name, tmp_path),
            log=self.log,
            clock=lambda: 0.0,
            sources=of_objects({"llama": self.plugin}),
        )
        self._manager.load()
        self._manager.register()

    def run(self, use: Callable[[], T]) -> T:
        """Run `use`, which blocks, in a thread beside the server."""

        async def main() -> T:
            sockets = open_edge_sockets(HttpSection(port=0, socket=self.socket))
            limits = EdgeLimits(heartbeat_s=0.05)
            app = build_app(FakeMesh(), limits, operate=self._manager, access=self.trail)
            async with trio.open_nursery() as nursery:

                async def serve(task_status: trio.TaskStatus[None]) -> None:
                    await serve_edge(app, sockets, graceful_s=0.2, task_status=task_status)

                await nursery.start(serve)
                with trio.fail_after(60):
                    result = await trio.to_thread.run_sync(use)
                nursery.cancel_scope.cancel()
            return result

        return trio.run(main)

    def post(self, path: str, body: bytes = b"{}") -> tuple[int, list[Any]]:
        """The status and the lines of an answer."""

        def use() -> tuple[int, list[Any]]:
            connection = UnixConnection(self.socket)
            try:
                connection.request("POST", path, body=body)
                answer = connection.getresponse()
                return answer.status, [json.loads(line) for line in answer.read().splitlines()]
            finally:
                connection.close()

        return self.run(use)

    def meshd(self, *arguments: str) -> Result:
        command = ["--socket", str(self.socket), "model", *arguments]
        return self.run(lambda: CliRunner().invoke(cli, command))


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


# -- the endpoint --------------------------------------------------------------------------------------------


def test_items_come_as_lines_and_the_last_says_done(scene: Scene) -> None:
    scene.plugin.items["add"] = [{"stage": "hashing", "bytes": 7}, {"done": {"id": "x"}}]
    status, lines = scene.post("/mesh/v1/plugins/llama/add", b'{"source": "/m"}')
    assert (status, scene.plugin.asked) == (200, [("add", {"source": "/m"})])
    assert lines == [
        {"event": "progress", "stage": "hashing", "bytes": 7},
        {"event": "done", "id": "x"},
    ]


def test_the_trail_has_what_was_done_and_not_what_was_read(scene: Scene) -> None:
    scene.plugin.items = {"add": [{"done": {}}], "list": [{"done": {"models": []}}]}
    scene.plugin.reading = {"list"}
    assert scene.post("/mesh/v1/plugins/llama/list") == (200, [{"event": "done", "models": []}])
    assert scene.trail.lines == []
    scene.post("/mesh/v1/plugins/llama/add")
    scene.post("/mesh/v1/plugins/llama/nothing")
    acts = [(line["act"], line["outcome"]) for line in scene.trail.lines]
    assert acts == [
        ("POST /mesh/v1/plugins/llama/add", "ok"),
        ("POST /mesh/v1/plugins/llama/nothing", "refused"),
    ]


@pytest.mark.parametrize(
    ("items", "status", "code"),
    [
        ([BadRequest("not so", code="taken")], 400, "taken"),
        ([Failed("broke", code="digest_mismatch")], 502, "digest_mismatch"),
        ([ZeroDivisionError("a secret")], 502, "crashed"),
        ([], 502, "contract"),
    ],
)
def test_an_operation_that_fails_at_once_has_a_status_of_its_own(
    scene: Scene, items: list[Item | Exception], status: int, code: str
) -> None:
    scene.plugin.items["add"] = items
    found, [body] = scene.post("/mesh/v1/plugins/llama/add")
    assert (found, body["error"]["code"]) == (status, code)
    assert "secret" not in json.dumps(body)
    # What else went wrong is told in the log, and the plugin stays.
    assert ("plugin.operation_crashed" in scene.log.events()) == (code == "crashed")


@pytest.mark.parametrize(
    ("items", "code"),
    [
        ([{"a": 1}, Failed("broke", code="stalled")], "stalled"),
        ([{"a": 1}, RuntimeError("bug")], "crashed"),
        ([{"a": 1}], "contract"),
        ([{"done": {}}, {"a": 1}], "contract"),
        ([{"done": {}}, {"done": {}}], "contract"),
    ],
)
def test_an_operation_that_breaks_later_says_so_in_its_last_line(
    scene: Scene, items: list[Item | Exception], code: str
) -> None:
    scene.plugin.items["add"] = items
    status, lines = scene.post("/mesh/v1/plugins/llama/add")
    assert status == 200
    assert (lines[-1]["event"], lines[-1]["code"]) == ("error", code)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("llama/fly", "it has add"),
        ("nobody/add", "not installed"),
    ],
)
def test_what_there_is_not_is_told(scene: Scene, path: str, why: str) -> None:
    scene.plugin.items["add"] = []
    status, [body] = scene.post(f"/mesh/v1/plugins/{path}")
    assert (status, body["error"]["code"]) == (404, "unknown_operation")
    assert why in body["error"]["message"]


def test_a_client_that_goes_ends_what_it_asked_for(scene: Scene) -> None:
    scene.plugin.items["endless"] = [{"stage": "downloading"}]

    def use() -> None:
        connection = UnixConnection(scene.socket)
        connection.request("POST", "/mesh/v1/plugins/llama/endless", body=b"{}")
        answer = connection.getresponse()
        assert json.loads(answer.readline())["stage"] == "downloading"
        assert json.loads(answer.readline()) == {"event": "waiting"}
        answer.close()
        connection.close()
        trio.from_thread.run(scene.plugin.closed.wait)

    scene.run(use)


# -- the command line ----------------------------------------------------------------------------------------


def test_list_shows_models_of_every_kind(scene: Scene) -> None:
    scene.plugin.items["list"] = [{"done": {"models": [ROW, COMING, ILL]}}]
    done = scene.meshd("list")
    assert done.exit_code == 0
    title, tiny, big, ill = done.stdout.splitlines()
    assert title.split()[:6] == ["MODEL", "SIZE", "QUANT", "NAMES", "READS", "STATE"]
    for cell in ("98.4 MB", "Q4_1", "knowledge.gpt/x", "serving", "240 MB", "380.5", "41"):
        assert cell in tiny
    assert "downloading 43%" in big
    assert "quarantined" in ill
    assert done.stderr.startswith("ill: it needs 9 GB")
    assert "\x1b" not in done.stderr
    listed = json.loads(scene.meshd("list", "--json").stdout)
    assert [row["id"] for row in listed] == ["tiny", "big", "ill"]


def test_add_sends_what_was_said_and_tells_the_outcome(
    scene: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    scene.plugin.items["add"] = [{"stage": "hashing", "bytes": 1}, {"done": ROW}]
    options = ["--name", "knowledge.gpt/x", "--context", "512", "--set", "gpu_layers=3"]
    done = scene.meshd("add", "m.gguf", *options, "--set", "privacy=lan", "--lora", "style")
    assert done.exit_code == 0
    assert "added tiny (Tiny, 98.4 MB, Q4_1)" in done.stdout
    assert done.stderr == "hashing\n"  # where nobody watches, only the stages
    [(_, arguments)] = scene.plugin.asked
    assert arguments == {
        "source": str(tmp_path / "m.gguf"),
        "names": ["knowledge.gpt/x"],
        "id": "",
        "sha256": "",
        "lora": ["style"],
        "projector": "",
        "allow_http": False,
        "wait": True,
        "options": {"context": 512, "gpu_layers": 3, "privacy": "lan"},
    }
    for source in ("hf:o/r/m.gguf", "pypi:x", "https://h/m.gguf"):
        scene.meshd("add", source)
        assert scene.plugin.asked[-1][1]["source"] == source


def test_a_model_that_cannot_be_served_is_a_failure_with_its_reason(scene: Scene) -> None:
    scene.plugin.items["add"] = [{"done": {**ILL, "size_bytes": 5}}]
    done = scene.meshd("add", "/m.gguf")
    assert done.exit_code == Exit.FAILED
    assert "it needs 9 GB" in done.stderr


def test_errors_are_one_line_and_a_status(scene: Scene) -> None:
    scene.plugin.items["add"] = [{"stage": "reading"}, Failed("no GGUF", code="not_gguf")]
    done = scene.meshd("add", "/m.gguf")
    assert (done.exit_code, done.stderr) == (Exit.FAILED, "reading\nmeshd: no GGUF\n")
    done = scene.meshd("add", "/m.gguf", "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["event"] for line in lines] == ["progress", "error"]
    scene.plugin.items["add"] = [BadRequest("write it so", code="bad_request")]
    assert scene.meshd("add", "x.gguf").exit_code == Exit.USAGE
    assert scene.meshd("add", "x.gguf", "--set", "nonsense").exit_code == Exit.USAGE


def test_a_node_without_language_models_says_what_is_missing(scene: Scene) -> None:
    done = scene.meshd("list")
    assert done.exit_code == Exit.NOT_SERVED
    assert "edge-meshd[llama]" in done.stderr


def test_verify_fails_where_one_file_is_damaged(scene: Scene) -> None:
    rows: list[Item] = [
        {"id": "tiny", "sound": True, "sha256": "ab", "compared": True},
        {"id": "ill", "sound": False, "reason": "another digest"},
    ]
    scene.plugin.items["verify"] = [{"done": {"models": rows, "sound": False}}]
    done = scene.meshd("verify")
    assert done.exit_code == Exit.FAILED
    assert done.stdout.splitlines() == ["tiny  sound  ab", "ill  DAMAGED  another digest"]
    scene.plugin.items["verify"] = [{"done": {"models": rows[:1], "sound": True}}]
    assert scene.meshd("verify", "tiny").exit_code == 0
    assert scene.plugin.asked[-1][1] == {"id": "tiny"}


def test_remove_asks_first(scene: Scene) -> None:
    done = scene.meshd("remove", "tiny")
    assert (done.exit_code, scene.plugin.asked) == (Exit.USAGE, [])
    assert "--yes" in done.stderr
    removed: Item = {"id": "tiny", "freed_bytes": 98_400_000, "left": ""}
    scene.plugin.items["remove"] = [{"done": removed}]
    done = scene.meshd("remove", "tiny", "--yes")
    assert done.stdout == "removed tiny; 98.4 MB are free again\n"
    scene.plugin.items["remove"] = [{"done": {**removed, "left": "/srv/m.gguf"}}]
    assert "stays: /srv/m.gguf" in scene.meshd("remove", "tiny", "--yes").stdout


def test_bench_shows_its_figures(scene: Scene) -> None:
    figures: Item = {
        "id": "tiny",
        "prefill_tokens_per_s_by_length": {"512": 390.0, "128": 350.5},
        "decode_tokens_per_s_by_batch": {"1": 40.0, "8": 120.0, "2": 70.0},
        "resident_bytes": 240_000_000,
        "load_s": 1.5,
    }
    measured: Item = {"phase": "decode of 2", "tokens_per_s": 70.25}
    scene.plugin.items["bench"] = [measured, {"done": figures}]
    done = scene.meshd("bench", "tiny")
    assert done.stderr == "decode of 2: 70.25 tokens/s\n"
    lines = done.stdout.splitlines()
    assert [line.split() for line in lines[1:6]] == [
        ["prefill", "128", "tokens", "350.5"],
        ["prefill", "512", "tokens", "390"],
        ["decode", "1", "stream", "40"],
        ["decode", "2", "streams", "70"],
        ["decode", "8", "streams", "120"],
    ]
    assert lines[-1] == "tiny: 240 MB of memory, loads in 1.50 s"


def test_a_model_that_was_left_out_is_tried_again(scene: Scene) -> None:
    scene.plugin.items["retry"] = [{"done": {"id": "ill", "state": "serving"}}]
    done = scene.meshd("retry", "ill")
    assert (done.exit_code, scene.plugin.asked) == (0, [("retry", {"id": "ill"})])
    assert done.stdout == "ill: serving\n"


@pytest.mark.parametrize("columns", [20, 40, 60, 80, 120])
def test_a_line_of_progress_fits_the_terminal(columns: int) -> None:
    item: Item = {"bytes": 1_200_000_000, "total": 2_800_000_000}
    line = progress_text("downloading (1 of 3)", item, 11e6, columns)
    assert cell_width(line) <= columns
    if columns >= 120:
        assert "43%" in line
        assert "1.2 GB of 2.8 GB" in line
        assert "11 MB/s" in line
        assert "2 min left" in line
