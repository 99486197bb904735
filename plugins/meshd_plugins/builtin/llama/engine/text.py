"""From tokens to text: whole characters only, and nothing of a stop string."""

from __future__ import annotations

import codecs
from dataclasses import dataclass
from typing import NamedTuple


class Logprob(NamedTuple):
    """How likely a token was, before any sampler had a say."""

    token: int
    logprob: float  # natural logarithm
    top: tuple[tuple[int, float], ...]  # the likeliest tokens in its place, best first


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that may be shown, and the tokens it came from."""

    text: str
    token_ids: tuple[int, ...]
    position: int  # tokens of the answer before these
    logprobs: tuple[Logprob, ...] = ()  # one a token, where they were asked for


class TextAssembler:
    """Holds back what may not be shown yet: an incomplete character, or the beginning of a stop string.

    The pieces' texts, joined, are the decoded answer up to (without) the first stop string, and their
    tokens, joined, are all tokens given, in order. Where the answer is cut at a stop string the last
    piece has the tokens of the whole stop string and only the text before it.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._tokens: list[int] = []
        self._logprobs: list[Logprob] = []
        self._position = 0
        self.stopped = False  # a stop string was found

    def add(self, token: int, data: bytes, logprob: Logprob | None = None) -> Piece | None:
        """Take the next token and its bytes; return what may be shown now."""
        self._tokens.append(token)
        if logprob is not None:
            self._logprobs.append(logprob)
        self._held += self._decoder.decode(data)
        return self._release(final=False)

    def finish(self) -> Piece | None:
        """Return what is still held: the answer is at its end."""
        self._held += self._decoder.decode(b"", final=True)
        return self._release(final=True)

    def _release(self, *, final: bool) -> Piece | None:
        if self.stopped:
            return None
        cut = self._find_stop()
        if cut is not None:
            self.stopped = True
            text, self._held = self._held[:cut], ""
        else:
            keep = 0 if final else self._stop_prefix_length()
            split = len(self._held) - keep
            text, self._held = self._held[:split], self._held[split:]
        if not text and not (self._tokens and (final or self.stopped)):
            return None
        piece = Piece(text, tuple(self._tokens), self._position, tuple(self._logprobs))
        self._position += len(self._tokens)
        self._tokens.clear()
        self._logprobs.clear()
        return piece

    def _find_stop(self) -> int | None:
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        return min(found, default=None)

    def _stop_prefix_length(self) -> int:
        """Length of the longest end of the held text that could become a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest
