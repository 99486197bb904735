"""What a node writes about itself into its record, and how others read it.

Keys (DESIGN: the Capability Metadata Store): `node`, `hw`, `model/<digest>`, `cap/<id>`; soft state
`load`. Values are maps with whole words as keys, since people read them. What is meant for people is cut
to a bound, so that the entries stay within what the store and a datagram carry.

Reading trusts nothing: a value that is not what it should be makes the capability unusable
(`Malformed`), which the catalogue counts; it never breaks the node. Fields and operations that a later
release may add are passed over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from meshd.core.prefixes import pack_warm, unpack_warm
from meshd.core.scheduler import Load
from meshd.orchestrate.decoding import Malformed, count, mapping, number, sequence, text, typed
from meshd_cms import ENTRY_BYTES_MAX, Entry, StoreError, ValueTooLarge, Version
from meshd_cms.entries import UNSIGNED, check_key, entry_size_bytes, pack_value
from meshd_cms.soft import SOFT_VALUE_BYTES_MAX
from meshd_cms.types import COUNTER_MAX
from meshd_plugins.api import Descriptor, ModelFacts, Operation, Privacy, Rates, Value

NODE_KEY = "node"
HARDWARE_KEY = "hw"
CAPABILITY_PREFIX = "cap/"
MODEL_PREFIX = "model/"
LOAD_KEY = "load"  # soft
WARM_FIELD = "warm"  # of a load
DIGEST_CHARS = 16  # of the model's sha256 in keys: the whole digest is in the value
SUMMARY_CHARS_MAX = 120  # what is longer is cut
LICENCE_CHARS_MAX = 60  # some model files carry the text of a licence where its name belongs
HELD_S_MAX = 3600.0
_OPERATIONS = {operation.value: operation for operation in Operation}


def capability_key(capability_id: str) -> str:
    """Store key of a capability."""
    return f"{CAPABILITY_PREFIX}{capability_id}"


def model_key(digest: str) -> str:
    """Store key of a model's facts."""
    return f"{MODEL_PREFIX}{digest[:DIGEST_CHARS]}"


def capability_value(descriptor: Descriptor) -> dict[str, Value]:
    """What `cap/<id>` holds; the model's facts have a key of their own."""
    value: dict[str, Value] = {
        "name": descriptor.name,
        "operations": [str(operation) for operation in descriptor.operations],
        "summary": cut_text(descriptor.summary, SUMMARY_CHARS_MAX),
        "slots": descriptor.slots,
        "privacy": int(descriptor.privacy),
    }
    if descriptor.model is not None:
        value["model"] = descriptor.model.digest
    rates = descriptor.rates
    if rates is not None:
        value["rates"] = {
            "prefill_tokens_per_s": round(rates.prefill_tokens_per_s, 1),
            "decode_tokens_per_s": round(rates.decode_tokens_per_s, 1),
            "decode_by_batch": [
                [batch, round(rate, 1)]
                for batch, rate in sorted(rates.decode_tokens_per_s_by_batch.items())
            ],
            "load_s": round(rates.load_s, 2),
        }
    if descriptor.fields:
        value["fields"] = dict(descriptor.fields)
    return value


def model_value(model: ModelFacts) -> dict[str, Value]:
    """What `model/<digest>` holds."""
    return {
        "digest": model.digest,
        "family": model.family,
        "architecture": model.architecture,
        "parameters": model.parameters,
        "quantisation": model.quantisation,
        "context_tokens": model.context_tokens,
        "size_bytes": model.size_bytes,
        "licence": cut_text(model.licence, LICENCE_CHARS_MAX),
        "modalities": list(model.modalities),
        "chat_template_digest": model.chat_template_digest,
        "pooling": model.pooling,
        "kv_key": model.kv_key,
        "kv_bytes_per_token": model.kv_bytes_per_token,
    }


def check_fits(descriptor: Descriptor) -> None:
    """Whether the store can carry a capability and its model.

    Raises:
        ValueError: it cannot; the message says what is too large, or what msgpack cannot carry.
    """
    try:
        _check_entry(capability_key(descriptor.id), capability_value(descriptor))
        if descriptor.model is not None:
            _check_entry(model_key(descriptor.model.digest), model_value(descriptor.model))
    except StoreError as error:
        raise ValueError(f"{descriptor.id} cannot be announced: {error}") from error


def _check_entry(key: str, value: Value) -> None:
    check_key(key)
    entry = Entry(key, pack_value(value), Version(COUNTER_MAX), UNSIGNED)
    size_bytes = entry_size_bytes(entry)
    if size_bytes > ENTRY_BYTES_MAX:
        raise ValueTooLarge(key, size_bytes, ENTRY_BYTES_MAX)


def load_value(
    busy: Mapping[str, tuple[int, int]],
    held_s: Mapping[str, float],
    *,
    queue_max: int,
    draining: bool,
    figures: Mapping[str, Value],
    warm: Sequence[tuple[bytes, int]] | None = None,
    bytes_max: int = SOFT_VALUE_BYTES_MAX,
) -> dict[str, Value]:
    """What the soft state `load` and every reply carry, within `bytes_max` when encoded.

    Only capabilities that run or queue something are listed; one that is not, is idle. If that is too
    long, the device's figures go first, then warm prefixes, then the least busy capabilities.

    Args:
        busy: requests that run and that wait, by capability id.
        held_s: how long each is expected to hold its slot, by capability id; told in tenths of a second, of
            which the first two bits count, so that it does not change with every request.
        queue_max: how many may wait for one capability.
        draining: the node takes no new work.
        figures: how busy the device is, from plugins.
        warm: tags and tokens of the prefixes that are warm here, the most recently used first; None: nothing
            here keeps any.
        bytes_max: of the encoded value.
    """
    listed = sorted(
        ((sum(taken), key, taken) for key, taken in busy.items() if any(taken)), reverse=True
    )
    head: dict[str, Value] = {"queue_max": queue_max, "draining": draining}
    shown: Mapping[str, Value] = figures
    told = None if warm is None else pack_warm(warm)
    while True:
        capabilities: dict[str, Value] = {
            key: [*taken, _tenths(held_s.get(key, 0.0))] for _, key, taken in listed
        }
        value = {**shown, **head, "capabilities": capabilities}
        if told is not None:
            value[WARM_FIELD] = told
        if _fits(value, bytes_max) or not (shown or told or listed):
            return value
        if shown:
            shown = {}
        elif told:
            told = None
        else:
            listed.pop()


def load_for_people(load: Mapping[str, Value]) -> dict[str, Value]:
    """A load to be shown: of what is warm, how many prefixes that are."""
    shown = dict(load)
    told = unpack_warm(shown.pop(WARM_FIELD, None))
    if told is not None:
        shown["warm_prefixes"] = told.count
    return shown


def _fits(value: Value, bytes_max: int) -> bool:
    try:
        return len(pack_value(value)) <= bytes_max
    except StoreError:  # a plugin's figure is nothing that msgpack carries
        return False


def _tenths(seconds: float) -> int:
    """Tenths of a second, rounded to two bits: 1, 2, 3, 4, 6, 8, 12, 16, 24 ..."""
    tenths = round(min(seconds, HELD_S_MAX) * 10)
    dropped = max(0, tenths.bit_length() - 2)
    return (tenths + ((1 << dropped) >> 1)) >> dropped << dropped


def load_from(load: Mapping[str, Value], capability_id: str) -> Load:
    """What a peer said of one capability; its age is left at 0.

    Raises:
        Malformed: it said something else.
    """
    queue_max = count(load.get("queue_max", 0), "queue_max")
    taken = mapping(load.get("capabilities"), "load").get(capability_id)
    if taken is None:
        return Load(0, queue_max=queue_max)
    told = sequence(taken, "load")
    if len(told) != 3:
        raise Malformed("load: expected what runs, what waits, and how long one takes")
    busy, queued, tenths = count(told[0], "busy"), count(told[1], "queued"), count(told[2], "held")
    held_s = min(tenths / 10, HELD_S_MAX)
    return Load(busy, queued=queued, queue_max=queue_max, held_s=held_s)


def descriptor_from(value: Value, model: Value) -> Descriptor:
    """Read a capability of another node.

    Args:
        value: of `cap/<id>`.
        model: of the `model/<digest>` it names, None when there is none.

    Raises:
        Malformed: the value is malformed, or its model is missing or another; the message says where.
    """
    table = mapping(value, "cap")
    named = [text(each, "operations") for each in sequence(table.get("operations"), "operations")]
    operations = tuple(_OPERATIONS[each] for each in named if each in _OPERATIONS)
    if not operations:
        raise Malformed("operations: none that is known here")
    slots = count(table.get("slots"), "slots")
    if slots < 1:
        raise Malformed("slots: a capability needs one")
    privacy = count(table.get("privacy"), "privacy")
    if privacy > max(Privacy):
        raise Malformed(f"privacy: {privacy} is no class")
    return Descriptor(
        name=text(table.get("name"), "name"),
        operations=operations,
        summary=text(table.get("summary", ""), "summary"),
        slots=slots,
        privacy=Privacy(privacy),
        model=_model_named(table["model"], model) if "model" in table else None,
        rates=_rates_from(table["rates"]) if "rates" in table else None,
        fields=mapping(table.get("fields", {}), "fields"),
    )


def _model_named(digest: Value, value: Value) -> ModelFacts:
    model = model_from(value)
    if model.digest != digest:
        raise Malformed("model: the record describes another one")
    return model


def model_from(value: Value) -> ModelFacts:
    """Read a model's facts.

    Raises:
        Malformed: the value is malformed.
    """
    table = mapping(value, "model")
    return ModelFacts(
        digest=text(table.get("digest"), "digest"),
        family=text(table.get("family", ""), "family"),
        architecture=text(table.get("architecture", ""), "architecture"),
        parameters=count(table.get("parameters", 0), "parameters"),
        quantisation=text(table.get("quantisation", ""), "quantisation"),
        context_tokens=count(table.get("context_tokens", 0), "context_tokens"),
        size_bytes=count(table.get("size_bytes", 0), "size_bytes"),
        licence=text(table.get("licence", ""), "licence"),
        modalities=tuple(
            typed(each, str, "modalities")
            for each in sequence(table.get("modalities", ["text"]), "modalities")
        ),
        chat_template_digest=text(table.get("chat_template_digest", ""), "chat template"),
        pooling=text(table.get("pooling", ""), "pooling"),
        kv_key=text(table.get("kv_key", ""), "kv_key"),
        kv_bytes_per_token=count(table.get("kv_bytes_per_token", 0), "kv_bytes_per_token"),
    )


def _rates_from(value: Value) -> Rates:
    table = mapping(value, "rates")
    pairs = sequence(table.get("decode_by_batch", []), "decode_by_batch")
    return Rates(
        prefill_tokens_per_s=number(table.get("prefill_tokens_per_s", 0.0), "prefill_tokens_per_s"),
        decode_tokens_per_s=number(table.get("decode_tokens_per_s", 0.0), "decode_tokens_per_s"),
        decode_tokens_per_s_by_batch=dict(_batch_rate(pair) for pair in pairs),
        load_s=number(table.get("load_s", 0.0), "load_s"),
    )


def _batch_rate(value: Value) -> tuple[int, float]:
    pair: Sequence[Value] = sequence(value, "decode_by_batch")
    if len(pair) != 2:
        raise Malformed("decode_by_batch: expected pairs of a batch size and a rate")
    batch = count(pair[0], "decode_by_batch")
    if batch < 1:
        raise Malformed("decode_by_batch: a batch holds at least one sequence")
    return batch, number(pair[1], "decode_by_batch")


def cut_text(line: str, chars_max: int) -> str:
    """At most so many characters, the last of which says that there were more."""
    return line if len(line) <= chars_max else line[: chars_max - 1] + "…"
