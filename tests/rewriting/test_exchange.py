# SPDX-License-Identifier: Apache-2.0
"""Exchanging variants of a selection whose savings overlap."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxcollapse import Proposal
from onnxcollapse.rewriting import Saving
from onnxcollapse.rewriting.exchange import Exchange
from onnxcollapse.rewriting.selection import Candidate
from tests.rewriting.test_pricing import Drop

WIDTHS = (40, 30, 20, 10)


class Chain:
    """Linears in a chain: widths between them may be cut, and the size is what is left of all products."""

    def __init__(self, layers: int, costs, shared: bool = False) -> None:
        self.layers = layers
        self.items = []
        for layer in range(layers):
            for place, width in enumerate(WIDTHS[1:]):
                alone = self.size([]) - self._size({layer: width})
                self.items.append(
                    Candidate(
                        Drop(),
                        Proposal(f"y{layer}", f"keep {width}"),
                        layer,
                        frozenset(["all" if shared else f"n{layer}"]),
                        Saving(params=alone),
                        costs[layer] * (place + 1) ** 2,
                        frozenset([f"z{layer}", f"y{layer - 1}"]),
                    )
                )
        self.sized = 0

    def _size(self, cut) -> int:
        widths = [WIDTHS[0], *(cut.get(layer, WIDTHS[0]) for layer in range(self.layers)), WIDTHS[0]]
        return sum(a * b for a, b in itertools.pairwise(widths))

    def size(self, chosen) -> float:
        self.sized = getattr(self, "sized", 0) + 1
        return self._size(
            {int(item.proposal.site[1:]): int(item.proposal.variant.split()[-1]) for item in chosen}
        )

    def improved(self, chosen, room):
        return Exchange(self.items, "params", self.size, lambda item: item.impact).better(chosen, room)

    def best(self, room):
        """The least cost of all selections inside the room."""
        by_site = [[None, *self.items[3 * layer : 3 * layer + 3]] for layer in range(self.layers)]
        selections = ([item for item in picks if item is not None] for picks in itertools.product(*by_site))
        return min((sum(i.impact for i in s) for s in selections if self.size(s) <= room), default=None)


@given(costs=st.lists(st.floats(0.1, 10), min_size=3, max_size=4), share=st.floats(0.35, 0.95))
@settings(deadline=None, max_examples=40)
def test_it_ends_inside_the_room_at_no_more_error_and_near_the_best(costs, share):
    chain = Chain(len(costs), costs)
    smallest = [chain.items[3 * layer + 2] for layer in range(len(costs))]
    room = share * chain.size([])
    if chain.size(smallest) > room:
        return
    found = chain.improved(smallest, room)
    cost = sum(item.impact for item in found)
    assert chain.size(found) <= room
    assert [item.order for item in found] == sorted(item.order for item in found)
    assert len({item.proposal.site for item in found}) == len(found)
    assert (
        chain.best(room)
        <= cost
        <= 1.5 * chain.best(room) + 1e-9
        <= sum(i.impact for i in smallest) * 1.5 + 1e-9
    )


def test_what_is_free_to_leave_leaves():
    chain = Chain(3, [1.0, 1.0, 1.0])
    assert chain.improved([chain.items[2]], chain.size([])) == []


def test_sites_that_exclude_each_other_are_not_both_taken():
    """From nothing, what saves most is one cut in each layer; they hold one key, though they are no neighbours."""
    for shared, count in ((False, 2), (True, 1)):
        chain = Chain(3, [1.0, 100.0, 1.0], shared=shared)
        exchange = Exchange(chain.items, "params", chain.size, lambda item: item.impact)
        assert len(exchange.smaller([], 20.0)) == count


@given(costs=st.lists(st.floats(0.1, 10), min_size=3, max_size=4), allowed=st.floats(1, 100))
@settings(deadline=None, max_examples=30)
def test_more_is_saved_at_an_error_that_is_allowed(costs, allowed):
    chain = Chain(len(costs), costs)
    exchange = Exchange(chain.items, "params", chain.size, lambda item: item.impact)
    found = exchange.smaller([], allowed)
    assert sum(item.impact for item in found) <= allowed * (1 + 1e-9)
    by_site = [[None, *chain.items[3 * layer : 3 * layer + 3]] for layer in range(chain.layers)]
    selections = ([item for item in picks if item is not None] for picks in itertools.product(*by_site))
    best = min(chain.size(s) for s in selections if sum(i.impact for i in s) <= allowed)
    assert best <= chain.size(found) <= 1.25 * best


def test_a_selection_that_cannot_get_better_stays():
    chain = Chain(2, [1.0, 1.0])
    start = [chain.items[0]]
    assert chain.improved(start, chain.size(start)) == start
    assert Exchange([], "params", chain.size, lambda item: item.impact).better([], 0.0) == []


def test_only_a_few_variants_of_a_site_are_sized():
    chain = Chain(4, [1.0, 2.0, 3.0, 4.0])
    start = [chain.items[3 * layer + 1] for layer in range(4)]
    chain.sized = 0
    chain.improved(start, chain.size(start))
    assert chain.sized < 80


@pytest.mark.parametrize("first", ["width", "rank"])
def test_ranks_are_cut_before_widths_at_one_place(first):
    second = {"width": "rank", "rank": "width"}[first]
    items = [Candidate(Drop(), Proposal("y", cuts=cuts), 3, frozenset()) for cuts in (first, second)]
    assert [item.proposal.cuts for item in sorted(items, key=lambda item: item.order)] == ["rank", "width"]
