"""A real browser shows a hostile page: it must read nothing of the node, and have it do nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import trio
from tests.e2e.support_browser import EVIL, SITE_ADDRESS, Reports, find_browser, visit
from tests.shell.support_fake_mesh import FakeMesh, serving

from meshd.edge.counters import EdgeCounters

BROWSER = find_browser()


@pytest.mark.skipif(
    BROWSER is None, reason="no browser (Debian: apt-get install chromium-headless-shell)"
)
def test_a_hostile_page_reads_nothing_and_asks_nothing(tmp_path: Path) -> None:
    mesh, counters = FakeMesh(), EdgeCounters()
    assert BROWSER is not None
    browser = BROWSER

    async def main() -> tuple[int, Reports, list[tuple[str, str]]]:
        async with serving(mesh, tmp_path, counters=counters) as sockets:
            port = sockets.port
            reports, posts = await trio.to_thread.run_sync(
                visit, browser, port, tmp_path / "profile"
            )
            return port, reports, posts

    port, reports, posts = trio.run(main)
    # The page was shown, under three origins, and does to a server without protection what it wants.
    assert set(reports.by_origin) >= {f"http://{EVIL}:{port}", f"http://{SITE_ADDRESS}:{port}"}
    assert len(reports.by_origin) == 3
    for found in reports.by_origin.values():
        assert found["the naive server get"].startswith("read: 200")
        assert found["the naive server post text"] == "opaque"
    asked = {path for path, _ in posts}
    assert asked >= {"/v1/chat/completions", "/mesh/v1/ask", "/mesh/v1/leave"}
    assert "null" in {origin for _, origin in posts}

    # Of the node it got nothing. What comes in by the page's own name may be read: it is the refusal.
    outcomes = [
        (origin, attack, outcome)
        for origin, found in reports.by_origin.items()
        for attack, outcome in found.items()
        if not attack.startswith("the naive server")
    ]
    assert len(outcomes) == (2 * 3 + 1) * 17
    for origin, attack, outcome in outcomes:
        refused = outcome.startswith("read: 403 ") or "is not a name of this node" in outcome
        assert not outcome.startswith("read:") or refused, (origin, attack, outcome)
        assert not refused or attack.startswith("the rebound name"), (origin, attack, outcome)
    assert mesh.asks == []
    assert not mesh.left
    assert counters.refused["host_not_allowed"] >= 10
    assert counters.refused["origin_not_allowed"] >= 50
    assert counters.requests == sum(counters.refused.values())
