"""Small pictures and sounds that are whole, and the parts of messages that hold them."""

import random
import struct
import zlib
from base64 import b64encode

from meshd_plugins.api import Value


def png(width: int = 2, height: int = 2, colour: tuple[int, int, int] = (200, 30, 30)) -> bytes:
    """A picture of one colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    row = b"\0" + bytes(colour) * width
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(row * height)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def wav(samples: int = 16) -> bytes:
    """Silence, 16 kHz, mono."""
    data = bytes(2 * samples)
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, 16_000, 32_000, 2, 16)
    body = b"WAVE" + form + struct.pack("<4sI", b"data", len(data)) + data
    return struct.pack("<4sI", b"RIFF", len(body)) + body


def jpeg(size: int) -> bytes:
    """So many bytes that begin like a photo; nobody may have to decode it."""
    begin = b"\xff\xd8\xff\xe0\0\x10JFIF\0"
    return (begin + random.Random(size).randbytes(size))[:size]


def image_part(data: bytes, kind: str = "png") -> dict[str, Value]:
    """As OpenAI has it."""
    url = f"data:image/{kind};base64,{b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def audio_part(data: bytes, form: str = "wav") -> dict[str, Value]:
    """As OpenAI has it."""
    sound: dict[str, Value] = {"data": b64encode(data).decode(), "format": form}
    return {"type": "input_audio", "input_audio": sound}


def text_part(text: str) -> dict[str, Value]:
    """As OpenAI has it."""
    return {"type": "text", "text": text}
