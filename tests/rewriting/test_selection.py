# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import ctypes
import itertools
import os
import sys

import onnx_ir as ir
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from onnxcollapse import Proposal, Saving
from onnxcollapse.rewriting.selection import (
    Candidate,
    admit,
    choose,
    compatible,
    node_key,
    ranked,
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


def best(items, measure, needed, allowed, power):
    """The least cost, or the most saved, over all selections."""
    found = None
    for taken in itertools.product([False, True], repeat=len(items)):
        group = [item for item, take in zip(items, taken, strict=True) if take]
        nodes = [node for item in group for node in item.nodes]
        cost = sum(item.impact**power for item in group)
        saved = sum(item.saving.of(measure) for item in group)
        if len(set(nodes)) < len(nodes) or cost > allowed**power * (1 + 1e-9):
            continue
        if needed is not None and saved < needed:
            continue
        score = cost if needed is not None else -saved
        found = score if found is None else min(found, score)
    return found


VARIANTS = st.lists(
    st.tuples(st.integers(1, 50), st.floats(0.01, 1), st.sampled_from(["1", "2", "3", "12", "4"])),
    min_size=1,
    max_size=8,
)


@given(
    items=VARIANTS, needed=st.none() | st.integers(1, 120), allowed=st.floats(0.1, 2), power=st.integers(1, 2)
)
def test_choose_is_as_good_as_any_selection(items, needed, allowed, power):
    found = [
        candidate(f"{place}", params=params, impact=impact, nodes=nodes, position=place)
        for place, (params, impact, nodes) in enumerate(items)
    ]
    allowed = 1e9 if needed is not None else allowed
    chosen = choose(found, "params", needed=needed, allowed=allowed, power=power)
    assert compatible(chosen) == chosen
    assert [item.position for item in chosen] == sorted(item.position for item in chosen)
    cost, saved = sum(item.impact**power for item in chosen), sum(item.saving.params for item in chosen)
    assert cost <= allowed**power * (1 + 1e-6)
    reachable = best(found, "params", needed, allowed, power)
    if needed is None:
        assert saved == -reachable
    elif reachable is None:  # no selection saves enough: the one that saves most
        assert saved == -best(found, "params", None, allowed, power)
    else:
        assert saved >= needed
        assert cost == pytest.approx(reachable, rel=1e-3, abs=1e-6)


def test_choose_takes_nothing_where_nothing_is_allowed_and_all_that_is_free():
    items = [candidate("a", impact=0.1), candidate("b", impact=0.0)]
    assert names(choose(items, "params", allowed=0.0)) == "b"
    assert choose([], "params", needed=3) == []


def test_errors_of_a_norm_add_up_in_squares():
    items = [candidate("a", impact=0.6), candidate("b", impact=0.8)]
    assert names(choose(items, "params", allowed=1.0, power=2)) == "ab"
    assert len(choose(items, "params", allowed=1.0, power=1)) == 1


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


def test_what_the_solver_prints_does_not_reach_stdout(monkeypatch, capfd):
    """Some releases of HiGHS print, through C's buffer, and stdout may have to hold one JSON document only."""
    solve = scipy.optimize.milp

    def chatty(*arguments, **options):
        os.write(1, b"at once ")
        ctypes.CDLL(None).printf(b"later ")
        return solve(*arguments, **options)

    monkeypatch.setattr(scipy.optimize, "milp", chatty)
    sys.stdout.write("before ")
    assert names(choose([candidate("a")], "params")) == "a"
    sys.stdout.write("after")
    ctypes.CDLL(None).fflush(None)
    assert capfd.readouterr().out == "before after"


def test_the_error_that_is_there_already_counts_for_no_candidate():
    items = [candidate("a", impact=0.5), candidate("b", impact=0.5, position=1)]
    assert not choose(items, "params", allowed=0.4, power=2)
    assert names(choose(items, "params", allowed=0.4, power=2, already=0.45)) == "ab"
