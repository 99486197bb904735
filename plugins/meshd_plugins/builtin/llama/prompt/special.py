"""Keeps what a user wrote from being read as the model's own control tokens.

A chat template puts messages between markers such as `<|im_end|>`, and its output is tokenised with
those markers taken for what they are. Text in a message that looks like one would be taken for it too:
a user, or a document that a user quotes, could end its own message and speak as the system.

So each message is cut, before it is rendered, inside everything in it that looks like a control token
(and inside what might become one together with the text after it); the cuts survive the template, and
the rendered prompt is tokenised piece by piece. What is true of the prompt then: no control token comes
from a message, and taking the cuts out gives, character by character, what the template makes of the
messages. What the model sees of such a text are ordinary tokens that spell it.

The template itself is not held to this: it comes with the model, and may write what it likes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Final, NamedTuple

CUT: Final = "\ufdd1"
"""A noncharacter: Unicode keeps it for such use. One that a user sends is dropped."""
_MEDIUM: Final = "\ufdd2"  # another one, around the number of a medium


class Medium(NamedTuple):
    """The place of a picture or a sound in a prompt."""

    number: int  # among the media of the request


class MessageCutter:
    """Knows the control tokens of one vocabulary."""

    def __init__(self, control_tokens: Iterable[str]) -> None:
        """Those of one character cannot be cut, and are left alone: no known vocabulary has any."""
        tokens = sorted({token for token in control_tokens if len(token) > 1})
        tails: dict[str, list[str]] = defaultdict(list)
        for token in tokens:
            tails[token[0]].append(re.escape(token[1:]))
        pattern = "|".join(
            f"{re.escape(first)}(?=(?:{'|'.join(rest)}))" for first, rest in tails.items()
        )
        self._token_start = re.compile(pattern) if pattern else None
        self._beginnings = {token[:n] for token in tokens for n in range(1, len(token))}
        self._longest = max((len(token) for token in tokens), default=1)

    def cut(self, text: str) -> str:
        """Return the text with cuts in it, behind the first character of each look-alike."""
        text = text.replace(CUT, "").replace(_MEDIUM, "")
        if self._token_start is None:
            return text
        end = len(text.rstrip())  # a template may trim what follows
        starts = {match.start() for match in self._token_start.finditer(text)}
        starts |= {
            end - length
            for length in range(1, min(self._longest, end + 1))
            if text[end - length : end] in self._beginnings
        }
        parts: list[str] = []
        done = 0
        for start in sorted(starts):
            parts += [text[done : start + 1], CUT]
            done = start + 1
        return "".join((*parts, text[done:]))


def medium_mark(number: int) -> str:
    """What stands for a medium in a message that was cut, and survives the template."""
    return f"{_MEDIUM}{number}{_MEDIUM}"


def parts(prompt: str) -> list[str | Medium]:
    """The rendered prompt: texts, to be tokenised piece by piece, and media between them."""
    found: list[str | Medium] = []
    for turn, text in enumerate(prompt.split(_MEDIUM)):
        if turn % 2 and text.isdecimal():
            found.append(Medium(int(text)))
        else:
            found += pieces(text)
    return found


def pieces(prompt: str) -> list[str]:
    """The rendered prompt, to be tokenised piece by piece."""
    return [piece for piece in prompt.split(CUT) if piece]
