"""One mesh of four daemons for all tests that harm it and heal it again."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tests.integration.support_namespaces import why_unavailable
from tests.integration.support_switch import Switch
from tests.integration.support_town import Net, SharedTown


@pytest.fixture(scope="session")
def switches() -> None:
    """Skips what needs a switch of our own where it cannot be made."""
    reason = why_unavailable(Switch)
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def shared(switches: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedTown]:
    made = SharedTown(tmp_path_factory.mktemp("town"), ("one", "two", "three", "four"))
    yield made
    made.close()


@pytest.fixture
def net(shared: SharedTown) -> Iterator[Net]:
    """A whole town with default settings on perfect paths. A test leaves it such that it heals."""
    yield shared.take()
    shared.give_back()
