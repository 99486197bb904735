"""The manager: selection, quarantine, background tasks, merging."""

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import pytest
import trio
import trio.testing

from meshd_plugins import manager as manager_module
from meshd_plugins.api import PluginConfigError, PluginContext, Value
from meshd_plugins.builtin.echo import EchoCapability, EchoConfig
from meshd_plugins.hookspecs import hookimpl
from meshd_plugins.manager import PluginManager
from meshd_plugins.sources import UnknownPluginError, entry_points, of_objects
from meshd_plugins.testing import FakeCapabilities, FakeLogger, fake_context


class Good:
    @hookimpl
    def meshd_register(self, context: PluginContext) -> None:
        context.capabilities.add(EchoCapability(EchoConfig()))

    @hookimpl
    def meshd_facts(self, context: PluginContext) -> Mapping[str, Value]:
        return {"cores": 4, "good": True}


class AddsThenRaises:
    @hookimpl
    def meshd_register(self, context: PluginContext) -> None:
        context.capabilities.add(EchoCapability(EchoConfig()))
        raise ValueError("boom")


class BadTable:
    @hookimpl
    def meshd_register(self, context: PluginContext) -> None:
        raise PluginConfigError("plugins.bad.volume is 12; it must be at most 11")


class Misspelt:
    @hookimpl
    def meshd_regster(self, context: PluginContext) -> None: ...


class Unmarked:
    def meshd_register(self, context: PluginContext) -> None: ...


class WrongParameter:
    @hookimpl
    def meshd_register(self, kontext: PluginContext) -> None: ...


class Facts:
    def __init__(self, result: object) -> None:
        self.result = result

    @hookimpl
    def meshd_facts(self, context: PluginContext) -> object:
        return self.result

    @hookimpl
    def meshd_load(self, context: PluginContext) -> object:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


class Background:
    def __init__(self, task: Callable[[], Awaitable[None]]) -> None:
        self.task = task

    @hookimpl
    def meshd_register(self, context: PluginContext) -> None:
        context.capabilities.add(EchoCapability(EchoConfig()))

    @hookimpl
    def meshd_background(self, context: PluginContext) -> Callable[[], Awaitable[None]]:
        return self.task


class World:
    """A manager over given plugins, loaded and registered, with everything it touches."""

    def __init__(self, tmp_path: Path, **plugins: object) -> None:
        self.log = FakeLogger()
        self.capabilities = {name: FakeCapabilities() for name in plugins}
        self.now_s = 0.0
        self.manager = PluginManager(
            lambda name: fake_context(
                name, tmp_path, capabilities=self.capabilities[name], log=self.log
            ),
            log=self.log,
            clock=lambda: self.now_s,
            sources=of_objects(plugins),
        )
        self.manager.load()
        self.manager.register()

    def state(self, name: str) -> tuple[Value, Value]:
        row = next(row for row in self.manager.status() if row["name"] == name)
        return row["state"], row["reason"]


def test_a_good_plugin_is_active_and_its_capabilities_are_listed(tmp_path: Path) -> None:
    world = World(tmp_path, good=Good())
    assert world.manager.status() == [
        {
            "name": "good",
            "version": "",
            "state": "active",
            "reason": "",
            "capabilities": ["computation.gpt/echo"],
            "slow_calls": 0,
        }
    ]
    assert len(world.capabilities["good"].added) == 1


def test_a_raising_plugin_is_quarantined_with_its_reason_and_the_others_go_on(
    tmp_path: Path,
) -> None:
    world = World(tmp_path, araises=AddsThenRaises(), good=Good())
    state, reason = world.state("araises")
    assert state == "quarantined"
    assert isinstance(reason, str)
    assert reason.startswith("ValueError in meshd_register: boom [test_plugin_manager.py:")
    assert world.capabilities["araises"].added == ()
    assert world.state("good") == ("active", "")
    assert world.log.events("error") == ["plugin.quarantined"]
    [(name, (told,))] = world.manager.complaints().items()
    assert (name, told.is_error) == ("araises", True)
    assert "the plugin araises is left out: ValueError in meshd_register: boom" in told.message
    assert "[plugins.araises]" in told.remedy


@pytest.mark.parametrize(
    ("plugin", "reason"),
    [
        (BadTable(), "plugins.bad.volume is 12; it must be at most 11"),
        (Misspelt(), "meshd_regster is no hook of meshd; did you mean 'meshd_register'?"),
        (Unmarked(), "meshd_register is not marked with @hookimpl, so it is never called"),
    ],
)
def test_the_reason_is_the_message(plugin: object, reason: str, tmp_path: Path) -> None:
    assert World(tmp_path, bad=plugin).state("bad") == ("quarantined", reason)


def test_a_wrong_parameter_is_named(tmp_path: Path) -> None:
    state, reason = World(tmp_path, bad=WrongParameter()).state("bad")
    assert state == "quarantined"
    assert "kontext" in str(reason)


def test_a_hook_under_another_name_is_found(tmp_path: Path) -> None:
    class Renamed:
        @hookimpl
        def start(self, context: PluginContext) -> None: ...

    state, reason = World(tmp_path, bad=Renamed()).state("bad")
    assert state == "quarantined"
    assert "the hooks are: meshd_register" in str(reason)


def test_an_import_that_fails_is_quarantined(tmp_path: Path) -> None:
    def load() -> object:
        raise ImportError("no module named llama_cpp")

    log = FakeLogger()
    manager = PluginManager(
        lambda name: fake_context(name, tmp_path),
        log=log,
        clock=lambda: 0.0,
        sources=[manager_module.Source("broken", "1.2", load)],
    )
    manager.load()
    manager.register()
    [row] = manager.status()
    assert (row["state"], row["version"]) == ("quarantined", "1.2")
    assert str(row["reason"]).startswith("ImportError: no module named llama_cpp")
    assert manager.facts() == {}


def test_facts_are_merged_in_the_order_of_names_and_a_conflict_is_counted(tmp_path: Path) -> None:
    world = World(tmp_path, b=Facts({"cores": 8, "b": 1}), a=Facts({"cores": 4}))
    assert world.manager.facts() == {"cores": 4, "b": 1}
    assert world.manager.statistics()["conflicting_keys"] == 1
    assert world.log.events("warning") == ["plugin.key_conflicted"]


def test_a_hook_that_returns_no_mapping_is_quarantined(tmp_path: Path) -> None:
    world = World(tmp_path, bad=Facts(["cores"]), good=Good())
    assert world.manager.facts() == {"cores": 4, "good": True}
    assert world.state("bad") == (
        "quarantined",
        "TypeError in meshd_facts: returned list, not a mapping",
    )


def test_a_load_call_that_raises_takes_only_its_plugin_out(tmp_path: Path) -> None:
    world = World(tmp_path, a=Facts(OSError("no sensor")), b=Facts({"cpu": 0.5}))
    assert world.manager.load_figures() == {"cpu": 0.5}
    assert world.state("a")[0] == "quarantined"


def test_slow_calls_are_counted_and_logged_once(tmp_path: Path) -> None:
    world: World

    class Slow:
        @hookimpl
        def meshd_load(self, context: PluginContext) -> Mapping[str, Value]:
            world.now_s += manager_module.SLOW_CALL_S * 2
            return {}

    world = World(tmp_path, slow=Slow())
    world.manager.load_figures()
    world.manager.load_figures()
    assert world.manager.status()[0]["slow_calls"] == 2
    assert world.log.events("warning") == ["plugin.call_slowed"]


def test_a_background_task_that_raises_quarantines_its_plugin_only(tmp_path: Path) -> None:
    finished: list[str] = []

    async def fails() -> None:
        await trio.sleep(1)
        raise RuntimeError("lost the bus")

    async def lives() -> None:
        await trio.sleep(5)
        finished.append("lives")

    async def main() -> None:
        world = World(tmp_path, fails=Background(fails), lives=Background(lives))
        async with trio.open_nursery() as nursery:
            await nursery.start(world.manager.run)
            await trio.sleep(10)
            nursery.cancel_scope.cancel()
        state, reason = world.state("fails")
        assert state == "quarantined"
        assert str(reason).startswith("RuntimeError: lost the bus")
        assert world.capabilities["fails"].added == ()
        assert world.state("lives") == ("active", "")

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert finished == ["lives"]


def test_a_background_task_that_breaks_while_it_is_cancelled_does_not_stop_the_stop(
    tmp_path: Path,
) -> None:
    async def breaks() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            try:
                await trio.sleep_forever()
            finally:
                raise RuntimeError("broke in its clean-up")

    async def main() -> None:
        world = World(tmp_path, breaks=Background(breaks))
        async with trio.open_nursery() as nursery:
            await nursery.start(world.manager.run)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert world.state("breaks")[0] == "quarantined"

    trio.run(main)


def test_quarantine_ends_the_background_task(tmp_path: Path) -> None:
    async def main() -> None:
        ended = trio.Event()

        async def task() -> None:
            try:
                await trio.sleep_forever()
            finally:
                ended.set()

        world = World(tmp_path, one=Background(task))
        async with trio.open_nursery() as nursery:
            await nursery.start(world.manager.run)
            await trio.testing.wait_all_tasks_blocked()
            world.manager.quarantine("one", RuntimeError("by the daemon"))
            await ended.wait()
            nursery.cancel_scope.cancel()

    trio.run(main)


def make(tmp_path: Path, **selection: list[str]) -> PluginManager:
    return PluginManager(
        lambda name: fake_context(name, tmp_path),
        log=FakeLogger(),
        clock=lambda: 0.0,
        sources=of_objects({"arithmetic": Good(), "echo": Good()}),
        enabled=selection.get("enabled", []),
        disabled=selection.get("disabled", []),
        configured=selection.get("configured", []),
    )


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"enabled": ["arithmatic"]}, "plugins.enable names the plugin 'arithmatic', which is not installed; did you mean 'arithmetic'"),
        ({"disabled": ["zzz"]}, "known: arithmetic, echo"),
        ({"configured": ["ecko"]}, r"a table \[plugins.\*\] names the plugin 'ecko'.*did you mean 'echo'"),
        ({"enabled": ["echo"], "disabled": ["echo"]}, "both enabled and disabled"),
    ],
)  # fmt: skip
def test_a_wrong_selection_is_rejected(
    selection: dict[str, list[str]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnknownPluginError, match=message):
        make(tmp_path, **selection)


@pytest.mark.parametrize(
    ("selection", "states"),
    [
        ({}, ["active", "disabled"]),
        ({"enabled": ["echo"]}, ["active", "active"]),
        ({"disabled": ["arithmetic"]}, ["disabled", "disabled"]),
    ],
)
def test_the_selection_decides_what_is_loaded(
    selection: dict[str, list[str]], states: list[str], tmp_path: Path
) -> None:
    manager = make(tmp_path, **selection)
    manager.load()
    manager.register()
    assert [row["state"] for row in manager.status()] == states


def test_a_plugin_cannot_touch_what_another_registered(tmp_path: Path) -> None:
    class Thief:
        @hookimpl
        def meshd_register(self, context: PluginContext) -> None:
            context.capabilities.remove("computation.gpt/echo")

    world = World(tmp_path, good=Good(), thief=Thief())
    assert world.state("thief")[0] == "quarantined"
    assert len(world.capabilities["good"].added) == 1


def test_the_built_in_plugins_are_found_by_their_entry_points(tmp_path: Path) -> None:
    assert {"arithmetic", "document", "echo", "hardware", "llama"} <= {
        source.name for source in entry_points()
    }
    manager = PluginManager(
        lambda name: fake_context(name, tmp_path),
        log=FakeLogger(),
        clock=lambda: 0.0,
        enabled=["echo"],
        disabled=["llama"],
    )
    manager.load()
    manager.register()
    rows = {row["name"]: row for row in manager.status()}
    for name in ("arithmetic", "document", "echo", "hardware"):
        assert (rows[name]["state"], rows[name]["reason"]) == ("active", "")
    assert rows["arithmetic"]["capabilities"] == [
        "computation.gpt/arithmetic",
        "knowledge.gpt/arithmetic",
    ]
    assert {"architecture", "cores", "memory_bytes"} <= set(manager.facts())
    assert {"cpu", "memory_free_bytes"} <= set(manager.load_figures())
