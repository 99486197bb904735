"""How fast an adopted model is, from the requests that it really served. Pure.

Only requests count that ran alone, as far as this node knows: the rate of one sequence is what is announced.
What the server says of its own time (llama-server's `timings`, Ollama's durations, in nanoseconds) is taken
before what we measure at our end, which has the network, the queue and the cache in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from meshd_plugins.api import Rates, Value
from meshd_plugins.builtin.adopt.untrusted import count, number, table

DECODE_TOKENS_MIN: Final = 8  # fewer say nothing
PREFILL_TOKENS_MIN: Final = 32
NEWEST_WEIGHT: Final = 0.3  # of a measurement. Up: follows faster, wavers more
CHANGE_SHARE: Final = 0.2  # a rate that has changed by more is announced anew
RATE_MAX: Final = 1e6  # tokens a second; more is a mistake


@dataclass(frozen=True, slots=True)
class Timing:
    """What one request took; 0 where it is not known."""

    prefill_tokens: int = 0  # that were computed, not found in a cache
    prefill_s: float = 0.0
    decode_tokens: int = 0
    decode_s: float = 0.0
    load_s: float = 0.0

    @property
    def decode_rate(self) -> float:
        """Tokens a second; 0.0 when too few to tell."""
        return _rate(self.decode_tokens, self.decode_s, DECODE_TOKENS_MIN)

    @property
    def prefill_rate(self) -> float:
        """Tokens a second; 0.0 when too few to tell."""
        return _rate(self.prefill_tokens, self.prefill_s, PREFILL_TOKENS_MIN)


def from_llama_server(timings: Value) -> Timing | None:
    """Read `timings` of llama-server; None where there are none."""
    told = table(timings)
    if "predicted_ms" not in told:
        return None
    return Timing(
        prefill_tokens=count(told.get("prompt_n")),
        prefill_s=number(told.get("prompt_ms")) / 1e3,
        decode_tokens=count(told.get("predicted_n")),
        decode_s=number(told.get("predicted_ms")) / 1e3,
    )


def from_ollama(last: Value) -> Timing | None:
    """Read the last object of Ollama's own API; None where it has no durations."""
    told = table(last)
    if "eval_duration" not in told:
        return None
    return Timing(
        prefill_tokens=count(told.get("prompt_eval_count")),
        prefill_s=number(told.get("prompt_eval_duration")) / 1e9,
        decode_tokens=count(told.get("eval_count")),
        decode_s=number(told.get("eval_duration")) / 1e9,
        load_s=number(told.get("load_duration")) / 1e9,
    )


class Meter:
    """The rates of one model."""

    def __init__(self) -> None:
        self._prefill = 0.0
        self._decode = 0.0
        self._load_s = 0.0

    @property
    def is_measured(self) -> bool:
        """Whether anything is known."""
        return bool(self._decode or self._prefill)

    def note(self, timing: Timing) -> None:
        """A request ran alone and took this."""
        self._decode = _mixed(self._decode, timing.decode_rate)
        self._prefill = _mixed(self._prefill, timing.prefill_rate)
        if (
            timing.load_s > 1.0
        ):  # less is no loading: Ollama counts what it does for a warm model too
            self._load_s = timing.load_s

    @property
    def rates(self) -> Rates | None:
        """What is announced; None when nothing was measured yet."""
        if not (self.is_measured or self._load_s):
            return None
        return Rates(
            prefill_tokens_per_s=round(self._prefill, 1),
            decode_tokens_per_s=round(self._decode, 1),
            load_s=round(self._load_s, 1),
        )

    def differs(self, announced: Rates | None) -> bool:
        """Whether what is announced is off by more than `CHANGE_SHARE`."""
        now = self.rates
        if now is None or announced is None:
            return now is not announced
        return any(
            abs(new - old) > CHANGE_SHARE * old
            for new, old in (
                (now.prefill_tokens_per_s, announced.prefill_tokens_per_s),
                (now.decode_tokens_per_s, announced.decode_tokens_per_s),
                (now.load_s, announced.load_s),
            )
        )


def _rate(tokens: int, seconds: float, tokens_min: int) -> float:
    if tokens < tokens_min or seconds <= 0:
        return 0.0
    rate = tokens / seconds
    return rate if rate <= RATE_MAX else 0.0


def _mixed(known: float, measured: float) -> float:
    if not measured:
        return known
    return known + NEWEST_WEIGHT * (measured - known) if known else measured
