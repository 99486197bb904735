"""What is hashed is what is loaded, and a remembered digest is never a stale one."""

import hashlib
import json
import os
import time
from pathlib import Path

import pytest

from meshd_plugins.api import PluginConfigError
from meshd_plugins.builtin.llama.config import read_config
from meshd_plugins.builtin.llama.models.digest import (
    DIGEST_CACHE_FILE,
    DIGESTS_MAX,
    Mark,
    ModelRefused,
    open_verified,
)

LATER_NS = 10_000_000_000
FAKE = "c" * 64


def later() -> int:
    """A clock on which every file of the test has been at rest for a while."""
    return time.time_ns() + LATER_NS


def digest(path: Path, state: Path, expected: str = "") -> str:
    file = open_verified(path, state, expected, now_ns=later)
    file.close()
    return file.digest


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"weights")
    return path


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


def poison(state: Path) -> None:
    """Make the cache lie, so that one sees whether it was used."""
    cache = state / DIGEST_CACHE_FILE
    cache.write_text(cache.read_text().replace(sha256(b"weights"), FAKE))


def test_the_file_of_the_configured_digest_is_opened(model: Path, state: Path) -> None:
    file = open_verified(model, state, sha256(b"weights"))
    assert os.pread(file.descriptor, 100, 0) == b"weights"
    assert not os.get_inheritable(file.descriptor)
    model.unlink()
    model.write_bytes(b"another")
    assert os.pread(file.descriptor, 100, 0) == b"weights"
    file.close()
    file.close()


def test_another_digest_is_refused_with_both(model: Path, state: Path) -> None:
    with pytest.raises(ModelRefused, match=f"{sha256(b'weights')}.*{FAKE}") as refused:
        open_verified(model, state, FAKE)
    assert refused.value.code == "digest_mismatch"


def test_a_digest_is_remembered_while_the_file_is_as_it_was(model: Path, state: Path) -> None:
    assert digest(model, state) == sha256(b"weights")
    poison(state)
    assert digest(model, state) == FAKE


def test_any_change_has_it_hashed_again(model: Path, state: Path) -> None:
    digest(model, state)
    poison(state)
    seen = model.stat()
    with model.open("r+b") as file:
        file.write(b"WEIGHTS")
    os.utime(model, ns=(seen.st_atime_ns, seen.st_mtime_ns))
    assert model.stat().st_mtime_ns == seen.st_mtime_ns  # the time of change gives it away
    assert digest(model, state) == sha256(b"WEIGHTS")
    poison(state)
    model.unlink()
    model.write_bytes(b"weights")
    assert digest(model, state) == sha256(b"weights")


def test_a_file_that_changed_just_now_is_not_remembered(model: Path, state: Path) -> None:
    file = open_verified(model, state, now_ns=lambda: model.stat().st_ctime_ns + 1)
    file.close()
    assert not (state / DIGEST_CACHE_FILE).exists()


def test_a_file_that_changes_while_it_is_hashed_is_refused(model: Path, state: Path) -> None:
    def clock() -> int:  # read after the mark was taken and before the file is
        model.write_bytes(b"longer than before")
        return later()

    with pytest.raises(ModelRefused, match="being written to") as refused:
        open_verified(model, state, now_ns=clock)
    assert refused.value.code == "changing"


def test_what_is_no_file_is_refused_at_once(tmp_path: Path, state: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path):
        with pytest.raises(ModelRefused, match="no regular file"):
            open_verified(path, state)
    with pytest.raises(FileNotFoundError):
        open_verified(tmp_path / "absent", state)


def test_a_damaged_cache_or_one_that_cannot_be_written_costs_only_time(
    model: Path, state: Path, tmp_path: Path
) -> None:
    for damage in ("{broken", "[]", '{"x": [1]}', '{"x": null}'):
        (state / DIGEST_CACHE_FILE).write_text(damage)
        assert digest(model, state) == sha256(b"weights")
    nowhere = tmp_path / "file"
    nowhere.write_text("in the way of the folder")
    assert digest(model, nowhere) == sha256(b"weights")


def test_the_cache_is_bounded(model: Path, state: Path) -> None:
    full = {f"/old/{n}": [0, 0, 0, 0, 0, FAKE] for n in range(DIGESTS_MAX)}
    (state / DIGEST_CACHE_FILE).write_text(json.dumps(full))
    digest(model, state)
    kept = json.loads((state / DIGEST_CACHE_FILE).read_text())
    assert len(kept) == DIGESTS_MAX
    assert str(model) in kept
    assert "/old/0" not in kept


def test_a_mark_tells_new_content_from_a_new_link(model: Path) -> None:
    with model.open("rb") as file:
        before = Mark.of(file.fileno())
        os.link(model, model.with_suffix(".link"))
        linked = Mark.of(file.fileno())
        assert linked.holds_the_same(before)
        with model.open("ab") as other:
            other.write(b"more")
        assert not Mark.of(file.fileno()).holds_the_same(before)


@pytest.mark.parametrize("value", ["abc", 5, "g" * 64, "a" * 63])
def test_a_digest_in_the_configuration_is_64_digits(value: str | int) -> None:
    entry = {"path": "/m.gguf", "names": ["knowledge.gpt/x"]}
    with pytest.raises(PluginConfigError, match="sha256sum"):
        read_config({"models": [{**entry, "sha256": value}]})
    [model] = read_config({"models": [{**entry, "sha256": "AB" * 32}]})
    assert model.sha256 == "ab" * 32
