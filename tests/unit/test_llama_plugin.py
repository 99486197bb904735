"""All models of a node together: what an operator is told of them, and can have done."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from tests.unit.support_residency import Device, run

from meshd_plugins.api import BadRequest, Refused, Value
from meshd_plugins.builtin.llama.config import Limits, ModelConfig
from meshd_plugins.builtin.llama.models.entries import Entry
from meshd_plugins.builtin.llama.models.folder import ModelFolder
from meshd_plugins.builtin.llama.models.kinds import Kind
from meshd_plugins.builtin.llama.models.library import FOLDER, Library
from meshd_plugins.builtin.llama.plugin import LlamaPlugin
from meshd_plugins.builtin.llama.running.keeping import State
from meshd_plugins.builtin.llama.running.residency import THRASH_EVICTIONS


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.lowlevel.checkpoint()


def plugin_of(device: Device, *names: str, limits: Limits | None = None) -> LlamaPlugin:
    """A plugin with a model of 400 MiB for each name."""
    models: list[ModelConfig] = []
    for name in names:
        path = device.folder / f"{name}.gguf"
        path.write_text(name)
        device.sizes[name] = 400
        models.append(
            ModelConfig(str(path), (f"knowledge.gpt/{name}",), prefix_cache_mib=0, keep="demand")
        )
    told: list[Value] = [{"path": model.path, "names": list(model.names)} for model in models]
    context = replace(device.tools.context, config={"models": told})
    limits = limits or Limits(reserve_mib=1)
    return LlamaPlugin(context, tuple(models), limits, Library(context), device.folder)


def test_what_is_left_out_is_told_and_tried_again_when_asked(tmp_path: Path) -> None:
    async def body() -> None:
        device = Device(tmp_path, 1000)
        device.refusals["a"] = {"refused": "no GGUF", "code": "not_gguf"}
        plugin = plugin_of(device, "a", "b")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(plugin.run)
            await until(lambda: len(plugin.keepers) == 2)
            a, b = plugin.keepers.values()
            await until(lambda: (a.state, b.state) == (State.QUARANTINED, State.SERVING))
            [complaint] = plugin.complaints()
            assert complaint.is_error
            assert f"The model {a.key} is left out: " in complaint.message
            assert f"meshd model retry {a.key}" in complaint.remedy
            assert complaint.remedy.endswith("again in 10 minutes, or when its file changes.")
            standing = plugin.standing()
            assert (standing[a.key]["state"], standing[b.key]["state"]) == (
                "quarantined",
                "serving",
            )
            assert "physical core" in str(standing[b.key]["threads_reason"])
            retry = plugin.operations()["retry"]
            with pytest.raises(Refused, match="not quarantined"):
                await anext(retry({"id": b.key}))
            with pytest.raises(BadRequest, match="give the id of a model"):
                await anext(retry({}))
            for verb in ("retry", "bench"):
                with pytest.raises(Refused, match="there is no model 'c' here") as refused:
                    await anext(plugin.operations()[verb]({"id": "c"}))
                assert refused.value.code == "no_such_model"
            again = [item async for item in retry({"id": a.key})][-1]["done"]
            assert isinstance(again, Mapping)
            assert (again["state"], again["reason"]) == ("quarantined", a.reason)
            [complaint] = plugin.complaints()
            assert complaint.remedy.endswith("again in 10 minutes, or when its file changes.")
            device.refusals.clear()
            loading, done = [item.get("done", item) async for item in retry({"id": a.key})]
            assert loading == {"stage": "loading", "id": a.key}
            assert isinstance(done, Mapping)
            assert (done["id"], done["state"]) == (a.key, "serving"), "it is told how the try ended"
            assert plugin.complaints() == ()
            nursery.cancel_scope.cancel()

    run(body)


def test_models_that_are_unloaded_for_one_another_again_and_again_are_told(tmp_path: Path) -> None:
    async def body() -> None:
        device = Device(tmp_path, 600)
        plugin = plugin_of(device, "a", "b", limits=Limits(reserve_mib=1, residency_min_s=0))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(plugin.run)
            await until(lambda: len(device.started) == 2)  # each is measured once: one had to go
            a, b = plugin.keepers.values()
            for number in range(THRASH_EVICTIONS - 1):
                assert plugin.complaints() == ()
                async with (b if device.started[-1] == "a" else a).use(60.0):
                    assert len(device.started) == 3 + number
            [complaint] = plugin.complaints()
            assert "6 times within 10 minutes" in complaint.message
            assert not complaint.is_error
            device.now_s += 3600.0
            assert plugin.complaints() == ()
            nursery.cancel_scope.cancel()

    run(body)


def test_a_model_of_the_library_whose_id_the_configuration_has_got_is_told(tmp_path: Path) -> None:
    async def body() -> None:
        device = Device(tmp_path, 1000)
        folder = ModelFolder(device.tools.context.state_dir / FOLDER)
        folder.load()
        folder.save(
            Entry(
                id="a",
                path="/srv/other/a.gguf",
                kept=False,
                sha256="ab" * 32,
                size_bytes=1,
                source="/srv/other/a.gguf",
                facts=None,
                kind=Kind.MODEL,
                names=("knowledge.gpt/other",),
            )
        )
        plugin = plugin_of(device, "a")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(plugin.run)
            await until(lambda: bool(plugin.complaints()))
            [complaint] = plugin.complaints()
            assert complaint.is_error
            assert "The model a of the library is not served" in complaint.message
            assert "add it with another --id" in complaint.message
            [keeper] = plugin.keepers.values()
            await until(lambda: keeper.state is State.SERVING)
            nursery.cancel_scope.cancel()

    run(body)
