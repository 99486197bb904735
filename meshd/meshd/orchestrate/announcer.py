"""Keeps this node's own record in step with what it is, can do, and how busy it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import trio

from meshd.core.effects import Effect
from meshd.core.node import NodeCore
from meshd.orchestrate.catalogue import Catalogue
from meshd.orchestrate.host import CapabilityHost, HostChange
from meshd.orchestrate.records import (
    HARDWARE_KEY,
    LOAD_KEY,
    NODE_KEY,
    capability_key,
    capability_value,
    load_value,
    model_key,
    model_value,
)
from meshd_cms import NodeId, StoreError
from meshd_plugins.api import Logger, Value

LOAD_INTERVAL_S = 2.0  # between samples of the device's figures
LOAD_CHANGE_GAP_S = 0.1  # least time between two publications when slots are taken or freed
Command = Callable[[NodeCore, float], tuple[Effect, ...]]
Post = Callable[[Command], bool]


class Announcer:
    """Writes the keys of our own record and publishes our load.

    A write that finds the queue of the node core full is kept, and posted again with the next sample; for
    one key the latest value wins. One that the store cannot take is logged: it breaks nothing else.

    Args:
        me: this node.
        post: runs a command in the task that owns the node core; False when it could not.
        catalogue: told at once of what we changed, so that we resolve to ourselves.
        figures: how busy the device is, from plugins.
        log: bound logger.
    """

    def __init__(
        self,
        me: NodeId,
        *,
        post: Post,
        catalogue: Catalogue,
        figures: Callable[[], Mapping[str, Value]],
        log: Logger,
    ) -> None:
        self._me = me
        self._post = post
        self._catalogue = catalogue
        self._figures = figures
        self._log = log
        self._sampled: Mapping[str, Value] = {}
        self._changed = trio.Event()
        self._model_of: dict[str, str] = {}  # capability id to the digest of its model
        self._unposted: dict[str, Value] = {}  # values by key, in order; None: to be deleted
        self.host: CapabilityHost | None = None  # set by the composition root: the two are a pair

    def node(self, value: Mapping[str, Value], hardware: Mapping[str, Value]) -> None:
        """Write who we are and what the device is."""
        self._set(NODE_KEY, value)
        if hardware:
            self._set(HARDWARE_KEY, hardware)

    def capability_changed(self, change: HostChange) -> None:
        """A plugin added, changed or withdrew a capability."""
        key = capability_key(change.capability_id)
        if change.descriptor is None:
            self._delete(key)
            digest = self._model_of.pop(change.capability_id, None)
            if digest is not None and digest not in self._model_of.values():
                self._delete(model_key(digest))
        else:
            model = change.descriptor.model
            if model is not None:  # before the capability: whoever has that has this
                self._model_of[change.capability_id] = model.digest
                self._set(model_key(model.digest), model_value(model))
            self._set(key, capability_value(change.descriptor))
        self.load_changed()

    def load_changed(self) -> None:
        """Slots were taken or freed: publish soon."""
        self._changed.set()

    def load(self) -> dict[str, Value]:
        """Our load now: the device's figures as last sampled, slots as they are at this moment."""
        host = self.host
        return load_value(
            host.busy() if host is not None else {},
            host.held_s() if host is not None else {},
            queue_max=host.queue_max if host is not None else 0,
            draining=host is not None and host.draining,
            figures=self._sampled,
            warm=host.warm() if host is not None else None,
        )

    async def run(self) -> None:
        """Sample and publish until cancelled."""
        while True:
            self._sampled = dict(self._figures())
            self._post_writes()
            self._post_interest()
            until_s = trio.current_time() + LOAD_INTERVAL_S
            while trio.current_time() < until_s:
                self._publish()
                with trio.move_on_at(until_s):
                    await self._changed.wait()
                    self._changed = trio.Event()
                    await trio.sleep(LOAD_CHANGE_GAP_S)

    def _post_interest(self) -> None:
        """In a large mesh, nodes tell their load to those who route to them only."""
        owners = self._catalogue.take_asked()
        if owners:
            self._post(lambda core, now_s: core.interested(owners, now_s))

    def _publish(self) -> None:
        load = self.load()
        self._catalogue.note_load(self._me, load)
        self._post(lambda core, now_s: core.publish(LOAD_KEY, load, now_s))

    def _set(self, key: str, value: Value) -> None:
        self._unposted.pop(key, None)  # to its end: a model stays before its capability
        self._unposted[key] = value
        self._post_writes()

    def _delete(self, key: str) -> None:
        self._set(key, None)

    def _post_writes(self) -> None:
        """Post what waits, in order, as far as the queue takes it."""
        for key, value in tuple(self._unposted.items()):
            if not self._post(partial(self._write, key, value)):
                return
            del self._unposted[key]

    def _write(self, key: str, value: Value, core: NodeCore, now_s: float) -> tuple[Effect, ...]:
        """Runs in the task of the node core."""
        try:
            effects = core.delete(key, now_s) if value is None else core.set(key, value, now_s)
        except StoreError as error:
            self._log.error("record.refused", key=key, code=error.code, error=str(error))
            return ()
        self._catalogue.record_changed(self._me)
        return effects
