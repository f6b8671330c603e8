# SPDX-License-Identifier: Apache-2.0
"""One hidden layer found by its name is the one that a search of the whole graph finds."""

from __future__ import annotations

import pytest

from onnxcollapse.model import edit
from onnxcollapse.structure import Convolution, Linear, hidden_layer_at, hidden_layers, linears, operator_of
from tests.structure.hidden_nets import NETS, Builder, conv_pool, plain
from tests.support import Net, mlp, residual

MODELS = {name: entry[0] for name, entry in NETS.items()} | {
    "chain": lambda: mlp([4, 6, 7, 5]),
    "residual": residual,
}


@pytest.mark.parametrize("case", MODELS)
def test_every_layer_is_found_by_its_name(case):
    model = MODELS[case]()
    found, _ = hidden_layers(model.graph)
    assert found
    for layer in found:
        alone = hidden_layer_at(model.graph, layer.name)
        assert alone.output is layer.output
        assert alone.nodes == layer.nodes
        assert alone.region == layer.region
        assert [source.output for source in alone.sources] == [source.output for source in layer.sources]
        assert (alone.width, alone.group, alone.params) == (layer.width, layer.group, layer.params)
        assert (alone.hidden, alone.flat) == (layer.hidden, layer.flat)
        assert (alone.block is None) == (layer.block is None)


@pytest.mark.parametrize("case", MODELS)
def test_no_other_name_gives_a_layer(case):
    model = MODELS[case]()
    names = {layer.name for layer in hidden_layers(model.graph)[0]}
    others = [v.name for node in model.graph for v in node.outputs if v.name not in names]
    others += [v.name for v in model.graph.inputs] + list(model.graph.initializers) + ["nothing", ""]
    assert [name for name in others if hidden_layer_at(model.graph, name) is not None] == []


def test_a_refused_layer_is_not_found():
    net = Net()
    hidden = net.op("Relu", net.dense("x", 8, 40), name="hidden")
    net.dense(hidden, 40, 5, name="y")
    net.op("Neg", hidden, name="spy")
    model = net.model({"x": ["n", 8]}, {"y": ["n", 5], "spy": ["n", 40]})
    assert hidden_layers(model.graph)[0] == []
    assert hidden_layer_at(model.graph, "y") is None


@pytest.mark.parametrize("spelling", ["gemm", "matmul"])
def test_operators_are_found_by_what_they_yield_bias_included(spelling):
    model = plain(spelling)
    for linear in linears(model.graph):
        found = operator_of(model.graph, linear.name)
        assert isinstance(found, Linear)
        assert (found.output, found.weight, found.bias) == (linear.output, linear.weight, linear.bias)
    product = next((node for node in model.graph if node.op_type == "MatMul"), None)
    if product is not None:
        assert operator_of(model.graph, product.outputs[0].name) is None, "the bias is part of the Linear"


def test_convolutions_are_operators_and_what_is_elementwise_is_none():
    model = conv_pool()
    assert isinstance(operator_of(model.graph, "y"), Convolution)
    for node in model.graph:
        if node.op_type in ("Relu", "MaxPool", "BatchNormalization"):
            assert operator_of(model.graph, node.outputs[0].name) is None
    assert operator_of(model.graph, "x") is None
    assert operator_of(model.graph, "nothing") is None


def test_it_reads_the_graph_as_it_is_now():
    net = Builder()
    net.dense(net.op("Relu", net.dense("x", 4, 6)), 6, 5, name="y")
    model = net.model({"x": ["n", 4]}, {"y": ["n", 5]})
    assert hidden_layer_at(model.graph, "y").activation == "Relu"
    relu = next(node for node in model.graph if node.op_type == "Relu")
    edit.replace_value(model.graph, relu.outputs[0], relu.inputs[0])
    edit.prune(model)
    assert hidden_layer_at(model.graph, "y") is None  # two Linears with nothing between
