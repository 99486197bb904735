"""The library's folder: descriptions that are believed only whole, and changes that a power cut may end."""

import hashlib
import os
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshd_plugins.api import ModelFacts, Value
from meshd_plugins.builtin.llama.config import ModelConfig
from meshd_plugins.builtin.llama.models.digest import Mark, forget, open_verified, remember
from meshd_plugins.builtin.llama.models.entries import (
    Entry,
    FlawedDescription,
    config_ids,
    disclose,
    enclose,
    free_id,
    is_id,
    slug,
)
from meshd_plugins.builtin.llama.models.folder import ModelFolder
from meshd_plugins.builtin.llama.models.kinds import Kind

DIGEST = "ab" * 32
FACTS = ModelFacts(
    digest=DIGEST,
    family="Tiny",
    architecture="llama",
    parameters=7,
    quantisation="Q4_1",
    context_tokens=512,
    size_bytes=99,
)
ENTRY = Entry(
    id="tiny",
    path="/srv/Tiny.gguf",
    kept=False,
    sha256=DIGEST,
    size_bytes=99,
    source="hf:o/r/Tiny.gguf@c0ffee",
    facts=FACTS,
    kind=Kind.MODEL,
    names=("knowledge.gpt/general", "knowledge.gpt/tiny"),
    options={"context": 512, "lora": [{"path": "/a.gguf", "sha256": DIGEST}]},
    added_at_s=1_700_000_000,
)


def kept(entry_id: str = "tiny") -> Entry:
    return replace(ENTRY, id=entry_id, kept=True)


def loaded(path: Path) -> ModelFolder:
    folder = ModelFolder(path)
    folder.load()
    return folder


def put(folder: ModelFolder, entry: Entry) -> Entry:
    """An entry with its file, as `meshd model add` puts it there."""
    arrived = folder.path / "begun" / "arrived"
    arrived.write_bytes(b"GGUF")
    entry = replace(entry, path=str(folder.place(arrived, entry.id)))
    folder.save(entry)
    return entry


def test_a_state_folder_that_was_moved_takes_adapters_and_projectors_along(tmp_path: Path) -> None:
    folder = loaded(tmp_path / "old")
    beside = [
        put(folder, replace(kept(each.value), kind=each, names=(), options={}))
        for each in (Kind.ADAPTER, Kind.PROJECTOR)
    ]
    options: dict[str, Value] = {
        "context": 512,
        "lora": [{"path": beside[0].path, "sha256": DIGEST}, {"path": "/elsewhere.gguf"}],
        "projector": beside[1].path,
    }
    put(folder, replace(kept(), options=options))
    (tmp_path / "old").rename(tmp_path / "new")
    found = {entry.id: entry for entry in ModelFolder(tmp_path / "new").load().entries}
    assert found["tiny"].uses == (
        str(tmp_path / "new" / "adapter.gguf"),
        "/elsewhere.gguf",
        str(tmp_path / "new" / "projector.gguf"),
    )
    assert {entry.path for entry in found.values()} == {
        str(tmp_path / "new" / f"{name}.gguf") for name in ("tiny", "adapter", "projector")
    }


def test_a_description_reads_back() -> None:
    assert disclose(enclose(ENTRY)) == ENTRY
    bare = replace(ENTRY, facts=None, names=(), options={})
    assert disclose(enclose(bare)) == bare


@given(st.data())
def test_any_change_of_a_description_is_found(data: st.DataObject) -> None:
    raw = bytearray(enclose(ENTRY))
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    with pytest.raises(FlawedDescription):
        disclose(bytes(raw))
    with pytest.raises(FlawedDescription):
        disclose(bytes(raw[:place]))


@given(st.binary(max_size=300))
def test_any_bytes_are_refused_quietly(raw: bytes) -> None:
    with pytest.raises(FlawedDescription):
        disclose(raw)


@pytest.mark.parametrize(
    "change",
    [
        {"id": "../x"},
        {"sha256": "x"},
        {"options": {"contxt": 1}},
        {"size_bytes": "9"},
        {"names": (7,)},
        {"facts": replace(FACTS, family="a\nb")},
    ],
)
def test_a_description_that_cannot_be_is_refused_although_its_checksum_fits(
    change: dict[str, object],
) -> None:
    with pytest.raises(FlawedDescription):
        disclose(enclose(replace(ENTRY, **change)))  # type: ignore[arg-type]


def test_ids() -> None:
    assert slug("SmolLM2 135M/Q4_1") == "smollm2-135m-q4_1"
    assert slug("§") == "model"
    assert is_id(slug("x" * 300))
    assert free_id("a", ["a", "a-2"]) == "a-3"
    models = [ModelConfig(path, ("knowledge.gpt/x",)) for path in ("pypi:A_b", "/m/a_b.gguf")]
    assert config_ids(models) == ("a_b", "a_b-2")


@given(st.text(max_size=100))
def test_anything_has_an_id(text: str) -> None:
    assert is_id(slug(text))


def test_entries_read_back_and_a_moved_folder_is_no_matter(tmp_path: Path) -> None:
    folder = loaded(tmp_path / "one")
    entry = put(folder, kept())
    folder.save(replace(ENTRY, id="linked"))
    (tmp_path / "one").rename(tmp_path / "two")
    found = ModelFolder(tmp_path / "two").load()
    assert [each.id for each in found.entries] == ["linked", "tiny"]
    assert found.entries[1] == replace(entry, path=str(tmp_path / "two" / "tiny.gguf"))
    assert (found.strays, found.damaged) == ((), ())


def test_a_damaged_description_harms_nobody_else(tmp_path: Path) -> None:
    folder = loaded(tmp_path)
    put(folder, kept("one"))
    put(folder, kept("two"))
    (tmp_path / "one.model").write_bytes(b"noise")
    (tmp_path / "two.model").rename(tmp_path / "three.model")  # another model's name
    os.mkfifo(tmp_path / "four.model")
    (tmp_path / "five.model").symlink_to("/etc/passwd")
    found = folder.load()
    assert found.entries == ()
    assert found.strays == ("one", "two")
    assert found.damaged == ("five", "four", "one", "three")
    assert folder.load().damaged == ()
    assert (tmp_path / "one.model.damaged").read_bytes() == b"noise"


class PowerCut(BaseException):
    """The machine is off."""


def cut_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """After so many changes of names, no further one is made."""
    left = [calls]

    def counted(name: str) -> None:
        real = getattr(Path, name)

        def change(self: Path, *arguments: object, **named: object) -> object:
            if left[0] == 0:
                raise PowerCut
            left[0] -= 1
            return real(self, *arguments, **named)

        monkeypatch.setattr(Path, name, change)

    counted("rename")
    counted("unlink")


@pytest.mark.parametrize("calls", range(8))
def test_a_power_cut_while_a_model_is_taken_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    folder = loaded(tmp_path)
    with monkeypatch.context() as patch:
        cut_after(patch, calls)
        with suppress(PowerCut):
            put(folder, kept())
    found = ModelFolder(tmp_path).load()
    for entry in found.entries:
        assert Path(entry.path).read_bytes() == b"GGUF"
    here = (tmp_path / "tiny.gguf").exists()
    assert here == bool(found.entries or found.strays)
    assert found.damaged == ()


@pytest.mark.parametrize("calls", range(6))
def test_a_power_cut_while_a_model_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    folder = loaded(tmp_path)
    entry = put(folder, kept())
    with monkeypatch.context() as patch:
        cut_after(patch, calls)
        with suppress(PowerCut):
            folder.forget(entry)
    found = ModelFolder(tmp_path).load()
    left = sorted(path.name for path in tmp_path.iterdir())
    if found.entries:  # it had not begun
        assert left == ["begun", "tiny.gguf", "tiny.model"]
    else:
        assert left == ["begun"]
    assert found.strays == ()


def test_what_has_begun_to_arrive(tmp_path: Path) -> None:
    folder = loaded(tmp_path)
    begun, place = folder.begin("https://h/m.gguf", "m")
    assert folder.begin("https://h/m.gguf", "m") == (begun, place)
    (place / "part-1").write_bytes(b"x" * 70_000)
    assert [(each, folder.arrived_bytes(each)) for each in folder.begun()] == [(begun, 70_000)]
    folder.give_up("https://h/m.gguf")
    assert folder.begun() == (begun,)
    (place / "part-1").write_bytes(b"")
    folder.give_up("https://h/m.gguf")
    assert (folder.begun(), place.exists()) == ((), False)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{}",
        b"[1]",
        b'{"key":1,"id":2,"source":3}',
        b"\xff",
        b'{"key":"../..","id":"m","source":"x"}',
    ],
)
def test_a_note_that_is_none_is_thrown_away(tmp_path: Path, raw: bytes) -> None:
    folder = loaded(tmp_path)
    begun, place = folder.begin("https://h/m.gguf", "m")
    (tmp_path / "begun" / f"{begun.key}.json").write_bytes(raw)
    assert folder.begun() == ()
    assert not place.exists()


def test_room_is_what_is_allowed_less_what_is_used(tmp_path: Path) -> None:
    folder = ModelFolder(tmp_path, disk_mib_max=1)
    folder.load()
    (tmp_path / "other.gguf").write_bytes(b"x" * 600_000)
    to = tmp_path / "begun" / "part"
    to.write_bytes(b"x" * 100_000)
    room = folder.room(to)
    assert room.bytes == (1 << 20) - 600_000  # what is here of it counts for it
    assert "disk_mib_max allows 1 MiB" in room.why
    (tmp_path / "other.gguf").write_bytes(b"x" * (2 << 20))
    assert folder.room(to).bytes == 100_000


def test_a_remembered_digest_spares_the_reading_until_it_is_forgotten(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"GGUF")
    with path.open("rb") as file:
        mark = Mark.of(file.fileno())
    remember(path, tmp_path, mark, DIGEST)
    for expected in (DIGEST, hashlib.sha256(b"GGUF").hexdigest()):
        file_found = open_verified(path, tmp_path)
        file_found.close()
        assert file_found.digest == expected
        forget(path, tmp_path)
