"""The parameters of a generation: read from the body of a request, checked, and sent to the worker.

The defaults are for the small models (0.1 to 8 billion weights) that fit on these devices. Such models
ramble at high temperatures and loop at temperature 0, so: temperature 0.2 and top_p 0.9 (what the
authors of SmolLM2 recommend), min_p 0.05 to cut the long tail that a small model's flat distribution
has, repeat_penalty 1.1 over the last 64 tokens of the answer against loops, and at most 512 tokens,
some seconds of a slow device. A request overrides each of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from meshd_plugins.api import BadRequest, Value
from meshd_plugins.builtin.llama.prompt.constraint import Constraint

PENALTY_WINDOW_TOKENS: Final = 64
REPEAT_PENALTY: Final = 1.1
SEEDS: Final = 2**32 - 1  # llama.cpp takes the last 32-bit number to mean "any"
STOPS_MAX: Final = 16
STOP_CHARACTERS_MAX: Final = 256
BIASES_MAX: Final = 1024

LOGPROBS_MAX: Final = 20

_UNSUPPORTED: Final = ("functions", "function_call", "echo", "suffix")
"""Parameters that change the meaning of an answer: better refused than ignored."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How tokens are chosen, and when to stop."""

    seed: int  # 0 to SEEDS - 1
    max_tokens: int = 512
    temperature: float = 0.2  # 0: the most likely token, always
    top_p: float = 0.9  # 1: off
    top_k: int = 40  # 0: off
    min_p: float = 0.05  # 0: off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_penalty: float = REPEAT_PENALTY  # 1: off
    stop: tuple[str, ...] = ()
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = (
        None  # how many likeliest tokens are told beside the chosen; None: nothing
    )
    constraint: Constraint | None = None  # made in the worker, and does not travel

    @property
    def penalises(self) -> bool:
        """Whether tokens that were there before are less likely."""
        penalties = (self.repeat_penalty, self.frequency_penalty, self.presence_penalty)
        return penalties != (1.0, 0.0, 0.0)

    def to_wire(self) -> dict[str, Value]:
        """Return what `from_wire` reads."""
        wire = asdict(self)
        del wire["constraint"]
        return wire

    @staticmethod
    def from_wire(wire: Mapping[str, Any]) -> Sampling:
        """Read what `to_wire` wrote: both ends are of the same version, so it is not checked."""
        values: dict[str, Any] = dict(wire)
        values["stop"] = tuple(wire["stop"])
        values["logit_bias"] = tuple((token, bias) for token, bias in wire["logit_bias"])
        return Sampling(**values)


def read_sampling(
    body: Mapping[str, Value], default_seed: int, *, structured: bool = False
) -> Sampling:
    """Read the parameters of a request. Raises BadRequest, which names the parameter.

    `structured`: the answer is held to a grammar, or may turn into a tool call.
    """
    for name in _UNSUPPORTED:
        if body.get(name) not in (None, False, (), [], {}, "", 0):
            raise BadRequest(f"{name} is not supported by this model", code="unsupported_parameter")
    for name in ("n", "best_of"):
        if body.get(name) not in (None, 1):
            raise BadRequest(f"{name} must be 1", code="unsupported_parameter")
    # A grammar keeps an answer from rambling, and JSON repeats its quotes and braces.
    penalty = 1.0 if structured else REPEAT_PENALTY
    defaults = Sampling(seed=default_seed, repeat_penalty=penalty)
    limit_name = (
        "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    )
    return Sampling(
        seed=_integer(body, "seed", default_seed, -(2**63), 2**63 - 1) % SEEDS,
        max_tokens=_integer(body, limit_name, defaults.max_tokens, 1, 1_000_000),
        temperature=_number(body, "temperature", defaults.temperature, 0.0, 5.0),
        top_p=_number(body, "top_p", defaults.top_p, 0.0, 1.0),
        top_k=_integer(body, "top_k", defaults.top_k, 0, 1_000_000),
        min_p=_number(body, "min_p", defaults.min_p, 0.0, 1.0),
        presence_penalty=_number(body, "presence_penalty", 0.0, -2.0, 2.0),
        frequency_penalty=_number(body, "frequency_penalty", 0.0, -2.0, 2.0),
        repeat_penalty=_number(body, "repeat_penalty", defaults.repeat_penalty, 0.1, 10.0),
        stop=_stops(body.get("stop")),
        logit_bias=_biases(body.get("logit_bias")),
        logprobs=_logprobs(body),
    )


def _logprobs(body: Mapping[str, Value]) -> int | None:
    """Chats say `logprobs: true` and `top_logprobs: 5`, completions `logprobs: 5`."""
    wanted, likeliest = body.get("logprobs"), body.get("top_logprobs")
    if wanted is None or wanted is False:
        if likeliest not in (None, 0):
            raise BadRequest("top_logprobs needs logprobs: true")
        return None
    if wanted is True:
        return _integer(body, "top_logprobs", 0, 0, LOGPROBS_MAX)
    return _integer(body, "logprobs", 0, 0, LOGPROBS_MAX)


def _integer(body: Mapping[str, Value], name: str, default: int, least: int, most: int) -> int:
    value = body.get(name)
    if value is None:
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise BadRequest(f"{name} must be an integer from {least} to {most}")
    return value


def _number(
    body: Mapping[str, Value], name: str, default: float, least: float, most: float
) -> float:
    value = body.get(name)
    if value is None:
        return default
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not math.isfinite(value)
        or not least <= value <= most
    ):
        raise BadRequest(f"{name} must be a number from {least:g} to {most:g}")
    return float(value)


def _stops(value: Value) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = (value,) if isinstance(value, str) else value
    if not isinstance(stops, Sequence) or isinstance(stops, bytes) or len(stops) > STOPS_MAX:
        raise BadRequest(f"stop must be a string or a list of at most {STOPS_MAX} strings")
    for stop in stops:
        if not isinstance(stop, str) or not 1 <= len(stop) <= STOP_CHARACTERS_MAX:
            raise BadRequest(f"stop must hold strings of 1 to {STOP_CHARACTERS_MAX} characters")
    return tuple(str(stop) for stop in stops)


def _biases(value: Value) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, Mapping) or len(value) > BIASES_MAX:
        raise BadRequest(f"logit_bias must be a map of at most {BIASES_MAX} token ids")
    biases: list[tuple[int, float]] = []
    for token, bias in value.items():
        if not str(token).isdecimal() or int(token) >= 2**31:
            raise BadRequest(f"logit_bias: {str(token)[:20]!r} is no token id")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise BadRequest("logit_bias must hold numbers from -100 to 100")
        biases.append((int(token), float(bias)))
    return tuple(biases)
