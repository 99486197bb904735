"""TLS on the join channel: 1.3 only, and only the inviter shows a certificate.

The joiner knows no root yet, so OpenSSL checks nothing for it: it pins the root by its hash, with a chain that it
gets inside the session, and compares the certificate of that chain with the one in the handshake
(`meshd.shell.joining_client`).
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

from meshd.trust.certificates import pem
from meshd.trust.identity_files import as_file

if TYPE_CHECKING:
    from meshd.trust.identity import Identity


def inviter_context(identity: Identity) -> ssl.SSLContext:
    """For accepting joiners, with the certificate that this node has now."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    with as_file(pem(*identity.chain)) as chain:
        context.load_cert_chain(chain, identity.key_file)
    return context


def joiner_context() -> ssl.SSLContext:
    """For joining: see the module for what takes the place of verification."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
