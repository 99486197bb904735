"""Peer streams against strangers, noise, hung peers and peers that break the rules."""

from __future__ import annotations

import ssl
from pathlib import Path

import pytest
import trio
import trio.testing
from tests.shell.support_streams import (
    BarePeer,
    answer,
    bare_client,
    bare_server,
    header,
    hello,
    identities,
    on_stopped_clock,
    peer,
    settled,
    trio_test,
)

from meshd.core.frames import Call, Chunk, Frame, Goaway, Hello, Ping
from meshd.shell.streams import PeerRejected, PeerUnreachable, StreamConfig, StreamLost
from meshd.trust.identity import init_mesh
from meshd_cms.types import Epoch, NodeId


@trio_test
async def test_a_node_of_another_mesh_is_rejected_by_who_dials(tmp_path: Path) -> None:
    a, b = identities(tmp_path / "ours", 2)
    stranger = init_mesh(tmp_path / "theirs", "other")
    async with peer(a) as alice, peer(b) as bob, peer(stranger) as mallory:
        with pytest.raises(PeerRejected, match="certificate") as rejected:
            await answer(alice, mallory)
        assert rejected.value.code == "bad_certificate"
        with pytest.raises(PeerRejected):
            await answer(mallory, bob)
        assert await answer(alice, bob, ["x"]) == (["x"], {"count": 1})
        assert bob.log.events().count("peer.rejected") == 1


@trio_test
async def test_a_node_of_another_mesh_is_rejected_by_who_accepts(tmp_path: Path) -> None:
    """The stranger takes any certificate, so that it is the acceptor who must find out."""
    a, b = identities(tmp_path / "ours", 2)
    stranger = init_mesh(tmp_path / "theirs", "other")
    stranger.client_context.verify_mode = ssl.CERT_NONE
    async with peer(a) as alice, peer(b) as bob:
        async with bare_client(stranger, bob.address) as bare:
            assert await bare.hear_until_closed() == []
        await settled(lambda: bob.streams.statistics.accepts_failed == 1)
        assert bob.streams.statistics.accepted == 0
        assert await answer(alice, bob, ["x"]) == (["x"], {"count": 1})


@trio_test
async def test_a_dialer_without_a_certificate_is_rejected(tmp_path: Path) -> None:
    (a,) = identities(tmp_path, 1)
    async with peer(a) as alice:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        stream = await trio.open_tcp_stream(*alice.address)
        secured = trio.SSLStream(stream, context, https_compatible=True)
        try:
            await secured.do_handshake()
            assert await BarePeer(secured).hear_until_closed() == []
        finally:
            await trio.aclose_forcefully(secured)
        await settled(lambda: alice.streams.statistics.accepts_failed == 1)


@trio_test
async def test_another_node_than_the_one_that_was_meant_is_rejected(tmp_path: Path) -> None:
    a, b = identities(tmp_path, 2)
    async with peer(a) as alice, peer(b) as bob:
        nobody = NodeId(b"?" * 16)
        with pytest.raises(PeerRejected, match="is there, not") as rejected:
            async with alice.streams.call(nobody, bob.address, header(), None):
                pass
        assert rejected.value.code == "other_node"
        with pytest.raises(PeerRejected) as own:
            await alice.streams.send_gossip(None, alice.address, b"anybody?")
        assert own.value.code == "own"
        assert alice.streams.statistics.dials_failed == 2


@trio_test
async def test_a_hello_that_contradicts_the_certificate_ends_the_connection(tmp_path: Path) -> None:
    a, b = identities(tmp_path, 2)
    async with peer(a) as alice, bare_client(b, alice.address) as bare:
        await bare.say(Hello(a.mesh_id, NodeId(b"?" * 16), Epoch(1)))
        assert (await bare.hear_until_closed())[-1] == Goaway("other_node")
        await settled(lambda: "peer.misbehaved" in alice.log.events())


@trio_test
async def test_another_protocol_version_is_named_to_who_accepts(tmp_path: Path) -> None:
    a, b = identities(tmp_path, 2)
    async with peer(a) as alice, bare_client(b, alice.address) as bare:
        await bare.say(hello(b, version=2))
        assert (await bare.hear_until_closed())[-1] == Goaway("version_mismatch")
        await settled(lambda: "peer.misbehaved" in alice.log.events())
        fields = next(line[2] for line in alice.log.lines if line[1] == "peer.misbehaved")
        assert fields["code"] == "version_mismatch"
        assert "version 2" in str(fields["reason"])
        assert "version 1" in str(fields["reason"])


@trio_test
async def test_another_protocol_version_is_named_to_who_dials(tmp_path: Path) -> None:
    a, b = identities(tmp_path, 2)

    async def speak_version_2(bare: BarePeer) -> None:
        await bare.say(hello(b, version=2))
        await bare.hear_until_closed()

    async with peer(a) as alice, bare_server(b, speak_version_2) as address:
        with pytest.raises(PeerRejected, match=r"version 2 .* version 1") as rejected:
            async with alice.streams.call(b.node_id, address, header(), None):
                pass
        assert rejected.value.code == "version_mismatch"


@trio_test
async def test_an_oversized_frame_closes_its_connection_and_no_other(tmp_path: Path) -> None:
    members = identities(tmp_path, 3)
    async with peer(members[0]) as alice, peer(members[1]) as bob:
        async with bare_client(members[2], alice.address) as bare:
            await bare.say(hello(members[2]))
            await bare.stream.send_all(b"\xff\xff\xff\xff")
            assert (await bare.hear_until_closed())[-1] == Goaway("too_large")
        assert alice.streams.statistics.protocol_errors == 1
        assert await answer(bob, alice, ["x"]) == (["x"], {"count": 1})


@trio_test
async def test_a_peer_that_answers_out_of_turn_loses_its_connection(tmp_path: Path) -> None:
    a, b = identities(tmp_path, 2)

    async def babble(bare: BarePeer) -> None:
        await bare.say(hello(b))
        await bare.hear()
        await bare.say(Chunk(99, "for nobody"))
        await bare.hear_until_closed()

    async with peer(a) as alice, bare_server(b, babble) as address:
        with pytest.raises(StreamLost, match="unexpected_frame"):
            async with alice.streams.call(b.node_id, address, header(), None) as call:
                await call.receive()


@trio_test
async def test_noise_instead_of_tls_is_counted(tmp_path: Path) -> None:
    a, b = identities(tmp_path, 2)
    async with peer(a) as alice, peer(b) as bob:
        for noise in (b"GET / HTTP/1.1\r\n\r\n", b"\x00" * 500, b""):
            stream = await trio.open_tcp_stream(*alice.address)
            await stream.send_all(noise)
            await stream.aclose()
        await settled(lambda: alice.streams.statistics.accepts_failed == 2)
        await settled(lambda: alice.streams.statistics.knocks == 1)  # closed without a word
        assert await answer(bob, alice, ["x"]) == (["x"], {"count": 1})


def test_who_never_says_hello_or_never_shakes_hands_is_closed(tmp_path: Path) -> None:
    a, b = identities(tmp_path, 2)
    config = StreamConfig()

    async def test(clock: trio.testing.MockClock) -> None:
        async with peer(a, config=config) as alice:
            silent = await trio.open_tcp_stream(*alice.address)
            async with bare_client(b, alice.address) as bare:
                assert isinstance(await bare.hear(), Hello)
                await trio.testing.wait_all_tasks_blocked(0.005)  # `silent` was accepted, too
                clock.jump(config.dial_deadline_s + 0.1)
                assert (await bare.hear_until_closed())[-1] == Goaway("closing")
            await settled(lambda: alice.streams.statistics.accepts_failed == 1)
            assert await silent.receive_some() == b""
            await silent.aclose()
            assert alice.streams.statistics.connections == 0

    on_stopped_clock(test)


@trio_test
async def test_a_peer_that_hangs_in_the_handshake_is_unreachable(tmp_path: Path) -> None:
    a, b = identities(tmp_path, 2)
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    address = ("127.0.0.1", int(listener.socket.getsockname()[1]))
    async with listener, peer(a, config=StreamConfig(dial_deadline_s=0.1)) as alice:
        with pytest.raises(PeerUnreachable, match="in time"):
            async with alice.streams.call(b.node_id, address, header(), None):
                pass


def test_a_hung_peer_fails_its_calls(tmp_path: Path) -> None:
    a, b = identities(tmp_path, 2)
    config = StreamConfig()
    heard: list[type[Frame]] = []

    async def hang(bare: BarePeer) -> None:
        await bare.say(hello(b))
        while (frame := await bare.hear()) is not None:
            heard.append(type(frame))

    async def test(clock: trio.testing.MockClock) -> None:
        async def let_time_pass() -> None:
            await settled(lambda: Call in heard)
            assert Ping not in heard
            clock.jump(config.ping_interval_s + 0.1)
            await settled(lambda: Ping in heard)
            clock.jump(config.ping_deadline_s + 0.1)

        async with (
            peer(a, config=config) as alice,
            bare_server(b, hang) as address,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(let_time_pass)
            with pytest.raises(StreamLost, match="silent"):
                async with alice.streams.call(
                    b.node_id, address, header(remaining_s=100.0), None
                ) as call:
                    await call.receive()

    on_stopped_clock(test)


@trio_test
async def test_connections_beyond_the_bound_are_turned_away(tmp_path: Path) -> None:
    members = identities(tmp_path, 3)
    config = StreamConfig(connections_max=1)
    async with peer(members[0], config=config) as alice, peer(members[1]) as bob:
        assert await answer(bob, alice, ["x"]) == (["x"], {"count": 1})
        async with peer(members[2]) as carol:
            with pytest.raises(PeerUnreachable):
                await answer(carol, alice)
        assert "peer.turned_away" in alice.log.events()
        assert await answer(bob, alice, ["x"]) == (["x"], {"count": 1})
