"""What the node where a request enters knows of KV state that is warm for it, and where.

From two sources: it remembers where it sent a conversation, which needs no gossip and holds at once; and
nodes tell in their load of the prefixes that they keep. What is remembered does not outlive `REMEMBERED_S`,
nor a list of its node that was made since, could have named it, and does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from meshd.core.frames import WarmHint
from meshd.core.handoff import HandoffConfig, Links, Prospect, Reason, choose
from meshd.core.prefixes import Conversation, Tagger, Warm
from meshd.core.scheduler import HeadStart
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
        config: when a hand-over is worth it.
        links: how fast peers hand over to this node.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        tagger: Tagger,
        clock: Callable[[], float],
        config: HandoffConfig,
        links: Links,
    ) -> None:
        self.catalogue = catalogue
        self.config = config
        self._links = links
        self._tagger = tagger
        self._clock = clock
        self._remembered: dict[tuple[NodeId, bytes], tuple[int, float]] = {}

    def begin(self, request: Request, caller: Caller) -> Beginning:
        """What a request begins with."""
        conversation = self._tagger.conversation(str(caller), request.operation, request.body)
        return Beginning(self, conversation, request.privacy)

    def fetch_s(self, candidate: Candidate, holder: NodeId, tokens: int, tokens_here: int) -> float:
        """Seconds after which a candidate has fetched so many tokens from a holder; 0.0: it would not.

        Of what lies between two others nothing is known but how far they are from here. So it is taken for as
        slow as a fetch may be found to be before it is no longer worth it.
        """
        offer, config, catalogue = candidate.offer, self.config, self.catalogue
        if not config.enable or offer.rates is None:
            return 0.0
        away_s = catalogue.round_trip_of(holder)
        if candidate.local:
            bytes_per_s = self._links.bytes_per_s(holder, away_s, self._clock())
        else:
            both = (away_s, catalogue.round_trip_of(offer.owner))
            away_s = None if None in both else max(each for each in both if each is not None)
            bytes_per_s = self._links.guess(away_s)
        prospect = Prospect(
            tokens=tokens,
            tokens_here=tokens_here,
            bytes_per_token=offer.kv_bytes_per_token,
            prefill_tokens_per_s=offer.rates.prefill_tokens_per_s,
            link_bytes_per_s=bytes_per_s,
            round_trip_s=away_s or 0.0,
        )
        plan = choose(prospect, config)
        return 0.0 if isinstance(plan, Reason) else plan.expected_s * config.advantage

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
        self._holders: dict[
            str, list[tuple[int, bytes, Offer]]
        ] = {}  # by key, as they were first asked for

    def tags(self, candidate: Candidate) -> tuple[bytes, ...]:
        """What is sent to a candidate: none where no state is kept."""
        kv_key = candidate.offer.kv_key
        return self._conversation.tags(kv_key) if kv_key else ()

    def head_start(self, candidate: Candidate) -> HeadStart:
        """What of the prompt need not be computed at a candidate, as far as is known."""
        here = self._warm(candidate.offer)[0]
        hint = next(self._hints(candidate, here), None)
        if hint is None:
            return HeadStart(here)
        fetch_s = self._warmth.fetch_s(candidate, hint.node, hint.tokens, here)
        return HeadStart(here, hint.tokens, fetch_s) if fetch_s else HeadStart(here)

    def hint(self, candidate: Candidate, may_send: MaySend) -> WarmHint | None:
        """Where else more of it is warm, by enough that a candidate may want to fetch it.

        Args:
            candidate: that will serve.
            may_send: whether this very request may go to another one.
        """
        here = self._warm(candidate.offer)[0]
        return next(self._hints(candidate, here, may_send), None)

    def served(self, candidate: Candidate, usage: Usage) -> None:
        """A candidate has answered."""
        tags = self.tags(candidate)
        tokens = usage.prompt_tokens + usage.completion_tokens
        if tags and tokens:
            self._warmth.remember(candidate.offer.owner, tags[-1], tokens)

    def _hints(
        self, candidate: Candidate, here: int, may_send: MaySend = lambda _offer: True
    ) -> Iterator[WarmHint]:
        """Where else enough more than `here` is warm, the warmest first."""
        offer = candidate.offer
        if not offer.kv_key or self._privacy is Privacy.LOCAL:
            return
        holders = self._holders.get(offer.kv_key)
        if holders is None:
            holders = self._holders[offer.kv_key] = self._found(offer.kv_key)
        needed = here + self._warmth.config.tokens_min
        for tokens, tag, other in holders:
            if tokens < needed:
                return
            if other.owner != offer.owner and may_send(other):
                yield WarmHint(other.owner, tag, tokens)

    def _found(self, kv_key: str) -> list[tuple[int, bytes, Offer]]:
        """Who holds something of it."""
        offers = self._warmth.catalogue.holders(kv_key)
        found = [(*self._warm(offer), offer) for offer in offers]
        return sorted((one for one in found if one[0]), key=lambda one: one[0], reverse=True)

    def _warm(self, offer: Offer) -> tuple[int, bytes]:
        """The most tokens that are warm there, and of which of our prefixes."""
        best, of = 0, b""
        if offer.kv_key:
            for tag in self._conversation.tags(offer.kv_key):
                tokens = self._warmth.tokens(offer.owner, tag)
                if tokens >= max(1, best):
                    best, of = tokens, tag
        return best, of
