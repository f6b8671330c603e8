# SPDX-License-Identifier: Apache-2.0
"""How far decoding through a cache is from one pass."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxcollapse import open_data
from onnxcollapse.errors import ModelError
from onnxcollapse.verification.caching import cache_gap
from tests.passes.crossed import crossed, samples
from tests.passes.merging import merged


def made():
    return merged(crossed(2, caching="given"), crossed(2, caching="taken"))


def feeds(**options):
    return samples(crossed(2, caching="given"), 8, **options)


def weight(model, branch):
    """A weight that one branch alone reads from now on."""
    graph = next(iter(model.graph)).attributes[branch].value
    node = next(node for node in graph if node.op_type == "MatMul" and node.inputs[1].is_initializer())
    value = node.inputs[1]
    new = ir.Value(name="own", type=value.type, shape=value.shape, const_value=value.const_value)
    model.graph.initializers.add(new)
    node.replace_input_with(1, new)
    return new


def test_branches_of_the_same_weights_agree():
    model = made()
    assert 0 <= cache_gap(model, open_data(feeds(), model), "cpu") < 1e-6


@pytest.mark.parametrize("branch", ["then_branch", "else_branch"])
def test_branches_of_other_weights_do_not(branch):
    model = made()
    value = weight(model, branch)
    value.const_value = ir.tensor(value.const_value.numpy() * 1.1, name="own")
    assert 1e-3 < cache_gap(model, open_data(feeds(), model), "cpu") < 1


def test_nothing_is_said_where_nothing_is_decoded():
    model = made()
    assert 0 <= cache_gap(model, open_data(feeds(length=1), model), "cpu") < 1e-6  # one token is taken twice
    half = crossed(2, caching="given")  # gives caches and takes none
    assert cache_gap(half, open_data(feeds(), half), "cpu") is None


def test_outputs_that_are_not_finite():
    model = made()
    value = weight(model, "then_branch")
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(np.nan), name="own")
    with pytest.raises(ModelError, match="no finite outputs"):
        cache_gap(model, open_data(feeds(), model), "cpu")
