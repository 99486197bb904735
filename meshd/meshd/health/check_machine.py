"""Checks of the daemon itself and of the machine under it: disk, load, clock."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median_low
from typing import Final

from meshd.health.facts import Facts, TroubleKind
from meshd.health.findings import Code, Finding, Severity
from meshd.health.wording import lasting, listed, times

CLOCK_OFF_S: Final = 10.0  # names, logs and ages of files are then misleading; nothing else breaks
CLOCK_BROKEN_S: Final = (
    3600.0  # no accident; certificates are judged by the mesh's clock and bear it
)
CLOCK_EARLIEST_S: Final = 1_735_689_600.0  # 2025-01-01: this software is younger than that
EPOCH_AHEAD_S: Final = 60.0
STALLS_MAX: Final = 2  # of the window; the odd one is a kernel update or a slow card
HEALTH_MAX: Final = 2  # Lifeguard's score; above it, probes take three times as long and more
SEND_ERRORS_SHARE: Final = 0.05
SEND_ERRORS_MIN: Final = 5


def daemon_down(facts: Facts) -> Iterator[Finding]:
    """Nobody answers, and why it could not start."""
    if facts.daemon is not None:
        return
    denied = [t for t in facts.troubles if t.kind is TroubleKind.SOCKET_DENIED]
    for trouble in denied:
        yield Finding(
            Code.SOCKET_DENIED,
            Severity.ERROR,
            trouble.message,
            "Run this as the daemon's user, or join its group and log in again.",
        )
    if not denied:
        yield Finding(
            Code.DAEMON_DOWN,
            Severity.ERROR,
            f"No daemon answers on {facts.socket}.",
            "Start it with `systemctl start meshd` or `meshd run`; `journalctl -u meshd -n 5 -o cat` "
            "says why it ended.",
        )
    codes = {
        TroubleKind.CONFIG: (
            Code.CONFIG_WRONG,
            "Mend the file; `meshd run` says the same until then.",
        ),
        TroubleKind.IDENTITY: (
            Code.NO_IDENTITY,
            "`meshd init NAME` founds a mesh, `meshd join TOKEN` joins one (`meshd invite` on a node of it prints the token).",
        ),
        TroubleKind.PORT: (
            Code.PORT_TAKEN,
            "End what holds the port (`ss -lnptu` names it), or choose another one.",
        ),
        TroubleKind.DISK: (
            Code.DISK_REFUSES,
            "Make the folder writable for the user that runs meshd, and free some space.",
        ),
    }
    for trouble in facts.troubles:
        if trouble.kind in codes:
            code, do = codes[trouble.kind]
            yield Finding(code, Severity.ERROR, trouble.message, do)


def disk(facts: Facts) -> Iterator[Finding]:
    """Writes that fail, and files that were damaged."""
    if facts.daemon is None:
        return
    state = facts.daemon.disk
    if state.error:
        yield Finding(
            Code.DISK_REFUSES,
            Severity.ERROR,
            f"The disk refuses writes to {state.folder}: {state.error}.",
            "Free some space, or look for a card that went read-only (`dmesg | tail`); the node goes on "
            "and forgets on a restart what it could not write.",
        )
    if state.set_aside:
        yield Finding(
            Code.STATE_SET_ASIDE,
            Severity.NOTE,
            f"Damaged state was found {times(state.set_aside)} at the start and set aside in "
            f"{state.folder}.",
            "Nothing is lost, peers gave it back; if it happens again, replace the card or the supply. "
            "The files `*.damaged-*` may be deleted.",
        )


def load(facts: Facts) -> Iterator[Finding]:
    """A process that stands still is taken for a dead one."""
    if facts.daemon is None:
        return
    seen = facts.daemon.load
    if seen.stalls > STALLS_MAX or seen.lost:
        lost = f" and had no room for {seen.lost} pieces of its own work" if seen.lost else ""
        yield Finding(
            Code.OVERLOADED,
            Severity.WARNING,
            f"This process stood still {times(seen.stalls) if seen.stalls else 'not once'}{lost} in "
            f"the last {lasting(seen.window_s)}.",
            "Something takes the processor or the memory: look at `top`, at swapping, and at throttling "
            "(`meshd status`); give the model fewer threads.",
        )
    elif seen.local_health > HEALTH_MAX:
        yield Finding(
            Code.HEALTH_LOW,
            Severity.WARNING,
            f"This node trusts its own view little: its health score is {seen.local_health} of 8.",
            "Its probes go unanswered, or others suspect it: if other findings name no cause, look at the "
            "quality of its network link (`ping` a peer, `iw dev wlan0 link`).",
        )


def workers(facts: Facts) -> Iterator[Finding]:
    """Worker processes that are not locked in as they should be."""
    if facts.daemon is None:
        return
    exposed = {w.name: w.exposed for w in facts.daemon.workers if w.exposed}
    for steps in sorted(set(exposed.values())):
        names = sorted(name for name, found in exposed.items() if found == steps)
        yield Finding(
            Code.WORKER_EXPOSED,
            Severity.WARNING,
            f"The system does not let {listed(names)} be locked in wholly: {'; '.join(steps)}.",
            "What runs there (a model, a plugin) could do more harm if it were taken over. A kernel with "
            "Landlock and seccomp allows every step, and so does our systemd unit.",
        )


def plugins(facts: Facts) -> Iterator[Finding]:
    """What plugins think is wrong: they know what they watch."""
    if facts.daemon is None:
        return
    for told in facts.daemon.plugins:
        yield Finding(
            Code.PLUGIN_COMPLAINS,
            Severity.ERROR if told.is_error else Severity.WARNING,
            told.message,
            told.remedy,
        )


def sending(facts: Facts) -> Iterator[Finding]:
    """Datagrams that the operating system did not take."""
    if facts.daemon is None:
        return
    seen = facts.daemon.load
    tried = seen.sent + seen.send_errors
    if seen.send_errors >= SEND_ERRORS_MIN and seen.send_errors > SEND_ERRORS_SHARE * tried:
        yield Finding(
            Code.SEND_FAILS,
            Severity.ERROR,
            f"This machine did not take {seen.send_errors} of {tried} datagrams in the last "
            f"{lasting(seen.window_s)}.",
            "Look for a rule that drops outgoing UDP (`nft list ruleset`, `iptables -L OUTPUT`) and for a "
            "missing route to the peers (`ip route get ADDRESS`).",
        )


def clock(facts: Facts) -> Iterator[Finding]:
    """This node's wall clock, alone and beside those of its peers."""
    now = facts.clock
    if now.unix_s < CLOCK_EARLIEST_S:
        yield Finding(
            Code.CLOCK_UNSET,
            Severity.ERROR,
            "The clock of this machine was never set: it shows a time before this software was made.",
            "Have it synchronised (`timedatectl set-ntp true`); a board without a battery needs that at "
            "every start.",
        )
    if now.epoch_ms is not None and now.epoch_ms / 1e3 - now.unix_s > EPOCH_AHEAD_S:
        ahead_s = now.epoch_ms / 1e3 - now.unix_s
        yield Finding(
            Code.EPOCH_AHEAD,
            Severity.NOTE,
            f"This node's epoch lies {lasting(ahead_s)} ahead of its clock.",
            "The clock was once wrong, or the state folder was lost or refused writes: harmless, epochs only "
            "count up.",
        )
    yield from _clocks_compared(facts)


def _clocks_compared(facts: Facts) -> Iterator[Finding]:
    if facts.daemon is None:
        return
    ahead = {
        peer.name: (peer.answer.clock_ahead_s, peer.answer.clock_error_s)
        for peer in facts.daemon.peers
        if peer.answer is not None and peer.answer.clock_ahead_s is not None
    }
    do = "Synchronise it there: `timedatectl` shows whether it is, `timedatectl set-ntp true` does it."
    clocks = [seconds for seconds, _ in ahead.values()]
    # Of two clocks nobody can tell which is wrong; of more, ours has a voice like any other.
    middle_s = median_low([0.0, *clocks]) if len(clocks) != 1 else clocks[0]
    unsure_s = max((error_s for _, error_s in ahead.values()), default=0.0)
    ours_is_off = abs(middle_s) > CLOCK_OFF_S + unsure_s
    if ours_is_off:
        side = "behind" if middle_s > 0 else "ahead of"
        others = (
            f"the clock of {next(iter(ahead))}: one of the two is wrong"
            if len(ahead) == 1
            else f"the clocks of {len(ahead)} peers"
        )
        yield Finding(
            Code.CLOCK_OFF,
            Severity.ERROR if abs(middle_s) > CLOCK_BROKEN_S else Severity.WARNING,
            f"This node's clock is {lasting(middle_s)} {side} {others}.",
            "Synchronise it: `timedatectl` shows whether it is, `timedatectl set-ntp true` does it.",
        )
    if len(ahead) > 1:
        off = sorted(
            f"{name} ({lasting(seconds - middle_s)} {'ahead' if seconds > middle_s else 'behind'})"
            for name, (seconds, error_s) in ahead.items()
            if abs(seconds - middle_s) > CLOCK_OFF_S + error_s
        )
        if off:
            yield Finding(
                Code.PEER_CLOCK_OFF,
                Severity.WARNING,
                f"The clock is off on {listed(off)}.",
                do,
            )
