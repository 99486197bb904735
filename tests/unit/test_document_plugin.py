"""Files served as data.gpt objects."""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import pytest
import trio
import trio.testing

from meshd_plugins.api import (
    BackgroundTask,
    BadRequest,
    Chunk,
    Failed,
    Operation,
    PluginConfigError,
    Refused,
    Value,
)
from meshd_plugins.builtin import document
from meshd_plugins.builtin.document import CHUNK_BYTES, HASH_AT_ONCE_BYTES_MAX
from meshd_plugins.testing import FakeCapabilities, check_capability, fake_context, make_request

FETCH = make_request(Operation.FETCH)
CONTENT = os.urandom(CHUNK_BYTES) + b"tail"


def serve(
    tmp_path: Path, files: Value, **more: Value
) -> tuple[FakeCapabilities, BackgroundTask | None]:
    capabilities = FakeCapabilities()
    context = fake_context(
        "document", tmp_path, {"files": files, **more}, capabilities=capabilities
    )
    document.meshd_register(context)
    return capabilities, document.meshd_background(context)


def test_a_file_is_fetched_whole_and_keeps_the_contract(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(CONTENT)
    capabilities, background = serve(tmp_path, {"data.gpt/notes": str(path)})
    assert background is None
    [capability] = capabilities.added
    announced = {
        "size_bytes": len(CONTENT),
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "content_type": "text/plain",
    }
    assert capability.descriptor.fields == announced
    checked = trio.run(check_capability, capability, FETCH)
    assert checked.data == CONTENT
    assert [len(chunk.data) for chunk in checked.chunks] == [CHUNK_BYTES, 4]
    assert {chunk.content_type for chunk in checked.chunks} == {"text/plain"}
    assert checked.done.detail == announced
    assert capabilities.replaced == []


@pytest.mark.parametrize("size_bytes", [0, 1, CHUNK_BYTES, 2 * CHUNK_BYTES])
def test_every_size_is_fetched_whole(size_bytes: int, tmp_path: Path) -> None:
    path = tmp_path / "object.unknowntype"
    path.write_bytes(b"x" * size_bytes)
    capabilities, _ = serve(tmp_path, {"data.gpt/object": str(path)})
    checked = trio.run(check_capability, capabilities.added[0], FETCH)
    assert checked.data == b"x" * size_bytes
    assert checked.done.detail["content_type"] == "application/octet-stream"


def test_a_changed_file_is_announced_anew_by_the_next_fetch(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("old")
    capabilities, _ = serve(tmp_path, {"data.gpt/notes": str(path)})
    path.write_text("newer")
    [capability] = capabilities.added
    checked = trio.run(check_capability, capability, FETCH)
    assert checked.data == b"newer"
    assert capabilities.replaced == ["data.gpt/notes"]
    assert capability.descriptor.fields["size_bytes"] == 5
    assert capability.descriptor.fields["sha256"] == checked.done.detail["sha256"]


def test_a_file_that_changes_while_it_is_read_fails_and_is_never_a_mix(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(CONTENT)
    capabilities, _ = serve(tmp_path, {"data.gpt/notes": str(path)})

    async def main() -> None:
        stream = capabilities.added[0].invoke(FETCH)
        first = await anext(stream)
        assert isinstance(first, Chunk)
        path.write_bytes(CONTENT.swapcase() + b"more")
        with pytest.raises(Failed, match="changed while it was being read"):
            await anext(stream)
        await stream.aclose()

    trio.run(main)


def test_a_file_that_is_gone_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("here")
    capabilities, _ = serve(tmp_path, {"data.gpt/notes": str(path)})
    path.unlink()
    with pytest.raises(Refused) as caught:
        trio.run(check_capability, capabilities.added[0], FETCH)
    assert caught.value.code == "not_here"


def test_a_file_that_grew_beyond_the_bound_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("12345")
    capabilities, _ = serve(tmp_path, {"data.gpt/notes": str(path)}, size_bytes_max=5)
    path.write_text("123456")
    with pytest.raises(Refused) as caught:
        trio.run(check_capability, capabilities.added[0], FETCH)
    assert caught.value.code == "too_large"


def test_only_fetching_is_possible(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("x")
    capabilities, _ = serve(tmp_path, {"data.gpt/notes": str(path)})

    async def main() -> None:
        with pytest.raises(BadRequest):
            await anext(capabilities.added[0].invoke(make_request(Operation.CHAT)))

    trio.run(main)


def test_a_large_file_is_announced_by_the_background_task(tmp_path: Path) -> None:
    path = tmp_path / "large.bin"
    path.write_bytes(b"z" * (HASH_AT_ONCE_BYTES_MAX + 1))
    capabilities, background = serve(tmp_path, {"data.gpt/large": str(path)})
    assert capabilities.added == ()
    assert background is not None

    async def main() -> None:
        await background()

    trio.run(main)
    [capability] = capabilities.added
    assert capability.descriptor.fields["size_bytes"] == HASH_AT_ONCE_BYTES_MAX + 1


def test_the_list_form_has_summaries(tmp_path: Path) -> None:
    path = tmp_path / "notes.md"
    path.write_text("# Notes")
    capabilities, _ = serve(
        tmp_path, [{"name": "data.gpt/notes", "path": str(path), "summary": "My notes"}]
    )
    assert capabilities.added[0].descriptor.summary == "My notes"


@pytest.mark.parametrize(
    ("table", "says"),
    [
        ({"file": []}, "plugins.document.file is no setting"),
        ({"files": "notes.txt"}, "must be a table of name = path"),
        ({"files": ["notes.txt"]}, "must be a table of name = path"),
        ({"files": {"notes": "GOOD"}}, "must begin with data.gpt/"),
        ({"files": {"data.gpt/notes": 3}}, "must be the path of a file"),
        ({"files": {"data.gpt/not a name!": "GOOD"}}, "not a name!"),
        ({"files": {"data.gpt/notes": "/no/such/file.txt"}}, "/no/such/file.txt.*No such file"),
        ({"files": {"data.gpt/notes": "/dev/null"}}, "no regular file"),
        ({"files": {"data.gpt/notes": "/"}}, "no regular file"),
        ({"files": {"data.gpt/notes": "GOOD"}, "size_bytes_max": 2}, "size_bytes_max is 2"),
        ({"files": {}, "size_bytes_max": 0}, "at least 1"),
        ({"files": [{"name": "data.gpt/x", "path": "GOOD", "colour": 1}]}, "colour is no setting"),
        ({"files": [{"name": "data.gpt/x", "path": "GOOD", "summary": ""}]}, "one line"),
        ({"files": [{"name": "data.gpt/x", "path": "GOOD"}] * 2}, "'data.gpt/x' twice"),
    ],
)
def test_a_wrong_table_says_what_is_wrong(
    table: dict[str, Value], says: str, tmp_path: Path
) -> None:
    good = tmp_path / "good.txt"
    good.write_text("good")

    def placed(value: Value) -> Value:
        match value:
            case "GOOD":
                return str(good)
            case list():
                return [placed(item) for item in value]
            case Mapping():
                return {key: placed(item) for key, item in value.items()}
            case _:
                return value

    config = {key: placed(value) for key, value in table.items()}
    with pytest.raises(PluginConfigError, match=says):
        document.meshd_register(fake_context("document", tmp_path, config))


def test_no_files_is_no_error(tmp_path: Path) -> None:
    capabilities = FakeCapabilities()
    document.meshd_register(fake_context("document", tmp_path, capabilities=capabilities))
    assert capabilities.added == ()
