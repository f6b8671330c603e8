# SPDX-License-Identifier: Apache-2.0
"""What a graph keeps on its way through onnx-graphsurgeon: everything that the script did not change."""

from __future__ import annotations

import difflib
from collections.abc import Callable

import ml_dtypes
import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest
from google.protobuf import text_format
from onnx import numpy_helper

from onnxcollapse import Model
from onnxcollapse.errors import ModelError
from onnxcollapse.interop.passage import Passage
from onnxcollapse.model import skeleton
from onnxcollapse.model.source import FileTensor
from tests.interop.everything import everything


@pytest.fixture(params=["inside", "external"])
def model(request, tmp_path) -> Model:
    proto = everything()
    onnx.checker.check_model(proto)
    options = {}
    if request.param == "external":
        options = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 1024}
    onnx.save(proto, tmp_path / "model.onnx", **options)
    return Model.load(tmp_path / "model.onnx")


def cross(model: Model, edit: Callable[[gs.Graph], gs.Graph | None] = lambda _: None) -> ir.Model:
    passage = Passage(model.ir)
    edited = edit(passage.graph)
    return passage.back(passage.graph if edited is None else edited)


def whole(model: ir.Model) -> onnx.ModelProto:
    return skeleton.encode(model, lambda tensor: tensor)


def assert_equal(got: onnx.ModelProto, want: onnx.ModelProto) -> None:
    if got != want:
        texts = [text_format.MessageToString(proto).splitlines() for proto in (want, got)]
        pytest.fail("\n".join(list(difflib.unified_diff(*texts, "wanted", "got", lineterm=""))[:60]))


def find(graph, name: str):
    """The node that makes a tensor."""
    return next(node for node in graph.nodes if node.outputs[0].name == name)


def find_proto(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    return next(node for node in graph.node if node.output[0] == name)


def set_weight(graph: onnx.GraphProto, name: str, array: np.ndarray) -> None:
    old = next(item for item in graph.initializer if item.name == name)
    made = numpy_helper.from_array(array, name)
    if old.doc_string:
        made.doc_string = old.doc_string
    made.metadata_props.extend(old.metadata_props)
    old.CopyFrom(made)


def test_graphsurgeon_alone_would_lose_much_of_this_model():
    """Or else the tests below would say nothing."""
    proto = everything()
    for graph in (proto.graph,):
        find_proto(graph, "custom").ClearField("attribute")  # alone it crashes on some of these
        del graph.output[-1]  # and on optional types
    made = gs.export_onnx(gs.import_onnx(proto))
    text = text_format.MessageToString(made)
    assert "stack_trace" not in text
    assert "doc of node" not in text
    assert "overload" not in text
    assert "denotation" not in text
    assert "SCALE_TENSOR" not in text
    assert [info.name for info in made.graph.input] == ["x", "flag", "place"]
    assert "nobody_reads" not in text
    inner = find_proto(made.graph, "if").attribute[1].g
    assert "w_big" in [item.name for item in inner.initializer] or "by_default" in text


def test_nothing_is_lost_when_the_script_does_nothing(model):
    assert_equal(whole(cross(model)), whole(model.ir))


def test_nothing_is_lost_when_the_script_reads_every_weight(model):
    def edit(graph):
        for item in [graph, *graph.functions]:
            for constant in item.tensors().values():
                if isinstance(constant, gs.Constant):
                    assert constant.values is constant.values

    made = cross(model, edit)
    assert_equal(whole(made), whole(model.ir))
    held = made.graph.initializers["w_big"].const_value
    assert isinstance(held, FileTensor), "an unchanged weight must stay where it is mapped from"


def test_nothing_is_lost_when_the_script_sorts_and_returns_a_copy(model):
    made = cross(model, lambda graph: graph.copy().toposort(mode="nodes"))
    got, want = whole(made), whole(model.ir)
    for graph in (got.graph, want.graph):
        nodes = sorted(graph.node, key=lambda node: node.output[0])
        weights = sorted(graph.initializer, key=lambda tensor: tensor.name)
        infos = sorted(graph.value_info, key=lambda info: info.name)
        for field, items in (("node", nodes), ("initializer", weights), ("value_info", infos)):
            graph.ClearField(field)
            getattr(graph, field).extend(items)
    assert_equal(got, want)


def attribute_of_a_node(graph):
    find(graph, "custom").attrs["number"] = 4


def want_attribute_of_a_node(graph):
    next(item for item in find_proto(graph, "custom").attribute if item.name == "number").i = 4


def operator_of_a_node(graph):
    node = find(graph, "product")
    node.op, node.attrs = "Gemm", {"alpha": 2.0}


def want_operator_of_a_node(graph):
    node = find_proto(graph, "product")
    node.op_type = "Gemm"
    node.attribute.add(name="alpha", type=onnx.AttributeProto.FLOAT, f=2.0)


def operator_with_odd_attributes(graph):
    node = find(graph, "custom")
    node.op, node.attrs = "Relu", {}
    node.domain = None


def want_operator_with_odd_attributes(graph):
    node = find_proto(graph, "custom")
    node.op_type = "Relu"
    for field in ("attribute", "domain"):
        node.ClearField(field)


def a_call_of_an_overload(graph):
    find(graph, "act").op = "Gelu"
    find(graph, "act").domain = ""


def want_a_call_of_an_overload(graph):
    node = find_proto(graph, "act")
    node.op_type = "Gelu"
    for field in ("overload", "domain"):
        node.ClearField(field)


def a_constant_that_a_branch_reads_too(graph):
    find(graph, "if").attrs["else_branch"].nodes[0].inputs[1] = graph.tensors()["w_small"]


def want_a_constant_that_a_branch_reads_too(graph):
    branch = next(a.g for a in find_proto(graph, "if").attribute if a.name == "else_branch")
    branch.node[0].input[1] = "w_small"


def a_new_node(graph):
    product, total = graph.tensors()["product"], find(graph, "sum")
    made = gs.Variable("made", np.float32, ["n", 32])
    total.inputs[0] = made
    graph.nodes.insert(3, gs.Node("Relu", "made_node", inputs=[product], outputs=[made]))


def want_a_new_node(graph):
    find_proto(graph, "sum").input[0] = "made"
    nodes = list(graph.node)
    nodes.insert(3, onnx.helper.make_node("Relu", ["product"], ["made"], "made_node"))
    graph.ClearField("node")
    graph.node.extend(nodes)
    infos = list(graph.value_info)
    infos.insert(1, onnx.helper.make_tensor_value_info("made", onnx.TensorProto.FLOAT, ["n", 32]))
    graph.ClearField("value_info")
    graph.value_info.extend(infos)


def a_node_less(graph):
    graph.outputs = [tensor for tensor in graph.outputs if tensor.name != "optional"]
    graph.nodes.remove(find(graph, "optional"))


def want_a_node_less(graph):
    graph.node.remove(find_proto(graph, "optional"))
    graph.output.remove(next(info for info in graph.output if info.name == "optional"))


def a_node_of_a_subgraph(graph):
    inner = find(graph, "if").attrs["then_branch"].nodes[1].attrs["then_branch"]
    inner.nodes[1].op = "Abs"


def want_a_node_of_a_subgraph(graph):
    then = next(a.g for a in find_proto(graph, "if").attribute if a.name == "then_branch")
    inner = next(a.g for a in then.node[1].attribute if a.name == "then_branch")
    inner.node[1].op_type = "Abs"


def a_fixed_dimension(graph):
    graph.inputs[0].shape = [4, 32]


def want_a_fixed_dimension(graph):
    shape = graph.input[0].type.tensor_type.shape
    shape.ClearField("dim")
    shape.dim.add(dim_value=4)
    shape.dim.add(dim_value=32)


def the_name_of_an_output(graph):
    find(graph, "y").outputs[0].name = "renamed"


def want_the_name_of_an_output(graph):
    find_proto(graph, "y").output[0] = "renamed"
    old = next(info for info in graph.output if info.name == "y")
    old.CopyFrom(onnx.helper.make_tensor_value_info("renamed", onnx.TensorProto.FLOAT, ["n", None]))


EDITS = {
    edit.__name__: (edit, want)
    for edit, want in (
        (attribute_of_a_node, want_attribute_of_a_node),
        (operator_of_a_node, want_operator_of_a_node),
        (operator_with_odd_attributes, want_operator_with_odd_attributes),
        (a_call_of_an_overload, want_a_call_of_an_overload),
        (a_constant_that_a_branch_reads_too, want_a_constant_that_a_branch_reads_too),
        (a_new_node, want_a_new_node),
        (a_node_less, want_a_node_less),
        (a_node_of_a_subgraph, want_a_node_of_a_subgraph),
        (a_fixed_dimension, want_a_fixed_dimension),
        (the_name_of_an_output, want_the_name_of_an_output),
    )
}


@pytest.mark.parametrize("name", EDITS)
def test_only_what_the_script_changes_changes(model, name):
    edit, expect = EDITS[name]
    want = whole(model.ir)
    expect(want.graph)
    assert_equal(whole(cross(model, edit)), want)


@pytest.mark.parametrize(
    "name, shape, dtype",
    [
        ("w_big", (32, 32), np.float32),
        ("w_small", (32,), np.float32),
        ("four_bits", (64, 64), ml_dtypes.int4),
        ("four_bits_small", (3, 5), ml_dtypes.int4),
        ("brain", (32, 32), ml_dtypes.bfloat16),
        ("brain_small", (5,), ml_dtypes.bfloat16),
        ("eight_bits", (32, 32), ml_dtypes.float8_e4m3fnuz),
        ("by_default", (32,), np.float32),
        ("big_default", (32, 32), np.float32),
        ("typed", (2, 16), np.float32),
    ],
)
@pytest.mark.parametrize("way", ["in place", "anew"])
def test_a_weight_that_the_script_reads_and_replaces(model, name, shape, dtype, way):
    stored = {item.name: numpy_helper.to_array(item) for item in everything().graph.initializer}[name]

    def edit(graph):
        constant = graph.tensors()[name]
        assert (constant.shape, constant.values.dtype) == (
            list(shape),
            dtype,
        ) or constant.values.shape == shape
        np.testing.assert_array_equal(constant.values, stored)
        if way == "in place":
            constant.values[..., 0] = 1
        else:
            changed = constant.values.copy()
            changed[..., 0] = 1
            constant.values = changed

    changed = stored.copy()
    changed[..., 0] = 1
    before, want = whole(model.ir), whole(model.ir)
    set_weight(want.graph, name, changed)
    assert_equal(whole(cross(model, edit)), want)
    assert_equal(whole(model.ir), before)


def test_strings_can_be_changed(model):
    def edit(graph):
        graph.tensors()["texts"].values = np.array(["three", "four"], object)

    made = cross(model, edit)
    assert made.graph.initializers["texts"].const_value.string_data() == [b"three", b"four"]


def test_constants_fold_although_the_weights_did_not_cross():
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["": 21]> net (float[n,64] x) => (float[n,64] y) '
        "{ t = Transpose<perm = [1, 0]>(w) z = MatMul(x, t) y = Identity(z) }"
    )
    weight = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    made = cross(Model(ir.from_proto(proto)), lambda graph: graph.fold_constants().cleanup())
    assert [node.op_type for node in made.graph] == ["MatMul", "Identity"]
    [folded] = made.graph.initializers.values()
    np.testing.assert_array_equal(folded.const_value.numpy(), weight.T)


def test_an_input_with_a_default_stays_one_when_the_script_uses_it_no_more(model):
    def edit(graph):
        find(graph, "sum").inputs[1] = graph.tensors()["w_small"]
        otherwise = find(graph, "if").attrs["else_branch"]
        otherwise.nodes[0].inputs[1] = graph.tensors()["w_small"]

    made = Model(cross(model, edit))
    assert made.signature() == model.signature()
    assert "by_default" in made.graph.initializers


def test_a_default_that_becomes_computed_is_no_input_any_more(model):
    def edit(graph):
        made = gs.Variable("by_default", np.float32, [32])
        graph.nodes.append(gs.Node("Neg", inputs=[graph.tensors()["w_small"]], outputs=[made]))
        find(graph, "sum").inputs[1] = made
        find(graph, "if").attrs["else_branch"].nodes[0].inputs[1] = made

    made = Model(cross(model, edit))
    assert [spec.name for spec in made.signature().overridable] == ["big_default"]
    assert next(node for node in made.graph if node.op_type == "Neg").outputs[0].name == "by_default"


def test_functions_with_overloads_are_kept_together(model):
    def change(graph):
        graph.functions[1].nodes[0].op = "Tanh"

    want = whole(model.ir)
    want.functions[1].node[0].op_type = "Tanh"
    assert_equal(whole(cross(model, change)), want)

    def drop(graph):
        graph.functions = graph.functions[:1]

    with pytest.raises(ValueError, match=r"function local\.Act has overloads"):
        cross(model, drop)


def test_nodes_out_of_order_are_sorted(model):
    def edit(graph):
        graph.nodes.reverse()

    names = [node.outputs[0].name for node in cross(model, edit).graph]
    assert names.index("product") < names.index("sum") < names.index("y")


def cycle(graph):
    product, total = find(graph, "product"), find(graph, "sum")
    product.inputs[0] = total.outputs[0]


def missing_producer(graph):
    find(graph, "sum").inputs[0] = gs.Variable("nobody_makes_this", np.float32, ["n", 32])


def missing_output(graph):
    graph.outputs.append(gs.Variable("nobody_makes_this", np.float32, ["n", 32]))


def two_of_a_name(graph):
    made = gs.Variable("sum", np.float32, ["n", 32])
    graph.nodes.append(gs.Node("Relu", inputs=[graph.inputs[0]], outputs=[made]))


@pytest.mark.parametrize(
    "edit, message",
    [
        (cycle, "cycle"),
        (missing_producer, "'nobody_makes_this', which nothing makes"),
        (missing_output, "nobody_makes_this"),
        (two_of_a_name, "'sum'"),
    ],
)
def test_broken_graphs_are_named(model, edit, message):
    before = whole(model.ir)
    with pytest.raises(ModelError, match=message):
        cross(model, edit)
    assert_equal(whole(model.ir), before)
