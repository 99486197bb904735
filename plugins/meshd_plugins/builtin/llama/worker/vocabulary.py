"""The vocabulary of a loaded model: text to tokens and back."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Final

PIECE_BYTES_MAX: Final = 256
MARKERS: Final = frozenset(
    {
        "<think>",
        "</think>",
        "[THINK]",
        "[/THINK]",
        "<tool_call>",
        "</tool_call>",
        "<tool_response>",
        "</tool_response>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "<|python_tag|>",
        "<|tool_call|>",
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
        "<minimax:tool_call>",
        "</minimax:tool_call>",
        "<\uff5ctool▁calls▁begin\uff5c>",
        "<\uff5ctool▁calls▁end\uff5c>",
        "<\uff5ctool▁call▁begin\uff5c>",
        "<\uff5ctool▁call▁end\uff5c>",
        "<\uff5ctool▁sep\uff5c>",
    }
)
"""Tokens that say what a part of an answer is: they are read there, though some vocabularies hide them."""


class Vocabulary:
    """Belongs to a loaded model, and lives as long as that."""

    def __init__(self, api: Any, model: Any) -> None:
        self._api = api
        self.pointer = api.llama_model_get_vocab(model)
        self.size = int(api.llama_vocab_n_tokens(self.pointer))
        self._piece_buffer = ctypes.create_string_buffer(PIECE_BYTES_MAX)
        self._pieces: dict[int, bytes] = {}
        self._characters: dict[str, int | None] = {}

    def piece(self, token: int) -> bytes:
        """Return the bytes of a token; control tokens have none, but for `MARKERS`."""
        known = self._pieces.get(token)
        if known is None:
            known = self._convert(token, special=False)
            if not known and (
                marker := self._convert(token, special=True).decode("utf-8", "ignore")
            ):
                known = marker.encode() if marker in MARKERS else b""
            self._pieces[token] = known
        return known

    def text(self, token: int) -> bytes:
        """Return the bytes of a token as people want to see them, those of control tokens too."""
        return self.piece(token) or self._convert(token, special=True)

    def character(self, character: str) -> int | None:
        """Return the token that is exactly this character; None when there is none."""
        if character not in self._characters:
            # Some vocabularies put a blank before a text: then it stands alone behind something else.
            ends = [
                self.tokenise([before + character], parse_special=False)[-1]
                for before in ("", "\n", "0")
            ]
            found = (token for token in ends if self.piece(token) == character.encode())
            self._characters[character] = next(found, None)
        return self._characters[character]

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

    def tokenise(
        self, pieces: Sequence[str], *, parse_special: bool, begins: bool = True
    ) -> list[int]:
        """Return the tokens of a prompt, in pieces between which no token reaches.

        A beginning-of-text token that the first piece has already is not doubled. `begins`: the prompt begins
        with it.
        """
        beginning = self.special_tokens["bos_token"]
        add_special = begins and not (
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
        markers = api.LLAMA_TOKEN_ATTR_USER_DEFINED
        found: list[str] = []
        for token in range(self.size):
            attributes = api.llama_vocab_get_attr(vocabulary, token)
            if attributes & (steering | markers):
                text = self._convert(token, special=True).decode("utf-8", "replace")
                if attributes & steering or text in MARKERS:
                    found.append(text)
        return found

    def hidden_tokens(self) -> frozenset[int]:
        """Tokens that have a text for llama.cpp's grammars and none in an answer."""
        api, vocabulary = self._api, self.pointer
        hidden = api.LLAMA_TOKEN_ATTR_CONTROL | api.LLAMA_TOKEN_ATTR_UNKNOWN
        return frozenset(
            token
            for token in range(self.size)
            if api.llama_vocab_get_attr(vocabulary, token) & hidden
            and not self.ends_text(token)
            and not self.piece(token)
        )

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
