"""Knobs of the gossip core, with presets. Each comment gives the unit and what raising the value does."""

from __future__ import annotations

from dataclasses import dataclass, replace

DATAGRAM_BYTES_MAX = 1400
"""A sealed datagram on the wire: passes every link with an MTU of 1,500 less tunnels and IPv6."""

SEALING_BYTES = 49
"""What sealing adds: 33 bytes of header (version, mesh, sender, epoch, counter) and a 16-byte tag."""


@dataclass(frozen=True, slots=True)
class GossipConfig:
    """The LAN preset is the default; see `lan`, `wan`, `local` and `constrained`."""

    # -- Probing (SWIM) ---------------------------------------------------------------------------------
    probe_interval_s: float = 1.5  # s between probes. Up: less traffic, slower detection
    probe_deadline_s: float = 1.0  # s one probe lasts, all its ways together. Up: detects later
    probe_timeout_s: float = (
        0.4  # s until indirect probes start. Up: tolerates slower links, detects later
    )
    indirect_probes: int = 3  # helpers asked. Up: fewer false suspicions under loss, more traffic
    local_health_max: int = (
        8  # ceiling of the own ill-health score; a probe's times scale by score+1
    )
    suspicion_health_max: int = (
        2  # points of it that also stretch suspicions. Up: the ill declare death later
    )
    probes_in_flight_max: int = 64  # bound. Up: more memory under a storm of suspicions
    relayed_probes_max: int = (
        256  # bound on probes done for others at once. Up: more reflected traffic
    )
    stall_s: float = (
        0.5  # timers this late mean that we stalled, not the others. Up: trusts late timers
    )

    # -- Suspicion (Lifeguard) --------------------------------------------------------------------------
    suspicion_multiplier: float = (
        3.0  # Tmin = this * max(1, log10 N) * probe_deadline_s. Up: dies later
    )
    suspicion_max_multiplier: float = (
        6.0  # Tmax = this * Tmin, with no confirmation. Up: waits for others
    )
    suspicion_confirmations: int = (
        3  # distinct accusers that bring Tmax down to Tmin. Up: dies later
    )
    death_floor_s: float = (
        6.0  # s of silence before which nobody is declared dead. Up: longer stalls survive
    )
    evidence_death_s: float = (
        0.25  # s from the evidence of two witnesses to death. Up: slower, more time to refute
    )
    witness_streams: int = 3  # idle streams kept, so that the end of a process is noticed at once. Up: surer, more memory
    witness_settle_s: float = (
        0.5  # s after a change of members until witnesses are chosen anew. Up: fewer changes
    )
    witness_retry_s: float = 5.0  # s until a failed witness stream is tried again. Up: less traffic
    knock_gap_s: float = (
        0.1  # least s between looks at one node's port on refused datagrams. Up: fewer
    )
    accusations_max: int = (
        30  # refuted accusations a minute that an accuser is forgiven. Up: a liar disturbs more
    )
    witnesses: int = (
        3  # rendezvous-chosen nodes that probe a suspect at once. Up: quicker confirmations
    )

    # -- Rumours ----------------------------------------------------------------------------------------
    rumour_fanout: int = 5  # peers per burst step. Up: fewer wake-ups, more datagrams at once
    rumour_step_s: float = 0.01  # s to the second burst step; doubles each step. Up: slower spread
    rumour_loss: float = 0.1  # assumed loss p in L = ceil((ln N + 7)/(1 - p)) sends. Up: more sends
    rumour_sends_per_peer_max: int = 2  # caps L at this * peers in small meshes. Up: more sends
    rumours_max: int = (
        512  # bound on the queue; the oldest is dropped (sync repairs). Up: more memory
    )

    # -- Repair (Scuttlebutt) ---------------------------------------------------------------------------
    anti_entropy_interval_s: float = 30.0  # s between unconditional exchanges. Up: less traffic
    hash_settle_s: float = (
        0.4  # s our own hash must be unchanged for a difference to count. Up: slower
    )
    exchange_gap_s: float = (
        0.4  # least s between exchanges that we start. Up: less traffic, slower repair
    )
    pull_delay_s: float = (
        0.03  # s a gap may fill by itself before it is pulled. Up: slower, fewer pulls
    )
    pulls_max: int = 128  # bound on owners waiting to be pulled
    sync_datagrams_max: int = 8  # a longer answer goes by stream. Up: bigger datagram bursts
    stream_payload_bytes_max: int = 262_144  # bound on one stream transfer. Up: bigger messages

    # -- Joining ----------------------------------------------------------------------------------------
    join_retry_min_s: float = 0.25  # s to the first retry; doubles. Up: slower start under loss
    join_retry_max_s: float = 10.0  # s between retries while alone. Up: rejoins later
    seed_recheck_s: float = (
        60.0  # s between tries of a seed that is no live member. Up: heals later
    )
    seeds_max: int = 64  # bound on remembered seed addresses
    seed_unreachable_attempts: int = 5  # joins unanswered before it is told. Up: told later
    join_answers_per_s: float = (
        400.0  # joins answered; more get "later". Up: a storm costs this node more
    )
    join_answers_burst: int = 400  # joins answered at once

    # -- The dead and the gone --------------------------------------------------------------------------
    dead_probe_interval_s: float = (
        2.0  # s between tries of one dead member. Up: a partition heals later
    )
    dead_keep_s: float = (
        86_400.0  # s a dead member is remembered. Up: heals after longer partitions
    )
    left_keep_s: float = 30.0  # s a member that left stays listed. Up: longer in `meshd peers`
    graveyard_keep_s: float = 86_400.0  # s a forgotten node's last word is kept against ghosts
    graveyard_max: int = 1024  # bound; the oldest is dropped
    members_max: int = 2048  # bound on members; further ones are refused and counted
    leave_copies: int = 3  # copies of our own leave. Up: surer, slower to end
    leave_step_s: float = 0.05  # s between copies; the driver lingers copies * step

    # -- Soft state -------------------------------------------------------------------------------------
    soft_gap_s: float = 0.1  # least s between sends of a changed value. Up: staler load
    soft_refresh_s: float = 4.0  # s between sends of an unchanged value. Up: less traffic
    soft_change: float = 0.1  # relative change of a float that is significant. Up: fewer sends
    soft_direct_members_max: int = 64  # up to here every peer is told directly. Up: more datagrams
    soft_fanout: int = 8  # random peers told in larger meshes. Up: fresher, more traffic

    # -- Addresses -------------------------------------------------------------------------------
    contest_gap_s: float = (
        60.0  # s between accusations over one address. Up: fewer, a ghost stays longer
    )

    # -- Own record --------------------------------------------------------------------------------
    tombstones_kept: int = (
        64  # deleted keys that are told. Up: fewer whole transfers, longer record
    )

    # -- Messages ---------------------------------------------------------------------------------------
    datagram_payload_bytes_max: int = DATAGRAM_BYTES_MAX - SEALING_BYTES  # bytes before sealing

    @property
    def isolation_s(self) -> float:
        """After how long without a word from anybody a node takes itself to be cut off."""
        return 2 * self.probe_interval_s + self.probe_deadline_s

    @property
    def leave_linger_s(self) -> float:
        """How long a driver keeps driving the core after `leave`."""
        return self.leave_copies * self.leave_step_s


def lan() -> GossipConfig:
    """Wired and Wi-Fi networks of a home, a lab, a site."""
    return GossipConfig()


def wan() -> GossipConfig:
    """Round trips up to a second, sites joined by tunnels."""
    return replace(
        lan(),
        probe_interval_s=4.0,
        probe_deadline_s=3.0,
        probe_timeout_s=1.5,
        stall_s=1.0,
        suspicion_multiplier=4.0,
        death_floor_s=15.0,
        evidence_death_s=3.0,
        witness_settle_s=2.0,
        witness_retry_s=15.0,
        knock_gap_s=1.0,
        rumour_step_s=0.05,
        anti_entropy_interval_s=60.0,
        hash_settle_s=2.0,
        exchange_gap_s=1.0,
        pull_delay_s=0.3,
        join_retry_min_s=1.5,
        join_retry_max_s=30.0,
        dead_probe_interval_s=10.0,
        leave_step_s=0.2,
        soft_gap_s=0.5,
        soft_refresh_s=8.0,
    )


def local() -> GossipConfig:
    """All nodes on one machine, and demonstrations: a silent process is dead in about three seconds."""
    return replace(
        lan(),
        probe_interval_s=0.5,
        probe_deadline_s=0.5,
        probe_timeout_s=0.2,
        suspicion_multiplier=3.0,
        suspicion_max_multiplier=2.0,
        death_floor_s=2.0,
        evidence_death_s=0.15,
        suspicion_health_max=0,
        witness_settle_s=0.1,
        witness_retry_s=1.0,
        anti_entropy_interval_s=10.0,
        dead_probe_interval_s=1.0,
        join_retry_max_s=2.0,
    )


def constrained() -> GossipConfig:
    """Batteries and radios: fewer wake-ups, slower to notice."""
    return replace(
        lan(),
        probe_interval_s=5.0,
        probe_deadline_s=5.0,
        probe_timeout_s=1.5,
        stall_s=1.0,
        suspicion_multiplier=2.0,
        death_floor_s=20.0,
        evidence_death_s=2.0,
        witness_settle_s=2.0,
        witness_retry_s=60.0,
        rumour_fanout=2,
        rumour_step_s=0.05,
        anti_entropy_interval_s=180.0,
        hash_settle_s=1.0,
        exchange_gap_s=2.0,
        pull_delay_s=0.2,
        join_retry_min_s=1.0,
        join_retry_max_s=60.0,
        dead_probe_interval_s=20.0,
        soft_gap_s=1.0,
        soft_refresh_s=8.0,
    )


PRESETS = {"lan": lan, "wan": wan, "local": local, "constrained": constrained}
"""Name in the configuration file -> factory."""
