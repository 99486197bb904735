"""The life of models on one device: loaded when asked for, unloaded for others, left out when they break."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
from tests.unit.support_residency import Asked, Device, request, run

from meshd_plugins.api import Chunk, Descriptor, Failed, Refused, Value
from meshd_plugins.builtin.llama.config import Limits
from meshd_plugins.builtin.llama.running import lifecycle
from meshd_plugins.builtin.llama.running.keeping import State
from meshd_plugins.builtin.llama.running.lifecycle import Keeper
from meshd_plugins.builtin.llama.running.restarts import CRASHES_MAX, Waits

ROOM = Limits(reserve_mib=1, residency_min_s=30)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what other tasks do; the deadline of the test bounds it."""
    while not condition():
        await trio.lowlevel.checkpoint()


def announced(device: Device) -> dict[str, Descriptor]:
    return {each.descriptor.name: each.descriptor for each in device.capabilities.added}


def resident(device: Device, keeper: Keeper) -> bool | None:
    descriptor = announced(device).get(keeper.model.names[0])
    return None if descriptor is None else descriptor.fields["resident"] is True


async def measured(device: Device, nursery: trio.Nursery, *keepers: Keeper) -> None:
    """Start models one after the other, and let each be loaded once."""
    for keeper in keepers:
        nursery.start_soon(keeper.run)
        await until(lambda keeper=keeper: keeper.worker is not None)  # type: ignore[misc]
        device.now_s += 60


def test_a_model_is_announced_once_it_was_measured_and_then_also_while_it_is_cold(
    tmp_path: Path,
) -> None:
    async def body() -> None:
        device = Device(tmp_path, 1000)
        async with trio.open_nursery() as nursery:
            keeper = device.model("a", 100, keep="demand")
            device.gate = trio.Event()
            nursery.start_soon(keeper.run)
            await until(lambda: keeper.state is State.LOADING)
            assert announced(device) == {}
            device.gate.set()
            await until(lambda: keeper.state is State.SERVING)
            assert resident(device, keeper) is True
            await keeper.vacate()
            await until(lambda: keeper.state is State.COLD)
            assert resident(device, keeper) is False
            rates = announced(device)["knowledge.gpt/a"].rates
            assert rates is not None
            assert rates.load_s == 2.0
            nursery.cancel_scope.cancel()
        assert announced(device) == {}
        async with trio.open_nursery() as nursery:  # the next life of the daemon
            again = device.model("a", 100, keep="demand")
            nursery.start_soon(again.run)
            await until(lambda: again.state is State.COLD)
            assert resident(device, again) is False
            assert device.started == ["a"], "what was measured is remembered"
            nursery.cancel_scope.cancel()

    run(body)


def test_requests_for_a_cold_model_share_one_load_and_are_answered(tmp_path: Path) -> None:
    async def body() -> None:
        device = Device(tmp_path, 1000)
        async with trio.open_nursery() as nursery:
            keeper = device.model("a", 100, keep="demand")
            await measured(device, nursery, keeper)
            await keeper.vacate()
            device.gate = trio.Event()
            [capability] = device.capabilities.added
            texts: list[str] = []

            async def ask() -> None:
                events = capability.invoke(request(capability.descriptor.name))
                texts.extend([event.text async for event in events if isinstance(event, Chunk)])

            async with trio.open_nursery() as asking:
                for _ in range(5):
                    asking.start_soon(ask)
                await until(lambda: keeper.open_calls == 5)
                device.gate.set()
            assert texts == ["yes"] * 5
            assert device.started == ["a", "a"]
            nursery.cancel_scope.cancel()

    run(body)


def test_room_is_made_by_unloading_the_one_that_was_used_longest_ago(tmp_path: Path) -> None:
    async def body() -> None:
        device = Device(tmp_path, 1000, ROOM)  # each takes its weights and about 40 MiB
        async with trio.open_nursery() as nursery:
            a, b = device.model("a", 400), device.model("b", 400)
            c = device.model("c", 400, keep="demand")
            await measured(device, nursery, a, b)
            async with a.use(60.0):
                pass
            device.now_s += 60
            nursery.start_soon(c.run)
            await until(lambda: c.worker is not None)
            assert (resident(device, a), resident(device, b)) == (True, False)
            device.now_s += 60
            async with b.use(60.0):  # and the other way round
                assert resident(device, a) is False
            nursery.cancel_scope.cancel()

    run(body)


def test_a_model_in_use_or_to_stay_or_just_loaded_is_not_unloaded(tmp_path: Path) -> None:
    async def body() -> None:
        device = Device(tmp_path, 1000, ROOM)
        async with trio.open_nursery() as nursery:
            used, kept = device.model("used", 400), device.model("kept", 400, keep="loaded")
            late = device.model("late", 400, keep="demand")
            await measured(device, nursery, used)
            asked = Asked(used)
            nursery.start_soon(asked.run)
            await asked.begun.wait()
            await measured(device, nursery, kept)
            nursery.start_soon(late.run)
            await until(lambda: late.reason != "")
            assert "used is in use" in late.reason
            assert "kept is to stay loaded" in late.reason
            with pytest.raises(
                Refused, match=r"no memory for it now: it needs 0\.43 GiB"
            ) as refused:
                async with late.use(60.0):
                    pass
            assert refused.value.code == "busy"
            asked.end.set()
            await until(lambda: late.worker is not None)
            await until(lambda: used.state is State.COLD)
            with pytest.raises(Refused, match="late was loaded 0 s ago"):
                async with used.use(60.0):
                    pass
            nursery.cancel_scope.cancel()

    run(body)


def test_a_load_that_takes_longer_than_the_request_may_is_refused_and_goes_on(
    tmp_path: Path,
) -> None:
    async def body() -> None:
        device = Device(tmp_path, 1000)
        async with trio.open_nursery() as nursery:
            keeper = device.model("a", 100, keep="demand")
            await measured(device, nursery, keeper)
            await keeper.vacate()
            with pytest.raises(
                Refused, match=r"takes 2 s, and the request has 1 s left"
            ) as refused:
                async with keeper.use(1.0):
                    pass
            assert refused.value.code == "starting"
            await until(lambda: keeper.worker is not None)
            nursery.cancel_scope.cancel()

    run(body)


def test_an_idle_model_on_demand_is_unloaded_and_others_stay(tmp_path: Path) -> None:
    async def body() -> None:
        device = Device(tmp_path, 1000)
        async with trio.open_nursery() as nursery:
            demand = device.model("demand", 100, keep="demand", idle_unload_s=1)
            never = device.model("never", 100, keep="demand", idle_unload_s=0)
            usual = device.model("usual", 100, idle_unload_s=1)
            await measured(device, nursery, never, usual)
            nursery.start_soon(demand.run)
            await until(lambda: demand.worker is not None)
            device.now_s += 10
            await demand_cold(demand)
            assert never.worker is not None
            assert usual.worker is not None
            nursery.cancel_scope.cancel()

    async def demand_cold(keeper: Keeper) -> None:
        await until(lambda: keeper.state is State.COLD)

    run(body)


def test_what_does_not_fit_the_machine_is_left_out_with_the_arithmetic(tmp_path: Path) -> None:
    async def body() -> None:
        device = Device(tmp_path, 200)
        async with trio.open_nursery() as nursery:
            keeper = device.model("big", 400)
            nursery.start_soon(keeper.run)
            await until(lambda: keeper.state is State.QUARANTINED)
            assert "needs 0.43 GiB (weights 0.39, KV 0.00 for 512 tokens" in keeper.reason
            assert "0.19 GiB are free" in keeper.reason
            assert device.started == []
            with pytest.raises(Refused, match="quarantined"):
                async with keeper.use(60.0):
                    pass
            device.sizes["big"] = 10  # and is tried again when its file is another one
            (tmp_path / "big.gguf").write_text("smaller")
            keeper.try_again()
            await until(lambda: keeper.worker is not None)
            nursery.cancel_scope.cancel()

    run(body)


@pytest.mark.parametrize(
    ("limits", "options", "limit"),
    [
        (ROOM, {"memory_mib_max": 100}, "memory_mib_max of the model"),
        (Limits(memory_mib_max=100), {}, r"plugins\.llama\.memory_mib_max"),
    ],
)
def test_what_a_setting_forbids_is_told_as_that(
    tmp_path: Path, limits: Limits, options: dict[str, int], limit: str
) -> None:
    async def body() -> None:
        device = Device(tmp_path, 1000, limits)
        async with trio.open_nursery() as nursery:
            keeper = device.model("a", 400, **options)
            nursery.start_soon(keeper.run)
            await until(lambda: keeper.state is State.QUARANTINED)
            assert re.search(rf"0\.10 GiB are allowed by {limit};", keeper.reason), keeper.reason
            nursery.cancel_scope.cancel()

    run(body)


def test_a_header_that_is_refused_is_not_tried_again(tmp_path: Path) -> None:
    async def body() -> None:
        device = Device(tmp_path, 1000)
        device.refusals["a"] = {"refused": "no GGUF", "code": "not_gguf"}
        async with trio.open_nursery() as nursery:
            keeper = device.model("a", 100)
            nursery.start_soon(keeper.run)
            await until(lambda: keeper.state is State.QUARANTINED)
            assert "no GGUF" in keeper.reason
            assert device.log.events("error") == ["llama.model_quarantined"]
            nursery.cancel_scope.cancel()

    run(body)


def test_a_worker_that_dies_is_withdrawn_and_comes_back(tmp_path: Path) -> None:
    async def body() -> None:
        device = Device(tmp_path, 1000)
        async with trio.open_nursery() as nursery:
            keeper = device.model("a", 100)
            await measured(device, nursery, keeper)
            device.running["a"].die("killed by SIGKILL")
            await until(lambda: keeper.state is State.BACKING_OFF)
            assert announced(device) == {}
            assert keeper.reason == "killed by SIGKILL"
            with pytest.raises(Refused, match="backing_off"):
                async with keeper.use(60.0):
                    pass
            await until(lambda: keeper.worker is not None)  # a second later
            assert resident(device, keeper) is True
            nursery.cancel_scope.cancel()

    run(body)


def test_a_model_that_is_removed_lets_its_requests_finish(tmp_path: Path) -> None:
    async def body() -> None:
        device = Device(tmp_path, 1000)
        async with trio.open_nursery() as nursery:
            keeper = device.model("a", 100)
            await measured(device, nursery, keeper)
            asked = Asked(keeper)
            nursery.start_soon(asked.run)
            await asked.begun.wait()
            retired = trio.Event()

            async def retire() -> None:
                await keeper.retire()
                retired.set()

            nursery.start_soon(retire)
            await until(lambda: announced(device) == {})
            assert not retired.is_set()
            asked.end.set()
            await retired.wait()
            nursery.cancel_scope.cancel()

    run(body)


def test_a_crash_loop_takes_the_model_out_and_lets_it_back_in(tmp_path: Path) -> None:
    async def body() -> None:
        device = Device(tmp_path, 1000, waits=Waits(backoff_s=0.001, quarantine_s=0.01))
        device.crashing.add("a")
        async with trio.open_nursery() as nursery:
            keeper = device.model("a", 100)
            other = device.model("b", 100)
            nursery.start_soon(keeper.run)
            await until(lambda: keeper.state is State.QUARANTINED)
            assert device.started == ["a"] * CRASHES_MAX
            assert keeper.reason == ("5 crashes; the last: worker a died: killed by SIGKILL")
            await measured(device, nursery, other)  # nobody else is touched
            device.crashing.clear()
            await until(lambda: keeper.worker is not None)  # by itself, after a while
            assert resident(device, keeper) is True
            nursery.cancel_scope.cancel()

    run(body)


def test_a_worker_that_says_nonsense_is_left_out(tmp_path: Path) -> None:
    async def body() -> None:
        device = Device(tmp_path, 1000)
        device.refusals["a"] = {"model": {}, "shape": {"layers": -1}, "devices": []}
        async with trio.open_nursery() as nursery:
            keeper = device.model("a", 100)
            nursery.start_soon(keeper.run)
            await until(lambda: keeper.state is State.QUARANTINED)
            assert "the worker says that the model's weights_bytes is None" in keeper.reason
            nursery.cancel_scope.cancel()

    run(body)


def test_figures_that_were_damaged_are_measured_again(tmp_path: Path) -> None:
    async def body() -> None:
        device = Device(tmp_path, 1000)
        async with trio.open_nursery() as nursery:
            await measured(device, nursery, device.model("a", 100, keep="demand"))
            nursery.cancel_scope.cancel()
        [kept] = (tmp_path / "figures").iterdir()
        for damaged in ('{"model": 5}', "{", "[]"):
            kept.write_text(damaged)
            device.started.clear()
            async with trio.open_nursery() as nursery:
                await measured(device, nursery, device.model("a", 100, keep="demand"))
                assert device.started == ["a"]
                nursery.cancel_scope.cancel()

    run(body)


def test_a_model_that_was_never_loaded_gets_its_turn_though_nobody_asks_for_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "ROOM_LOOK_S", 0.001)

    async def body() -> None:
        device = Device(tmp_path, 600, ROOM)
        async with trio.open_nursery() as nursery:
            first, second = (device.model(name, 400, keep="demand") for name in "ab")
            nursery.start_soon(first.run)
            await until(lambda: first.worker is not None)
            nursery.start_soon(second.run)
            await until(lambda: "a was loaded 0 s ago" in second.reason)
            device.now_s += 60
            await until(lambda: second.worker is not None)
            assert (resident(device, first), resident(device, second)) == (False, True)
            nursery.cancel_scope.cancel()

    run(body)


def test_a_model_that_makes_vectors_is_measured_too(tmp_path: Path) -> None:
    figures: dict[str, Value] = {"dimensions": 8, "tokens_per_s": 900.0, "texts_per_s": 30.0}

    async def body() -> None:
        device = Device(tmp_path, 1000)
        device.answers["bench"] = [
            {"done": {"embedding": figures, "prefill_tokens_per_s": 900.0, "resident_bytes": 7}}
        ]
        async with trio.open_nursery() as nursery:
            keeper = device.model("a", 100)
            await measured(device, nursery, keeper)
            [item] = [item async for item in keeper.bench()]
            assert isinstance(item["done"], dict)
            assert item["done"]["embedding"] == figures
            assert announced(device)["knowledge.gpt/a"].fields["texts_per_s"] == 30.0
            device.answers["bench"] = [
                {"done": {"embedding": {"dimensions": -1}, "prefill_tokens_per_s": 1.0}}
            ]
            with pytest.raises(Failed, match="numbers"):
                await anext(keeper.bench())
            nursery.cancel_scope.cancel()

    run(body)


def test_measuring_has_the_model_alone_and_changes_what_is_announced(tmp_path: Path) -> None:
    async def body() -> None:
        device = Device(tmp_path, 1000)
        device.answers["bench"] = [
            {"measured": "prefill of 128 tokens", "rate": 50.0},
            {"done": BENCHED},
        ]
        async with trio.open_nursery() as nursery:
            keeper = device.model("a", 100)
            await measured(device, nursery, keeper)
            async with keeper.use(60.0):
                with pytest.raises(Refused, match=r"answers requests \(1\); it is measured when"):
                    await anext(keeper.bench())
            items = [item async for item in keeper.bench()]
            assert items[0] == {"phase": "prefill of 128 tokens", "tokens_per_s": 50.0}
            done = items[-1]["done"]
            assert isinstance(done, dict)
            assert done["prefill_tokens_per_s"] == 60.0
            rates = announced(device)["knowledge.gpt/a"].rates
            assert rates is not None
            assert (rates.prefill_tokens_per_s, rates.decode_tokens_per_s) == (60.0, 7.0)
            assert rates.decode_tokens_per_s_by_batch == {1: 7.0, 4: 20.0}
            await keeper.vacate()
            async with keeper.use(60.0):  # what was measured well outlives the next start
                rates = announced(device)["knowledge.gpt/a"].rates
                assert rates is not None
                assert rates.decode_tokens_per_s == 7.0
            nursery.cancel_scope.cancel()

    run(body)


BENCHED: dict[str, Value] = {
    "prefill_tokens_per_s_by_length": {"128": 50.0, "512": 60.0},
    "decode_tokens_per_s_by_batch": {"1": 7.0, "4": 20.0},
    "resident_bytes": 1000,
}
