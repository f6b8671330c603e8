# SPDX-License-Identifier: Apache-2.0
"""Tensors of two graphs of the same layers get the same names by what they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcollapse.model import edit
from onnxcollapse.structure.alignment import align
from tests.passes.crossed import crossed
from tests.passes.layering import stream


def named(model):
    """Operator and name of what every node makes."""
    return [(node.op_type, [value.name for value in node.outputs]) for node in model.graph]


@given(st.randoms(use_true_random=False))
def test_a_graph_with_other_names_gets_those_of_its_like(random):
    model, other = stream(3), stream(3)
    values = [value for node in other.graph for value in node.outputs if value.name != "y"]
    names = [f"t{number}" for number in range(len(values))]
    random.shuffle(names)
    for value, name in zip(values, names, strict=True):
        value.name = name
    align(other.graph, model.graph)
    assert named(other) == named(model)
    edit.check(other)


def test_names_may_pass_each_other():
    model, other = stream(2), stream(2)
    first, second = (
        next(v for n in other.graph for v in n.outputs if v.name == name) for name in ("a0", "a1")
    )
    first.name, second.name = "a1", "a0"
    align(other.graph, model.graph)
    assert named(other) == named(model)


@pytest.mark.parametrize("post", [False, True])
def test_all_but_caches_and_masks_correspond(post):
    without, cached = crossed(caching="given", post=post), crossed(caching="taken", post=post)
    for number, node in enumerate(cached.graph):
        for value in node.outputs:
            if not value.is_graph_output():
                value.name = f"other{number}"
    align(cached.graph, without.graph)
    edit.check(cached)
    known = {name for _, names in named(without) for name in names}
    own = [kind for kind, names in named(cached) if not known.issuperset(names)]
    assert set(own) == {"Shape", "Squeeze", "Transpose"} and own.count("Transpose") == 4
    points = [f"{kind}{n}{'_sum' if post else ''}" for n in range(4) for kind in ("self", "cross")]
    for name in (*points, "h1", "h2", "h3", "h4"):
        made = [next(v.producer() for v in values(model) if v.name == name) for model in (without, cached)]
        assert made[0].op_type == made[1].op_type
        weights = [[v.const_value.numpy() for v in node.inputs if v.const_value is not None] for node in made]
        for one, other in zip(*weights, strict=True):
            np.testing.assert_array_equal(one, other)


def values(model):
    return [value for node in model.graph for value in node.outputs]


def test_other_weights_do_not_correspond():
    model, other = stream(2), stream(2, scale=0.5)
    before = dict.fromkeys(name for _, names in named(other) for name in names)
    align(other.graph, model.graph)
    edit.check(other)
    assert len({name for _, names in named(other) for name in names}) == len(before)
    assert next(v for v in values(other) if v.name == "y").producer().op_type == "Add"


def test_interfaces_keep_their_names():
    model, other = stream(2), stream(2)
    [x] = other.graph.inputs
    [y] = other.graph.outputs
    x.name, y.name = "h1", "z0"  # as tensors of the first graph are called
    align(other.graph, model.graph)
    assert (x.name, y.name) == ("h1", "z0")
    edit.check(other)
