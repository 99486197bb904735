"""llama.cpp's libmtmd: pictures and sounds become embeddings of a text model.

`read` decodes a file and says what stands for it in a prompt: ordinary tokens that the model wants around a
medium, and pieces to be encoded. `encode` computes the embeddings of a piece, which takes from milliseconds to
minutes; it is safe beside the model's own computing, on another thread.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import os
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

from meshd_plugins.builtin.llama.engine.media import COUNT_MAX
from meshd_plugins.builtin.llama.worker.low_level import import_low_level
from meshd_plugins.builtin.llama.worker.media_files import (
    MediumUnusable,
    check_picture,
    check_sound,
    is_sound,
)

PIECES_MAX: Final = 256  # of one medium
_FAR: Final = 1000  # a position, to see what depends on it

Place: TypeAlias = tuple[int, int, int, int]
"""Time, row, column and a fourth, seen from where a piece begins."""


class ProjectorUnusable(Exception):
    """libmtmd does not take this projector for this model. The message is for people; details are on stderr."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The embeddings of one piece."""

    values: Any  # ctypes array of floats: `count` rows
    places: tuple[Place, ...]  # of each, where the model counts in several dimensions; else ()

    @property
    def size_bytes(self) -> int:
        """What keeping it costs."""
        return ctypes.sizeof(self.values)


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a medium: text around it, or what is to be encoded."""

    tokens: tuple[int, ...] = ()
    key: bytes = b""  # hash of the medium, and which piece of it this is; b"": text
    count: int = 0  # embeddings
    positions: int = 0  # that they take together
    at_once: bool = False  # computed in one step or not at all
    places: tuple[Place, ...] = ()
    chunk: Any = None  # a pointer, while the medium is open


class MediaEncoder:
    """Belongs to a loaded model. `read` and `encode` are for one thread at a time, whichever."""

    def __init__(
        self, path: str, model: Any, log: Any, threads: int, *, gpu: bool, flash_attention: int = -1
    ) -> None:
        """Load a projector. Raises ProjectorUnusable.

        Args:
            path: of the open file that was verified.
            model: llama.cpp's, loaded.
            log: llama.cpp's callback, which must outlive this.
            threads: that one encoding takes.
            gpu: whether it may lie on one.
            flash_attention: llama.cpp's number: -1 automatic, 0 off, 1 on.
        """
        low_level = import_low_level()
        self._api = api = _import_mtmd()
        api.mtmd_helper_log_set(log, None)
        parameters = api.mtmd_context_params_default()
        parameters.use_gpu = gpu
        parameters.flash_attn_type = flash_attention
        parameters.print_timings = False
        parameters.n_threads = self.threads = threads
        parameters.warmup = False
        self._context = api.mtmd_init_from_file(os.fsencode(path), model, parameters)
        if not self._context:
            raise ProjectorUnusable("llama.cpp cannot load the projector for this model")
        self._width = int(low_level.llama_model_n_embd_inp(model))
        self._marker: bytes = api.mtmd_get_marker(self._context) or api.mtmd_default_marker()
        self._in_dimensions = bool(api.mtmd_decode_use_mrope(self._context))

    def close(self) -> None:
        """Give everything back. Nothing may be reading or encoding."""
        self._api.mtmd_free(self._context)

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model can take in with it."""
        sees = bool(self._api.mtmd_support_vision(self._context))
        hears = bool(self._api.mtmd_support_audio(self._context))
        return ("text", *(["image"] if sees else []), *(["audio"] if hears else []))

    @contextmanager
    def read(self, data: bytes) -> Generator[list[Piece], None, None]:
        """Decode a medium; its pieces can be encoded within the context. Raises MediumUnusable."""
        kind = "audio" if is_sound(data) else "image"
        if kind not in self.modalities:
            raise MediumUnusable(f"this model reads {' and '.join(self.modalities)} only")
        check = check_sound if kind == "audio" else check_picture
        check(data)
        api = self._api
        buffer = (ctypes.c_uint8 * len(data)).from_buffer_copy(data)
        found = api.mtmd_helper_bitmap_init_from_buf_wrapper(
            self._context, buffer, len(data), False, api.mtmd_helper_init_opt_default()
        )
        if found.video_ctx:
            api.mtmd_helper_video_free(found.video_ctx)
        if not found.bitmap:
            raise MediumUnusable("the picture or sound is broken, or none that this model reads")
        chunks = api.mtmd_input_chunks_init()
        try:
            text = api.mtmd_input_text(self._marker, len(self._marker), False, True)
            bitmaps = (api.mtmd_bitmap_p_ctypes * 1)(found.bitmap)
            if api.mtmd_tokenize(self._context, chunks, ctypes.byref(text), bitmaps, 1) != 0:
                raise MediumUnusable("the picture or sound cannot be cut as this model wants it")
            yield self._pieces(chunks, hashlib.blake2b(data, digest_size=16).digest())
        finally:
            api.mtmd_input_chunks_free(chunks)
            api.mtmd_bitmap_free(found.bitmap)

    def encode(self, piece: Piece) -> Encoded:
        """Compute the embeddings of a piece. Raises MediumUnusable."""
        if self._api.mtmd_encode_chunk(self._context, piece.chunk) != 0:
            raise MediumUnusable("the picture or sound could not be encoded")
        values = (ctypes.c_float * (piece.count * self._width))()
        ctypes.memmove(values, self._api.mtmd_get_output_embd(self._context), ctypes.sizeof(values))
        return Encoded(values, piece.places)

    def _pieces(self, chunks: Any, digest: bytes) -> list[Piece]:
        api = self._api
        number = int(api.mtmd_input_chunks_size(chunks))
        if number > PIECES_MAX:
            raise MediumUnusable(f"it comes in {number} pieces; at most {PIECES_MAX} are taken")
        pieces: list[Piece] = []
        for index in range(number):
            chunk = api.mtmd_input_chunks_get(chunks, index)
            if api.mtmd_input_chunk_get_type(chunk) == api.MTMD_INPUT_CHUNK_TYPE_TEXT:
                length = ctypes.c_size_t()
                tokens = api.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(length))
                around = tuple(tokens[: length.value])
                if any(token < 0 for token in around):
                    raise MediumUnusable(
                        "the model has not the tokens that its projector puts around pictures"
                    )
                pieces.append(Piece(around))
                continue
            count = int(api.mtmd_input_chunk_get_n_tokens(chunk))
            if not 0 < count < COUNT_MAX:
                raise MediumUnusable(f"a piece of it takes {count} tokens")
            pieces.append(
                Piece(
                    key=digest + index.to_bytes(4, "big"),
                    count=count,
                    positions=int(api.mtmd_input_chunk_get_n_pos(chunk)),
                    at_once=bool(api.mtmd_decode_use_non_causal(self._context, chunk)),
                    places=self._places(chunk, count),
                    chunk=chunk,
                )
            )
        return pieces

    def _places(self, chunk: Any, count: int) -> tuple[Place, ...]:
        """Where the embeddings of a piece are, seen from its beginning. Raises MediumUnusable."""
        if not self._in_dimensions:
            return ()
        image = self._api.mtmd_input_chunk_get_tokens_image(chunk)
        if not image:
            return tuple((n, n, n, n) for n in range(count))
        here, there = ([self._place(image, begin, n) for n in range(count)] for begin in (0, _FAR))
        for near, far in zip(here, there, strict=True):
            if any(b - a != _FAR for a, b in zip(near[:3], far[:3], strict=True)):
                raise MediumUnusable(
                    "this model places pictures in a way that is not computed here"
                )
        return tuple(here)

    def _place(self, image: Any, begin: int, number: int) -> Place:
        found = self._api.mtmd_image_tokens_get_decoder_pos(image, begin, number)
        return int(found.t), int(found.y), int(found.x), int(found.z)


def _import_mtmd() -> Any:
    """Raises ProjectorUnusable."""
    try:
        return importlib.import_module("llama_cpp.mtmd_cpp")
    except (ImportError, OSError, RuntimeError):
        raise ProjectorUnusable(
            "this llama-cpp-python was built without libmtmd, which pictures and sounds need: "
            "install it anew with CMAKE_ARGS=-DLLAVA_BUILD=on"
        ) from None
