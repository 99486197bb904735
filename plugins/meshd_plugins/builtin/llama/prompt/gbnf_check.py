"""Whether a grammar may be given to llama.cpp.

llama.cpp trusts its grammars. Its search for left recursion and its matching take exponential time on some,
and neither can be interrupted. So a grammar is refused here when it recurses to the left, describes no finite
text, or is too ambiguous: the ways in which it reads one token of text are counted, for all stacks it can be in
(told apart by their last frames), and there may be at most `WAYS_MAX`.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Final, TypeAlias

from meshd_plugins.builtin.llama.prompt.gbnf import Chars, Element, Grammar, GrammarError, Range

LEFTMOST_MAX: Final = 100_000  # ways from a rule to what may stand first
WAYS_MAX: Final = 5_000
TOKEN_CHARACTERS: Final = 24  # of the longest tokens that matter
FRAMES: Final = (2, 1)  # of a stack that are told apart; fewer where these are too many
STACKS_MAX: Final = 4_000  # looked at for the estimate
STEPS_MAX: Final = 20_000  # of following texts

_Fits: TypeAlias = "Callable[[Element, set[int]], bool]"


def check(grammar: Grammar, *, wholly: bool = True) -> None:
    """Refuse what llama.cpp could not handle. Raises GrammarError.

    Args:
        grammar: as read.
        wholly: refuse what is too large for the ambiguity to be estimated, instead of trusting it.
    """
    _check_finite(grammar)
    _check_leftmost(grammar)
    ways = _ways(grammar, wholly=wholly)
    if ways > WAYS_MAX:
        raise GrammarError(
            "the grammar is too ambiguous: there are thousands of ways to read the same few characters; "
            "let alternatives begin differently"
        )


def nullable_rules(grammar: Grammar) -> frozenset[int]:
    """Rules that the empty text fits."""
    return _closed(grammar, lambda element, known: isinstance(element, int) and element in known)


def _closed(grammar: Grammar, fits: _Fits) -> frozenset[int]:
    """Rules of which one sequence fits throughout, given those that are known to."""
    known: set[int] = set()
    users: dict[int, set[int]] = {}
    for number, alternates in enumerate(grammar.rules):
        for sequence in alternates:
            for element in sequence:
                if isinstance(element, int):
                    users.setdefault(element, set()).add(number)
    todo = list(range(len(grammar.rules)))
    while todo:
        number = todo.pop()
        if number in known:
            continue
        if any(all(fits(each, known) for each in alternate) for alternate in grammar.rules[number]):
            known.add(number)
            todo += users.get(number, ())
    return frozenset(known)


def _check_finite(grammar: Grammar) -> None:
    finite = _closed(grammar, lambda element, known: isinstance(element, Chars) or element in known)
    if grammar.root not in finite:
        raise GrammarError("the grammar describes no finite text: it could never end")


def _check_leftmost(grammar: Grammar) -> None:
    """No left recursion, and few ways to what stands first: llama.cpp walks all of them."""
    nullable = nullable_rules(grammar)
    first: list[list[int]] = []
    for alternates in grammar.rules:
        found: list[int] = []
        for sequence in alternates:
            for element in sequence:
                if not isinstance(element, int):
                    break
                found.append(element)
                if element not in nullable:
                    break
        first.append(found)
    ways: dict[int, int] = {}
    for start in range(len(grammar.rules)):
        open_rules: dict[int, int] = {}  # rule to how many of its children are done
        path = [start] if start not in ways else []
        while path:
            number = path[-1]
            done = open_rules.setdefault(number, 0)
            if done == len(first[number]):
                ways[number] = 1 + sum(ways[child] for child in first[number])
                del open_rules[number]
                path.pop()
                if ways[number] > LEFTMOST_MAX or len(path) > 5_000:
                    raise GrammarError(
                        "the grammar is too ambiguous: too many rules may begin a rule"
                    )
                continue
            child = first[number][done]
            open_rules[number] += 1
            if child in open_rules:
                raise GrammarError("the grammar recurses to the left: a rule may begin with itself")
            if child not in ways:
                path.append(child)


_Stack: TypeAlias = tuple[
    tuple[int, int, int], ...
]  # places (rule, alternate, index), the last is next


def _ways(grammar: Grammar, *, wholly: bool) -> int:
    """How many ways there may be to read `TOKEN_CHARACTERS` characters, from any stack reached."""
    for frames in FRAMES:
        following, complete = _reached(grammar, frames)
        if complete:
            break
    else:
        if wholly:
            raise GrammarError("the grammar is too large to be checked; make it smaller")
        return 1
    classes = _classes(grammar, following)
    if (estimate := _estimate(classes, following)) <= WAYS_MAX:
        return estimate
    return _most_ways(classes, following)


def _estimate(
    classes: Mapping[_Stack, frozenset[int]], following: Mapping[_Stack, tuple[_Stack, ...]]
) -> int:
    """An upper bound: as if each way went on with the characters that part it most."""
    numbers = {stack: number for number, stack in enumerate(following)}
    groups: list[set[tuple[int, ...]]] = []
    for after in following.values():
        by_character: dict[int, list[int]] = {}
        for stack in after:
            for character in classes[stack]:
                by_character.setdefault(character, []).append(numbers[stack])
        groups.append({tuple(group) for group in by_character.values()})
    if all(len(group) == 1 for found in groups for group in found):
        return 1
    ways = [1] * len(groups)
    for _ in range(TOKEN_CHARACTERS):
        before = ways
        ways = [
            max((sum([before[each] for each in group]) for group in found), default=1)
            for found in groups
        ]
        if ways == before or max(ways) > WAYS_MAX:
            break
    return max(ways, default=1)


def _classes(grammar: Grammar, following: Iterable[_Stack]) -> dict[_Stack, frozenset[int]]:
    """For each stack the characters that fit it, one of each kind that the grammar tells apart."""
    tops: dict[_Stack, tuple[Range, ...]] = {}
    for stack in following:
        rule, alternate, index = stack[-1]
        element = grammar.rules[rule][alternate][index]
        assert isinstance(element, Chars)
        tops[stack] = element.ranges
    edges = sorted(
        {edge for ranges in tops.values() for low, high in ranges for edge in (low, high + 1)}
    )
    fitting = {
        ranges: frozenset(
            edge
            for low, high in ranges
            for edge in edges[bisect_left(edges, low) : bisect_right(edges, high)]
        )
        for ranges in set(tops.values())
    }
    return {stack: fitting[ranges] for stack, ranges in tops.items()}


def _most_ways(
    classes: Mapping[_Stack, frozenset[int]], following: Mapping[_Stack, tuple[_Stack, ...]]
) -> int:
    """The most ways in which a short text can be read from a stack, all stacks it may be in counted.

    From each stack where ways part, all texts are followed at once: what counts of a text is how often it
    leads to which stack.
    """
    most = 1
    steps = 0
    explored: dict[frozenset[tuple[_Stack, int]], int] = {}  # with so many characters to follow
    for start, after in following.items():
        if sum(map(len, (classes[each] for each in after))) == len(
            frozenset[int]().union(*(classes[each] for each in after))
        ):
            continue  # no character fits two of them
        states = {frozenset({(start, 1)})}
        for left in range(TOKEN_CHARACTERS, 0, -1):
            reached: set[frozenset[tuple[_Stack, int]]] = set()
            for state in states:
                if explored.get(state, 0) >= left:
                    continue
                explored[state] = left
                for character in frozenset[int]().union(*(classes[stack] for stack, _ in state)):
                    counts: Counter[_Stack] = Counter()
                    for stack, ways in state:
                        if character in classes[stack]:
                            for each in following[stack]:
                                counts[each] += ways
                    most = max(most, *counts.values()) if counts else most
                    if len(counts) > 1 or most > 1:
                        reached.add(frozenset(counts.items()))
                    steps += 1
                    if most > WAYS_MAX or steps > STEPS_MAX:
                        return WAYS_MAX + 1
            states = {state for state in reached if len(state) > 1 or sum(n for _, n in state) > 1}
            if not states:
                break
    return most


def _reached(grammar: Grammar, frames: int) -> tuple[dict[_Stack, tuple[_Stack, ...]], bool]:
    """Stacks that texts lead to, each with those after one more character; and whether these are all."""
    todo = [
        stack
        for number in range(len(grammar.rules[grammar.root]))
        for stack in _advanced(grammar, ((grammar.root, number, 0),), frames)
    ]
    following: dict[_Stack, tuple[_Stack, ...]] = {}
    while todo:
        stack = todo.pop()
        if stack in following or not stack:
            continue
        if len(following) >= STACKS_MAX:
            return following, False
        rule, alternate, index = stack[-1]
        after = _advanced(grammar, (*stack[:-1], (rule, alternate, index + 1)), frames)
        following[stack] = after
        todo += after
    return following, True


def _advanced(grammar: Grammar, stack: _Stack, frames: int) -> tuple[_Stack, ...]:
    """Stacks with a character on top that a stack leads to without reading any."""
    found: dict[_Stack, None] = {}
    seen: set[_Stack] = set()
    todo = [stack]
    while todo:
        stack = todo.pop()
        if stack in seen:
            continue
        seen.add(stack)
        if len(seen) > STACKS_MAX:
            raise GrammarError("the grammar is too ambiguous: too many rules may begin a rule")
        if not stack:
            continue
        rule, alternate, index = stack[-1]
        sequence = grammar.rules[rule][alternate]
        if index >= len(sequence):
            todo.append(stack[:-1])
            continue
        element = sequence[index]
        if isinstance(element, Chars):
            found[stack[-frames:]] = None
            continue
        rest = stack[:-1]
        if index + 1 < len(sequence):
            rest = (*rest, (rule, alternate, index + 1))
        todo += [(*rest, (element, n, 0)) for n in range(len(grammar.rules[element]))]
    return tuple(found)
