"""Chains of llama.cpp's own samplers, one a job."""

from __future__ import annotations

from typing import Any

from meshd_plugins.builtin.llama.sampling import PENALTY_WINDOW_TOKENS, Sampling
from meshd_plugins.builtin.llama.worker.vocabulary import Vocabulary


class Samplers:
    """Makes and frees chains; a chain is a pointer."""

    def __init__(self, api: Any, vocabulary: Vocabulary) -> None:
        self._api = api
        self._vocabulary = vocabulary

    def new(self, sampling: Sampling) -> Any:
        """Build the chain: biases, penalties, cuts, temperature, and the choice."""
        api = self._api
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())

        def add(sampler: Any) -> None:
            api.llama_sampler_chain_add(chain, sampler)

        biases = [
            (token, bias) for token, bias in sampling.logit_bias if token < self._vocabulary.size
        ]
        if biases:
            array = (api.llama_logit_bias * len(biases))()
            for index, (token, bias) in enumerate(biases):
                array[index].token, array[index].bias = token, bias
            add(api.llama_sampler_init_logit_bias(self._vocabulary.size, len(biases), array))
        penalties = (sampling.repeat_penalty, sampling.frequency_penalty, sampling.presence_penalty)
        if penalties != (1.0, 0.0, 0.0):
            add(self._penalties(*penalties))
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

    def free(self, sampler: Any) -> None:
        """Give a chain back, with all that is in it."""
        self._api.llama_sampler_free(sampler)
