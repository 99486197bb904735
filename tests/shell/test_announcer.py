"""The announcer: nothing that we say of ourselves is lost, and load goes out when it changes."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import trio
from tests.shell.support_log import KeptLog
from tests.shell.support_orchestrate import (
    GENERAL,
    Scripted,
    descriptor,
    hanging,
    open_guard,
    run,
)
from tests.unit.support_cms import store

from meshd.core.effects import Effect
from meshd.core.node import NodeCore
from meshd.orchestrate.announcer import LOAD_INTERVAL_S, Announcer, Command
from meshd.orchestrate.catalogue import Catalogue
from meshd.orchestrate.host import CapabilityHost, HostChange
from meshd.orchestrate.records import HARDWARE_KEY, NODE_KEY, capability_key, model_key
from meshd_cms import Version
from meshd_plugins.api import ModelFacts, Value

MODEL = ModelFacts("ab" * 32, "Tiny", "llama", 10, "Q4", 512, 100)


class FakeCore:
    """The writing half of a node core, over a real store."""

    def __init__(self) -> None:
        self.store = store(1)
        self.loads: list[tuple[float, Value]] = []

    def set(self, key: str, value: Value, now_s: float) -> tuple[Effect, ...]:
        self.store.set(key, value)
        return ()

    def delete(self, key: str, now_s: float) -> tuple[Effect, ...]:
        self.store.delete(key)
        return ()

    def publish(self, key: str, value: Value, now_s: float) -> tuple[Effect, ...]:
        self.loads.append((now_s, value))
        return ()


class Setup:
    """An announcer over a fake core whose queue may be full."""

    def __init__(self) -> None:
        self.core = FakeCore()
        self.full = False
        self.log = KeptLog()
        me = self.core.store.owner
        self.catalogue = Catalogue(self.core.store, lambda: (), trio.current_time)
        self.announcer = Announcer(
            me,
            post=self.post,
            catalogue=self.catalogue,
            figures=lambda: {"cpu": 0.25},
            log=self.log,
        )
        self.host = CapabilityHost(
            guard=open_guard(),
            queue_max=3,
            changed=self.announcer.capability_changed,
            load_changed=self.announcer.load_changed,
            log=self.log,
        )
        self.announcer.host = self.host

    def post(self, command: Command) -> bool:
        if self.full:
            return False
        command(cast("NodeCore", self.core), trio.current_time())
        return True

    def live_keys(self) -> list[str]:
        return [key for key, _ in self.core.store.items(self.core.store.owner)]

    def versions(self) -> list[str]:
        """Live keys in the order in which they were written."""
        whole = self.core.store.delta_since(self.core.store.owner, Version(0), 10**6)
        assert whole is not None
        return [entry.key for entry in whole.entries if entry.value is not None]


def test_a_capability_is_written_after_its_model_and_both_go_together() -> None:
    async def body() -> None:
        setup = Setup()
        shown = replace(descriptor(GENERAL), model=MODEL)
        other = replace(descriptor("knowledge.gpt/other"), model=MODEL)
        setup.host.add(Scripted(shown, hanging()))
        assert setup.versions() == [model_key(MODEL.digest), capability_key(shown.id)]
        assert [offer.capability_id for offer in setup.catalogue.offers()] == [shown.id]
        setup.host.add(Scripted(other, hanging()))
        setup.host.remove(shown.id)
        assert model_key(MODEL.digest) in setup.live_keys()  # the other has it still
        setup.host.remove(other.id)
        assert not setup.live_keys()
        assert not setup.catalogue.offers()

    run(body)


def test_what_finds_the_queue_full_is_written_later_in_its_order() -> None:
    async def body() -> None:
        setup = Setup()
        setup.full = True
        setup.announcer.node({"name": "hub"}, {"cores": 4})
        shown = replace(descriptor(GENERAL), model=MODEL)
        setup.host.add(Scripted(shown, hanging()))
        setup.host.replace(Scripted(replace(shown, slots=2), hanging()))
        setup.full = False
        assert not setup.live_keys()
        with trio.move_on_after(LOAD_INTERVAL_S / 2):
            await setup.announcer.run()
        assert setup.versions() == [
            NODE_KEY,
            HARDWARE_KEY,
            model_key(MODEL.digest),
            capability_key(shown.id),
        ]
        assert [offer.slots for offer in setup.catalogue.offers()] == [2]

    run(body)


def test_what_the_store_cannot_take_is_logged_and_breaks_nothing() -> None:
    async def body() -> None:
        setup = Setup()
        setup.announcer.node({"name": "hub"}, {"board": "x" * 2000})
        assert setup.live_keys() == [NODE_KEY]
        [(level, event, fields)] = setup.log.lines
        assert (level, event, fields["key"]) == ("error", "record.refused", HARDWARE_KEY)

    run(body)


def test_load_goes_out_at_intervals_and_soon_after_a_slot_was_taken() -> None:
    async def body() -> None:
        setup = Setup()
        setup.host.add(Scripted(descriptor(GENERAL), hanging()))
        with trio.move_on_after(2 * LOAD_INTERVAL_S + 0.5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(setup.announcer.run)
                await trio.sleep(LOAD_INTERVAL_S * 1.5)
                quiet = len(setup.core.loads)
                setup.announcer.capability_changed(HostChange("knowledge.gpt/gone", None))
        times = [at_s for at_s, _ in setup.core.loads]
        assert quiet <= 4
        assert len(times) > quiet
        assert any(0.0 <= at_s - LOAD_INTERVAL_S * 1.5 <= 0.2 for at_s in times)
        assert setup.core.loads[-1][1] == {
            "cpu": 0.25,
            "queue_max": 3,
            "draining": False,
            "capabilities": {},
        }

    run(body)


def test_our_own_draining_is_seen_by_our_own_resolver() -> None:
    async def body() -> None:
        setup = Setup()
        await setup.host.drain()
        with trio.move_on_after(0.5):
            await setup.announcer.run()
        shown = setup.catalogue.load_shown(setup.core.store.owner)
        assert shown is not None
        assert shown[0]["draining"] is True

    run(body)
