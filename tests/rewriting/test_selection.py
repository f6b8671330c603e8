# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcollapse import Proposal, Saving
from onnxcollapse.rewriting.selection import (
    Candidate,
    admit,
    affordable,
    compatible,
    most_saving,
    node_key,
    ranked,
    reaching,
)
from tests.rewriting.branches import Drop


def candidate(
    name: str, *, impact: float = 0.0, params: int = 1, flops: int = 0, nodes: str = "", position: int = 0
) -> Candidate:
    held = frozenset(nodes or name)
    return Candidate(Drop(), Proposal(name), position, held, Saving(params=params, flops=flops), impact)


def names(candidates) -> str:
    return "".join(item.proposal.site for item in candidates)


def test_of_those_that_share_a_node_the_first_stays():
    found = compatible([candidate("a", nodes="12"), candidate("b", nodes="23"), candidate("c", nodes="34")])
    assert names(found) == "ac"
    assert names(compatible([candidate("a", nodes=""), candidate("b", nodes="")])) == "ab"


def test_the_cheapest_error_for_what_is_saved_comes_first():
    items = [
        candidate("a", impact=0.4, params=10),
        candidate("b", impact=0.1, params=10, flops=1),
        candidate("c", impact=0.2, params=100, flops=1),
    ]
    assert names(ranked(items)) == "cba"
    assert names(ranked(items, "flops")) == "bca"


def test_equals_keep_the_order_of_the_graph_and_exclusion_follows_the_price():
    items = [candidate("a", position=2), candidate("b", position=1), candidate("c", position=0)]
    assert names(ranked(items)) == "cba"
    rivals = [
        candidate("a", impact=0.2, nodes="1"),
        candidate("b", impact=0.1, nodes="12"),
        candidate("c", nodes="3"),
    ]
    assert names(ranked(rivals)) == "cb"


def test_what_saves_nothing_comes_last_but_what_was_asked_for_first():
    class Asked(Drop):
        on_request = True

    asked = Candidate(Asked(), Proposal("x"), 9, frozenset("x"), Saving(), 0.5)
    items = [candidate("a", params=0), candidate("b", impact=0.9), asked]
    assert names(ranked(items)) == "xba"


@pytest.mark.parametrize(
    "cap, expected", [(0.0, ""), (0.125, "a"), (0.374, "a"), (0.375, "ab"), (0.874, "ab"), (0.875, "abc")]
)
def test_affordable_is_the_longest_run_within_the_cap(cap, expected):
    items = [candidate("a", impact=0.125), candidate("b", impact=0.25), candidate("c", impact=0.5)]
    assert names(affordable(items, cap)) == expected


@pytest.mark.parametrize(
    "needed, expected", [(0, ""), (1, "a"), (2, "a"), (3, "ab"), (6, "abc"), (99, "abc")]
)
def test_reaching_is_the_shortest_run_that_saves_enough(needed, expected):
    items = [candidate("a", params=2), candidate("b", params=2), candidate("c", params=2)]
    assert names(reaching(items, "params", needed)) == expected


def test_a_node_is_known_again_in_a_copy_and_not_by_its_name_alone():
    value = ir.Value(name="x")
    first = ir.node("Relu", [value], name="n", outputs=[ir.Value(name="y")])
    again = ir.node("Relu", [value], name="n", outputs=[ir.Value(name="y")])
    other = ir.node("Relu", [value], name="n", outputs=[ir.Value(name="z")])
    nameless = ir.node("Relu", [value], outputs=[ir.Value(name="y")])
    assert node_key(first) == node_key(again)
    assert len({node_key(node) for node in (first, other, nameless)}) == 3


class Recorder:
    """Keeps what a predicate on the set of all that is kept allows, as the engine does."""

    def __init__(self, allowed) -> None:
        self.allowed = allowed
        self.kept: list[str] = []
        self.refused: list[str] = []
        self.attempts: list[str] = []

    def attempt(self, group) -> bool:
        self.attempts.append(names(group))
        if not self.allowed({*self.kept, *names(group)}):
            return False
        self.kept += names(group)
        return True

    def run(self, letters: str) -> Recorder:
        admit(
            [candidate(letter) for letter in letters],
            self.attempt,
            lambda c: self.refused.append(c.proposal.site),
        )
        return self


def test_a_group_that_passes_is_tried_once():
    done = Recorder(lambda _: True).run("abcd")
    assert (done.attempts, done.kept, done.refused) == (["abcd"], list("abcd"), [])


def test_one_bad_apple_is_found_by_halving():
    done = Recorder(lambda kept: "c" not in kept).run("abcdefgh")
    assert done.attempts == ["abcdefgh", "abcd", "ab", "cd", "c", "d", "efgh"]
    assert (done.kept, done.refused) == (list("abdefgh"), ["c"])


def test_nothing_is_tried_for_an_empty_group():
    assert Recorder(lambda _: True).run("").attempts == []


LETTERS = "abcdefghijkl"
SUBSETS = st.sets(st.sampled_from(LETTERS), min_size=1, max_size=4)


@given(count=st.integers(0, len(LETTERS)), bad=st.lists(SUBSETS, max_size=6))
def test_admit_keeps_a_maximal_set_in_few_attempts(count, bad):
    """Monotone: a set is refused when it holds one of the bad sets, and so are all that hold it."""
    letters = LETTERS[:count]

    def allowed(kept) -> bool:
        return not any(group <= kept for group in bad)

    done = Recorder(allowed).run(letters)
    assert sorted(done.kept + done.refused) == sorted(letters)
    assert allowed(set(done.kept))
    for letter in done.refused:
        assert not allowed({*done.kept, letter}), "a refused one would have fitted after all"
    assert len(done.attempts) <= max(2 * count - 1, 0)


@given(
    costs=st.lists(st.floats(0, 1, allow_nan=False), max_size=len(LETTERS)),
    cap=st.floats(0, 3, allow_nan=False),
)
def test_admit_under_a_budget_of_sums_is_maximal(costs, cap):
    table = dict(zip(LETTERS, sorted(costs), strict=False))

    def allowed(kept) -> bool:
        return sum(sorted(table[letter] for letter in kept)) <= cap

    done = Recorder(allowed).run("".join(table))
    assert allowed(set(done.kept))
    assert not any(allowed({*done.kept, letter}) for letter in done.refused)


def test_most_saving_takes_the_larger_variant_of_a_site():
    small = candidate("a", params=10, impact=0.01, nodes="1")
    large = candidate("b", params=30, impact=0.5, nodes="1")
    other = candidate("c", params=20, impact=0.1, nodes="2")
    assert names(most_saving([small, large, other], "params")) == "bc"
    assert names(ranked([small, large, other], "params")) == "ac"
