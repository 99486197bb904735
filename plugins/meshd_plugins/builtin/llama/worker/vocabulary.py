"""The vocabulary of a loaded model: text to tokens and back."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Final

PIECE_BYTES_MAX: Final = 256


class Vocabulary:
    """Belongs to a loaded model, and lives as long as that."""

    def __init__(self, api: Any, model: Any) -> None:
        self._api = api
        self.pointer = api.llama_model_get_vocab(model)
        self.size = int(api.llama_vocab_n_tokens(self.pointer))
        self._piece_buffer = ctypes.create_string_buffer(PIECE_BYTES_MAX)
        self._pieces: dict[int, bytes] = {}

    def piece(self, token: int) -> bytes:
        """Return the bytes of a token; control tokens have none."""
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = self._convert(token, special=False)
        return known

    def ends_text(self, token: int) -> bool:
        """Whether the token means that the answer is complete."""
        return bool(self._api.llama_vocab_is_eog(self.pointer, token))

    def _convert(self, token: int, *, special: bool) -> bytes:
        buffer = self._piece_buffer
        length = self._api.llama_token_to_piece(
            self.pointer, token, buffer, len(buffer), 0, special
        )
        if length < 0:  # a longer token than any known vocabulary has
            buffer = ctypes.create_string_buffer(-length)
            length = self._api.llama_token_to_piece(
                self.pointer, token, buffer, len(buffer), 0, special
            )
        return buffer.raw[: max(length, 0)]

    def tokenise(self, pieces: Sequence[str], *, parse_special: bool) -> list[int]:
        """Return the tokens of a prompt, in pieces between which no token reaches.

        A beginning-of-text token that the first piece has already is not doubled.
        """
        beginning = self.special_tokens["bos_token"]
        add_special = not (
            parse_special and beginning and "".join(pieces[:1]).startswith(beginning)
        )
        tokens: list[int] = []
        for piece in pieces:
            data = piece.encode()
            room = len(data) + 8
            found = (self._api.llama_token * room)()
            count = self._api.llama_tokenize(
                self.pointer, data, len(data), found, room, add_special, parse_special
            )
            assert count >= 0, "a token has at least one byte"
            tokens += found[:count]
            add_special = False
        return tokens

    def control_tokens(self) -> list[str]:
        """Texts of the tokens that steer the model and that no user may write."""
        api, vocabulary = self._api, self.pointer
        steering = api.LLAMA_TOKEN_ATTR_CONTROL | api.LLAMA_TOKEN_ATTR_UNKNOWN
        return [
            self._convert(token, special=True).decode("utf-8", "replace")
            for token in range(self.size)
            if api.llama_vocab_get_attr(vocabulary, token) & steering
        ]

    @property
    def special_tokens(self) -> dict[str, str]:
        """Text of the tokens that chat templates name."""
        ids = {
            "bos_token": self._api.llama_vocab_bos(self.pointer),
            "eos_token": self._api.llama_vocab_eos(self.pointer),
        }
        return {
            name: self._convert(token, special=True).decode("utf-8", "replace")
            if token >= 0
            else ""
            for name, token in ids.items()
        }
