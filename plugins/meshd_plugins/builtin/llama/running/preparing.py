"""From what is known of a model to how it is loaded: its plan, the room for it, the key of its figures."""

from __future__ import annotations

from dataclasses import dataclass, replace

from meshd_plugins.api import Failed
from meshd_plugins.builtin.llama.config import ModelConfig
from meshd_plugins.builtin.llama.running.figures import figures_key
from meshd_plugins.builtin.llama.running.fit import MIB, DoesNotFit, Plan, Room, Wish, choose
from meshd_plugins.builtin.llama.running.hardware import Chosen
from meshd_plugins.builtin.llama.running.launch import Inspected, Opened
from meshd_plugins.builtin.llama.running.residency import NoRoom, Residency


@dataclass(frozen=True, slots=True)
class Prepared:
    """What is known of a model before it is loaded."""

    digest: str
    adapters: tuple[str, ...]
    projector: str  # "": it has none
    inspected: Inspected
    threads: Chosen
    plan: Plan  # for a machine where nothing else is loaded

    def check_same(self, opened: Opened) -> None:
        """The files may have been replaced since they were inspected: then begin anew. Raises Failed."""
        now = tuple(each.digest for each in opened.files)
        beside = (self.projector,) if self.projector else ()
        if now != (self.digest, *self.adapters, *beside):
            raise Failed("its file changed; it is looked at anew", code="worker_died")


def wish_of(model: ModelConfig) -> Wish:
    """What is configured of how a model is loaded."""
    return Wish(
        model.context,
        model.slots,
        model.batch,
        model.gpu_layers,
        model.flash_attention != "off",
        model.prefix_cache_mib * MIB,
    )


def capped(model: ModelConfig, room: Room) -> Room:
    """Room for a model, which may have a limit of its own."""
    limit = model.memory_mib_max * MIB
    if not limit or limit >= room.host_bytes:
        return room
    return replace(room, host_bytes=limit, limit="memory_mib_max of the model")


def key_of(model: ModelConfig, prepared: Prepared, plan: Plan) -> str:
    """What the figures of a model are kept under: all that they depend on."""
    scales = (lora.scale for lora in model.lora)
    return figures_key(
        digest=prepared.digest,
        adapters=[list(pair) for pair in zip(prepared.adapters, scales, strict=True)],
        projector=prepared.projector,
        family=model.family,
        threads=prepared.threads.value,
        slots=plan.slots,
        context=plan.context_tokens,
        batch=plan.batch_tokens,
        gpu_layers=plan.gpu_layers,
        flash=model.flash_attention,
        embeddings=[model.embeddings, model.pooling],
        split=list(model.split),
    )


async def find_room(residency: Residency, model: ModelConfig, prepared: Prepared) -> Plan:
    """Make room for the plan; where its values were chosen here, for a smaller one. Raises NoRoom.

    The caller has the turn.
    """
    room = capped(model, residency.room(prepared.inspected.device_bytes))
    plan = prepared.plan
    if plan.need.host > room.host_bytes:  # no other model goes for the sake of kept prefixes
        plan = replace(plan, need=replace(plan.need, kept=0))
    try:
        await residency.make_room(plan.need, room)
    except NoRoom:
        try:
            smaller = choose(prepared.inspected.shape, wish_of(model), room)
        except DoesNotFit:
            smaller = plan
        if smaller.need.total >= plan.need.total:
            raise
        plan = smaller
    return plan
