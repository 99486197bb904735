"""The audit trail: what is written, when, how much of it is kept, and that a change to it shows."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.shell.support_log import KeptLog
from tests.shell.support_streams import settled

from meshd.orchestrate.audit import WAITING_MAX, Audit, Wanted
from meshd.orchestrate.audit_chain import Head, sealed, verified
from meshd.orchestrate.audit_files import FILES_MAX, AuditFiles

NOW_S = 1_800_000_000.0


class Clock:
    """A wall clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s


def trail(folder: Path, clock: Callable[[], float] = Clock(), *, keep: bool = True) -> Audit:  # noqa: B008
    return Audit(folder, size_bytes_max=65_536, keep=keep, unix_s=clock, log=KeptLog())


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


def written(folder: Path, count: int = 12) -> list[str]:
    """A trail of some lines, and those lines."""
    AuditFiles(folder, 65_536).append([{"kind": "left", "to": f"n{i}"} for i in range(count)])
    return files(folder)[0].read_text().splitlines()


def test_lines_are_written_together_a_moment_later_and_an_idle_node_writes_nothing(
    tmp_path: Path,
) -> None:
    async def body(audit: Audit) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(audit.run)
            await trio.testing.wait_all_tasks_blocked()
            assert not (tmp_path / "audit").exists()
            for number in range(100):
                audit.record("left", to="cloud", request=f"r-{number}")
            await settled(lambda: audit.statistics.flushes > 0)
            await trio.testing.wait_all_tasks_blocked()  # and now it waits for what comes
            assert audit.statistics.flushes == 1
            nursery.cancel_scope.cancel()
        found = await audit.read(Wanted())
        assert [line["request"] for line in found] == [f"r-{number}" for number in range(100)]

    # A clock that runs fast; autojump would jump while the disk's thread is at work.
    clock = trio.testing.MockClock(rate=200.0)
    trio.run(body, trail(tmp_path / "audit"), clock=clock)


def test_it_is_for_its_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "audit"
    written(folder)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_what_is_wanted_is_found_newest_first_told_oldest_first(tmp_path: Path) -> None:
    async def body() -> None:
        clock = Clock()
        audit = trail(tmp_path, clock)
        audit.record("left", to="abcdef", to_name="pi", privacy="mesh")
        clock.now_s += 60
        audit.record("left", to="cloud", to_name="cloud", privacy="cloud")
        audit.record("served", to="abcxyz", to_name="nano", privacy="lan")
        audit.record("key_created", key="phone")

        async def found(**wanted: object) -> list[object]:
            return [line["n"] for line in await audit.read(Wanted(**wanted))]  # type: ignore[arg-type]

        assert await found() == [2, 3, 4, 5]  # the first says where the file begins
        assert await found(since_s=NOW_S + 1) == [3, 4, 5]
        assert await found(to="pi") == [2]
        assert await found(to="abc") == [2, 4]
        assert await found(to="cloud") == await found(privacy="cloud") == [3]
        assert await found(kind="served") == [4]
        assert await found(after=3) == [4, 5]
        assert await found(limit=1) == [5]
        assert all("chain" not in line for line in await audit.read(Wanted()))

    trio.run(body)


def test_one_that_is_not_kept_leaves_no_file(tmp_path: Path) -> None:
    async def body() -> None:
        audit = trail(tmp_path / "audit", keep=False)
        audit.record("left", to="cloud")
        assert await audit.read(Wanted()) == []
        assert not (tmp_path / "audit").exists()

    trio.run(body)


def test_a_disk_that_refuses_stops_nothing_and_what_was_lost_is_said(tmp_path: Path) -> None:
    async def body() -> None:
        folder = tmp_path / "audit"
        folder.write_text("in the way")
        log = KeptLog()
        audit = Audit(folder, size_bytes_max=65_536, keep=True, unix_s=Clock(), log=log)
        for _ in range(2):
            audit.record("left", to="pi")
            await audit.flush()
        assert audit.statistics.lost == 2
        assert [event for _, event, _ in log.lines] == ["audit.refused"]  # told once
        folder.unlink()
        audit.record("left", to="nano")
        lines = await audit.read(Wanted())
        assert [(line["kind"], line.get("lines")) for line in lines] == [
            ("left", None),
            ("lost", 2),
        ]
        assert (await audit.verify()).problems == ()

    trio.run(body)


def test_what_waits_is_bounded(tmp_path: Path) -> None:
    async def body() -> None:
        audit = trail(tmp_path)
        for _ in range(WAITING_MAX + 3):
            audit.record("left")
        assert audit.statistics.lost == 3

    trio.run(body)


def test_the_oldest_goes_and_the_rest_is_still_one_chain(tmp_path: Path) -> None:
    trail_files = AuditFiles(tmp_path, 65_536)
    for start in range(40):
        trail_files.append([{"kind": "left", "n_": start, "pad": "x" * 200}] * 20)
        assert sum(path.stat().st_size for path in files(tmp_path)) < 2 * 65_536
    assert len(files(tmp_path)) == FILES_MAX
    verdict = AuditFiles(tmp_path, 65_536).verify()
    assert verdict.problems == ()
    assert verdict.first > 1
    assert verdict.head == trail_files.head


def test_it_goes_on_after_a_restart_and_after_a_power_cut_in_the_middle_of_a_line(
    tmp_path: Path,
) -> None:
    written(tmp_path)
    again = AuditFiles(tmp_path, 65_536)
    again.append([{"kind": "left"}])
    assert len(files(tmp_path)) == 1
    with files(tmp_path)[0].open("a") as file:
        file.write('{"n":15,"kind":"le')
    after = AuditFiles(tmp_path, 65_536)
    after.append([{"kind": "left"}])
    assert len(files(tmp_path)) == 2
    assert after.verify().problems == ()
    assert after.verify().lines == 16  # two of them say where a file begins


@pytest.mark.parametrize("restart", [False, True])
def test_lines_cut_off_the_end_are_missed(tmp_path: Path, restart: bool) -> None:
    lines = written(tmp_path)
    files(tmp_path)[0].write_text("\n".join(lines[:-3]) + "\n")
    looked = AuditFiles(tmp_path, 65_536)
    if restart:
        looked.append([{"kind": "left"}])  # which must not make it look whole again
        assert looked.verify().problems
    else:
        assert "3 are missing at its end" in looked.verify().problems[0]


@given(
    place=st.integers(1, 11), how=st.sampled_from(["edit", "take out", "swap", "put in", "cut in"])
)
@settings(max_examples=40, deadline=None)
def test_any_change_to_a_line_shows(place: int, how: str) -> None:
    head, lines = Head(), list[str]()
    for number in range(13):
        line, head = sealed(head, {"kind": "left", "to": f"n{number}"})
        lines.append(line)
    assert verified([("a", lines)], head).problems == ()
    match how:
        case "edit":
            lines[place] = lines[place].replace('"to":"n', '"to":"m')
        case "take out":
            del lines[place]
        case "swap":
            lines[place], lines[place + 1] = lines[place + 1], lines[place]
        case "put in":
            lines.insert(place, lines[place])
        case _:
            lines[place] = lines[place][:-5]
    assert verified([("a", lines)], head).problems


def test_a_line_rewritten_with_a_chain_of_its_own_shows_at_the_next(tmp_path: Path) -> None:
    lines = written(tmp_path)
    before = json.loads(lines[4])
    forged, _ = sealed(Head(5, before["chain"]), {"kind": "left", "to": "nobody"})
    lines[5] = forged
    files(tmp_path)[0].write_text("\n".join(lines) + "\n")
    [problem] = AuditFiles(tmp_path, 65_536).verify().problems
    assert "line 7" in problem
