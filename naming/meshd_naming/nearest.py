"""The nearest valid thing to what was typed, in bounded work.

The measure is optimal string alignment (insertion, deletion, substitution, transposition of neighbours,
each 1), cut off at `limit`, so a word far from everything costs a set difference and no table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

WORD_CHARS_MAX = 96  # what is longer is compared by its first characters only


def edit_distance(left: str, right: str, limit: int) -> int:
    """Optimal string alignment distance, or `limit + 1` when it is more than `limit`."""
    if abs(len(left) - len(right)) > limit or len(set(left) ^ set(right)) > 2 * limit:
        return limit + 1
    far = limit + 1
    before: list[int] = []
    row = list(range(len(right) + 1))
    for i, a in enumerate(left, start=1):
        first, last = max(1, i - limit), min(len(right), i + limit)  # beyond the band it is too far
        previous, row = row, [far] * (len(right) + 1)
        row[0] = i
        for j in range(first, last + 1):
            b = right[j - 1]
            cost = min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (a != b))
            if i > 1 and j > 1 and a == right[j - 2] and left[i - 2] == b:
                cost = min(cost, before[j - 2] + 1)
            row[j] = cost
        if min(row[first - 1 : last + 1]) > limit:
            return far
        before = previous
    return min(row[-1], far)


def closest(word: str, choices: Iterable[str], count: int = 1) -> tuple[str, ...]:
    """At most `count` of `choices` within about a third of the word's length, nearest first."""
    word = word[:WORD_CHARS_MAX].lower()
    limit = max(1, min(4, (len(word) + 2) // 3))
    scored: list[tuple[int, str]] = []
    for choice in choices:
        distance = edit_distance(word, choice[:WORD_CHARS_MAX], limit)
        if distance > limit and len(word) >= 3 and choice.startswith(word):
            distance = limit
        if distance <= limit:
            scored.append((distance, choice))
    return tuple(choice for _, choice in sorted(scored)[:count])


def closest_paths(
    path: str, labels: Sequence[str], paths: Iterable[tuple[str, Sequence[str]]], count: int
) -> tuple[str, ...]:
    """Paths most like `path`: by spelling first, then by labels in common, then alphabetically.

    `paths` yields (path, labels). Another kind with the very same labels counts as one slip.
    """
    kind, _, spelling = path[:WORD_CHARS_MAX].partition("/")
    limit = max(1, min(4, (len(spelling) + 2) // 4))
    wanted = set(labels)
    scored: list[tuple[int, str]] = []
    for other, other_labels in paths:
        other_kind, _, other_spelling = other[:WORD_CHARS_MAX].partition("/")
        if other_kind != kind:
            distance = 1 if other_spelling == spelling else limit + 1
        else:
            distance = edit_distance(spelling, other_spelling, limit)
        if distance <= limit:
            scored.append((distance, other))
        elif common := len(wanted.intersection(other_labels)):
            first = labels[0] == other_labels[0]
            scored.append((limit + 20 - 2 * common - first, other))
    return tuple(other for _, other in sorted(scored)[:count])
