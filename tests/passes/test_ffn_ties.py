# SPDX-License-Identifier: Apache-2.0
"""Which neurons of several blocks correspond."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxcollapse.passes import ffn_ties


def correlations(x, orders):
    """Between blocks that have the same neurons in other orders."""
    views = [x[:, order] for order in orders]

    def between(i, j):
        return np.corrcoef(views[i].T, views[j].T)[: x.shape[1], x.shape[1] :]

    return between


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.integers(2, 4))
def test_copies_are_recovered_and_lose_nothing(seed, count):
    random = np.random.default_rng(seed)
    x = random.normal(size=(60, 9))
    orders = [random.permutation(9) for _ in range(count)]
    between = correlations(x, orders)
    found = ffn_ties.aligned(count, 9, between)
    assert all(np.array_equal(orders[i][found[i]], orders[0]) for i in range(count))
    power = [np.square(random.normal(size=9))[order] for order in orders[:1]] * count
    power = [power[0][np.argsort(orders[0])][order] for order in orders]
    rows_, kept_ = ffn_ties.matched(power, between)
    assert all(np.array_equal(orders[i][rows_[i]], orders[0]) for i in range(count))
    assert not kept_.any()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_neurons_that_have_no_like_meet_those_that_matter_least(seed):
    random = np.random.default_rng(seed)
    power = [random.uniform(1, 2, 8) * np.repeat([1.0, 1e-3], 4) for _ in range(2)]
    order, kept_ = ffn_ties.matched(power, lambda i, j: np.zeros((8, 8)))
    strong = np.concatenate([power[0][kept_ == 0], power[1][order[1]][kept_ == 1]])
    assert (strong >= 1).all()  # each of the eight that matter keeps a slot
