"""What is made of a worker's report: believed where nothing contradicts it, and told in words."""

import os

import pytest
from tests.unit.support_health import daemon, facts

from meshd.cli.look import _worker
from meshd.health import Code, WorkerFact, examine
from meshd.shell.sandbox import (
    STEPS_THAT_MATTER,
    Isolation,
    ProcessView,
    observe_isolation,
    worker_environment,
)
from meshd_plugins.api import Value, WorkerSpec
from meshd_plugins.workersandbox import ASKED_FOR, ORDER_VARIABLE, Order

WHOLE: dict[str, str] = {**dict.fromkeys(STEPS_THAT_MATTER, "yes"), "parent_death": "yes"}


class Unfiltered(ProcessView):
    """A process that the kernel holds to nothing, wherever the test runs."""

    def status(self) -> dict[str, str]:
        assert {"Seccomp", "NoNewPrivs"} <= set(super().status())
        return {"Seccomp": "0", "NoNewPrivs": "0"}


def worker(isolation: Isolation, *, ready: bool = True) -> str:
    row: dict[str, Value] = {
        "name": "llama:small",
        "pid": 4121,
        "ready": ready,
        "resident_bytes": 240_000_000,
        "isolation": {
            "applied": isolation.applied,
            "steps": dict(isolation.steps),
            "missing": list(isolation.missing),
        },
    }
    return _worker(row)


def test_a_worker_that_holds_everything_is_said_to() -> None:
    isolation = Isolation(applied=True, steps=WHOLE)
    assert (isolation.missing, isolation.exposed) == ((), ())
    assert worker(isolation).endswith("files: yes, network: yes; every step holds")
    assert "240 MB" in worker(isolation)
    assert worker(isolation, ready=False).endswith(": starting")


@pytest.mark.parametrize("step", STEPS_THAT_MATTER)
def test_a_step_that_matters_and_was_refused_is_a_finding(step: str) -> None:
    isolation = Isolation(applied=True, steps={**WHOLE, step: "no: the kernel says so"})
    assert isolation.missing == isolation.exposed == (f"{step}: the kernel says so",)
    assert worker(isolation).endswith(f"does not hold: {step}: the kernel says so")
    found = examine(facts(daemon=daemon(workers=(WorkerFact("m", isolation.exposed),))))
    assert [f.code for f in found.findings] == [Code.WORKER_EXPOSED]


def test_a_lesser_step_or_one_that_was_not_wanted_is_shown_and_no_finding() -> None:
    steps = {**WHOLE, "parent_death": "no: refused", "no_network": ASKED_FOR}
    isolation = Isolation(applied=True, steps=steps)
    assert len(isolation.missing) == 2
    assert isolation.exposed == ()


def test_a_step_that_is_not_reported_does_not_hold() -> None:
    assert "it does not say" in " ".join(Isolation(applied=True, steps={"limits": "yes"}).exposed)
    assert Isolation().exposed == ("it does not lock itself in",)
    assert worker(Isolation()).endswith("not locked in")


def test_what_the_kernel_shows_wins_over_what_the_worker_says() -> None:
    view = Unfiltered(os.getpid())  # this process: it has the network of the daemon
    try:
        isolation = observe_isolation(view, {"isolation": WHOLE})
        assert set(isolation.exposed) == {
            "system_calls: the kernel applies no filter to it",
            "no_network: it shares the network namespace of the daemon",
            "no_new_privileges: the kernel lets it gain privileges",
        }
        assert observe_isolation(view, {}).applied is False
        assert (view.resident_bytes() or 0) > 1024 * 1024
    finally:
        view.close()
    assert view.resident_bytes() is None
    assert ProcessView.status(view) == {}


def test_an_order_survives_the_environment() -> None:
    order = Order(7, True, True, True, ("/a",), ("/b",), (3, 4), ("/state",), 2**30)
    assert Order.from_text(order.to_text()) == order
    spec = WorkerSpec(name="x", argv=("x",), environment={ORDER_VARIABLE: "forged"})
    assert Order.from_text(worker_environment(spec)[ORDER_VARIABLE]).parent == os.getpid()
