"""What the node where a request enters knows of KV state that is warm for it, and where.

From two sources: it remembers where it sent a conversation, which needs no gossip and holds at once; and
nodes tell in their load of the prefixes that they keep. What is remembered does not outlive `REMEMBERED_S`,
nor a list of its node that was made since, could have named it, and does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from meshd.core.frames import WarmHint
from meshd.core.handoff import HandoffConfig
from meshd.core.prefixes import Conversation, Tagger, Warm
from meshd.orchestrate.callers import Caller
from meshd.orchestrate.catalogue import Catalogue
from meshd_cms import NodeId
from meshd_naming import Candidate, Offer
from meshd_plugins.api import Privacy, Request, Usage

REMEMBERED_MAX: Final = 4_096
REMEMBERED_S: Final = 600.0
TOLD_WITHIN_S: Final = 5.0
"""By then a node's load speaks of what it served: workers report once a second, loads go out every two."""

MaySend = Callable[[Offer], bool]


class Warmth:
    """Remembers, and puts it together with what the catalogue knows.

    Args:
        catalogue: has the loads of others.
        tagger: makes tags.
        clock: monotonic seconds.
        config: from how many tokens on a hand-over is worth a hint.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        tagger: Tagger,
        clock: Callable[[], float],
        config: HandoffConfig,
    ) -> None:
        self.catalogue = catalogue
        self.tokens_min = config.tokens_min
        self._tagger = tagger
        self._clock = clock
        self._remembered: dict[tuple[NodeId, bytes], tuple[int, float]] = {}

    def begin(self, request: Request, caller: Caller) -> Beginning:
        """What a request begins with."""
        conversation = self._tagger.conversation(str(caller), request.operation, request.body)
        return Beginning(self, conversation, request.privacy)

    def remember(self, node: NodeId, tag: bytes, tokens: int) -> None:
        """A node has served the request that this tag is of: so many tokens are warm there."""
        self._remembered.pop((node, tag), None)
        if len(self._remembered) >= REMEMBERED_MAX:
            del self._remembered[next(iter(self._remembered))]
        self._remembered[node, tag] = (tokens, self._clock())

    def tokens(self, node: NodeId, tag: bytes) -> int:
        """Tokens of a prefix that are warm at a node, as far as is known."""
        told = self.catalogue.warm_of(node)
        told_tokens = told[0].tokens(tag) if told else 0
        tokens, at_s = self._remembered.get((node, tag), (0, 0.0))
        if not tokens:
            return told_tokens
        if self._clock() - at_s > REMEMBERED_S or (not told_tokens and _denied(told, at_s)):
            del self._remembered[node, tag]
            return told_tokens
        return max(tokens, told_tokens)


def _denied(told: tuple[Warm, float] | None, at_s: float) -> bool:
    return told is not None and told[1] > at_s + TOLD_WITHIN_S and not told[0].is_full


class Beginning:
    """One request, while candidates are chosen for it."""

    def __init__(self, warmth: Warmth, conversation: Conversation, privacy: Privacy) -> None:
        self._warmth = warmth
        self._conversation = conversation
        self._privacy = privacy

    def tags(self, candidate: Candidate) -> tuple[bytes, ...]:
        """What is sent to a candidate: none where no state is kept."""
        kv_key = candidate.offer.kv_key
        return self._conversation.tags(kv_key) if kv_key else ()

    def warm_tokens(self, candidate: Candidate) -> int:
        """Tokens of the prompt that need not be computed at a candidate."""
        return self._warm(candidate.offer)[0]

    def hint(self, candidate: Candidate, may_send: MaySend) -> WarmHint | None:
        """Where else more of it is warm, by enough that a candidate may want to fetch it.

        Args:
            candidate: that will serve.
            may_send: whether this very request may go to another one.
        """
        offer = candidate.offer
        if not offer.kv_key or self._privacy is Privacy.LOCAL:
            return None
        needed = self.warm_tokens(candidate) + self._warmth.tokens_min
        best: WarmHint | None = None
        for other in self._warmth.catalogue.holders(offer.kv_key):
            if other.owner == offer.owner:
                continue
            tokens, tag = self._warm(other)
            if tokens >= needed and may_send(other):
                best, needed = WarmHint(other.owner, tag, tokens), tokens + 1
        return best

    def served(self, candidate: Candidate, usage: Usage) -> None:
        """A candidate has answered."""
        tags = self.tags(candidate)
        tokens = usage.prompt_tokens + usage.completion_tokens
        if tags and tokens:
            self._warmth.remember(candidate.offer.owner, tags[-1], tokens)

    def _warm(self, offer: Offer) -> tuple[int, bytes]:
        """The most tokens that are warm there, and of which of our prefixes."""
        best, of = 0, b""
        if offer.kv_key:
            for tag in self._conversation.tags(offer.kv_key):
                tokens = self._warmth.tokens(offer.owner, tag)
                if tokens >= max(1, best):
                    best, of = tokens, tag
        return best, of
