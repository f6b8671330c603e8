# SPDX-License-Identifier: Apache-2.0
"""Loading and saving random graphs changes nothing."""

from __future__ import annotations

import numpy as np
import onnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxcollapse.model import Model

FLOAT = TensorProto.FLOAT
info = helper.make_tensor_value_info


def tensor(shape, name, seed):
    return numpy_helper.from_array(
        np.random.default_rng(seed).standard_normal(shape).astype(np.float32), name
    )


def branch(value, weight, out, name):
    """A branch that adds its own copy of the weight to a captured value."""
    own, result = TensorProto.FromString(weight.SerializeToString()), f"{out}_{name}"
    own.name = f"{weight.name}_{name}"
    adds = helper.make_node("Add", [value, own.name], [result])
    return helper.make_graph([adds], name, [], [info(result, FLOAT, None)], [own])


@st.composite
def graphs(draw):
    """A chain of additions and branches whose weights lie around the threshold."""
    nodes, initializers, value = [], [], "x"
    for index in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["initializer", "constant", "if", "shared"]))
        shape, out = draw(st.sampled_from([(16, 16), (1, 16)])), f"v{index}"
        weight = tensor(shape, f"w{index}", draw(st.integers(0, 9)))
        if kind == "if":
            branches = {f"{name}_branch": branch(value, weight, out, name) for name in ("then", "else")}
            nodes.append(helper.make_node("If", ["cond"], [out], **branches))
        else:
            if kind == "constant":
                nodes.append(helper.make_node("Constant", [], [weight.name], value=weight))
            else:
                initializers.append(weight)
            reads = initializers[0].name if kind == "shared" else weight.name
            name = draw(st.sampled_from(["", f"n{index}"]))
            nodes.append(helper.make_node("Add", [value, reads], [out], name=name))
        value = out
    outputs = [info(value, FLOAT, ["b", 16])]
    if draw(st.booleans()):
        outputs += [info(weight.name, FLOAT, None) for weight in initializers]
    cond = numpy_helper.from_array(np.bool_(True), "cond")
    graph = helper.make_graph(nodes, "g", [info("x", FLOAT, ["b", 16])], outputs, [cond, *initializers])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(made=graphs(), external=st.booleans())
def test_any_graph_survives(made, external, tmp_path, assert_same):
    source, target = tmp_path / "in.onnx", tmp_path / "out.onnx"
    source.write_bytes(made.SerializeToString())
    loaded = Model.load(source)
    loaded.save(target, external=external)
    first = target.read_bytes()
    assert_same(onnx.load(target), made)
    loaded.clone().save(target, external=external)
    assert target.read_bytes() == first
    Model.load(target).save(target)
    assert target.read_bytes() == first
