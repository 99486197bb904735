"""The one door to msgpack, which ships no types: strict, and with one kind of failure."""

from __future__ import annotations

from typing import Any, cast

import msgpack

from meshd_cms.errors import CodecError

_msgpack: Any = msgpack


def pack(obj: object) -> bytes:
    """The msgpack of an object made of what msgpack carries.

    Raises:
        ValueError, OverflowError, TypeError: it is not.
    """
    return cast("bytes", _msgpack.packb(obj, use_bin_type=True))


def unpack(data: bytes) -> object:
    """The one object these bytes are the msgpack of; maps may only have text or bytes as keys.

    Raises:
        CodecError: they are not, or there is more than one; nothing else is raised on any bytes.
    """
    try:
        return cast("object", _msgpack.unpackb(data, raw=False, strict_map_key=True))
    except (
        ValueError,
        TypeError,
        OverflowError,
        RecursionError,
        _msgpack.UnpackException,
    ) as error:
        raise CodecError(f"not msgpack: {type(error).__name__}") from error
