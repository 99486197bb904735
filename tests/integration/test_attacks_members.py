"""Attackers with keys: a member that forges, rolls back and floods, on the network of real daemons."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest
from tests.e2e.support_liar import Liar
from tests.integration.support_attackers import Attacker, attacking
from tests.integration.support_forgeries import (
    WHOLE_RECORD_BYTES,
    bad_last_signature,
    holding_nothing,
    made_up_senders,
    signed_by_another,
    spliced,
    spoil,
    with_own_key,
    wrong_digest,
)
from tests.integration.support_namespaces import LISTEN_PORT, Bridge, Host, LanMesh, why_unavailable
from tests.integration.support_town import (
    ALIVE,
    ECHO,
    answered_by,
    counter,
    sees,
    states,
    status,
)
from tests.integration.support_town import heard as logged
from tests.support_daemons import Daemon, UnixConnection

from meshd.core.effects import Address
from meshd.core.frames import (
    Call,
    CallHeader,
    Chunk,
    End,
    Error,
    Frame,
    Goaway,
    Gossip,
    Hello,
    Refuse,
)
from meshd.core.messages import Claim, Record
from meshd.core.wire import encode, payload_of
from meshd.shell.gate import TRUST_ID
from meshd.trust.identity import Identity, Role, admit, load_identity
from meshd_cms.types import Delta, MeshId, Value, Version

pytestmark = pytest.mark.namespaces

NAMES = ("one", "two", "three")
ENTRY, SERVING, THIRD = NAMES
QUIET = "[discovery]\nannounce_models = false\n"
DAY_S = 86_400.0
CHECKS_PER_S = 400.0
"""Failed checks of signatures that all datagrams together may cause; see meshd.core.verifying."""
CHECKS_BURST = 1_200.0
RENEWED_DEADLINE_S = 60.0  # it asks again after half a minute
FLOOD = 2_000
FLOOD_PER_S = 2_000.0
ENTRIES = 7
ALL_ENTRIES = 512


class LooseMesh(LanMesh):
    """A mesh some of whose nodes were let in long ago."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.ended: set[str] = set()  # names of nodes whose certificates have ended

    def admit(self, state: Path, role: Role = Role.MEMBER) -> Identity:
        if state.parent.name not in self.ended:
            return super().admit(state, role)
        inviter = load_identity(self.folder / ENTRY / "state")
        return admit(inviter, state, role=role, now_s=time.time() - 60 * DAY_S)


@dataclass(frozen=True, slots=True)
class Betrayed:
    """A mesh with a member that is no daemon of ours."""

    lan: Bridge
    mesh: LooseMesh
    hosts: dict[str, Host]
    daemons: dict[str, Daemon]
    attacker: Attacker
    liar: Liar
    killed: set[str] = field(default_factory=set[str])  # by a test, for good reason

    def __getitem__(self, name: str) -> Daemon:
        return self.daemons[name]

    def address(self, name: str) -> Address:
        return (self.hosts[name].address, LISTEN_PORT)

    def offence(self, name: str, kind: str) -> int:
        return int(status(self[name])["offences"].get("liar", {}).get(kind, 0))

    def kill(self, name: str) -> None:
        self.killed.add(name)
        self[name].process.kill()
        self[name].process.wait()

    def revoke(self, through: str, node: str) -> None:
        connection = UnixConnection(self[through].socket)
        try:
            connection.request("POST", "/mesh/v1/trust/revoke", json.dumps({"node": node}))
            answer = connection.getresponse()
            told = answer.read()
        finally:
            connection.close()
        assert answer.status == 200, told

    def check_nobody_died(self) -> None:
        """All are there, and none but those that were killed was ever missed."""
        for name, daemon in self.daemons.items():
            others = {other: ALIVE for other in NAMES if other != name}
            self.mesh.wait("the others", daemon, partial(sees(**others), daemon))
            assert not set(logged(daemon, "member.failed")) & (set(NAMES) - self.killed)
            assert "Traceback" not in daemon.log()
        assert answered_by(self.mesh, self[ENTRY], "still there?") == SERVING


@pytest.fixture(scope="module")
def betrayed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Betrayed]:
    reason = why_unavailable(Bridge)
    if reason is not None:
        pytest.skip(reason)
    with ExitStack() as stack:
        lan = stack.enter_context(Bridge())
        mesh = stack.enter_context(LooseMesh(tmp_path_factory.mktemp("betrayed") / "mesh"))
        hosts = {name: lan.add_host() for name in NAMES}
        attacker = stack.enter_context(attacking(lan.add_host()))
        daemons = {
            name: mesh.start_on(
                hosts[name],
                name,
                plugins=["echo"] if name == SERVING else ["hardware"],
                sections=QUIET,
                wait=False,
            )
            for name in NAMES
        }
        for daemon in daemons.values():
            mesh.wait("the daemon", daemon, partial(_answers, daemon))
        targets = [(hosts[name].address, LISTEN_PORT) for name in NAMES]
        state = mesh.init("liar") / "state"
        speaking = attacker.datagrams(LISTEN_PORT)
        liar = stack.enter_context(Liar(state, targets, speaking, attacker.dial))
        liar.store.set("node", {"name": "liar"})

        def met() -> bool:
            liar.introduce()
            liar.ask_for_records()
            return len(liar.records) >= len(NAMES)

        mesh.wait("the liar to know everybody", daemons[ENTRY], met, poll_s=0.2)
        for daemon in daemons.values():
            mesh.wait_for_members(daemon, len(NAMES) + 1)
            mesh.wait_for_capability(daemon, ECHO)
        yield Betrayed(lan, mesh, hosts, daemons, attacker, liar)


def _answers(daemon: Daemon) -> bool:
    return bool(status(daemon))


# -- the forger --------------------------------------------------------------------------------------------


def _of(betrayed: Betrayed, name: str) -> Delta:
    """What the liar holds of a daemon's record."""
    liar = betrayed.liar
    return next(liar.records[one.node] for one in liar.others() if one.name == name)


@pytest.mark.parametrize("forge", [signed_by_another, with_own_key])
def test_a_record_forged_in_anothers_name_is_refused_and_its_sender_named(
    betrayed: Betrayed, forge: Callable[[Liar, Delta, MeshId], Delta]
) -> None:
    liar, true = betrayed.liar, _of(betrayed, SERVING)
    forged = forge(liar, true, liar.identity.mesh_id)
    named = betrayed.offence(ENTRY, "record_rejected")
    for target in liar.targets:
        liar.say(target, [Record(forged, rumour=True)])
    betrayed.mesh.wait(
        "the forger to be named",
        betrayed[ENTRY],
        lambda: betrayed.offence(ENTRY, "record_rejected") > named,
    )
    for daemon in betrayed.daemons.values():
        assert "owned" not in str(daemon.get("/mesh/v1/capabilities"))
    betrayed.check_nobody_died()


def test_a_true_record_with_a_changed_entry_is_not_taken(betrayed: Betrayed) -> None:
    liar, true = betrayed.liar, _of(betrayed, SERVING)
    forged = spliced(liar, true, liar.identity.mesh_id)
    before = counter(betrayed[ENTRY], "records_applied")
    liar.say(betrayed.address(ENTRY), [Record(forged, rumour=True)])
    liar.store.set("after", 1)  # what is taken afterwards shows that the forged one was looked at
    (mine,) = liar.store.deltas_for(holding_nothing(liar.me), WHOLE_RECORD_BYTES, [liar.me])
    liar.say(betrayed.address(ENTRY), [Record(mine, rumour=True)])
    betrayed.mesh.wait(
        "the liar's own record",
        betrayed[ENTRY],
        lambda: counter(betrayed[ENTRY], "records_applied") > before,
    )
    assert "owned" not in str(betrayed[ENTRY].get("/mesh/v1/capabilities"))
    betrayed.check_nobody_died()


# -- the roll-back -----------------------------------------------------------------------------------------


def test_an_old_record_of_an_earlier_life_brings_nothing_back(betrayed: Betrayed) -> None:
    """All that is told again was signed by its owner once, and was true then."""
    liar, mesh = betrayed.liar, betrayed.mesh
    old = _of(betrayed, THIRD)
    life = next(one for one in liar.others() if one.name == THIRD)
    assert old.entries
    betrayed.kill(THIRD)
    config = betrayed[THIRD].folder / "meshd.toml"
    config.write_text(config.read_text().replace("[node]", '[node]\nzone = "greenhouse"'))
    third = betrayed.daemons[THIRD] = mesh.boot(betrayed.hosts[THIRD], THIRD)
    for daemon in betrayed.daemons.values():
        mesh.wait("the new record", daemon, partial(_holds, daemon, "greenhouse"))
    before = {daemon.name: _old_refused(daemon) for daemon in betrayed.daemons.values()}

    def refused() -> bool:
        for target in liar.targets:
            liar.say(target, [Claim(life, merged=False), Record(old, rumour=True)])
            liar.say(target, [Record(replace(old, since=Version(0)), rumour=False)])
        return all(
            _old_refused(daemon) > before[daemon.name] for daemon in betrayed.daemons.values()
        )

    mesh.wait("the old record to be refused", betrayed[ENTRY], refused)
    for daemon in betrayed.daemons.values():
        assert _holds(daemon, "greenhouse")
    assert status(third)["epoch"] > life.epoch
    betrayed.check_nobody_died()


def _holds(daemon: Daemon, text: str) -> bool:
    return text in str(daemon.get(f"/mesh/v1/store?node={THIRD}"))


def _old_refused(daemon: Daemon) -> int:
    """Records of lives that are over: of others, and of the daemon itself."""
    return counter(daemon, "record_rejected_stale_epoch")


# -- floods ------------------------------------------------------------------------------------------------


def _refused(daemon: Daemon) -> int:
    """Records that were checked and found bad."""
    counters: dict[str, int] = status(daemon)["counters"]["gossip"]
    return sum(count for name, count in counters.items() if name.startswith("record_rejected_"))


@pytest.mark.parametrize(
    ("forge", "made_up"),
    [(bad_last_signature, False), (bad_last_signature, True), (wrong_digest, False)],
)
def test_a_flood_of_bad_signatures_is_not_all_checked_and_holds_nothing_up(
    betrayed: Betrayed, forge: Callable[[Liar, int, int], Delta], made_up: bool
) -> None:
    liar, daemon = betrayed.liar, betrayed[ENTRY]
    payloads = [
        payload_of([encode(Record(forge(liar, number, ENTRIES), rumour=True))])
        for number in range(50)
    ]
    sealers = made_up_senders(liar) if made_up else [liar.sealer]
    before, probes = _refused(daemon), counter(daemon, "probes")
    began_s = time.monotonic()
    for number in range(FLOOD):
        sealer = sealers[number % len(sealers)]
        liar.throw(betrayed.address(ENTRY), sealer.seal(payloads[number % len(payloads)]))
        if number % 40 == 0:
            liar.rest(max(0.0, began_s + number / FLOOD_PER_S - time.monotonic()))
    betrayed.mesh.wait("probes to go on", daemon, lambda: counter(daemon, "probes") > probes + 1)
    checked = (_refused(daemon) - before) * (ENTRIES + 1)
    elapsed_s = time.monotonic() - began_s
    assert checked > 0
    assert checked <= CHECKS_BURST + CHECKS_PER_S * elapsed_s + (ENTRIES + 1)
    betrayed.check_nobody_died()


def test_one_frame_of_many_bad_records_is_left_alone_after_the_first(betrayed: Betrayed) -> None:
    liar, daemon = betrayed.liar, betrayed[ENTRY]
    bad = encode(Record(bad_last_signature(liar, 1_000, ALL_ENTRIES), rumour=False))
    frame = Gossip(payload_of([bad] * 14))
    before = _refused(daemon)
    with liar.stream(betrayed.address(ENTRY)) as stream:
        for _ in range(10):
            stream.send(frame)
        betrayed.mesh.wait("one of them", daemon, lambda: _refused(daemon) > before)
        betrayed.check_nobody_died()
    assert _refused(daemon) - before <= 4  # of 140: the account was empty after the first or second


# -- downgrade ---------------------------------------------------------------------------------------------


def test_a_member_that_speaks_an_older_protocol_or_for_another_is_told_and_cut_off(
    betrayed: Betrayed,
) -> None:
    liar = betrayed.liar
    true = liar.hello()
    other = next(one.node for one in liar.others() if one.name == THIRD)
    for hello, code in (
        (replace(true, version=true.version - 1), "version_mismatch"),
        (replace(true, mesh=MeshId(bytes(16))), "other_mesh"),
        (replace(true, node=other), "other_node"),
    ):
        with liar.stream(betrayed.address(ENTRY), hello=hello) as stream:
            said = [frame.reason for frame in stream.frames() if isinstance(frame, Goaway)]
        assert said == [code]
    betrayed.check_nobody_died()


# -- clocks ------------------------------------------------------------------------------------------------


def test_a_node_with_a_wrong_clock_and_an_ended_certificate_comes_back(
    betrayed: Betrayed,
) -> None:
    """It was off for two months, and its clock was set far ahead: its word on the time counts for nobody else."""
    mesh, name, off_s = betrayed.mesh, "board", 400 * DAY_S
    mesh.ended.add(name)
    honest, mesh.command = mesh.command, skewed(off_s)
    try:
        board = mesh.start_on(betrayed.lan.add_host(), name, sections=QUIET)
    finally:
        mesh.command = honest

    def is_good() -> bool:
        told = board.get("/mesh/v1/trust")
        certificate = told["certificate"]
        return bool(certificate["standing"] == "good" and certificate["left_s"] > 0)

    mesh.wait("another certificate", board, is_good, RENEWED_DEADLINE_S)
    mesh.wait("the others", board, partial(sees(one=ALIVE, two=ALIVE, three=ALIVE), board))
    mesh.wait("what time it is", board, lambda: abs(_clock_ahead(board) - off_s) < DAY_S)
    # A node that had heard no other clock yet believes the later one of two, until it hears a third.
    mesh.wait("an answer", board, partial(_is_answered, mesh, board), RENEWED_DEADLINE_S)
    for daemon in betrayed.daemons.values():
        mesh.wait("the true time", daemon, partial(_clock_is_right, daemon))
    board.process.kill()
    board.process.wait()


def _is_answered(mesh: LooseMesh, daemon: Daemon) -> bool:
    try:
        return answered_by(mesh, daemon, "what time is it?") == SERVING
    except AssertionError:
        return False


def _clock_ahead(daemon: Daemon) -> float:
    return float(daemon.get("/mesh/v1/trust")["clock"]["ahead_s"])


def _clock_is_right(daemon: Daemon) -> bool:
    return abs(_clock_ahead(daemon)) < DAY_S


def skewed(off_s: float) -> list[str]:
    """The command, in a world whose wall clock is wrong."""
    wrong = f"import time; true = time.time; time.time = lambda: true() + {off_s!r}"
    return [sys.executable, "-c", f"{wrong}; from meshd.__main__ import main; main()"]


# -- the revoked node --------------------------------------------------------------------------------------


def _call(operation: str, body: Value) -> Call:
    return Call(1, CallHeader("0" * 16, "", TRUST_ID, operation), body)


def _reasons(frames: Iterable[Frame]) -> list[str]:
    """The codes with which a stream, and what was asked on it, was ended."""
    return [
        frame.reason if isinstance(frame, Goaway) else frame.code
        for frame in frames
        if isinstance(frame, Goaway | Refuse | Error)
    ]


def test_a_revoked_member_is_out_everywhere_at_once_and_stays_out(betrayed: Betrayed) -> None:
    """The last test with this mesh: from here on the liar is none of it."""
    liar, daemons = betrayed.liar, betrayed.daemons.values()
    generation = _sealing(betrayed[ENTRY])
    spoil(liar, liar.others())
    with liar.stream(betrayed.address(SERVING)) as stream:
        frames = stream.frames()
        assert isinstance(next(frames), Hello)  # it is one of them, and is heard
        betrayed.revoke(ENTRY, "liar")
        assert "revoked" in _reasons(frames)  # and now the stream has ended
    for daemon in daemons:
        betrayed.mesh.wait("the liar to be out", daemon, partial(_knows_no, daemon, "liar"))
    # What it says with the key that it has still got is dropped; its record, signed and true, is nobody's.
    (mine,) = liar.store.deltas_for(holding_nothing(liar.me), WHOLE_RECORD_BYTES, [liar.me])
    for daemon, target in zip(daemons, liar.targets, strict=True):
        before = _unheard(daemon)

        liar.say(target, [Record(mine, rumour=True)])
        betrayed.mesh.wait("it to be dropped", daemon, partial(_dropped, betrayed, daemon, before))
    # A new key is in force, which nobody gives it; nor does it get another certificate.
    for daemon in daemons:
        betrayed.mesh.wait("another key", daemon, partial(_seals_after, daemon, generation))
    for body, operation in (({}, "renew"), ({"d": [], "k": [bytes(32)]}, "sync")):
        with liar.stream(betrayed.address(SERVING)) as stream:
            with suppress(OSError):
                stream.send(_call(operation, body))
            answered = list(stream.frames())
        assert "revoked" in _reasons(answered)
        assert not any(isinstance(frame, End | Chunk) for frame in answered)
    # With the new key, who was muted in the old one's name is heard again.
    for name in (ENTRY, THIRD):
        betrayed.mesh.wait(
            "it to be heard", betrayed[name], partial(_hears, betrayed[name], SERVING)
        )
    # A peer that restarts has not forgotten.
    betrayed.kill(THIRD)
    third = betrayed.daemons[THIRD] = betrayed.mesh.boot(betrayed.hosts[THIRD], THIRD)
    before = _unheard(third)
    betrayed.mesh.wait("it to be dropped again", third, partial(_dropped, betrayed, third, before))
    betrayed.mesh.wait("the others", third, partial(sees(one=ALIVE, two=ALIVE), third))
    for daemon in betrayed.daemons.values():
        assert _knows_no(daemon, "liar")
    assert answered_by(betrayed.mesh, betrayed[ENTRY], "without it") == SERVING


def _hears(daemon: Daemon, name: str) -> bool:
    """Whether datagrams of a node are opened under the key in force."""
    rows = daemon.get("/mesh/v1/trust")["keys"]
    return any(row["state"] == "in force" and name in row["used_by"] for row in rows)


def _knows_no(daemon: Daemon, name: str) -> bool:
    return name not in states(daemon)


def _dropped(betrayed: Betrayed, daemon: Daemon, before: int) -> bool:
    """Whether more was dropped, of what the liar says now."""
    betrayed.liar.introduce()
    return _unheard(daemon) > before


def _unheard(daemon: Daemon) -> int:
    """What was dropped because its sender is out, or because it has a key that is not in force."""
    dropped = status(daemon)["counters"]["dropped"]
    return counter(daemon, "dropped_revoked") + int(dropped["bad_seal"])


def _seals_after(daemon: Daemon, generation: int) -> bool:
    return _sealing(daemon) > generation


def _sealing(daemon: Daemon) -> int:
    """The generation of the key that a daemon seals with."""
    rows = daemon.get("/mesh/v1/trust")["keys"]
    return next(int(row["generation"]) for row in rows if row["state"] == "in force")
