# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxcollapse.passes.tie_weights import TieWeights

from onnxcollapse import Model, optimize
from onnxcollapse.model import size
from tests.support import Net, file_bytes, mlp, outputs, rows


def run(model, **options):
    return optimize(model, passes=[TieWeights(**options)])


def details(result):
    return [entry.reason for entry in result.journal.of("kept")]


def test_equal_initializers_are_stored_once_and_outputs_stay():
    net, matrix = Net(), np.random.default_rng(0).normal(size=(8, 8))
    value = net.linear(net.linear("x", matrix), matrix)
    net.linear(value, matrix.copy(), name="y")
    model = net.model({"x": ["n", 8]}, {"y": ["n", 8]})
    result = run(model)
    assert (result.before.params, result.after.params) == (192, 64)
    x = rows(5, 8)
    np.testing.assert_array_equal(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"])
    assert "2 copies" in details(result)[0]


def test_one_different_bit_keeps_them_apart(tmp_path):
    net, matrix = Net(), np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    other = matrix.copy()
    other[-1, -1] = np.nextafter(other[-1, -1], np.float32(9))
    net.linear(net.linear("x", matrix), other, name="y")
    model = net.model({"x": ["n", 8]}, {"y": ["n", 8]})
    result = run(model)
    assert not details(result)
    assert file_bytes(result.model, tmp_path) == file_bytes(model, tmp_path)


def test_equal_bytes_of_another_shape_or_type_stay_apart():
    net = Net()
    a, b = net.const(np.zeros(4)), net.const(np.zeros((1, 4)))
    net.op("Add", net.op("Add", "x", a), b, name="y")
    assert not details(run(net.model({"x": ["n", 4]}, {"y": ["n", 4]})))


def embedding(spelling: str) -> Model:
    """An embedding and a head that is its transpose, as exports of tied models have them."""
    net, table = Net(), np.random.default_rng(0).normal(size=(200, 16)).astype(np.float32)
    rows_read = net.op("Gather", net.const(table, "table"), net.const([3, 7, 11], dtype=np.int64))
    hidden = net.op("MatMul", "x", net.const(np.eye(16)))
    hidden = net.op("Add", hidden, net.op("ReduceSum", rows_read, net.const([0], dtype=np.int64), keepdims=0))
    head = net.const(np.ascontiguousarray(table.T), "head")
    net.op(spelling, hidden, head, name="y")
    return net.model({"x": ["n", 16]}, {"y": ["n", 200]})


@pytest.mark.parametrize("spelling, added", [("MatMul", ["Transpose"]), ("Gemm", [])])
def test_a_transposed_copy_goes(spelling, added):
    model = embedding(spelling)
    result = run(model)
    assert result.before.bytes - result.after.bytes == 200 * 16 * 4
    before, after = ([node.op_type for node in m.graph] for m in (model, result.model))
    assert sorted(after) == sorted(before + added)
    x = rows(5, 16)
    np.testing.assert_array_equal(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"])


def test_transposed_copies_stay_when_asked_or_small():
    assert not details(run(embedding("MatMul"), transposed=False))
    assert not details(run(embedding("MatMul"), min_bytes=1 << 20))


def test_a_symmetric_matrix_is_no_copy_of_itself():
    net = Net()
    net.linear("x", np.eye(64), name="y")
    assert not details(run(net.model({"x": ["n", 64]}, {"y": ["n", 64]})))


def test_overridable_inputs_and_outputs_are_left_alone():
    text = """<ir_version: 8, opset_import: ["": 17]>
    net (float[2] x, float[2] a) => (float[2] y, float[2] b)
    <float[2] a = {1, 2}, float[2] b = {1, 2}, float[2] c = {1, 2}> { s = Add(x, a) t = Add(s, b) y = Add(t, c) }"""
    model = Model(ir.from_onnx_text(text))
    result = run(model)
    assert {"a", "b", "c"} <= set(result.model.graph.initializers)
    assert result.model.signature() == model.signature()


def test_copies_behind_constant_nodes_and_in_branches_go():
    text = """<ir_version: 8, opset_import: ["": 17]>
    net (float[2] x, bool p) => (float[2] y)
    <float[2] w = {1.5, 2}>
    {
        k = Constant <value = float[2] {1.5, 2}> ()
        s = Mul(x, k)
        t = If (p) <
            then_branch = yes () => (float[2] u) <float[2] v = {1.5, 2}> { u = Add(s, v) },
            else_branch = no () => (float[2] u2) { u2 = Identity(s) }
        >
        y = Mul(t, w)
    }"""
    proto = onnx.parser.parse_model(text)
    model = Model(ir.from_proto(proto))
    result = run(model)
    assert result.after.bytes == 8
    for p in (True, False):
        feeds = {"x": np.array([3, 4], np.float32), "p": np.array(p)}
        np.testing.assert_array_equal(outputs(result.model, **feeds)["y"], outputs(model, **feeds)["y"])


def test_tying_twice_finds_nothing_more():
    once = run(embedding("MatMul")).model
    assert not details(run(once))


def test_sharing_through_identity_is_no_copy():
    net = Net()
    w = net.const(np.random.default_rng(0).normal(size=(8, 8)))
    net.op("MatMul", net.op("MatMul", "x", w), net.op("Identity", w), name="y")
    model = net.model({"x": ["n", 8]}, {"y": ["n", 8]})
    assert size(model).params == 64
    assert not details(run(model))


def test_off_means_byte_identical(tmp_path):
    model = mlp([4, 8, 4])
    assert file_bytes(optimize(model, passes=[]).model, tmp_path) == file_bytes(model, tmp_path)


@pytest.mark.parametrize("turned", [False, True])
def test_copies_in_both_branches_go_where_both_can_read_them(turned):
    matrix = np.random.default_rng(0).normal(size=(40, 40)).astype(np.float32)
    weights = {"yes": matrix, "no": np.ascontiguousarray(matrix.T) if turned else matrix}

    def branch(name):
        made = onnx.helper.make_node("MatMul", ["x", f"{name}_weight"], [f"{name}_out"])
        output = onnx.helper.make_tensor_value_info(f"{name}_out", onnx.TensorProto.FLOAT, ["n", 40])
        held = onnx.numpy_helper.from_array(weights[name], f"{name}_weight")
        return onnx.helper.make_graph([made], name, [], [output], [held])

    net = Net()
    net.op("If", "p", name="y", then_branch=branch("yes"), else_branch=branch("no"))
    flag = onnx.helper.make_tensor_value_info("p", onnx.TensorProto.BOOL, [])
    x, y = (onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 40]) for name in "xy")
    graph = onnx.helper.make_graph(net.nodes, "net", [x, flag], [y])
    opsets = [onnx.helper.make_opsetid("", 17)]
    model = Model(ir.from_proto(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8)))
    result = run(model)
    assert (result.before.bytes, result.after.bytes) == (2 * 6400, 6400)
    onnx.checker.check_model(onnx.load_from_string(result.model.to_bytes()), full_check=True)
    for p in (True, False):
        feeds = {"x": rows(3, 40), "p": np.array(p)}
        np.testing.assert_array_equal(outputs(result.model, **feeds)["y"], outputs(model, **feeds)["y"])


def test_a_constant_node_behind_its_copys_user_serves_it_all_the_same():
    net, matrix = Net(), np.random.default_rng(0).normal(size=(48, 64)).astype(np.float32)
    first = net.op("MatMul", "x", net.const(np.ascontiguousarray(matrix.T), "early"))
    other = net.op("MatMul", first, net.const(np.random.default_rng(1).normal(size=(48, 64))))
    late = net.op("Constant", value=onnx.numpy_helper.from_array(matrix))
    again = net.op("MatMul", net.op("MatMul", other, "early"), late)
    net.op("Relu", again, name="y")
    model = net.model({"x": ["n", 64]}, {"y": ["n", 64]})
    result = run(model)
    assert result.before.bytes - result.after.bytes == matrix.nbytes
    x = rows(3, 64)
    np.testing.assert_allclose(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"], rtol=1e-6)
