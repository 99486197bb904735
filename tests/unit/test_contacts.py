"""Who was heard and who was turned away, within bounds."""

from __future__ import annotations

import pytest

from meshd.core.sealing import DropReason
from meshd.shell.contacts import HEARD_MAX, STRANGERS_MAX, TELLING, Contacts
from meshd_cms import NodeId


def node(number: int) -> NodeId:
    return NodeId(number.to_bytes(16, "big"))


def test_the_last_datagram_counts() -> None:
    contacts = Contacts()
    assert contacts.heard_s(node(1)) is None
    contacts.heard(node(1), 1.0)
    contacts.heard(node(1), 2.5)
    assert contacts.heard_s(node(1)) == 2.5


def test_who_was_heard_longest_ago_makes_room() -> None:
    contacts = Contacts()
    for number in range(HEARD_MAX):
        contacts.heard(node(number), float(number))
    contacts.heard(node(0), 5000.0)
    contacts.heard(node(HEARD_MAX), 5001.0)
    assert contacts.heard_s(node(0)) == 5000.0
    assert contacts.heard_s(node(1)) is None


@pytest.mark.parametrize("reason", TELLING)
def test_a_source_is_counted_and_a_flood_of_them_is_bounded(reason: DropReason) -> None:
    contacts = Contacts()
    for number in range(3 * STRANGERS_MAX):
        contacts.dropped(reason, ("192.0.2.1", 1), float(number))
        contacts.dropped(reason, ("203.0.113.9", number), float(number))
    found = contacts.strangers()[reason]
    assert len(found) == STRANGERS_MAX
    [known] = [each for each in found if each.address == ("192.0.2.1", 1)]
    assert known.count == 3 * STRANGERS_MAX
    assert all(not contacts.strangers()[other] for other in TELLING if other is not reason)


def test_reasons_that_name_nobody_are_not_kept() -> None:
    contacts = Contacts()
    for reason in DropReason:
        contacts.dropped(reason, ("192.0.2.1", 1), 1.0)
    assert set(contacts.strangers()) == set(TELLING)
