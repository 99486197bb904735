"""What one operation of the security layer costs, on one processor: rows for `bench_security`."""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from meshd.core.decrees import DecreeKind
from meshd.core.sealing import Opened, Opener, Sealer
from meshd.trust.certificates import verify_chain
from meshd.trust.decree_proofs import decree_verifier, sign_decree
from meshd.trust.identity import Identity, admit, init_mesh
from meshd.trust.keys import verify
from meshd.trust.pins import inviter_exchange, joiner_exchange
from meshd_cms.types import Epoch

PAYLOAD = bytes(range(256)) * 2  # about what a datagram of gossip holds
MESSAGE = bytes(180)  # about what an entry of a record has signed
BLOCK_BYTES = 64 * 1024
LONG_ENOUGH_S = 0.4
ROUNDS = 5


def each_s(run: Callable[[], object]) -> float:
    """Seconds of one run: the best of some rounds, since whatever else runs only adds."""
    count = 1
    while True:
        took_s = timed(run, count)
        if took_s >= LONG_ENOUGH_S / ROUNDS:
            break
        count *= 2
    return min(timed(run, count) for _ in range(ROUNDS)) / count


def timed(run: Callable[[], object], count: int) -> float:
    began_s = time.perf_counter()
    for _ in range(count):
        run()
    return time.perf_counter() - began_s


def rows(folder: Path) -> Iterator[tuple[str, str]]:
    """One row an operation."""
    founder = init_mesh(folder / "founder", "bench")
    member = admit(founder, folder / "member")
    yield from sealing_rows(founder, member)
    yield from signing_rows(founder, member)
    yield from stream_rows(founder, member)
    yield "SPAKE2 with a PIN, both sides, ms", f"{1e3 * each_s(exchange_pin):.1f}"


def us(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}"


def sealing_rows(one: Identity, other: Identity) -> Iterator[tuple[str, str]]:
    sealer = Sealer(one.datagram_key, one.mesh_id, one.node_id, Epoch(1))
    opener = Opener((one.datagram_key,), one.mesh_id, other.node_id)
    yield f"seal a datagram of {len(PAYLOAD)} bytes, µs", us(each_s(lambda: sealer.seal(PAYLOAD)))
    datagrams = [sealer.seal(PAYLOAD) for _ in range(20_000)]
    began_s = time.perf_counter()
    opened = [opener.open(each) for each in datagrams]
    took_s = time.perf_counter() - began_s
    assert all(isinstance(each, Opened) for each in opened)
    yield "open one, µs", us(took_s / len(datagrams))
    forged = bytearray(sealer.seal(PAYLOAD))
    forged[-1] ^= 1
    bad = bytes(forged)
    yield "refuse one with a bad seal, µs", us(each_s(lambda: opener.open(bad)))


def signing_rows(one: Identity, other: Identity) -> Iterator[tuple[str, str]]:
    signature = one.signer.sign(MESSAGE)
    public = one.signer.public_key
    assert verify(public, MESSAGE, signature)
    yield f"sign {len(MESSAGE)} bytes, µs", us(each_s(lambda: one.signer.sign(MESSAGE)))
    took_s = each_s(lambda: verify(public, MESSAGE, signature))
    yield "verify, µs", us(took_s)
    yield "verifications a second", f"{1 / took_s:,.0f}"
    yield (
        "check a chain of certificates, µs",
        us(each_s(lambda: verify_chain(other.chain, other.root))),
    )
    decree = sign_decree(one, DecreeKind.REVOCATION, made_at_s=0, node=other.node_id)
    assert decree_verifier(one.root, one.mesh_id)(decree) is not None
    yield (
        "check a decree heard for the first time, µs",
        us(each_s(lambda: decree_verifier(one.root, one.mesh_id)(decree))),
    )


def stream_rows(one: Identity, other: Identity) -> Iterator[tuple[str, str]]:
    yield (
        "mutual TLS 1.3 handshake, both sides, ms",
        f"{1e3 * each_s(lambda: connected(one, other)):.2f}",
    )
    client, server, wire = connected(one, other)
    for size in (200, BLOCK_BYTES):
        data = bytes(size)

        def pass_on(data: bytes = data) -> None:
            client.write(data)
            wire()
            left = len(data)
            while left:
                left -= len(server.read(left))

        yield f"encrypt, pass on and decrypt {size} bytes over TLS, µs", us(each_s(pass_on))


def connected(
    one: Identity, other: Identity
) -> tuple[ssl.SSLObject, ssl.SSLObject, Callable[[], None]]:
    """Both ends of a connection in memory, and what carries bytes from the client to the server."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = one.client_context.wrap_bio(to_client, to_server)
    server_in, server_out = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = other.server_context.wrap_bio(server_in, server_out, server_side=True)

    def carry() -> None:
        server_in.write(to_server.read())

    done: set[ssl.SSLObject] = set()
    while len(done) < 2:
        for end in (client, server):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            else:
                done.add(end)
            carry()
            to_client.write(server_out.read())
    return client, server, carry


def exchange_pin() -> None:
    certificate = bytes(32)
    joiner, inviter = (
        joiner_exchange("481516", certificate),
        inviter_exchange("481516", certificate),
    )
    assert joiner.finish(inviter.message) == inviter.finish(joiner.message)
