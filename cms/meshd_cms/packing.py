"""The one door to msgpack, which ships no types: strict, and with one kind of failure."""

from __future__ import annotations

from typing import Any, Final, cast

import msgpack

from meshd_cms.errors import CodecError

_msgpack: Any = msgpack

ITEMS_MAX: Final = 4096
"""In one array or map. A header may announce more items than there are bytes, in each level of a nest, and room
for them is made before they are read."""


def pack(obj: object) -> bytes:
    """The msgpack of an object made of what msgpack carries.

    Raises:
        ValueError, OverflowError, TypeError: it is not.
    """
    return cast("bytes", _msgpack.packb(obj, use_bin_type=True))


def unpack(data: bytes) -> object:
    """The one object these bytes are the msgpack of; maps may only have text or bytes as keys.

    No array or map in it has more than `ITEMS_MAX` items, or more than there are bytes, and there are no
    extension types.

    Raises:
        CodecError: they are not, or there is more than one; nothing else is raised on any bytes.
    """
    items_max = min(ITEMS_MAX, len(data))
    try:
        found = _msgpack.unpackb(
            data,
            raw=False,
            strict_map_key=True,
            max_array_len=items_max,
            max_map_len=items_max,
            max_ext_len=0,
        )
        return cast("object", found)
    except (
        ValueError,
        TypeError,
        OverflowError,
        RecursionError,
        _msgpack.UnpackException,
    ) as error:
        raise CodecError(f"not msgpack: {type(error).__name__}") from error
