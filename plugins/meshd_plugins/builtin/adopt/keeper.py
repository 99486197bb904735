"""Watches one server, and announces its models while it answers.

A server is *absent* (looked for, never seen), *serving*, *starting*, *down* or *refused* (it answers, and may
not be adopted). Only in *serving* are its models announced, exactly those of the last survey. One failed look
withdraws them when nothing listens any more; a look that only took too long is believed the second time, since
a busy machine is slow and a hung server has deadlines of its own. Looks are `poll_s` apart; while it is not
serving they back off to `BACKOFF_MAX_S`, and where something else has the port to `FOREIGN_S`. A request that
finds trouble brings the next look forward, `LOOK_GAP_S` after the last one at the earliest.
"""

from __future__ import annotations

import random
from contextlib import aclosing
from enum import StrEnum
from typing import Final

import trio

from meshd_plugins.api import (
    CapabilityError,
    Complaint,
    Descriptor,
    Operation,
    PluginContext,
    Privacy,
    Request,
)
from meshd_plugins.builtin.adopt.capability import AdoptedCapability
from meshd_plugins.builtin.adopt.client import Client, make_client
from meshd_plugins.builtin.adopt.config import Kind, ServerConfig
from meshd_plugins.builtin.adopt.errors import Denied, Loading, NotOurs, ServerError, Slow
from meshd_plugins.builtin.adopt.listening import is_exposed
from meshd_plugins.builtin.adopt.models import ServedModel, describe
from meshd_plugins.builtin.adopt.served import Served, Traffic
from meshd_plugins.builtin.adopt.survey import MODELS_MAX, Survey, Surveyor

BACKOFF_FIRST_S: Final = 1.0
BACKOFF_MAX_S: Final = 15.0
FOREIGN_S: Final = 300.0
LOOK_GAP_S: Final = 0.5
JITTER: Final = 0.2
SLOW_LOOKS_MAX: Final = 2
EXPOSURE_S: Final = 60.0  # between two looks at where the server listens
MEASURE_S: Final = 60.0
MEASURE_TOKENS: Final = 24
MEASURE_WORDS: Final = 96

_reading = trio.CapacityLimiter(1)  # files, which are small


class State(StrEnum):
    """What is known of a server."""

    ABSENT = "absent"
    SERVING = "serving"
    STARTING = "starting"
    DOWN = "down"
    REFUSED = "refused"


class Keeper:
    """One server.

    Args:
        context: the plugin's.
        config: where it is, and how it is to be treated.
        is_expected: it is configured; one that is only looked for may be absent without a word.
    """

    def __init__(self, context: PluginContext, config: ServerConfig, *, is_expected: bool) -> None:
        self._context = context
        self._config = config
        self._is_expected = is_expected
        self._random = random.Random()
        self._hurry = trio.Event()
        self._traffic = Traffic()
        self._announced: dict[str, AdoptedCapability] = {}  # by capability id
        self._served: dict[tuple[str, str], Served] = {}  # by model and what is said of it
        self._left_out: frozenset[str] = frozenset()  # ids that could not be announced, told once
        self._slow_looks = 0
        self._failures = 0
        self._exposed_at_s = -EXPOSURE_S
        self.state = State.ABSENT
        self.reason = ""
        self.exposed = False
        self.looks = 0
        self._looked = trio.Event()
        self._to_measure: list[Served] = []
        self._measuring = trio.Event()

    async def wait_looked(self) -> None:
        """Return after the next look at the server."""
        await self._looked.wait()

    @property
    def url(self) -> str:
        """Where it is."""
        return str(self._config.url)

    # -- what is wrong ---------------------------------------------------------------------------------

    def complaints(self) -> tuple[Complaint, ...]:
        """What an operator should know. Returns at once."""
        url = str(self._config.url)
        found: list[Complaint] = []
        if self.state in (State.DOWN, State.REFUSED) and self._is_expected:
            found.append(
                Complaint(
                    f"The server {url}, whose models this node is to serve, is {self._word}: {self.reason}.",
                    "Start it, or mend its entry in plugins.adopt.servers; it is adopted as soon as it answers.",
                    is_error=True,
                )
            )
        if self.state is State.SERVING and self.exposed:
            found.append(
                Complaint(
                    f"The adopted server {url} listens beyond this machine and asks for no key: whoever reaches it "
                    "passes by the mesh and its rules.",
                    "Let it listen on loopback only (Ollama: OLLAMA_HOST=127.0.0.1; llama-server and vLLM: "
                    "--host 127.0.0.1), or give it a key and name it in api_key_file.",
                )
            )
        return tuple(found)

    @property
    def _word(self) -> str:
        return "not fit to be adopted" if self.state is State.REFUSED else "down"

    # -- watching --------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Watch until cancelled."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._measure_models)
                await self._watch_always()
        finally:
            self._withdraw(tuple(self._announced))

    async def _watch_always(self) -> None:
        while True:
            try:
                client = await trio.to_thread.run_sync(
                    make_client,
                    self._config.url,
                    self._config.api_key_file,
                    self._config.ca_file,
                    limiter=_reading,
                )
            except (OSError, ValueError) as error:
                self._became(State.DOWN, f"its key or its authorities cannot be read: {error}")
                await trio.sleep(self._backoff())
                continue
            await self._watch(client)

    async def _watch(self, client: Client) -> None:
        """Look again and again; returns when the key should be read anew."""
        surveyor = Surveyor(client, self._config)
        while True:
            wait_s = await self._look(surveyor, client)
            self.looks += 1
            self._looked.set()
            self._looked = trio.Event()
            await self._pause(wait_s, surveyor.kind)
            if self.state is State.REFUSED and client.has_key:
                return

    async def _pause(self, wait_s: float, kind: Kind) -> None:
        """Wait for the next look. One of unknown kind is left in peace while it answers us.

        llama-cpp-python's own server, for one, breaks off the answer that it streams when anything else is asked.
        """
        gap_s = min(LOOK_GAP_S, wait_s)
        await trio.sleep(gap_s)
        left_s = wait_s - gap_s
        while True:
            with trio.move_on_after(left_s):
                await self._hurry.wait()
            if self._hurry.is_set() or kind is not Kind.OPENAI or not self._traffic.busy:
                break
            left_s = wait_s
        self._hurry = trio.Event()

    async def _look(self, surveyor: Surveyor, client: Client) -> float:
        """Survey it once and act on it; seconds until the next look."""
        try:
            survey = await surveyor.survey()
        except Slow as error:
            self._slow_looks += 1
            if self.state is State.SERVING and self._slow_looks < SLOW_LOOKS_MAX:
                return LOOK_GAP_S
            return self._lost(surveyor, State.DOWN, error)
        except Loading as error:
            if self.state is State.SERVING and self._slow_looks < SLOW_LOOKS_MAX:
                self._slow_looks += 1
                return LOOK_GAP_S
            return self._lost(surveyor, State.STARTING, error)
        except (NotOurs, Denied) as error:
            self._lost(surveyor, State.REFUSED, error)
            return self._jittered(BACKOFF_MAX_S if self._is_expected else FOREIGN_S)
        except ServerError as error:
            return self._lost(surveyor, State.DOWN, error)
        self._slow_looks = self._failures = 0
        self._reconcile(survey, client)
        if survey.left_out and self.state is not State.SERVING:
            self._context.log.warning(
                "adopt.models_left_out",
                url=str(self._config.url),
                count=survey.left_out,
                most=MODELS_MAX,
            )
        self._became(State.SERVING, "")
        self._plan_measuring(survey)
        await self._look_at_exposure(client)
        return self._jittered(self._config.poll_s)

    def _lost(self, surveyor: Surveyor, state: State, error: ServerError) -> float:
        """It does not serve: withdraw its models; seconds until the next look."""
        was_seen = self.state is not State.ABSENT
        self._withdraw(tuple(self._announced))
        self._served.clear()
        surveyor.forget()
        if was_seen or self._is_expected or state is State.STARTING:
            self._became(state, str(error))
        return self._backoff()

    def _backoff(self) -> float:
        first_s = min(BACKOFF_FIRST_S, self._config.poll_s)
        wait_s = min(first_s * 2.0 ** min(self._failures, 16), BACKOFF_MAX_S)
        self._failures += 1
        return self._jittered(wait_s)

    def _jittered(self, seconds: float) -> float:
        return seconds * self._random.uniform(1 - JITTER, 1 + JITTER)

    def _became(self, state: State, reason: str) -> None:
        if state is self.state and (state is State.SERVING or reason == self.reason):
            return
        self.state, self.reason = state, reason
        log, url = self._context.log, str(self._config.url)
        if state is State.SERVING:
            log.info("adopt.server_adopted", url=url, capabilities=sorted(self._announced))
        elif self._is_expected:
            log.warning("adopt.server_lost", url=url, state=str(state), reason=reason)
        else:
            log.info("adopt.server_lost", url=url, state=str(state), reason=reason)

    async def _look_at_exposure(self, client: Client) -> None:
        now_s = self._context.clock()
        if not self._config.url.is_loopback or now_s - self._exposed_at_s < EXPOSURE_S:
            return
        self._exposed_at_s = now_s
        listens = await trio.to_thread.run_sync(is_exposed, self._config.url.port, limiter=_reading)
        self.exposed = listens and not client.has_key

    # -- announcing ------------------------------------------------------------------------------------

    def _reconcile(self, survey: Survey, client: Client) -> None:
        """Announce what the survey found, and withdraw what it did not."""
        wanted: dict[str, tuple[Descriptor, Served]] = {}
        served_now: dict[tuple[str, str], Served] = {}
        for model in survey.models:
            key = (model.id, model.digest)
            served = self._served.get(key) or self._new_served(model, survey.kind, client)
            served.is_warm, served.tools = model.is_warm, model.tools
            served_now[key] = served
            for descriptor in self._described(model, survey, served):
                wanted.setdefault(descriptor.id, (descriptor, served))
        self._served = served_now
        self._withdraw(tuple(key for key in self._announced if key not in wanted))
        failed: set[str] = set()
        for capability_id, (descriptor, served) in wanted.items():
            announced = self._announced.get(capability_id)
            if announced is not None and announced.descriptor == descriptor:
                continue
            capability = AdoptedCapability(descriptor, served)
            try:
                if announced is None:
                    self._context.capabilities.add(capability)
                else:
                    self._context.capabilities.replace(capability)
            except ValueError as error:  # the name is taken, or there are too many
                failed.add(capability_id)
                if capability_id not in self._left_out:
                    self._context.log.warning(
                        "adopt.model_refused", capability=capability_id, reason=str(error)
                    )
            else:
                self._announced[capability_id] = capability
        self._left_out = frozenset(failed)

    def _new_served(self, model: ServedModel, kind: Kind, client: Client) -> Served:
        return Served(
            client, kind, self._config, model.id, self._traffic, self._trouble, self._gone
        )

    def _described(
        self, model: ServedModel, survey: Survey, served: Served
    ) -> tuple[Descriptor, ...]:
        """What is announced of a model: rates that have hardly changed stay as they are."""
        fresh = describe(model, survey.kind, self._config, survey.slots, served.meter.rates)
        known = next((self._announced[d.id] for d in fresh if d.id in self._announced), None)
        if known is None or served.meter.differs(known.descriptor.rates):
            return fresh
        return describe(model, survey.kind, self._config, survey.slots, known.descriptor.rates)

    def _withdraw(self, ids: tuple[str, ...]) -> None:
        for capability_id in ids:
            del self._announced[capability_id]
            try:
                self._context.capabilities.remove(capability_id)
            except KeyError:  # the daemon has dropped it: the plugin was quarantined
                continue

    def _trouble(self) -> None:
        self._hurry.set()

    def _gone(self, model: str) -> None:
        """Its server says that it has a model no more; the next look decides."""
        self._withdraw(
            tuple(
                key
                for key, capability in self._announced.items()
                if capability.served.model == model
            )
        )
        self._hurry.set()

    # -- measuring -------------------------------------------------------------------------------------

    def _plan_measuring(self, survey: Survey) -> None:
        """Models that are ready and were never measured are to be asked one short question each."""
        if not self._config.measure or not self._config.url.is_loopback:
            return
        for model in survey.models:
            served = self._served[(model.id, model.digest)]
            ready = model.is_warm if model.is_warm is not None else len(survey.models) == 1
            if ready and model.completes and not (served.was_measured or self._traffic.busy):
                served.was_measured = True
                if not served.meter.is_measured:
                    self._to_measure.append(served)
                    self._measuring.set()

    async def _measure_models(self) -> None:
        """Ask them, beside the looks: it may take a while."""
        while True:
            await self._measuring.wait()
            self._measuring = trio.Event()
            while self._to_measure:
                await self._measure_one(self._to_measure.pop(0))
                self._hurry.set()

    async def _measure_one(self, served: Served) -> None:
        descriptor = next(
            (
                each.descriptor
                for each in self._announced.values()
                if each.served is served and Operation.COMPLETE in each.descriptor.operations
            ),
            None,
        )
        if descriptor is None:
            return
        words = " ".join(str(self._random.randrange(10)) for _ in range(MEASURE_WORDS))
        request = Request(
            request_id="adopt-measure",
            name=descriptor.name,
            operation=Operation.COMPLETE,
            body={"prompt": words, "max_tokens": MEASURE_TOKENS, "temperature": 0.0},
            privacy=Privacy.LOCAL,
            deadline_s=MEASURE_S,
        )
        try:
            with trio.move_on_after(MEASURE_S):
                async with aclosing(
                    AdoptedCapability(descriptor, served).invoke(request)
                ) as events:
                    async for _ in events:
                        pass
        except CapabilityError as error:
            self._context.log.info(
                "adopt.measure_failed", url=str(self._config.url), code=error.code
            )
