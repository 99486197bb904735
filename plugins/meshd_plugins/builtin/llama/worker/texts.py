"""Texts to tokens for a model that embeds or ranks: with the tokens around them that it was trained with.

What a text holds that looks like a control token is ordinary text, as in a chat (`prompt.special`).
"""

from __future__ import annotations

import re
from array import array
from typing import Any, Final

from meshd_plugins.builtin.llama.prompt.special import MessageCutter, pieces
from meshd_plugins.builtin.llama.worker.vocabulary import Vocabulary

_PLACES: Final = re.compile(r"\{(query|document)\}")


class TextRefused(Exception):
    """A text has more tokens than the model takes, or none. The message is for people."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class TextTokeniser:
    """Of one loaded model.

    Args:
        api: the low-level module.
        vocabulary: the model's.
        template: how it wants a query and a document put together, "" when it does not say.
        tokens_max: of one text, those around it included.
    """

    def __init__(self, api: Any, vocabulary: Vocabulary, template: str, tokens_max: int) -> None:
        self._api = api
        self._vocabulary = vocabulary
        self._template = template
        self._tokens_max = tokens_max
        self._cutter = MessageCutter(vocabulary.control_tokens()) if template else None
        pointer = vocabulary.pointer
        begin, end = api.llama_vocab_bos(pointer), api.llama_vocab_eos(pointer)
        separator = api.llama_vocab_sep(pointer)
        ends = bool(api.llama_vocab_get_add_eos(pointer)) and end >= 0
        separates = bool(api.llama_vocab_get_add_sep(pointer)) and separator >= 0
        self._tail = 1 if ends or separates else 0  # tokens that llama.cpp puts behind a text
        self._begin = [begin] if api.llama_vocab_get_add_bos(pointer) and begin >= 0 else []
        self._end = [end] if ends else [separator] if separates else []
        self._between = ([end] if ends else []) + ([separator] if separates else [])

    def tokens(self, text: str, query: str | None, *, truncate: bool) -> array[int]:
        """Return the tokens of a text, or of a query and a document. Raises TextRefused.

        With `truncate` the end of the text is cut off, not the tokens behind it. A template has words of
        its own behind the document, so nothing is cut there.
        """
        if query is None:
            tokens = self._vocabulary.tokenise([text], parse_special=False)
            room, tail = self._tokens_max - self._tail - 1, self._tail
        elif self._cutter is not None:
            tokens, room, tail = self._in_template(query, text, self._cutter), 0, 0
        else:
            head = [*self._begin, *self._plain(query), *self._between]
            tokens = [*head, *self._plain(text), *self._end]
            room, tail = self._tokens_max - len(self._end) - len(head), len(self._end)
        if not tokens:
            raise TextRefused("it is empty for this model", "bad_request")
        if len(tokens) > self._tokens_max:
            if not truncate or room <= 0:
                hint = " or send truncate: true" if room > 0 else ""
                raise TextRefused(
                    f"it has {len(tokens)} tokens and this model takes {self._tokens_max}: shorten it{hint}",
                    "context_length_exceeded",
                )
            tokens = tokens[: self._tokens_max - tail] + tokens[len(tokens) - tail :]
        return array("i", tokens)

    def _plain(self, text: str, *, parse_special: bool = False) -> list[int]:
        """The tokens of a text and nothing around them."""
        data = text.encode()
        found = (self._api.llama_token * (len(data) + 8))()
        count = self._api.llama_tokenize(
            self._vocabulary.pointer, data, len(data), found, len(found), False, parse_special
        )
        assert count >= 0, "a token has at least one byte"
        return list(found[:count])

    def _in_template(self, query: str, document: str, cutter: MessageCutter) -> list[int]:
        """The template has all tokens around the texts, and only it may name control tokens."""
        values = {"query": cutter.cut(query), "document": cutter.cut(document)}
        prompt = _PLACES.sub(lambda place: values[place[1]], self._template)
        return [t for piece in pieces(prompt) for t in self._plain(piece, parse_special=True)]
