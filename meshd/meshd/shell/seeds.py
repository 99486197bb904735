"""Configured first contacts: a host name that does not resolve yet delays nothing and is tried again.

A board often boots before its network and DNS are there; it joins when they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import trio

from meshd.core.effects import Address
from meshd.shell.addresses import ListenError
from meshd_plugins.api import Logger

RETRY_FIRST_S = 1.0
RETRY_MAX_S = 60.0
THREADS_MAX = 4  # names that are looked up at once; one may hang for many seconds


class Seeds:
    """Looks the configured seeds up.

    Args:
        seeds: "host:port" each.
        found: called with the address of each seed, once it is known.
        log: bound logger.
        resolve: blocks; raises ListenError when the name is not known (now).
    """

    def __init__(
        self,
        seeds: Sequence[str],
        *,
        found: Callable[[Address], None],
        log: Logger,
        resolve: Callable[[str], Address],
    ) -> None:
        self._seeds = seeds
        self._found = found
        self._log = log
        self._resolve = resolve
        self._limiter = trio.CapacityLimiter(THREADS_MAX)
        self._found_at: dict[str, Address] = {}

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Those that are resolved so far."""
        return tuple(self._found_at.values())

    def resolved(self) -> dict[str, Address | None]:
        """Every seed with its address; None: its name is not known yet."""
        return {seed: self._found_at.get(seed) for seed in self._seeds}

    async def run(self) -> None:
        """Return when all are resolved."""
        async with trio.open_nursery() as nursery:
            for seed in self._seeds:
                nursery.start_soon(self._look_up, seed)

    async def _look_up(self, seed: str) -> None:
        retry_s = RETRY_FIRST_S
        while True:
            try:
                address = await trio.to_thread.run_sync(
                    self._resolve, seed, abandon_on_cancel=True, limiter=self._limiter
                )
            except ListenError as error:
                self._log.warning(
                    "seed.unresolved", seed=seed, error=str(error), retry_in_s=retry_s
                )
                await trio.sleep(retry_s)
                retry_s = min(2 * retry_s, RETRY_MAX_S)
            else:
                self._found_at[seed] = address
                self._found(address)
                return
