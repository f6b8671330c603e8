# SPDX-License-Identifier: Apache-2.0
"""After a removal everything that only it needed goes as well, and nothing else."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from onnxcollapse.model import Model
from onnxcollapse.model.edit import check, prune


def load(text):
    return Model(ir.from_proto(onnx.parser.parse_model(text)))


def test_dead_nodes_weights_functions_and_imports_go():
    model = load("""
        <ir_version: 8, opset_import: ["" : 17, "my" : 1, "unused" : 3, "com.microsoft" : 1]>
        g (float[n,4] x) => (float[n,4] y) <float[4] live = {1,2,3,4}, float[4] dead = {1,2,3,4}> {
            y = Add(x, live)
            a = my.Outer(x)
            b = com.microsoft.Gelu(a)
            c = Mul(b, dead)
        }
        <domain: "my", opset_import: ["" : 17, "my" : 1]> Outer (p) => (q) { q = my.Inner(p) }
        <domain: "my", opset_import: ["" : 17]> Inner (p) => (q) { dead = Abs(p)  q = Relu(p) }
        <domain: "my", opset_import: ["" : 17]> Never (p) => (q) { q = Relu(p) }
    """)
    assert prune(model) == 4  # a, b, c and the dead node in Inner
    assert [node.op_type for node in model.graph] == ["Add"]
    assert list(model.graph.initializers) == ["live"]
    assert model.ir.functions == {}
    assert model.ir.opset_imports == {"": 17}
    assert prune(model) == 0


def test_functions_that_functions_call_stay():
    model = load("""
        <ir_version: 8, opset_import: ["" : 17, "my" : 1]>
        g (float[n,4] x) => (float[n,4] y) { y = my.Outer(x) }
        <domain: "my", opset_import: ["" : 17, "my" : 1]> Outer (p) => (q) { q = my.Inner(p) }
        <domain: "my", opset_import: ["" : 17, "other" : 1]> Inner (p) => (q) { dead = Abs(p)  q = Relu(p) }
    """)
    assert prune(model) == 1
    assert [key[1] for key in model.ir.functions] == ["Outer", "Inner"]
    assert model.ir.functions["my", "Inner", ""].opset_imports == {"": 17}
    assert model.ir.opset_imports == {"": 17, "my": 1}


def test_inputs_and_their_defaults_stay():
    model = load("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n,4] x, float[4] unused, float[4] w = {1,2,3,4}) => (float[n,4] y) { y = Relu(x) }
    """)
    prune(model)
    assert [value.name for value in model.graph.inputs] == ["x", "unused", "w"]
    assert list(model.graph.initializers) == ["w"]


BRANCHES = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[n,4] x, bool cond) => (float[n,4] y) {
        used = Relu(x)
        captured = Abs(x)
        only_dead = Neg(x)
        p = If (cond) <
            then_branch = t () => (float[n,4] a) { a = Add(used, captured)  gone = Exp(only_dead) },
            else_branch = e () => (float[n,4] b) { b = Identity(used) }
        >
        q = If (cond) <
            then_branch = t2 () => (float[n,4] c) { c = Exp(captured) },
            else_branch = e2 () => (float[n,4] d) { d = Exp(only_dead) }
        >
        y = Identity(p)
    }
"""


def test_what_branches_capture_stays_and_dead_branches_let_go():
    model = load(BRANCHES)
    assert prune(model) == 5  # q with two nodes in it, gone, only_dead
    assert [node.outputs[0].name for node in model.graph] == ["used", "captured", "p", "y"]
    check(model, full=True)


def test_initializers_of_branches_go_too():
    model = load(BRANCHES)
    branch = model.graph[3].attributes["then_branch"].as_graph()
    tensor = ir.tensor(np.ones(4, np.float32), name="w")
    branch.initializers.add(
        ir.Value(name="w", const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
    )
    prune(model)
    assert not branch.initializers


def test_outputs_stay_wherever_they_come_from():
    model = load("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n,4] x) => (float[n,4] y, float[n,4] h, float[4] w, float[n,4] z) <float[4] w = {1,2,3,4}> {
            h = Relu(x)
            y = Neg(h)
            k, z = Split<axis=0, num_outputs=2>(x)
        }
    """)
    assert prune(model) == 0
    assert list(model.graph.initializers) == ["w"]


def test_optional_outputs_stay_as_they_are():
    model = load("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[n,4] x) => (float[n,4] y) { y, mask = Dropout(x) }
    """)
    prune(model)
    assert [value.name for value in model.graph[0].outputs] == ["y", "mask"]


def test_scales_that_annotations_name_stay_while_the_annotated_lives():
    nodes = [helper.make_node("Relu", ["x"], ["y"]), helper.make_node("Abs", ["x"], ["dead"])]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in ("x", "y")]
    weights = [numpy_helper.from_array(np.ones(1, np.float32), name) for name in ("s1", "s2", "s3", "w")]
    graph = helper.make_graph(nodes, "g", infos[:1], infos[1:], weights)
    for name, scale in (("y", "s1"), ("dead", "s2"), ("w", "s3")):
        annotation = graph.quantization_annotation.add(tensor_name=name)
        annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value=scale)
    model = Model(ir.from_proto(helper.make_model(graph)))
    prune(model)
    assert list(model.graph.initializers) == ["s1"]
    saved = onnx.ModelProto.FromString(model.to_bytes())
    assert [annotation.tensor_name for annotation in saved.graph.quantization_annotation] == ["y"]


def test_value_info_of_the_removed_goes():
    model = load(BRANCHES)
    saved = onnx.shape_inference.infer_shapes(onnx.ModelProto.FromString(model.to_bytes()))
    model = Model(ir.from_proto(saved))
    prune(model)
    names = {info.name for info in onnx.ModelProto.FromString(model.to_bytes()).graph.value_info}
    assert names == {"used", "captured", "p"}
