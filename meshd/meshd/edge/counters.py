"""What the edge counts, for `GET /metrics`.

What it refuses is counted under the `code` of the error that the client sees (docs/api.md lists them), or would
see if it could be told. The set is closed, so no client can make series.
"""

from __future__ import annotations

from typing import Final

from meshd.orchestrate.metrics import Family

REFUSALS: Final = (
    "body_too_slow",
    "content_type_not_allowed",
    "expired_api_key",
    "head_too_large",
    "head_too_slow",
    "host_not_allowed",
    "https_required",
    "invalid_api_key",
    "key_rate_exceeded",
    "malformed_request",
    "method_not_allowed",
    "missing_api_key",
    "model_not_permitted",
    "origin_not_allowed",
    "request_too_large",
    "scope_missing",
    "target_too_long",
    "tls_failed",
    "too_many_connections",
    "too_many_failures",
    "transfer_not_supported",
    "version_not_supported",
)


class EdgeCounters:
    """Counters of one edge; for one thread."""

    def __init__(self) -> None:
        self.requests = 0
        self.accepted = 0
        self.open = 0  # connections now
        self.idle_closed = 0
        self.stalled_closed = 0
        self.refused: dict[str, int] = dict.fromkeys(REFUSALS, 0)

    def refuse(self, code: str) -> None:
        """Count a refusal; codes of other errors are not counted here."""
        if code in self.refused:
            self.refused[code] += 1

    def families(self) -> tuple[Family, ...]:
        """All of it as metric families."""
        closed = {"idle": self.idle_closed, "stalled": self.stalled_closed}
        return (
            Family(
                "meshd_http_requests_total",
                "Requests whose head was read.",
                is_counter=True,
                samples=[({}, float(self.requests))],
            ),
            Family(
                "meshd_http_connections",
                "Connections that are open.",
                is_counter=False,
                samples=[({}, float(self.open))],
            ),
            Family(
                "meshd_http_connections_total",
                "Connections that were accepted.",
                is_counter=True,
                samples=[({}, float(self.accepted))],
            ),
            Family(
                "meshd_http_connections_closed_total",
                "Connections that were closed: idle for too long, or the client did not read.",
                is_counter=True,
                samples=[({"why": why}, float(count)) for why, count in closed.items()],
            ),
            Family(
                "meshd_http_refused_total",
                "Requests and connections that were refused, by the code of the error.",
                is_counter=True,
                samples=[({"code": code}, float(n)) for code, n in self.refused.items()],
            ),
        )
