"""What is measured of one engine, through its client. Each figure returns named numbers."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

from tests.bench.engine_client import Ask, Client

FIGURE_DEADLINE_S: Final = 600.0
CLEARING_S: Final = 0.3  # for an engine to notice that a request was cancelled


@dataclass(slots=True)
class Stream:
    """One request and when its tokens came."""

    sent_s: float
    at_s: list[float] = field(default_factory=list[float])
    counts: list[int] = field(default_factory=list[int])  # tokens, beside each time
    ended_s: float | None = None
    error: str = ""

    @property
    def tokens(self) -> int:
        """That came so far."""
        return sum(self.counts)

    @property
    def first_s(self) -> float:
        """Seconds to the first token."""
        assert self.at_s, self.error or "no token came"
        return self.at_s[0] - self.sent_s


class Watch:
    """Requests on their way."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.streams: dict[int, Stream] = {}
        self._until_s = time.monotonic() + FIGURE_DEADLINE_S

    def send(self, ask: Ask) -> Stream:
        """Start a request."""
        sent_s = time.perf_counter()
        stream = Stream(sent_s)
        self.streams[self._client.send(ask)] = stream
        return stream

    def until(self, done: Callable[[], bool]) -> None:
        """Read until that is so. Raises TimeoutError."""
        while not done():
            if time.monotonic() > self._until_s:
                raise TimeoutError(f"not within {FIGURE_DEADLINE_S} s")
            self.read(1.0)

    def for_s(self, seconds: float) -> None:
        """Read for a while."""
        until_s = time.perf_counter() + seconds
        while (left_s := until_s - time.perf_counter()) > 0:
            self.read(left_s)

    def read(self, wait_s: float) -> None:
        """Read what comes within that time."""
        for arrival in self._client.receive(wait_s):
            stream = self.streams.get(arrival.request)
            if stream is None:
                continue
            if arrival.tokens:
                stream.at_s.append(arrival.at_s)
                stream.counts.append(arrival.tokens)
            if arrival.ended:
                stream.ended_s, stream.error = arrival.at_s, arrival.error

    def all_ended(self) -> bool:
        """Whether no request is on its way."""
        return all(stream.ended_s is not None for stream in self.streams.values())

    def finish(self) -> None:
        """Read to the end of all. Raises RuntimeError when one failed or is shorter than asked for."""
        self.until(self.all_ended)
        for stream in self.streams.values():
            if stream.error:
                raise RuntimeError(f"a request failed: {stream.error}")

    def cancel_all(self) -> None:
        """Cancel what has not ended, and let the engine notice."""
        for request, stream in self.streams.items():
            if stream.ended_s is None:
                self._client.cancel(request)
        self.streams.clear()
        self.for_s(CLEARING_S)


def together(client: Client, asks: Sequence[Ask]) -> Mapping[str, float]:
    """Aggregate rate of requests that begin at once.

    `whole`: all tokens over the time from the first request to the last token, prefill included.
    `steady`: from when all have their first token until the first one ends; decoding only.
    """
    watch = Watch(client)
    streams = [watch.send(ask) for ask in asks]
    watch.finish()
    for ask, stream in zip(asks, streams, strict=True):
        if stream.tokens != ask.tokens:
            raise RuntimeError(f"{stream.tokens} tokens came, {ask.tokens} were asked for")
    began_s = min(stream.sent_s for stream in streams)
    ended_s = max(stream.at_s[-1] for stream in streams)
    all_run_s = max(stream.at_s[0] for stream in streams)
    one_ends_s = min(stream.at_s[-1] for stream in streams)
    steady = sum(
        count
        for stream in streams
        for at_s, count in zip(stream.at_s, stream.counts, strict=True)
        if all_run_s < at_s <= one_ends_s
    )
    return {
        "whole tokens/s": sum(stream.tokens for stream in streams) / (ended_s - began_s),
        "steady tokens/s": steady / (one_ends_s - all_run_s) if one_ends_s > all_run_s else 0.0,
        "first token p50 ms": 1e3 * statistics.median(stream.first_s for stream in streams),
    }


def crowded(
    client: Client, running: Ask, long: Ask, short: Ask, after_s: float
) -> dict[str, float]:
    """A short request and a running stream while a long prompt is computed.

    `short first token`: of a request that arrives `after_s` after the long one.
    `gap`: between two tokens of a stream that ran before, from then until the long one's first token.
    """
    watch = Watch(client)
    stream = watch.send(running)
    watch.until(lambda: stream.tokens >= 8 or stream.ended_s is not None)
    long_stream = watch.send(long)
    watch.for_s(after_s)
    short_stream = watch.send(short)
    both = (long_stream, short_stream)
    watch.until(lambda: all(one.ended_s is not None for one in both))
    for one in both:
        if one.error:
            raise RuntimeError(f"a request failed: {one.error}")
    if stream.ended_s is not None and stream.ended_s < long_stream.at_s[0]:
        raise RuntimeError(f"the running stream ended too early: {stream.error or 'it was short'}")
    watch.cancel_all()
    return {
        "short first token ms": 1e3 * short_stream.first_s,
        "long first token ms": 1e3 * long_stream.first_s,
        **_gaps(stream, long_stream.sent_s, long_stream.at_s[0]),
    }


def _gaps(stream: Stream, since_s: float, until_s: float) -> dict[str, float]:
    before = [at_s for at_s in stream.at_s if at_s <= since_s][-1:]
    during = [at_s for at_s in stream.at_s if since_s < at_s <= until_s]
    after = [at_s for at_s in stream.at_s if at_s > until_s][:1]
    times = before + during + after
    gaps = [later - earlier for earlier, later in pairwise(times)]
    if not gaps:
        gaps = [until_s - times[0]]
    return {"gap p50 ms": 1e3 * statistics.median(gaps), "gap max ms": 1e3 * max(gaps)}


def first_token(client: Client, ask: Ask) -> float:
    """Seconds to the first token of a request that is alone."""
    watch = Watch(client)
    stream = watch.send(ask)
    watch.finish()
    return stream.first_s


def prefill(client: Client, ask: Ask, tokens: int) -> dict[str, float]:
    """Prompt tokens a second, sending and the first token included."""
    taken_s = first_token(client, ask)
    return {"prefill tokens/s": tokens / taken_s, "first token ms": 1e3 * taken_s}


def warm_prefix(client: Client, cold: Ask, warm: Ask) -> dict[str, float]:
    """First token of a request, and of the next one that begins with the same text."""
    cold_s = first_token(client, cold)
    warm_s = first_token(client, warm)
    return {"cold first token ms": 1e3 * cold_s, "warm first token ms": 1e3 * warm_s}
