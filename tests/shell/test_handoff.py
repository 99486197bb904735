"""KV state from peer to peer: fetched when that pays, given to nobody else, computed whatever goes wrong."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import cast

import pytest
import trio
from tests.shell.support_handoff import (
    BROKEN,
    KV_KEY,
    PROMPT_TOKENS,
    TAG,
    Counting,
    Kept,
    Node,
    kept,
    model,
    nodes,
    request,
    state_of,
)
from tests.shell.support_orchestrate import GENERAL
from tests.shell.support_streams import trio_test
from tests.shell.test_remote_capabilities import FakeIncoming

from meshd.core.frames import WarmHint
from meshd.core.handoff import HandoffConfig, Reason
from meshd.orchestrate.callers import Caller
from meshd.orchestrate.handoff import GIVEN_MAX, KV_ID
from meshd.shell.streams import (
    CallHeader,
    IncomingCall,
    OutgoingCall,
    RemoteFailed,
    RemoteRefused,
)
from meshd_cms import NodeId
from meshd_plugins.api import Privacy, Refused, Value

FETCHED = "computed 0"
COMPUTED = f"computed {PROMPT_TOKENS}"


def hint(node: Node, tag: bytes = TAG, tokens: int = PROMPT_TOKENS) -> WarmHint:
    return WarmHint(node.id, tag, tokens)


@trio_test
async def test_a_prefix_that_is_warm_elsewhere_is_fetched_and_used(tmp_path: Path) -> None:
    async with nodes(tmp_path) as (holder, server):
        caller = Caller(server.id, "key:anna")
        holder.capability.keep(kept(str(caller)))
        assert await server.ask(request(TAG), caller, hint(holder)) == FETCHED
        assert server.capability.states[TAG].data == state_of(TAG)
        assert server.statistics.fetches == {"fetched": 1}
        assert server.statistics.fetched_tokens == PROMPT_TOKENS
        assert server.statistics.fetched_bytes == len(state_of(TAG))
        assert (holder.statistics.given, holder.statistics.given_refused) == (1, 0)
        [line] = holder.audit.lines
        assert (line["kind"], line["capability"], line["outcome"]) == ("served", KV_ID, "ok")
        assert line["caller"] == str(caller)
        # A second request finds it here.
        assert await server.ask(request(TAG), caller, hint(holder)) == FETCHED
        assert server.statistics.fetches == {"fetched": 1, "too_short": 1}


@trio_test
async def test_a_third_node_asks_with_the_word_of_the_node_where_it_was_asked(
    tmp_path: Path,
) -> None:
    async with nodes(tmp_path, 3) as (entry, holder, server):
        asked = request(TAG)
        caller = Caller(entry.id, "key:anna")
        proven = replace(caller, passport=entry.passports.of(caller, asked))
        holder.capability.keep(kept(str(caller)))
        assert await server.ask(asked, caller, hint(holder), entry.id) == COMPUTED
        assert server.statistics.fetches == {"refused": 1}, "without that word it gets nothing"
        assert await server.ask(asked, proven, hint(holder), entry.id) == FETCHED


@trio_test
async def test_nobody_gets_the_state_of_another_caller(tmp_path: Path) -> None:
    async with nodes(tmp_path) as (holder, server):
        anna, bert = Caller(server.id, "key:anna"), Caller(server.id, "key:bert")
        holder.capability.keep(kept(str(anna)))
        assert await server.ask(request(TAG), bert, hint(holder)) == COMPUTED
        holder.capability.checks = False  # the daemon looks, whatever the capability does
        assert await server.ask(request(TAG), bert, hint(holder)) == COMPUTED
        assert server.capability.begun == 0
        assert [line["outcome"] for line in holder.audit.lines] == ["caller", "caller"]


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize(
    ("made", "asked"),
    [(Privacy.LOCAL, Privacy.MESH), (Privacy.LOCAL, Privacy.LAN)],
)
def test_a_state_that_may_not_leave_a_node_does_not(
    tmp_path: Path, made: Privacy, asked: Privacy, checks: bool
) -> None:
    @trio_test
    async def body() -> None:
        async with nodes(tmp_path) as (holder, server):
            caller = Caller(server.id)
            holder.capability.keep(kept(str(caller), privacy=made))
            holder.capability.checks = checks
            assert await server.ask(request(TAG, privacy=asked), caller, hint(holder)) == COMPUTED
            assert holder.statistics.given == 0
            assert [line["outcome"] for line in holder.audit.lines] == ["privacy"]

    body()


@trio_test
async def test_a_request_that_may_not_leave_a_node_asks_no_other(tmp_path: Path) -> None:
    async with nodes(tmp_path) as (holder, server):
        caller = Caller(server.id)
        holder.capability.keep(kept(str(caller), privacy=Privacy.LOCAL))
        local = request(TAG, privacy=Privacy.LOCAL)
        assert await server.ask(local, caller, hint(holder)) == COMPUTED
        assert server.statistics.fetches == {"privacy": 1}
        assert holder.audit.lines == []


@trio_test
async def test_a_state_keeps_the_narrower_class_on_its_way(tmp_path: Path) -> None:
    async with nodes(tmp_path) as (holder, server):
        caller = Caller(server.id)
        holder.capability.keep(kept(str(caller), privacy=Privacy.LAN))
        assert await server.ask(request(TAG), caller, hint(holder)) == FETCHED
        assert server.capability.states[TAG].head.privacy is Privacy.LAN
        other = b"tag-0002"
        holder.capability.keep(kept(str(caller), other, privacy=Privacy.MESH))
        narrow = request(other, privacy=Privacy.LAN)
        assert await server.ask(narrow, caller, hint(holder, other)) == FETCHED
        assert server.capability.states[other].head.privacy is Privacy.LAN


@trio_test
async def test_rules_of_the_holder_that_shut_a_caller_out_keep_its_state_in(tmp_path: Path) -> None:
    shut: list[dict[str, Value]] = [
        {"name": "knowledge.gpt/**", "callers": ["mesh"], "effect": "deny"}
    ]
    async with nodes(tmp_path, rules={0: shut}) as (holder, server):
        caller = Caller(server.id)
        holder.capability.keep(kept(str(caller)))
        assert await server.ask(request(TAG), caller, hint(holder)) == COMPUTED
        assert [line["outcome"] for line in holder.audit.lines] == ["access"]


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_flipped, Reason.CORRUPT),
        (lambda data: data[:-1], Reason.CORRUPT),
        (lambda _data: b"", Reason.CORRUPT),
        (lambda data: data + b"x", Reason.REFUSED),  # its own daemon ends it
    ],
)
def test_a_state_that_is_not_what_its_head_says_is_not_used(
    tmp_path: Path, spoil: Callable[[bytes], bytes], reason: Reason
) -> None:
    @trio_test
    async def body() -> None:
        async with nodes(tmp_path) as (holder, server):
            caller = Caller(server.id)
            holder.capability.keep(kept(str(caller)))
            holder.capability.spoil = spoil
            assert await server.ask(request(TAG), caller, hint(holder)) == COMPUTED
            assert server.statistics.fetches == {reason.value: 1}
            assert server.capability.states == {}

    body()


@trio_test
async def test_a_state_with_the_digest_of_another_is_not_used(tmp_path: Path) -> None:
    async with nodes(tmp_path) as (holder, server):
        caller = Caller(server.id)
        state = kept(str(caller))
        holder.capability.keep(Kept(replace(state.head, digest=bytes(32)), state.data))
        assert await server.ask(request(TAG), caller, hint(holder)) == COMPUTED
        assert server.statistics.fetches == {"corrupt": 1}
        assert server.capability.states == {}


@pytest.mark.parametrize(
    "change",
    [
        {"digest": bytes(31)},
        {"digest": b""},
        {"token_ids": b""},
        {"token_ids": b"123"},
        {"token_ids": bytes(4 * 100_000)},
        {"size_bytes": 0},
        {"size_bytes": -1},
        {"size_bytes": 2**40},
        {"privacy": 7},
    ],
)
def test_a_hostile_head_is_turned_down_before_the_capability_hears_of_it(
    tmp_path: Path, change: dict[str, object]
) -> None:
    @trio_test
    async def body() -> None:
        async with nodes(tmp_path) as (holder, server):
            caller = Caller(server.id)
            state = kept(str(caller))
            holder.capability.keep(Kept(replace(state.head, **change), state.data))  # type: ignore[arg-type]
            assert await server.ask(request(TAG), caller, hint(holder)) == COMPUTED
            assert server.capability.begun == 0
            assert "fetched" not in server.statistics.fetches

    body()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (BROKEN, Reason.BROKEN),
        (Refused("no room"), Reason.REFUSED),
        (ZeroDivisionError(), Reason.BROKEN),
    ],
)
def test_a_capability_that_does_not_take_it_computes(
    tmp_path: Path, error: Exception, reason: Reason
) -> None:
    @trio_test
    async def body() -> None:
        async with nodes(tmp_path) as (holder, server):
            caller = Caller(server.id)
            holder.capability.keep(kept(str(caller)))
            server.capability.import_error = error
            assert await server.ask(request(TAG), caller, hint(holder)) == COMPUTED
            assert server.statistics.fetches == {reason.value: 1}

    body()


@trio_test
async def test_a_capability_that_crashes_when_asked_what_is_warm_computes(tmp_path: Path) -> None:
    async with nodes(tmp_path) as (holder, server):
        caller = Caller(server.id)
        holder.capability.keep(kept(str(caller)))
        server.capability.warm_error = ZeroDivisionError()
        assert await server.ask(request(TAG), caller, hint(holder)) == COMPUTED
        assert server.statistics.fetches == {"broken": 1}
        assert server.host.warm() == ()


@pytest.mark.parametrize("case", ["nobody", "itself", "gone", "other key", "few", "no tags there"])
def test_hints_that_lead_nowhere_cost_nothing(tmp_path: Path, case: str) -> None:
    reasons = {
        "nobody": {"not_there": 1},
        "itself": {"not_there": 1},
        "gone": {"lost": 1},
        "other key": {"not_there": 1},
        "few": {"too_short": 1},
        "no tags there": {"refused": 1},
    }

    @trio_test
    async def body() -> None:
        async with nodes(tmp_path) as (holder, server):
            caller = Caller(server.id)
            holder.capability.keep(kept(str(caller)))
            given = hint(holder)
            match case:
                case "nobody":
                    given = WarmHint(NodeId(b"x" * 16), TAG, PROMPT_TOKENS)
                case "itself":
                    given = hint(server)
                case "gone":
                    holder.peer.killed.cancel()
                case "other key":
                    server.host.remove(server.capability.descriptor.id)
                    server.capability = Counting(model("another build"))
                    server.host.add(server.capability)
                case "few":
                    given = hint(holder, tokens=255)
                case _:
                    given = hint(holder, b"tag-none")
            assert await server.ask(request(TAG), caller, given) == COMPUTED
            assert server.statistics.fetches == reasons[case]
            assert server.capability.begun == 0

    body()


@trio_test
async def test_a_holder_that_stops_in_the_middle_is_waited_for_no_longer_than_it_may_take(
    tmp_path: Path,
) -> None:
    # 1,000 tokens take 10 s here: an advantage of 40 leaves a quarter of a second.
    hasty = HandoffConfig(advantage=40.0)
    quiet = HandoffConfig(silence_s_min=0.25, silence_trials=0.0)
    for number, config in enumerate((hasty, quiet)):
        async with nodes(tmp_path / str(number), config=config) as (holder, server):
            caller = Caller(server.id)
            holder.capability.keep(kept(str(caller)))
            holder.capability.pause = trio.Event()
            assert await server.ask(request(TAG), caller, hint(holder)) == COMPUTED
            assert server.statistics.fetches == {"timeout": 1}
            assert server.capability.states == {}


@trio_test
async def test_a_connection_that_breaks_in_the_middle_costs_a_computation(tmp_path: Path) -> None:
    async with nodes(tmp_path) as (holder, server):
        caller = Caller(server.id)
        holder.capability.keep(kept(str(caller)))
        holder.capability.pause = trio.Event()
        texts: list[str] = []

        async def ask() -> None:
            texts.append(await server.ask(request(TAG), caller, hint(holder)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            while not server.capability.begun:
                await trio.lowlevel.checkpoint()
            holder.peer.killed.cancel()
        assert texts == [COMPUTED]
        assert server.statistics.fetches == {"lost": 1}


@trio_test
async def test_a_caller_that_leaves_takes_the_fetch_along(tmp_path: Path) -> None:
    async with nodes(tmp_path) as (holder, server):
        caller = Caller(server.id)
        holder.capability.keep(kept(str(caller)))
        holder.capability.pause = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.ask, request(TAG), caller, hint(holder))
            while not server.capability.begun:
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        assert server.statistics.fetches == {"cancelled": 1}
        while not holder.audit.lines:
            await trio.lowlevel.checkpoint()
        assert holder.audit.lines[0]["outcome"] == "cancelled"


async def raw(
    asker: Node, holder: Node, header: CallHeader, body: Value
) -> tuple[list[Value], Value]:
    parts: list[Value] = []
    async with asker.peer.streams.call(holder.id, holder.peer.address, header, body) as call:
        while (part := await call.receive()) is not None:
            parts.append(part)
        return parts, call.trailer


def question(node: Node, **changes: object) -> CallHeader:
    header = CallHeader(
        "r-1", GENERAL, KV_ID, "export", caller=node.id, principal="local", remaining_s=10.0
    )
    return replace(header, **changes)  # type: ignore[arg-type]


BODY: dict[str, Value] = {"t": TAG, "k": KV_KEY, "m": 10**7}


@pytest.mark.parametrize(
    ("changes", "body"),
    [
        ({"operation": "chat"}, BODY),
        ({"privacy": 9}, BODY),
        ({}, None),
        ({}, {}),
        ({}, {**BODY, "t": b"short"}),
        ({}, {**BODY, "k": ""}),
        ({}, {**BODY, "k": 7}),
        ({}, {**BODY, "m": -1}),
        ({}, {**BODY, "m": "all"}),
    ],
)
def test_a_malformed_question_is_the_askers_fault(
    tmp_path: Path, changes: dict[str, object], body: Value
) -> None:
    @trio_test
    async def test() -> None:
        async with nodes(tmp_path) as (holder, asker):
            with pytest.raises(RemoteFailed) as caught:
                await raw(asker, holder, question(asker, **changes), body)
            assert (caught.value.code, caught.value.callers_fault) == ("malformed_call", True)

    test()


@trio_test
async def test_what_an_asker_says_of_itself_is_not_believed(tmp_path: Path) -> None:
    async with nodes(tmp_path, 3) as (entry, holder, asker):
        anna = Caller(entry.id, "key:anna")
        holder.capability.keep(kept(str(anna)))
        said = {"caller": entry.id, "principal": "key:anna"}
        with pytest.raises(RemoteRefused) as caught:
            await raw(asker, holder, question(asker, **said), BODY)
        assert caught.value.code == "caller"
        asked = request(TAG)
        word = entry.passports.of(anna, asked)
        parts, trailer = await raw(asker, holder, question(asker, **said, passport=word), BODY)
        assert trailer == {"b": len(state_of(TAG))}
        assert b"".join(part for part in parts if isinstance(part, bytes)) == state_of(TAG)
        for changes in ({"principal": "key:bert"}, {"name": "knowledge.gpt/other"}, {"privacy": 3}):
            header = question(asker, **{**said, "passport": word, **changes})
            with pytest.raises(RemoteRefused) as caught:
                await raw(asker, holder, header, BODY)
            assert caught.value.code == "caller"


@trio_test
async def test_more_than_is_wanted_is_not_sent(tmp_path: Path) -> None:
    async with nodes(tmp_path) as (holder, asker):
        holder.capability.keep(kept(str(Caller(asker.id))))
        with pytest.raises(RemoteRefused) as caught:
            await raw(asker, holder, question(asker), {**BODY, "m": 1_000})
        assert caught.value.code == "too_large"


@trio_test
async def test_only_so_many_states_are_handed_out_at_once(tmp_path: Path) -> None:
    async with nodes(tmp_path) as (holder, asker):
        holder.capability.keep(kept(str(Caller(asker.id))))
        holder.capability.pause = trio.Event()
        async with trio.open_nursery() as nursery:
            for _ in range(GIVEN_MAX):
                nursery.start_soon(raw, asker, holder, question(asker), BODY)
            while holder.peer.streams.statistics.calls_served < GIVEN_MAX:
                await trio.lowlevel.checkpoint()
            with pytest.raises(RemoteRefused) as caught:
                await raw(asker, holder, question(asker), BODY)
            assert caught.value.code == "busy"
            holder.capability.pause.set()


@trio_test
async def test_what_a_capability_has_not_reported_yet_is_handed_over(tmp_path: Path) -> None:
    async with nodes(tmp_path) as (holder, server):
        caller = Caller(server.id)
        holder.capability.keep(kept(str(caller)))
        holder.capability.reports = False
        assert await server.ask(request(TAG), caller, hint(holder)) == FETCHED


async def drained(call: OutgoingCall) -> None:
    while await call.receive() is not None:
        pass


LARGE_TOKENS = 20_000  # 10 MB: more than any window on the way


@trio_test
async def test_of_a_state_that_nobody_takes_little_is_read_and_soon_nothing_is_held(
    tmp_path: Path,
) -> None:
    async with nodes(tmp_path, config=HandoffConfig(taken_s_max=0.2)) as (holder, asker):
        holder.capability.keep(kept(str(Caller(asker.id)), tokens=LARGE_TOKENS))
        async with asker.peer.streams.call(
            holder.id, holder.peer.address, question(asker), {**BODY, "m": 10**8}
        ) as call:
            await call.receive()  # the head, and no more
            while not holder.audit.lines:
                await trio.lowlevel.checkpoint()
            assert [line["outcome"] for line in holder.audit.lines] == ["deadline_exceeded"]
            assert holder.capability.let_go == 1
            exported = holder.capability.exported
            assert exported is not None
            assert exported.at < 2 * 1024 * 1024
            with pytest.raises(RemoteFailed, match="does not take it"):
                await drained(call)


@trio_test
async def test_one_that_comes_too_slowly_is_let_go(tmp_path: Path) -> None:
    async with nodes(tmp_path, config=HandoffConfig(given_s_max=0.2)) as (holder, asker):
        holder.capability.keep(kept(str(Caller(asker.id)), tokens=LARGE_TOKENS))
        holder.capability.pause = trio.Event()
        with pytest.raises(RemoteFailed, match="takes too long"):
            await raw(asker, holder, question(asker), {**BODY, "m": 10**8})
        assert holder.capability.let_go == 1


@trio_test
async def test_a_large_state_arrives_whole(tmp_path: Path) -> None:
    async with nodes(tmp_path) as (holder, asker):
        state = kept(str(Caller(asker.id)), tokens=LARGE_TOKENS)
        holder.capability.keep(state)
        head, *pieces = (await raw(asker, holder, question(asker), {**BODY, "m": 10**8}))[0]
        assert b"".join(piece for piece in pieces if isinstance(piece, bytes)) == state.data
        assert isinstance(head, dict)
        assert head["b"] == len(state.data)


@trio_test
async def test_what_is_refused_after_its_head_was_sent_is_a_failure(tmp_path: Path) -> None:
    async with nodes(tmp_path) as (holder, asker):
        holder.capability.keep(kept(str(Caller(asker.id))))
        holder.capability.refuses = True
        with pytest.raises(RemoteFailed, match="it is gone"):
            await raw(asker, holder, question(asker), BODY)


@trio_test
async def test_where_it_is_turned_off_nothing_is_fetched_and_nothing_given(tmp_path: Path) -> None:
    async with nodes(tmp_path, config=HandoffConfig(enable=False)) as (holder, server):
        caller = Caller(server.id)
        holder.capability.keep(kept(str(caller)))
        assert await server.ask(request(TAG), caller, hint(holder)) == COMPUTED
        assert server.statistics.fetches == {"off": 1}
        with pytest.raises(RemoteRefused) as caught:
            await raw(server, holder, question(server), BODY)
        assert caught.value.code == "unsupported"


@trio_test
async def test_a_node_that_drains_still_hands_over_what_is_warm(tmp_path: Path) -> None:
    async with nodes(tmp_path) as (holder, server):
        caller = Caller(server.id)
        holder.capability.keep(kept(str(caller)))
        holder.host.close_to_peers()
        assert await server.ask(request(TAG), caller, hint(holder)) == FETCHED


@pytest.mark.parametrize(
    ("host", "made", "outcome"),
    [
        ("192.168.1.20", Privacy.LAN, "ok"),
        ("8.8.8.8", Privacy.LAN, "privacy"),
        ("", Privacy.LAN, "privacy"),
        ("8.8.8.8", Privacy.MESH, "ok"),
        ("8.8.8.8", Privacy.LOCAL, "privacy"),
    ],
)
def test_how_far_a_state_goes_is_read_from_the_connection(
    tmp_path: Path, host: str, made: Privacy, outcome: str
) -> None:
    @trio_test
    async def test() -> None:
        async with nodes(tmp_path) as (holder, asker):
            holder.capability.keep(kept(str(Caller(asker.id)), privacy=made))
            holder.capability.checks = False
            call = FakeIncoming(BODY, **asdict(question(asker)))
            call.peer, call.host = asker.id, host
            with suppress(Refused):
                await holder.server.serve(cast("IncomingCall", call))
            assert [line["outcome"] for line in holder.audit.lines] == [outcome]
            assert bool(call.sent) == (outcome == "ok")

    test()
