"""Attackers without keys on the network of real daemons: they listen, replay, knock, flood and lie.

One mesh of three daemons and one attacker's host serve all tests. Each test ends with everybody still there, and
nobody else. What is on the wire is kept from before the first daemon starts.
"""

from __future__ import annotations

import json
import random
import secrets
import socket
import ssl
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
from tests.fuzz.support_mutation import mutant
from tests.integration.support_attackers import (
    ANSWER_DEADLINE_S,
    MDNS_PORT,
    Attacker,
    Capture,
    Packet,
    Wiretap,
    attacking,
    heard,
    spellings,
)
from tests.integration.support_namespaces import (
    HTTP_PORT,
    LISTEN_PORT,
    Host,
    LanMesh,
    why_unavailable,
)
from tests.integration.support_town import ALIVE, counter, peers, states, status
from tests.integration.support_town import heard as logged
from tests.support_daemons import Daemon, Mesh, UnixConnection

from meshd.core.effects import Address
from meshd.core.frame_codec import encode as encode_frame
from meshd.core.frames import Hello
from meshd.core.messages import Join
from meshd.core.sealing import FORMAT_ONE, Sealer
from meshd.core.wire import encode, payload_of
from meshd.trust.identity import Identity, load_identity
from meshd_cms.types import Epoch

pytestmark = pytest.mark.namespaces

NAMES = ("wombat-kitchen", "quokka-attic", "numbat-cellar")
ENTRY, SERVING, THIRD = NAMES
DOCUMENT = "data.gpt/shelf/bilby-recipes"
ECHO = "computation.gpt/echo"
PROMPT = "xylophone-zeppelin-1867"
CONTENT = "marzipan-obelisk-4711"
QUIET = "[discovery]\nannounce_models = false\n"
MEMBERSHIP_EVENTS = ("member.joined", "member.failed", "member.left")
REPLAYED_MAX = 400
FORGED = 1_000
SPOILT = 150


@dataclass(frozen=True, slots=True)
class Site:
    """A mesh, and who wants to harm it."""

    switch: Wiretap
    mesh: LanMesh
    hosts: Mapping[str, Host]
    daemons: dict[str, Daemon]
    attacker: Attacker
    stranger: Identity  # of another mesh, with everything that belongs to it

    def __getitem__(self, name: str) -> Daemon:
        return self.daemons[name]

    def address(self, name: str) -> Address:
        return (self.hosts[name].address, LISTEN_PORT)

    def whole(self, daemon: Daemon) -> bool:
        return states(daemon) == dict.fromkeys(NAMES, ALIVE)

    def wait_until_whole(self) -> None:
        for daemon in self.daemons.values():
            self.mesh.wait("everybody, and nobody else", daemon, partial(self.whole, daemon))

    def dropped(self, name: str, reason: str) -> int:
        return int(status(self[name])["counters"]["dropped"][reason])

    def streams(self, name: str) -> dict[str, int]:
        counters: dict[str, int] = status(self[name])["counters"]["streams"]
        return counters

    def asked(self, name: str, target: str, prompt: str) -> str:
        """The answer of a model, asked through a daemon."""
        body = {"model": target, "messages": [{"role": "user", "content": prompt}]}
        connection = UnixConnection(self[name].socket)
        try:
            connection.request("POST", "/v1/chat/completions", json.dumps(body))
            answer = connection.getresponse()
            told: dict[str, Any] = json.loads(answer.read())
        finally:
            connection.close()
        assert answer.status == 200, told
        return str(told["choices"][0]["message"]["content"])

    def membership(self) -> dict[str, Any]:
        """What an attack must not change: who is there in which life, and what each holds of each."""
        told: dict[str, Any] = {}
        for name, daemon in self.daemons.items():
            rows = peers(daemon)
            told[name] = {
                other: {key: row.get(key) for key in ("state", "address", "epoch")}
                for other, row in rows.items()
            }
            told[f"log of {name}"] = [
                about for one in MEMBERSHIP_EVENTS for about in logged(daemon, one)
            ]
            told[f"names at {name}"] = sorted(
                row["name"] for row in daemon.get("/mesh/v1/capabilities")["capabilities"]
            )
        return told


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    reason = why_unavailable(Wiretap)
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("attacked")
    (folder / "recipes.txt").write_text(CONTENT)
    tables = f'[plugins.document.files]\n"{DOCUMENT}" = "{folder / "recipes.txt"}"\n'
    with ExitStack() as stack:
        switch = stack.enter_context(Wiretap())
        hosts = {name: switch.add_host() for name in NAMES}
        attacker = stack.enter_context(attacking(switch.add_host()))
        mesh = stack.enter_context(LanMesh(folder / "mesh"))
        daemons = {
            name: mesh.start_on(
                hosts[name],
                name,
                plugins=["echo", "document"] if name == SERVING else ["hardware"],
                sections=QUIET + (tables if name == SERVING else ""),
                wait=False,
            )
            for name in NAMES
        }
        other = Mesh(folder / "other")
        stranger = load_identity(other.init("stranger") / "state")
        made = Site(switch, mesh, hosts, daemons, attacker, stranger)
        made.wait_until_whole()
        for daemon in daemons.values():
            mesh.wait_for_capability(daemon, ECHO)
            mesh.wait_for_capability(daemon, DOCUMENT)
        yield made


@pytest.fixture
def unharmed(site: Site) -> Iterator[None]:
    """After the test everything is as it was, and answers."""
    before = site.membership()
    yield
    site.wait_until_whole()
    after = site.membership()
    assert after == before
    assert site.asked(ENTRY, ECHO, "still there?") == "still there?"
    for daemon in site.daemons.values():
        assert "Traceback" not in daemon.log()


# -- the eavesdropper --------------------------------------------------------------------------------------


def test_the_wire_shows_no_name_prompt_answer_load_or_key(site: Site) -> None:
    assert site.asked(ENTRY, ECHO, PROMPT) == PROMPT
    assert CONTENT in site.asked(ENTRY, DOCUMENT, "")
    site.mesh.wait(
        "a load to be told",
        site[ENTRY],
        lambda: any(age is not None for age in status(site[ENTRY])["load_ages_s"].values()),
    )
    # The detector reads what is readable, and the mesh did speak where it was listened to.
    site.attacker.throw([b"in the clear: tapir-control-99"], site.address(ENTRY))
    site.mesh.wait(
        "the control", site[ENTRY], lambda: bool(site.switch.capture().find(b"tapir-control-99"))
    )
    capture = site.switch.capture()
    assert capture.find(b"_meshd")
    assert len(capture.datagrams(LISTEN_PORT)) > 10
    assert sum(map(len, capture.streams(LISTEN_PORT))) > 1_000
    needles = [PROMPT, CONTENT, DOCUMENT, ECHO, "bilby", "in_flight", "queue", "hardware", *NAMES]
    for needle in needles:
        assert capture.find(needle.encode()) == []
    for name in NAMES:
        identity = load_identity(site.mesh.folder / name / "state")
        for key in (
            identity.mesh_id,
            identity.datagram_key,
            identity.private_key.private_bytes_raw(),
        ):
            assert capture.find(key) == []


def test_the_detector_finds_bytes_as_text_and_across_packets() -> None:
    needle = b"needle in here"
    for form in spellings(needle):
        udp = _frame(b"head " + form + b" tail")
        assert Capture([udp]).find(needle), form
    assert Capture([_frame(b"nothing of the kind")]).find(needle) == []


def _frame(payload: bytes) -> bytes:
    """An Ethernet frame with IPv4 and UDP; sums are not read here."""
    ip = bytearray(20)
    ip[0], ip[9] = 0x45, 17
    ip[2:4] = (28 + len(payload)).to_bytes(2, "big")
    udp = b"\x00\x01\x00\x02" + (8 + len(payload)).to_bytes(2, "big") + bytes(2)
    return bytes(12) + b"\x08\x00" + bytes(ip) + udp + payload


def test_multicast_shows_the_protocol_an_opaque_tag_and_node_ids_only(site: Site) -> None:
    told = site.switch.capture().datagrams(MDNS_PORT)
    assert told
    joined = b"".join(packet.payload for packet in told)
    for key in (b"v=", b"mesh=", b"id="):
        assert key in joined
    for key in (b"names=", b"load=", b"node="):
        assert key not in joined
    meshes = {load_identity(site.mesh.folder / name / "state").mesh_id for name in NAMES}
    assert len(meshes) == 1
    (mesh,) = meshes
    assert mesh.hex().encode() not in joined


# -- the replayer ------------------------------------------------------------------------------------------


def _sent_to(site: Site, name: str, capture: Capture) -> list[Packet]:
    return [
        packet
        for packet in capture.datagrams(LISTEN_PORT)
        if packet.destination == site.address(name)
        and packet.source[0] != site.attacker.host.address
    ][-REPLAYED_MAX:]


@pytest.mark.usefixtures("unharmed")
def test_recorded_datagrams_say_nothing_again_or_to_another(site: Site) -> None:
    recorded = _sent_to(site, ENTRY, site.switch.capture())
    assert len(recorded) >= 5
    before = {name: _said(site, name) for name in NAMES}
    # From whom they came, at once and twice; then from another address; then to another node.
    site.switch.replay([packet.frame for packet in recorded] * 2, site.hosts[ENTRY])
    site.attacker.throw([packet.payload for packet in recorded], site.address(ENTRY))
    # A few were for anyone: a node that never heard them may open them once. The others were for one node.
    bound = [packet.payload for packet in recorded if packet.payload[0] == FORMAT_ONE]
    assert bound
    site.attacker.throw(bound, site.address(THIRD))

    def refused() -> bool:
        replays = _said(site, ENTRY) - before[ENTRY]
        elsewhere = _said(site, THIRD) - before[THIRD]
        return replays >= 3 * len(recorded) and elsewhere >= len(bound)

    site.mesh.wait("the replays to be refused", site[ENTRY], refused)


def _said(site: Site, name: str) -> int:
    """Datagrams that a node refused as played again, or as not meant for it."""
    return sum(site.dropped(name, reason) for reason in ("replayed", "bad_seal", "own"))


def test_recorded_datagrams_change_nothing_after_their_receiver_restarted(site: Site) -> None:
    recorded = _sent_to(site, THIRD, site.switch.capture())
    assert recorded
    lives = {name: peers(site[ENTRY])[name] for name in NAMES if name != THIRD}
    site[THIRD].process.kill()
    site[THIRD].process.wait()
    site.daemons[THIRD] = site.mesh.boot(site.hosts[THIRD], THIRD)
    site.switch.replay([packet.frame for packet in recorded], site.hosts[THIRD])
    site.wait_until_whole()
    site.switch.replay([packet.frame for packet in recorded], site.hosts[THIRD])
    site.wait_until_whole()
    for name, life in lives.items():
        for key in ("address", "epoch"):
            assert peers(site[THIRD])[name].get(key) == life.get(key)
    assert logged(site[ENTRY], "member.failed") in ([], [THIRD])


@pytest.mark.usefixtures("unharmed")
def test_what_a_peer_said_over_tls_says_nothing_again(site: Site) -> None:
    said = [sent for sent in site.switch.capture().streams(LISTEN_PORT) if sent[:1] == b"\x16"]
    assert said
    witnesses = [sent for sent in site.switch.capture().streams(LISTEN_PORT) if sent[:1] == b"W"]
    assert witnesses
    failed = site.streams(ENTRY)["accepts_failed"]
    for sent in (*said[:5], *witnesses[:5]):
        told = site.attacker.told(site.address(ENTRY), sent)
        # TLS: the server's first flight, which is for a secret that nobody has, and an alert. Never a session.
        assert told[:1] != b"W"
    assert site.streams(ENTRY)["accepts_failed"] >= failed + min(5, len(said))


# -- the stranger ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unharmed")
def test_garbage_on_every_port_is_counted_and_answered_with_nothing(site: Site) -> None:
    rng = random.Random(7)
    short, other = site.dropped(ENTRY, "too_short"), site.dropped(ENTRY, "other_mesh")
    site.attacker.throw(
        [rng.randbytes(rng.randrange(0, 49)) for _ in range(200)], site.address(ENTRY)
    )
    site.attacker.throw(
        [b"\x01" + rng.randbytes(rng.randrange(60, 1_399)) for _ in range(200)], site.address(ENTRY)
    )
    for first in (
        b"",
        b"\x16\x03\x01\xff\xff",
        b"W\xff\xff",
        b"W\x00\x01x",
        b"J",
        b"GET / HTTP/1.1\r\n",
    ):
        told = site.attacker.told(site.address(ENTRY), first + rng.randbytes(3_000))
        assert len(told) < 200  # an alert of TLS at most
        assert not any(name.encode() in told for name in NAMES)
    site.mesh.wait(
        "all of it to be counted",
        site[ENTRY],
        lambda: (
            site.dropped(ENTRY, "too_short") >= short + 190
            and site.dropped(ENTRY, "other_mesh") >= other + 190
        ),
    )
    for port in (HTTP_PORT, 80, 443):  # the API is for this machine alone
        with pytest.raises(ConnectionRefusedError):
            site.attacker.dial((site.hosts[ENTRY].address, port))


@pytest.mark.usefixtures("unharmed")
def test_a_client_without_a_certificate_of_this_mesh_hears_nothing(site: Site) -> None:
    nobody = _trusting(None)
    self_made = _trusting(site.stranger)
    hello = encode_frame(Hello(site.stranger.mesh_id, site.stranger.node_id, Epoch(1)))
    failed = site.streams(ENTRY)["accepts_failed"]
    for context in (nobody, self_made):
        try:
            told = site.attacker.told_in_tls(site.address(ENTRY), context, hello)
        except (ssl.SSLError, ConnectionError):
            continue
        assert told == b""  # closed without a word is as good as an alert
    assert site.streams(ENTRY)["accepts_failed"] == failed + 2


def _trusting(identity: Identity | None) -> ssl.SSLContext:
    """A client that trusts whoever answers, and shows the certificate of a node of another mesh, if any."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if identity is not None:
        context = identity.client_context
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


@pytest.mark.usefixtures("unharmed")
def test_a_member_of_another_mesh_opens_nothing_even_with_our_tag(site: Site) -> None:
    theirs = site.stranger
    ours = load_identity(site.mesh.folder / ENTRY / "state")
    before = site.dropped(ENTRY, "other_mesh"), site.dropped(ENTRY, "bad_seal")
    join = payload_of([encode(Join(1))])
    honest = Sealer(_datagram_key(theirs), theirs.mesh_id, theirs.node_id, Epoch(5))
    tagged = Sealer(_datagram_key(theirs), ours.mesh_id, theirs.node_id, Epoch(6))
    guessed = Sealer(secrets.token_bytes(32), ours.mesh_id, ours.node_id, Epoch(2**47))
    for sealer in (honest, tagged, guessed):
        site.attacker.throw([sealer.seal(join) for _ in range(50)], site.address(ENTRY))

    def counted() -> bool:
        others = site.dropped(ENTRY, "other_mesh") - before[0]
        sealed = site.dropped(ENTRY, "bad_seal") - before[1]
        return others >= 50 and sealed >= 50

    site.mesh.wait("all of it to be refused", site[ENTRY], counted)


def _datagram_key(identity: Identity) -> bytes:
    return identity.datagram_key


@pytest.mark.usefixtures("unharmed")
def test_spoilt_requests_and_handshakes_end_their_own_connection_only(site: Site) -> None:
    """What nobody has proved anything for is read by libraries: TLS's records, and the head of a request."""
    rng = random.Random(11)
    hellos = [
        sent[:600] for sent in site.switch.capture().streams(LISTEN_PORT) if sent[:1] == b"\x16"
    ]
    assert hellos
    requests = [
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}",
        b"GET /mesh/v1/status HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        b"POST /x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
    ]
    for _ in range(SPOILT):
        told = site.attacker.told(site.address(ENTRY), mutant(hellos, rng))
        assert not any(name.encode() in told for name in NAMES)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with connection, suppress(OSError):
            connection.settimeout(ANSWER_DEADLINE_S)
            connection.connect(str(site[ENTRY].socket))
            connection.sendall(mutant(requests, rng))
            connection.shutdown(socket.SHUT_WR)
            heard(connection)
    assert status(site[ENTRY])


# -- downgrade ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.TLSv1_2])
@pytest.mark.usefixtures("unharmed")
def test_older_tls_is_refused_even_with_a_certificate_of_the_mesh(
    site: Site, version: ssl.TLSVersion
) -> None:
    context = load_identity(site.mesh.folder / THIRD / "state").client_context
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # it is what we warn of, too
        context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        context.maximum_version = version
    context.set_ciphers("ALL:COMPLEMENTOFALL:@SECLEVEL=0")
    began = site.switch.frames_seen
    with pytest.raises((ssl.SSLError, ConnectionError)):
        site.attacker.told_in_tls(site.address(ENTRY), context)
    (offered, *_) = [
        sent
        for (source, _), sent in site.switch.capture(began).flows.items()
        if source[0] == site.attacker.host.address
    ]
    assert offered[:2] == b"\x16\x03"  # it was refused by the daemon, and not by our own library


@pytest.mark.usefixtures("unharmed")
def test_frames_in_the_clear_are_no_stream(site: Site) -> None:
    member = load_identity(site.mesh.folder / THIRD / "state")
    hello = encode_frame(Hello(member.mesh_id, member.node_id, Epoch(1)))
    told = site.attacker.told(site.address(ENTRY), hello)
    assert told.find(member.mesh_id) == -1
    assert len(told) < 200


# -- floods ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unharmed")
def test_half_open_connections_of_every_kind_keep_no_member_out(site: Site) -> None:
    held: list[socket.socket] = []
    for number in range(300):
        with suppress(OSError):
            connection = site.attacker.dial(site.address(SERVING))
            held.append(connection)
            connection.send((b"W", b"W\x05", b"\x16\x03\x01\x02\x00", b"J", b"G")[number % 5])
    assert len(held) > 250
    began = counter(site[SERVING], "probes")
    for number in range(5):
        assert (
            site.asked(ENTRY, ECHO, f"through the flood {number}") == f"through the flood {number}"
        )
    site.mesh.wait(
        "probes to go on", site[SERVING], lambda: counter(site[SERVING], "probes") > began
    )
    for connection in held:
        connection.settimeout(20.0)
        heard(connection)  # each is closed by the other end, in time
        connection.close()


@pytest.mark.usefixtures("unharmed")
def test_forged_multicast_answers_lead_nowhere_and_cost_little(site: Site) -> None:
    host = site.attacker.host
    sender = site.attacker.datagrams(MDNS_PORT)
    interface = socket.inet_aton(host.address)
    sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, interface)
    real = _announcement(site, ENTRY)
    instance = real[real.index(b"id=") + 3 :][:26]
    own = socket.inet_aton(site.hosts[ENTRY].address)
    assert own in real
    rng = random.Random(3)
    began, hints = site.switch.frames_seen, _hints(site[SERVING])
    for number in range(FORGED):
        forged = bytearray(real)
        if number % 2:  # another node each time, with our tag, at the attacker's address
            forged = bytearray(real.replace(instance, b"%026d" % number).replace(own, interface))
        else:
            forged[rng.randrange(12, len(forged))] ^= 1 << rng.randrange(8)
        sender.sendto(forged, ("224.0.0.251", MDNS_PORT))
    site.mesh.wait("some to be read", site[SERVING], lambda: _hints(site[SERVING]) > hints)
    assert site.asked(ENTRY, ECHO, "through the lies") == "through the lies"
    drawn = [
        packet
        for packet in site.switch.capture(began).datagrams(LISTEN_PORT)
        if packet.destination[0] == host.address
    ]
    assert len(drawn) < FORGED / 2  # what a lie draws is not more than the lie
    for daemon in site.daemons.values():
        assert daemon.resident_bytes() < 200 << 20


def _hints(daemon: Daemon) -> int:
    return counter(daemon, "hints", "discovery")


def _announcement(site: Site, name: str) -> bytes:
    """What a node answered over multicast, with its TXT and address records."""
    host = site.hosts[name].address
    return next(
        packet.payload
        for packet in site.switch.capture().datagrams(MDNS_PORT)
        if packet.source[0] == host
        and b"id=" in packet.payload
        and packet.payload[2] & 0x80
        and socket.inet_aton(host) in packet.payload
    )
