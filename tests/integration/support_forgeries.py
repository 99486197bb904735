"""What a member can make up: records of others and of its own, and datagrams in the name of anybody."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from tests.e2e.support_liar import Liar

from meshd.core.membership import Update
from meshd.core.messages import Proclaim
from meshd.core.sealing import Sealer
from meshd.core.wire import encode, payload_of
from meshd_cms.entries import sign_entry, sign_head
from meshd_cms.store import Store
from meshd_cms.types import Delta, DigestLine, Epoch, MeshId, NodeId, StoreConfig, Version

WHOLE_RECORD_BYTES: Final = 10_000_000
FORGED_DECREES: Final = 20


def signed_by_another(liar: Liar, true: Delta, mesh: MeshId) -> Delta:
    """A record in another's name that goes on from the true one, with signatures of somebody else."""
    signer = liar.identity.signer
    entries = [
        replace(one, version=Version(true.until + 1 + count), value=b"\xa5owned")
        for count, one in enumerate(true.entries)
    ]
    signed = tuple(sign_entry(signer, mesh, true.owner, true.epoch, one) for one in entries)
    until = signed[-1].version
    head = sign_head(signer, mesh, replace(true.head, max_version=until))
    return replace(true, since=true.until, until=until, entries=signed, head=head)


def spliced(liar: Liar, true: Delta, mesh: MeshId) -> Delta:
    """The true head over an entry that was changed."""
    entry = replace(true.entries[-1], value=b"\xa5owned")
    return replace(true, entries=(*true.entries[:-1], entry), epoch=true.epoch)


def with_own_key(liar: Liar, true: Delta, mesh: MeshId) -> Delta:
    """The liar's key in place of the owner's, under which all signatures are good."""
    forged = signed_by_another(liar, true, mesh)
    head = replace(forged.head, public_key=liar.identity.signer.public_key)
    return replace(forged, head=sign_head(liar.identity.signer, mesh, head))


def holding_nothing(owner: NodeId) -> tuple[DigestLine, ...]:
    return (DigestLine(owner, Epoch(1), Version(0), Version(0)),)


def bad_last_signature(liar: Liar, number: int, entries: int) -> Delta:
    """A record of the liar's own in another life: all is good but the signature looked at last."""
    true = own_record(liar, number, entries)
    bad = replace(true.entries[-1], signature=bytes(64))
    return replace(true, entries=(*true.entries[:-1], bad))


def own_record(liar: Liar, number: int, entries: int) -> Delta:
    identity = liar.identity
    epoch = Epoch(liar.epoch + 1 + number)
    store = Store(StoreConfig(), identity.mesh_id, identity.signer, epoch, identity.verify)
    for count in range(entries):
        store.set(f"k{count}", count)
    (whole,) = store.deltas_for(holding_nothing(store.owner), WHOLE_RECORD_BYTES, [store.owner])
    return whole


def wrong_digest(liar: Liar, number: int, entries: int) -> Delta:
    """A record of the liar's own whose head says that it holds something else: every signature is good."""
    true = own_record(liar, number, entries)
    head = replace(true.head, live_digest=bytes(len(true.head.live_digest)))
    return replace(true, head=sign_head(liar.identity.signer, liar.identity.mesh_id, head))


def made_up_senders(liar: Liar) -> list[Sealer]:
    """Who has the mesh's datagram key can write any sender on what it seals."""
    identity = liar.identity
    names = [NodeId(secrets.token_bytes(16)) for _ in range(100)]
    return [Sealer(identity.datagram_key, identity.mesh_id, one, liar.epoch) for one in names]


def spoil(liar: Liar, victims: Sequence[Update]) -> None:
    """Leave as much behind as one can who has the key, and can seal in the name of everybody.

    What the victims say by datagram is taken for old, and they seem to have told of many forged decrees, so that
    they are not listened to when they tell of a true one: that the liar is out.
    """
    identity = liar.identity
    forged = payload_of([encode(Proclaim(secrets.token_bytes(400), rumour=False))])
    for one in victims:
        sealer = Sealer(identity.datagram_key, identity.mesh_id, one.node, one.epoch, counter=2**40)
        for target in liar.targets:
            for _ in range(FORGED_DECREES):
                liar.throw(target, sealer.seal(forged))
