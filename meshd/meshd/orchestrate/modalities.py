"""What a request needs a model to take in beside text. Read at the node where it enters and where it is served."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from meshd_naming import Offer, modalities_from
from meshd_plugins.api import BadRequest, Descriptor, Operation, Value
from meshd_plugins.media import Modality, modalities_of

UNSUPPORTED_MODALITY: Final = "unsupported_modality"
_NAMES_MAX: Final = 5  # of capabilities in one message
_WORDS: Final[Mapping[str, str]] = {Modality.IMAGE: "images", Modality.AUDIO: "sound"}


def needed_by(body: Mapping[str, Value]) -> tuple[str, ...]:
    """What whoever serves a request must be able to take in beside text; of most requests, nothing."""
    return modalities_of(body.get("messages"))


def lacking(descriptor: Descriptor, body: Mapping[str, Value]) -> tuple[str, ...]:
    """What a request needs and a capability cannot take in."""
    needed = needed_by(body)
    if not needed:
        return ()
    model = descriptor.model
    told = descriptor.fields.get("modality", model.modalities if model is not None else None)
    return tuple(each for each in needed if each not in modalities_from(told))


def words(modalities: Iterable[str]) -> str:
    """For people: `images and sound`."""
    return " and ".join(_WORDS.get(each, each) for each in modalities)


def nobody_takes(name: str, needed: Sequence[str], offers: Iterable[Offer]) -> BadRequest:
    """The error where a name is served, and by nobody who takes in what the request holds.

    Args:
        name: as it was asked for.
        needed: by the request.
        offers: all that the mesh holds now; those that do take it in are named.
    """
    chats = [offer for offer in offers if Operation.CHAT in offer.operations]
    able = sorted({o.name.path for o in chats if set(needed) <= set(o.modalities)})
    if able:
        more = f" and {len(able) - _NAMES_MAX} more" if len(able) > _NAMES_MAX else ""
        hint = f"what does: {', '.join(able[:_NAMES_MAX])}{more}"
    else:
        known = sorted({each for offer in chats for each in offer.modalities})
        hint = f"the models of this mesh take in {', '.join(known) or 'nothing'}"
    return BadRequest(
        f'nothing that serves "{name}" now takes in {words(needed)}; {hint}',
        code=UNSUPPORTED_MODALITY,
    )
