"""What this package raises.

CmsError
  StoreError            our caller's fault: the store is left as it was
    InvalidKey          an empty, over-long or unencodable key
    InvalidValue        a value that msgpack cannot carry, or one nested too deeply
    ValueTooLarge       the encoded entry with its proof is over the protocol's bound
    RecordFull          our own record holds as many keys as a record may
  CodecError            the peer's fault: bytes or objects that are no message of ours
  SnapshotError         the environment's fault: a saved state that cannot be used

A delta that is refused raises nothing: `Store.apply` returns `Rejected` with the reason.
"""

from __future__ import annotations

from enum import StrEnum


class CmsError(Exception):
    """Root of the tree; `code` is stable and is what logs, counters and HTTP answers show."""

    code = "cms_error"


class StoreError(CmsError):
    """A write to our own record that cannot be taken; nothing was changed."""

    code = "store_error"


class InvalidKey(StoreError):
    """The key is empty, longer than `KEY_BYTES_MAX` as UTF-8, or not encodable."""

    code = "invalid_key"


class InvalidValue(StoreError):
    """The value is not made of what msgpack carries, or is nested deeper than `VALUE_DEPTH_MAX`."""

    code = "invalid_value"


class ValueTooLarge(StoreError):
    """The entry would not fit in one rumour; announce a digest and let peers fetch the value."""

    code = "value_too_large"

    def __init__(self, key: str, size_bytes: int, limit_bytes: int) -> None:
        self.key = key
        self.size_bytes = size_bytes
        self.limit_bytes = limit_bytes
        super().__init__(
            f"the entry {key!r} is {size_bytes} bytes with its proof, the limit is {limit_bytes}"
        )


class RecordFull(StoreError):
    """Our record holds as many entries (tombstones included) as a record may."""

    code = "record_full"

    def __init__(self, key: str, entries_max: int) -> None:
        self.key = key
        self.entries_max = entries_max
        super().__init__(f"no room for {key!r}: a record holds at most {entries_max} entries")


class CodecError(CmsError):
    """A decoder met something that no encoder of ours makes; the only thing decoders raise."""

    code = "codec_error"


class SnapshotReason(StrEnum):
    """Why a saved state cannot be used."""

    TRUNCATED = "truncated"
    NOT_A_SNAPSHOT = "not_a_snapshot"
    UNKNOWN_FORMAT = "unknown_format"
    CHECKSUM = "checksum"
    MALFORMED = "malformed"
    OTHER_MESH = "other_mesh"
    OTHER_NODE = "other_node"
    BAD_PROOF = "bad_proof"
    TOO_LARGE = "too_large"


class SnapshotError(CmsError):
    """The saved state is damaged or is not ours: set it aside and start from what peers hold."""

    code = "snapshot_error"

    def __init__(self, reason: SnapshotReason, detail: str = "") -> None:
        self.reason = reason
        super().__init__(f"{reason.value}: {detail}" if detail else reason.value)
