"""The files of a node's standing: what was kept comes back, and no damage does more than lose it."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from tests.shell.support_log import KeptLog

from meshd.shell.trust_files import Known, TrustFiles
from meshd.shell.trust_state import load_trust
from meshd.trust.certificates import Role
from meshd.trust.identity import init_mesh
from meshd.trust.keyring import DatagramKey
from meshd_cms.types import NodeId

NODE = NodeId(b"n" * 16)
KEYS = (DatagramKey(4, b"k" * 32), DatagramKey(3, b"j" * 32))
FILES = ("certificate", "keyring", "decrees", "roster")


def files(folder: Path) -> tuple[TrustFiles, KeptLog]:
    log = KeptLog()
    return TrustFiles(folder, log), log


def filled(folder: Path) -> TrustFiles:
    made, _ = files(folder)
    identity = init_mesh(folder / "other", "home")
    assert made.keep_certificate(identity.chain)
    assert made.keep_keyring(KEYS)
    assert made.keep_decrees([b"one", b"two"])
    assert made.keep_roster([Known(NODE, Role.OBSERVER, "kitchen")])
    assert made.certificate() == identity.chain
    return made


def test_what_was_kept_comes_back_and_only_its_owner_can_read_it(tmp_path: Path) -> None:
    filled(tmp_path)
    again, log = files(tmp_path)
    assert again.keyring() == KEYS
    assert again.decrees() == (b"one", b"two")
    assert again.roster() == (Known(NODE, Role.OBSERVER, "kitchen"),)
    assert log.events() == []
    for path in (tmp_path / "trust").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "trust").stat().st_mode) == 0o700


def test_nothing_there_is_nothing_kept(tmp_path: Path) -> None:
    empty, log = files(tmp_path)
    assert empty.certificate() is None
    assert empty.keyring() == empty.decrees() == empty.roster() == ()
    assert log.events() == []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "other"])
def test_a_damaged_file_is_set_aside_and_the_others_are_whole(
    tmp_path: Path, name: str, damage: str
) -> None:
    filled(tmp_path)
    path = tmp_path / "trust" / name
    content = path.read_bytes()
    match damage:
        case "flipped":
            path.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
        case "cut":
            path.write_bytes(content[:-1])
        case "empty":
            path.write_bytes(b"")
        case _:
            other = "decrees" if name != "decrees" else "roster"
            path.write_bytes((tmp_path / "trust" / other).read_bytes())
    again, log = files(tmp_path)
    read = {
        "certificate": again.certificate(),
        "keyring": again.keyring(),
        "decrees": again.decrees(),
        "roster": again.roster(),
    }
    assert not read.pop(name)
    assert all(read.values())
    assert log.events() == ["trust.set_aside"]
    assert not path.exists()
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(f"{name}.damaged-")]


@pytest.mark.parametrize("content", [[], [b"no certificate"], "text", None])
def test_a_good_checksum_over_something_else_is_damage_too(tmp_path: Path, content: object) -> None:
    from meshd.shell.envelope import enclose
    from meshd_cms.packing import pack

    made, log = files(tmp_path)
    (tmp_path / "trust" / "certificate").write_bytes(enclose("certificate", 1, pack(content)))
    assert made.certificate() is None
    assert log.events() == ["trust.set_aside"]


def test_a_node_whose_files_are_all_lost_starts_with_what_it_joined_with(tmp_path: Path) -> None:
    identity = init_mesh(tmp_path, "home")
    log = KeptLog()
    folder = tmp_path / "trust"
    folder.mkdir(mode=0o700)
    for name in FILES:
        (folder / name).write_bytes(b"\x00" * 100)
    state = load_trust(tmp_path, identity, certificate_days=7.0, log=log)
    assert state.ring.current == DatagramKey(0, identity.datagram_key)
    assert state.identity == identity
    assert state.verdict.is_good
    assert log.events() == ["trust.set_aside"] * len(FILES)


def test_the_certificate_of_another_node_is_not_used(tmp_path: Path) -> None:
    identity = init_mesh(tmp_path, "home")
    made, log = files(tmp_path)
    made.keep_certificate(init_mesh(tmp_path / "other", "home").chain)
    assert load_trust(tmp_path, identity, certificate_days=7.0, log=log).identity == identity
    assert log.events() == ["certificate.rejected"]


def test_a_disk_that_refuses_is_told_once_and_nothing_is_raised(tmp_path: Path) -> None:
    (tmp_path / "trust").write_bytes(b"a file where the folder should be")
    refused, log = files(tmp_path)
    assert not refused.keep_keyring(KEYS)
    assert not refused.keep_decrees([])
    assert refused.keyring() == ()
    assert log.events().count("trust.write_refused") == 1
