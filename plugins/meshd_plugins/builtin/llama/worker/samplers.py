"""Chains of llama.cpp's own samplers, one a job, and beside some of them a grammar.

Without a constraint a token is one call of `llama_sampler_sample`. With one the grammar is kept apart from
the chain, as llama.cpp's server does it: the chain chooses first, and the grammar looks at that one token,
which takes some microseconds; only when it refuses does it look at the others, which takes milliseconds (all
of a vocabulary of 49,152: 8 to 50 ms), and the chain chooses again. Of those others it sees the likeliest
`LIKELIEST` first: that is enough where it is certain that no other could be chosen.
"""

from __future__ import annotations

import ctypes
import math
import time
from array import array
from dataclasses import dataclass, field
from typing import Any, Final

from meshd_plugins.builtin.llama.engine.jobs import BackendRefused
from meshd_plugins.builtin.llama.engine.text import Logprob
from meshd_plugins.builtin.llama.prompt.constraint import Constraint, Verdict
from meshd_plugins.builtin.llama.sampling import PENALTY_WINDOW_TOKENS, Sampling
from meshd_plugins.builtin.llama.worker.vocabulary import Vocabulary

LIKELIEST: Final = 512
TRIES_MAX: Final = 64  # tokens refused one by one while the grammar has not begun
GRAMMAR_S: Final = 2.0  # of one look of a grammar at a vocabulary; beyond it the job is given up
_LOWEST: Final = float("-inf")


class GrammarUnusable(Exception):
    """llama.cpp does not take a grammar. Its reason is on stderr."""


@dataclass(slots=True)
class Sampler:
    """Of one job."""

    chain: Any  # a pointer
    sampling: Sampling
    constraint: Constraint | None = None  # None: nothing more to look after
    grammar: Any = None  # a pointer, once the grammar has begun
    seen: bytearray = field(default_factory=bytearray)  # the answer, until the grammar has begun


class Samplers:
    """Makes, uses and frees samplers; for one thread."""

    def __init__(self, api: Any, vocabulary: Vocabulary) -> None:
        self._api = api
        self._vocabulary = vocabulary
        self._candidates = _Candidates(api, vocabulary.size)
        self._banned = vocabulary.hidden_tokens()
        self._likeliest = api.llama_sampler_init_top_k(LIKELIEST)
        self._softmax = api.llama_sampler_init_dist(0)  # it leaves the probabilities behind

    def new(self, sampling: Sampling) -> Sampler:
        """Make the sampler of one job. Raises GrammarUnusable."""
        constraint = sampling.constraint
        if constraint is None or not constraint.gate.at_once:
            return Sampler(self._chain(sampling), sampling, constraint)
        grammar = self._new_grammar(constraint.grammar)
        return Sampler(self._chain(sampling), sampling, constraint, grammar)

    def check(self, constraint: Constraint) -> None:
        """See whether llama.cpp takes the grammar. Raises GrammarUnusable."""
        self._api.llama_sampler_free(self._new_grammar(constraint.grammar))

    def free(self, sampler: Sampler) -> None:
        """Give a sampler back, with all that is in it."""
        self._api.llama_sampler_free(sampler.chain)
        if sampler.grammar is not None:
            self._api.llama_sampler_free(sampler.grammar)

    def sample(self, sampler: Sampler, context: Any, row: int) -> int:
        """Choose the token that follows a row of the last batch, and note it.

        Raises:
            BackendRefused: the grammar leaves no token, or takes too long. Nothing was chosen.
        """
        if sampler.constraint is None:
            return int(self._api.llama_sampler_sample(sampler.chain, context, row))
        self._candidates.load(context, row)
        token = self._candidates.choose(sampler.chain)
        if sampler.grammar is None:
            token = self._choose_free(sampler, context, row, token)
        elif not self._admits(sampler.grammar, token):
            token = self._choose_fitting(sampler, context, row)
        self._api.llama_sampler_accept(sampler.chain, token)
        return token

    def logprob(self, context: Any, row: int, token: int, count: int) -> Logprob:
        """How likely a token was at a row of the last batch, before any sampler, and the likeliest there."""
        found = self._candidates
        found.load(context, row)
        found.apply(self._softmax)
        logit = found.logit_at(token)
        found.apply(self._likeliest)
        best = found.first(max(1, count))
        total = best[0][1] - math.log(found.probability_first())
        top = tuple((each, value - total) for each, value in best[:count])
        return Logprob(token, min(0.0, logit - total), top)

    # -- with a grammar ----------------------------------------------------------------------------------

    def _choose_free(self, sampler: Sampler, context: Any, row: int, token: int) -> int:
        """Choose while the grammar has not begun; it may begin within the chosen token."""
        assert sampler.constraint is not None
        refused: list[int] = []
        while not self._passes(sampler, token):
            refused.append(token)
            if not sampler.seen and sampler.constraint.gate.skips_reasoning:
                # It does not think first: so what it writes is the answer.
                sampler.grammar = self._new_grammar(sampler.constraint.grammar)
                return self._choose_fitting(sampler, context, row)
            if len(refused) > TRIES_MAX:
                raise BackendRefused("no likely token fits the grammar at its beginning")
            self._candidates.load(context, row)
            self._candidates.forbid(refused)
            token = self._candidates.choose(sampler.chain)
        return token

    def _passes(self, sampler: Sampler, token: int) -> bool:
        """Note a token in front of the grammar, and begin that where its gate says so."""
        constraint = sampler.constraint
        assert constraint is not None
        if self._vocabulary.ends_text(token):
            return not constraint.gate.bound
        data = bytes(sampler.seen) + self._vocabulary.piece(token)
        text = data.decode("utf-8", "ignore")
        match constraint.gate.look(text):
            case Verdict.WAIT:
                sampler.seen[:] = data
            case Verdict.FREE:
                sampler.constraint = None
            case int() as begin:
                grammar = self._new_grammar(constraint.grammar)
                if not self._feed(grammar, text[begin:]):
                    self._api.llama_sampler_free(grammar)
                    return False
                sampler.grammar = grammar
        return True

    def _feed(self, grammar: Any, text: str) -> bool:
        """Let a grammar accept a text, if it does."""
        for character in text:
            token = self._vocabulary.character(character)
            if token is None or not self._fits(grammar, token):
                return False
            self._api.llama_sampler_accept(grammar, token)
        return True

    def _choose_fitting(self, sampler: Sampler, context: Any, row: int) -> int:
        """Choose again, among the tokens that fit."""
        began_s = time.monotonic()
        found = self._candidates
        found.load(context, row)
        found.forbid(self._banned)
        if not self._narrow(sampler, found):
            found.load(context, row)
            found.forbid(self._banned)
            found.apply(sampler.grammar)
        token = found.choose(sampler.chain)
        if not self._admits(sampler.grammar, token):
            raise BackendRefused("no token of this model fits the grammar at this place")
        if time.monotonic() - began_s > GRAMMAR_S:
            raise BackendRefused("the grammar takes too long: it can be read in too many ways")
        return token

    def _narrow(self, sampler: Sampler, found: _Candidates) -> bool:
        """Keep the likeliest tokens that fit; False: another one could be chosen as well."""
        sampling = sampler.sampling
        if sampling.logit_bias or sampling.penalises:  # these change the order
            return False
        found.apply(self._likeliest)
        last = found.first(LIKELIEST)[-1][1]
        found.apply(sampler.grammar)
        fitting = [logit for _, logit in found.first(LIKELIEST) if logit > _LOWEST]
        if not fitting:
            return False
        if sampling.temperature == 0.0 or 0 < sampling.top_k <= len(fitting):
            return True
        return sampling.min_p > 0.0 and last <= fitting[0] + math.log(sampling.min_p)

    def _admits(self, grammar: Any, token: int) -> bool:
        """Whether a token fits; if so the grammar goes on with it."""
        if not self._fits(grammar, token):
            return False
        began_s = time.monotonic()
        self._api.llama_sampler_accept(grammar, token)
        if time.monotonic() - began_s > GRAMMAR_S:
            raise BackendRefused("the grammar takes too long: it can be read in too many ways")
        return True

    def _fits(self, grammar: Any, token: int) -> bool:
        if token in self._banned:
            return False
        single = self._candidates.single
        single.data[0].id, single.data[0].logit = token, 1.0
        self._api.llama_sampler_apply(grammar, ctypes.byref(single))
        return bool(single.data[0].logit > _LOWEST)

    def _new_grammar(self, text: str) -> Any:
        grammar = self._api.llama_sampler_init_grammar(
            self._vocabulary.pointer, text.encode(), b"root"
        )
        if not grammar:
            raise GrammarUnusable(
                "llama.cpp refuses the grammar: too many repetitions, most likely"
            )
        return grammar

    # -- without ---------------------------------------------------------------------------------------------

    def _chain(self, sampling: Sampling) -> Any:
        """Build the chain: biases, penalties, cuts, temperature, and the choice."""
        api = self._api
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())

        def add(sampler: Any) -> None:
            api.llama_sampler_chain_add(chain, sampler)

        biases = [
            (token, bias) for token, bias in sampling.logit_bias if token < self._vocabulary.size
        ]
        if biases:
            array_ = (api.llama_logit_bias * len(biases))()
            for index, (token, bias) in enumerate(biases):
                array_[index].token, array_[index].bias = token, bias
            add(api.llama_sampler_init_logit_bias(self._vocabulary.size, len(biases), array_))
        if sampling.penalises:
            add(
                self._penalties(
                    sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty
                )
            )
        if sampling.temperature == 0.0:
            add(api.llama_sampler_init_greedy())
            return chain
        if sampling.top_k > 0:
            add(api.llama_sampler_init_top_k(sampling.top_k))
        if sampling.top_p < 1.0:
            add(api.llama_sampler_init_top_p(sampling.top_p, 1))
        if sampling.min_p > 0.0:
            add(api.llama_sampler_init_min_p(sampling.min_p, 1))
        add(api.llama_sampler_init_temp(sampling.temperature))
        add(api.llama_sampler_init_dist(sampling.seed))
        return chain

    def _penalties(self, repeat: float, frequency: float, presence: float) -> Any:
        make = self._api.llama_sampler_init_penalties
        arguments = (PENALTY_WINDOW_TOKENS, repeat, frequency, presence)
        # Newer llama.cpp wants the size of the vocabulary first.
        return (
            make(self._vocabulary.size, *arguments)
            if len(make.argtypes) > len(arguments)
            else make(*arguments)
        )


class _Candidates:
    """One array of all tokens with their logits, reused.

    An entry is (int32 id, float32 logit, float32 probability): a column is every third word of it, which a
    memoryview copies in C (49,152 logits: 0.3 ms).
    """

    def __init__(self, api: Any, size: int) -> None:
        self._api = api
        self._size = size
        self._ids = memoryview(array("i", range(size)))
        self._entries = (api.llama_token_data * size)()
        words = memoryview(self._entries).cast("B")
        self._id_column, self._columns = words.cast("i"), words.cast("f")
        self._array = api.llama_token_data_array(self._entries, size, -1, False)
        self._floats = ctypes.c_float * size
        self.single = api.llama_token_data_array((api.llama_token_data * 1)(), 1, -1, False)

    def load(self, context: Any, row: int) -> None:
        """Take the logits of a row."""
        pointer = self._api.llama_get_logits_ith(context, row)
        logits = self._floats.from_address(ctypes.addressof(pointer.contents))
        self._id_column[0::3] = self._ids
        self._columns[1::3] = memoryview(logits).cast("B").cast("f")
        self._array.size, self._array.selected, self._array.sorted = self._size, -1, False

    def forbid(self, tokens: Any) -> None:
        """Make tokens impossible; right after `load`."""
        for token in tokens:
            self._columns[3 * token + 1] = _LOWEST

    def apply(self, sampler: Any) -> None:
        """Let a sampler work on them. What it ordered counts as unordered: a grammar may follow."""
        self._api.llama_sampler_apply(sampler, ctypes.byref(self._array))
        self._array.sorted = False

    def choose(self, chain: Any) -> int:
        """The token that a chain chooses, without noting it there."""
        self._api.llama_sampler_apply(chain, ctypes.byref(self._array))
        return int(self._entries[self._array.selected].id)

    def logit_at(self, token: int) -> float:
        """The logit of a token, while all are in their places."""
        return self._columns[3 * token + 1]

    def probability_first(self) -> float:
        """The probability of the first entry, once a sampler has computed it."""
        return self._columns[2]

    def first(self, count: int) -> list[tuple[int, float]]:
        """The first entries, with their logits."""
        end = 3 * min(count, self._array.size)
        return list(zip(self._id_column[0:end:3], self._columns[1:end:3], strict=True))
