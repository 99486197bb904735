"""What can be wrong with an identity. Every message says what to do.

IdentityError                  code identity_error
  NoIdentity                   code no_identity: this node belongs to no mesh yet
  IdentityExists               code identity_exists: it belongs to one already
  IdentityUnsafe               code identity_unsafe: others could read the keys
  IdentityDamaged              code identity_damaged: files are missing, cut short or do not fit together
  IdentityUnreadable           code identity_unreadable: the system does not let us read or write them
  NotAnIssuer                  code not_an_issuer: this node may not let others in
"""

from __future__ import annotations


class IdentityError(Exception):
    """Root of what this node's identity can be wrong in. State: nothing was changed."""

    code = "identity_error"


class NoIdentity(IdentityError):
    """There is no identity; the daemon does not start without one."""

    code = "no_identity"


class IdentityExists(IdentityError):
    """There is an identity already; it is never overwritten."""

    code = "identity_exists"


class IdentityUnsafe(IdentityError):
    """Permissions allow others to read keys."""

    code = "identity_unsafe"


class IdentityDamaged(IdentityError):
    """Files of the identity are missing, cut short or of different identities."""

    code = "identity_damaged"


class IdentityUnreadable(IdentityError):
    """The operating system refused."""

    code = "identity_unreadable"


class NotAnIssuer(IdentityError):
    """This node may not let others in, or not with that role."""

    code = "not_an_issuer"
