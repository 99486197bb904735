"""Pictures for models that see, and what llama.cpp's own helper makes of a prompt with pictures."""

import base64
import ctypes
import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from tests.e2e.support_llama import request
from tests.e2e.support_projector import png
from tests.e2e.support_sequences import CONTEXT, Node

from meshd_plugins.api import Request, Value
from meshd_plugins.builtin.llama.engine.jobs import Row

SUNSET = png(64, 64, lambda x, y: (255 - y, 120 - y, x))
FOREST = png(64, 64, lambda x, y: (x * 3 % 256, 200 - y * 2, y * 7 % 256))


def image(data: bytes, kind: str = "png") -> dict[str, Value]:
    url = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def sound(data: bytes, form: str = "wav") -> dict[str, Value]:
    encoded = base64.b64encode(data).decode()
    return {"type": "input_audio", "input_audio": {"data": encoded, "format": form}}


def about(text: str, *media: Mapping[str, Value], **parameters: Value) -> Request:
    """A question about media."""
    content: list[Value] = [*media, {"type": "text", "text": text}]
    messages: list[Value] = [{"role": "user", "content": content}]
    return request({"messages": messages, "temperature": 0, "seed": 1, **parameters})


def by_the_helper(
    node: Node, before: str, pictures: Sequence[bytes], after: str, count: int
) -> list[int]:
    """The greedy answer that llama.cpp's own helper leads to, in slot 0, which is empty afterwards.

    Its first tokens are computed by `mtmd_helper_eval_chunks`; the rest one by one.
    """
    api: Any = importlib.import_module("llama_cpp.mtmd_cpp")
    backend = node.backend
    encoder: Any = backend.media_encoder
    context, llama = encoder._context, backend._context
    marker = api.mtmd_default_marker()
    prompt = before.encode() + marker * len(pictures) + after.encode()
    chunks = api.mtmd_input_chunks_init()
    bitmaps = []
    for data in pictures:
        buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        options = api.mtmd_helper_init_opt_default()
        found = api.mtmd_helper_bitmap_init_from_buf_wrapper(
            context, buffer, len(data), False, options
        )
        bitmaps.append(found.bitmap)
    text = api.mtmd_input_text(prompt, len(prompt), True, True)
    array = (api.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
    assert api.mtmd_tokenize(context, chunks, ctypes.byref(text), array, len(bitmaps)) == 0
    backend.keep(0, 0)
    position = ctypes.c_int32()
    batch = backend.batch_tokens
    status = api.mtmd_helper_eval_chunks(
        context, llama, chunks, 0, 0, batch, True, ctypes.byref(position)
    )
    assert status == 0
    api.mtmd_input_chunks_free(chunks)
    for bitmap in bitmaps:
        api.mtmd_bitmap_free(bitmap)
    sampler = backend.new_sampler(node.greedy)
    backend._tokens_at = []
    tokens = [backend.sample(sampler, -1)]
    while len(tokens) < count:
        at = position.value + len(tokens) - 1
        assert at < CONTEXT
        backend.decode([Row(tokens[-1], at, 0, output=True)])
        tokens.append(backend.sample(sampler, 0))
    backend.free_sampler(sampler)
    backend.keep(0, 0)
    return tokens
