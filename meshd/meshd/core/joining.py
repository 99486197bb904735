"""First contacts: addresses from outside the protocol (seeds, mDNS, remembered peers) and those who join by us.

Invariants: at most one join a seed is under way; retries back off and never end while we are alone; a seed
where a live member is known is left in peace; joins are answered at a bounded rate, and who comes too
soon is told when to come again rather than refused; one node cannot use up what is there for all.

An answer has two parts. The welcome is one datagram, and every joiner gets it: our own claim, and those of a few
other members, chosen by chance. What is held of all the others, and the records, follow while there is
room in what we answer with at all (`Repair.may_answer`); otherwise the joiner asks one of those members for it, a
moment later. So when many join by one seed at once, the seed sends a datagram or two to each, its rumours
tell the members of the joiners, and the work of telling the joiners of the members is everybody's.

Counted: `joins_sent`, `joins_answered`, `joins_referred` (those whose tables others have to tell),
`joins_put_off`, `joins_excess` (dropped: far more than a node that starts sends), `join_answer_unexpected`,
`seed_overflow`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

from meshd.core.allowance import Allowance, Allowances
from meshd.core.context import Context, Peer
from meshd.core.effects import Address
from meshd.core.events import MeshJoined, SeedUnreachable
from meshd.core.messages import Claim, Join, JoinAnswer, JoinLater, Message
from meshd.core.offences import Offence
from meshd.core.repair import Repair
from meshd.core.timers import Timer
from meshd_cms.types import NodeId

_WELCOME_MEMBERS: Final = 4  # told of in a welcome
_JOINS_PER_S: Final = 1.0  # of one node: it doubles the time between its own tries
_JOINS_BURST: Final = 8.0


@dataclass(slots=True)
class _Seed:
    timer: Timer
    attempts: int = 0  # joins sent since the last answer
    token: int = 0  # of the last join


class Joining:
    """Our own joins, and the answers to those of others."""

    def __init__(self, context: Context, repair: Repair) -> None:
        self._context = context
        self._repair = repair
        self._seeds: OrderedDict[Address, _Seed] = OrderedDict()
        config = context.config
        self._allowance = Allowance(config.join_answers_per_s, config.join_answers_burst)
        self._allowances = Allowances(_JOINS_PER_S, _JOINS_BURST, config.members_max)

    def contact(self, addresses: Sequence[Address]) -> None:
        """Join by these addresses, each at once unless it is being tried already."""
        context = self._context
        for address in addresses:
            if address == context.me.address:
                continue
            known = self._seeds.get(address)
            if known is None:
                if len(self._seeds) >= context.config.seeds_max:
                    _, dropped = self._seeds.popitem(last=False)
                    dropped.timer.cancel()
                    context.count("seed_overflow")
                timer = context.timers.at(context.now_s, partial(self._try, address))
                self._seeds[address] = _Seed(timer)
                continue
            self._seeds.move_to_end(address)
            if known.attempts == 0 and not self._is_live(address):
                self._retry(address, known, 0.0)

    def alone(self) -> None:
        """The last live peer went: try all seeds as on the first day."""
        for address, seed in self._seeds.items():
            seed.attempts = 0
            self._retry(address, seed, self._context.config.join_retry_min_s)

    def on_join(self, join: Join, peer: Peer) -> bool:
        """Answer a join; False when the rest of its payload is better left for the next time."""
        context, config = self._context, self._context.config
        assert peer.node is not None
        if not self._allowances.of(peer.node).take(context.now_s):
            context.count("joins_excess")
            context.offend(peer.node, Offence.JOINS_EXCESS)
            return False
        if not self._allowance.take(context.now_s):
            context.count("joins_put_off")
            # Spread over the time in which as many more can be answered.
            wait_s = context.rng.uniform(0.5, 1.5) * config.join_answers_burst
            context.send(peer, [JoinLater(join.token, wait_s / config.join_answers_per_s)])
            return False
        others = context.members.sample(_WELCOME_MEMBERS, peer.node)
        is_whole = self._repair.may_answer() or not others
        context.count("joins_answered" if is_whole else "joins_referred")
        welcome: list[Message] = [
            JoinAnswer(join.token, is_whole),
            Claim(context.own_update(), merged=False),
            *(Claim(other.update, merged=True) for other in others),
        ]
        context.send(peer, welcome)
        return is_whole

    def on_answer(self, answer: JoinAnswer, sender: NodeId) -> None:
        """A seed answered."""
        context = self._context
        found = self._find(answer.token)
        if found is None:
            context.count("join_answer_unexpected")
            return
        address, seed = found
        seed.attempts = 0
        self._retry(address, seed, context.config.seed_recheck_s)
        context.notify(MeshJoined(sender, address))
        if not answer.is_whole:
            least_s = context.config.pull_delay_s
            due_s = context.now_s + context.rng.uniform(least_s, 4 * least_s)
            context.timers.at(due_s, partial(self._ask_another, sender))

    def _ask_another(self, seed: NodeId) -> None:
        """The seed is busy: have another member tell us of the mesh."""
        for member in self._context.members.sample(1, seed):
            self._repair.exchange(member)

    def on_later(self, later: JoinLater) -> None:
        """A seed is busy: it lives, and said when to come again."""
        found = self._find(later.token)
        if found is None:
            self._context.count("join_answer_unexpected")
            return
        address, seed = found
        seed.attempts = 0
        self._retry(address, seed, later.retry_after_s)

    def _find(self, token: int) -> tuple[Address, _Seed] | None:
        if token == 0:
            return None
        for address, seed in self._seeds.items():
            if seed.token == token:
                return address, seed
        return None

    def _is_live(self, address: Address) -> bool:
        member = self._context.members.at_address(address)
        return member is not None and member.is_live

    def _try(self, address: Address) -> None:
        context, config, seed = self._context, self._context.config, self._seeds[address]
        if self._is_live(address):
            seed.attempts = 0
            self._retry(address, seed, config.seed_recheck_s)
            return
        seed.attempts += 1
        if seed.attempts == config.seed_unreachable_attempts + 1:
            context.notify(SeedUnreachable(address, config.seed_unreachable_attempts))
        seed.token = context.next_sequence()
        context.count("joins_sent")
        first: list[Message] = [Claim(context.own_update(), merged=False), Join(seed.token)]
        self._repair.send_tables(Peer(None, address), first)
        most_s = config.seed_recheck_s if context.members.live() else config.join_retry_max_s
        doubled_s = config.join_retry_min_s * 2.0 ** min(seed.attempts - 1, 16)
        self._retry(address, seed, min(doubled_s, most_s) * context.rng.uniform(0.75, 1.25))

    def _retry(self, address: Address, seed: _Seed, after_s: float) -> None:
        seed.timer.cancel()
        due_s = self._context.now_s + after_s
        seed.timer = self._context.timers.at(due_s, partial(self._try, address))
