# SPDX-License-Identifier: Apache-2.0
"""The invariants are checked, and what breaks one is named."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from onnxcollapse.errors import ModelError
from onnxcollapse.model import Model
from onnxcollapse.model.edit import add_initializer, check

TEXT = """
    <ir_version: 8, opset_import: ["" : 17, "my" : 1]>
    g (float[n,4] x, bool cond) => (float[n,4] y) <float[4] w = {1,2,3,4}> {
        h = Add(x, w)
        p = If (cond) <
            then_branch = t () => (float[n,4] a) { a = Neg(h) },
            else_branch = e () => (float[n,4] b) { b = my.F(h) }
        >
        y = Relu(p)
    }
    <domain: "my", opset_import: ["" : 17]> F (q) => (r) { r = Exp(q) }
"""


@pytest.fixture
def model():
    made = Model(ir.from_proto(onnx.parser.parse_model(TEXT)))
    check(made)
    check(made, full=True)
    return made


def broken(model, *words):
    with pytest.raises(ModelError) as caught:
        check(model)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_two_tensors_of_one_name(model):
    model.graph[0].outputs[0].name = "x"
    broken(model, "two tensors are called 'x'")


def test_an_initializer_of_a_taken_name(model):
    add_initializer(model.graph, "v", np.ones(4), ir.DataType.FLOAT).name = "h"
    broken(model, "two tensors are called 'h'")


def test_a_name_that_hides_what_a_branch_captures(model):
    branch = model.graph[1].attributes["then_branch"].as_graph()
    first = ir.Node("", "Abs", [model.graph.inputs[0]])
    first.outputs[0].name = "h"
    branch.insert_before(branch[0], first)
    broken(model, "'h'", "another tensor of that name hides it")


def test_a_cycle(model):
    add, branch, _ = model.graph
    add.replace_input_with(1, branch.outputs[0])
    broken(model, "'p'", "out of order or form a cycle")


def test_a_use_before_the_tensor_is_made(model):
    first, last = model.graph[0], model.graph[2]
    model.graph.remove(first)
    model.graph.insert_after(last, first)
    broken(model, "'h'", "before it is made")


def test_a_value_that_nothing_makes(model):
    model.graph[0].replace_input_with(1, ir.Value(name="lost"))
    broken(model, "'lost'", "nothing makes")


def test_an_output_that_nothing_makes(model):
    model.graph.outputs[0] = ir.Value(name="lost", type=ir.TensorType(ir.DataType.FLOAT))
    broken(model, "output 'lost'", "not made in that graph")


def test_a_removed_node_whose_output_is_used(model):
    model.graph.remove(model.graph[0])
    broken(model, "'h'")


def test_a_stale_shape_or_type_of_an_initializer(model):
    w = model.graph.initializers["w"]
    w.shape = ir.Shape([5])
    broken(model, "'w' is declared [5] but holds [4]")
    w.shape = ir.Shape(["any"])
    check(model)
    w.type = ir.TensorType(ir.DataType.FLOAT16)
    broken(model, "'w' is declared FLOAT16 but holds FLOAT")
    w.type = None
    w.const_value = None
    broken(model, "'w' has no tensor")


def test_an_operator_of_a_domain_that_is_not_imported(model):
    del model.ir.opset_imports["my"]
    broken(model, "'my'", "not imported")


def test_inside_functions(model):
    function = model.ir.functions["my", "F", ""]
    function.graph[0].domain = "other"
    broken(model, "'other'")
    function.graph[0].domain = ""
    function.graph[0].replace_input_with(0, model.graph.inputs[0])
    broken(model, "'x'")


def test_an_input_without_a_type(model):
    model.graph.inputs[0].type = None
    broken(model, "'x' has no type")


def test_an_input_twice(model):
    model.graph.inputs.append(model.graph.inputs[0])
    broken(model, "share a name")


def test_the_full_check_knows_the_operators(model):
    model.graph[0].op_type = "Added"
    check(model)
    with pytest.raises(ModelError, match="Added"):
        check(model, full=True)


def test_the_full_check_reads_no_weights(mlp, written):
    model = Model.load(written(mlp))
    for value in model.graph.initializers.values():
        value.const_value.source.read = None
    check(model, full=True)
