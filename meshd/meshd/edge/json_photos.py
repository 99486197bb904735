"""Reading the JSON of requests with photos in them, without holding up the daemon for it.

Python's reader looks at each character of a string, all in one go: 9 ms for a photo of 5 MB. But where a photo is, is
found quickly, and base64 stands in JSON as it is. So photos are taken out before, and put back into what was read.

Invariant: what is read is what `from_json` reads. What was taken out and comes back as the whole value of a name was
a whole string, in which nothing was to be done; and nothing else was changed. If not all of them come back so, all is
read again as it came.
"""

from __future__ import annotations

import re
import secrets
from typing import Final

import trio

from meshd.edge.errors import RequestError
from meshd.edge.http import from_json
from meshd_plugins.api import Value
from meshd_plugins.media import BASE64, MEDIA_MAX, SLICE

LONG: Final = 1 << 16
"""Bytes of a photo that is worth it."""

_BEGINS: Final = b'"data:image/'
_URL: Final = re.compile(rb'"data:image/[a-z]+;base64,')
_PLAIN: Final = BASE64 + b"="


async def read_json(raw: bytes) -> dict[str, Value]:
    """The JSON object in `raw`; others have their turn meanwhile.

    Raises:
        RequestError: as `from_json`.
    """
    photos = await photos_in(raw) if len(raw) > LONG else []
    if not photos:
        return from_json(raw)
    view, mark = memoryview(raw), secrets.token_hex(16)
    rest: list[bytes | memoryview] = []
    texts: dict[str, Value] = {}
    at = 0
    for begin, end in photos:
        name = f"{mark}{len(texts)}"
        texts[name] = str(view[begin:end], "ascii")
        rest += (view[at:begin], name.encode())
        at = end
    rest.append(view[at:])
    missing = len(texts)

    def put_back(found: dict[str, Value]) -> dict[str, Value]:
        nonlocal missing
        for key, value in found.items():
            if isinstance(value, str) and value in texts:
                found[key] = texts[value]
                missing -= 1
        return found

    try:
        payload = from_json(b"".join(rest), put_back)
    except RequestError:
        return from_json(raw)  # which says where it is
    return payload if missing == 0 else from_json(raw)


async def photos_in(raw: bytes) -> list[tuple[int, int]]:
    """Where the content of strings seems to be that are long, and nothing but a photo."""
    found: list[tuple[int, int]] = []
    at = 0
    while len(found) < MEDIA_MAX and (begin := raw.find(_BEGINS, at)) >= 0:
        at = begin + len(_BEGINS)
        if (head := _URL.match(raw, begin)) is None:
            continue
        end = raw.find(b'"', head.end())
        if end - begin > LONG and await _is_plain(raw, head.end(), end):
            found.append((begin + 1, end))
            at = end
    return found


async def _is_plain(raw: bytes, begin: int, end: int) -> bool:
    """Whether there is nothing but what base64 is made of."""
    for at in range(begin, end, SLICE):
        if raw[at : min(at + SLICE, end)].translate(None, _PLAIN):
            return False
        await trio.lowlevel.checkpoint()
    return True
