"""Prompts of a known number of tokens, no two of which begin alike."""

from __future__ import annotations

import ctypes
import os
import random
from pathlib import Path
from typing import Any, Final

from meshd_plugins.builtin.llama.worker.low_level import import_low_level

WORDS: Final = tuple(
    word
    for line in (
        "the river and a small boat near old stone bridge where people walk every morning with bread milk",
        "news about weather market school music garden winter summer light night water paper glass metal",
        "road train city village house door window table chair book letter story friend family teacher",
        "doctor worker farmer king queen horse bird fish tree flower field hill mountain sea island cloud",
        "rain snow wind fire heart hand voice word number line point circle question answer reason idea",
    )
    for word in line.split()
)


class Vocabulary:
    """The tokens of a model file, without its weights."""

    def __init__(self, path: Path) -> None:
        self._api: Any = import_low_level()
        self._quiet = self._api.llama_log_callback(_say_nothing)
        self._api.llama_log_set(self._quiet, ctypes.c_void_p(0))
        parameters = self._api.llama_model_default_params()
        parameters.vocab_only = True
        self._model = self._api.llama_model_load_from_file(os.fsencode(path), parameters)
        if not self._model:
            raise SystemExit(f"llama.cpp cannot read {path}")
        self._pointer = self._api.llama_model_get_vocab(self._model)
        self.size = int(self._api.llama_vocab_n_tokens(self._pointer))

    def count(self, text: str) -> int:
        """Tokens of a prompt, with those that the model wants in front."""
        data = text.encode()
        room = len(data) + 8
        found = (self._api.llama_token * room)()
        return int(
            self._api.llama_tokenize(self._pointer, data, len(data), found, room, True, False)
        )

    def ending(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return tuple(
            token
            for token in range(self.size)
            if self._api.llama_vocab_is_eog(self._pointer, token)
        )


def _say_nothing(_level: int, _text: bytes, _data: object) -> None:
    """Of what llama.cpp logs."""


class Prompts:
    """Made anew from a seed, so that every subject of a round gets the same ones."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary

    def of(self, tokens: int, key: str) -> str:
        """A prompt of exactly that many tokens; keys that differ give prompts that differ early."""
        choose = random.Random(key)
        words = [f"{choose.randrange(100, 1000)}"]
        while (missing := tokens - self._vocabulary.count(" ".join(words))) > 0:
            words += choose.choices(WORDS, k=missing)
        while self._vocabulary.count(" ".join(words)) > tokens:
            words.pop()
        text = " ".join(words)
        assert self._vocabulary.count(text) == tokens, (tokens, self._vocabulary.count(text))
        return text
