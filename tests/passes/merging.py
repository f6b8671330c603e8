# SPDX-License-Identifier: Apache-2.0
"""Two graphs of a decoder in the branches of one If, as optimum merges them."""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx import TensorProto, checker, helper

from onnxcollapse import Model


def merged(without: Model, cached: Model, *, hands_on: bool = False) -> Model:
    """The first where use_cache_branch is False, the second where it is True; weights lie outside, once.

    The graphs keep their own names for tensors, and branches call their outputs as the If does.

    Args:
        without: Gives caches and takes none.
        cached: Takes caches.
        hands_on: Whether the second gives the encoder's caches as it gets them, rather than empty ones.
    """
    parts = [onnx.load_from_string(model.to_bytes()) for model in (without, cached)]
    _other_outputs(*parts, hands_on)
    shared, weights = dict[tuple, str](), list[onnx.TensorProto]()
    branches = []
    for part, name in zip(parts, ("no_past", "with_past"), strict=True):
        inner = []
        names: dict[str, str] = {}
        for tensor in part.graph.initializer:
            integers = len(tensor.dims) == 1 and tensor.data_type in (TensorProto.INT32, TensorProto.INT64)
            if not tensor.dims or integers:
                inner.append(tensor)
                continue
            key = tensor.data_type, tuple(tensor.dims), tensor.raw_data
            if key not in shared:
                shared[key] = f"{tensor.name}_merged_{len(shared)}"
                new = onnx.TensorProto.FromString(tensor.SerializeToString())
                new.name = shared[key]
                weights.append(new)
            names[tensor.name] = shared[key]
        for node in part.graph.node:
            for place, read in enumerate(node.input):
                node.input[place] = names.get(read, read)
        branches.append(helper.make_graph(part.graph.node, name, [], part.graph.output, inner))
    inputs = {value.name: value for part in parts for value in part.graph.input}
    flag = helper.make_tensor_value_info("use_cache_branch", TensorProto.BOOL, [1])
    choice = helper.make_node(
        "If",
        ["use_cache_branch"],
        [value.name for value in parts[0].graph.output],
        name="optimum::if",
        then_branch=branches[1],
        else_branch=branches[0],
    )
    graph = helper.make_graph([choice], "merged", [*inputs.values(), flag], parts[0].graph.output, weights)
    proto = helper.make_model(graph, opset_imports=parts[0].opset_import, ir_version=9)
    checker.check_model(proto)
    return Model(ir.from_proto(proto))


def _other_outputs(without: onnx.ModelProto, cached: onnx.ModelProto, hands_on: bool) -> None:
    """Lets the second graph give what only the first one computes, in the order of the first."""
    known = {value.name: value for value in cached.graph.output}
    for value in without.graph.output:
        if value.name not in known:
            shape = [0 if dim.dim_param else dim.dim_value for dim in value.type.tensor_type.shape.dim]
            shape[2] = 1
            empty = helper.make_tensor("empty", TensorProto.FLOAT, shape, [])
            past = value.name.replace("present", "past_key_values")
            cached.graph.node.append(
                helper.make_node("Identity", [past], [value.name])
                if hands_on
                else helper.make_node("Constant", [], [value.name], value=empty)
            )
            known[value.name] = value
    order = [known[value.name] for value in without.graph.output]
    del cached.graph.output[:]
    cached.graph.output.extend(order)
