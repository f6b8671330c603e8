# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from onnxcollapse.passes.fold_affine import FoldAffine

from onnxcollapse import optimize
from tests.support import Net, data_for, file_bytes, mlp, outputs, relative, rows


def fold(model):
    return optimize(model, passes=[FoldAffine()])


def ops(model):
    return [node.op_type for node in model.graph]


def reasons(result):
    return [entry.reason for entry in result.journal.of("declined")]


def same(model, result, x, tolerance=1e-6):
    return relative(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"]) < tolerance


def bn(net, x, channels):
    parts = (net.random.uniform(0.5, 2, channels), net.random.normal(size=channels),
             net.random.normal(size=channels), net.random.uniform(0.5, 2, channels))  # fmt: skip
    return net.op("BatchNormalization", x, *(net.const(part) for part in parts), name="y", epsilon=1e-3)


@pytest.mark.parametrize("spelling", ["gemm", "matmul"])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_normalization_after_a_linear(spelling, bias):
    net = Net()
    net_out = net.linear(
        "x", net.random.normal(size=(6, 9)), net.random.normal(size=9) if bias else None, spelling=spelling
    )
    bn(net, net_out, 9)
    model = net.model({"x": ["n", 6]}, {"y": ["n", 9]})
    result = fold(model)
    assert "BatchNormalization" not in ops(result.model)
    assert result.after.params == 6 * 9 + 9
    assert same(model, result, rows(20, 6))


@pytest.mark.parametrize("group", [1, 2])
def test_batch_normalization_after_a_conv_of_any_kernel(group):
    net = Net()
    weight = net.random.normal(size=(8, 4 // group, 3, 3))
    bn(net, net.op("Conv", "x", net.const(weight), pads=[1, 1, 1, 1], strides=[2, 2], group=group), 8)
    model = net.model({"x": ["n", 4, 9, 9]}, {"y": ["n", 8, 5, 5]})
    result = fold(model)
    assert ops(result.model) == ["Conv"]
    x = np.random.default_rng(0).normal(size=(3, 4, 9, 9)).astype(np.float32)
    assert same(model, result, x)


def test_an_operator_before_all_its_linears():
    net = Net()
    shared = net.op("Mul", "x", net.const(net.random.normal(size=6)))
    net.op("Add", net.dense(shared, 6, 5), net.dense(shared, 6, 5), name="y")
    model = net.model({"x": ["n", 4, 6]}, {"y": ["n", 4, 5]})
    result = fold(model)
    assert sorted(ops(result.model)) == ["Add", "Add", "Add", "MatMul", "MatMul"]
    assert same(model, result, rows(80, 6).reshape(20, 4, 6))


def test_expressions_that_runtimes_fuse_stay_whole():
    net = Net()
    hidden = net.dense("x", 6, 40)
    erf = net.op("Add", net.op("Erf", net.op("Div", hidden, net.const(2**0.5))), net.const(1.0))
    gelu = net.op("Mul", net.op("Mul", hidden, erf), net.const(0.5))
    net.dense(gelu, 40, 5, name="y")
    model = net.model({"x": ["n", 6]}, {"y": ["n", 5]})
    assert ops(fold(model).model) == ops(model)


def test_an_operator_that_others_read_too_stays():
    net = Net()
    scaled = net.op("Mul", "x", net.const(net.random.normal(size=6)))
    net.op("Add", net.dense(scaled, 6, 6), scaled, name="y")
    model = net.model({"x": ["n", 6]}, {"y": ["n", 6]})
    assert "Mul" in ops(fold(model).model)


def test_chains_fold_where_the_product_is_smaller_only():
    net = Net()
    net.dense(net.dense("x", 6, 40), 40, 5, name="y")
    model = net.model({"x": ["n", 6]}, {"y": ["n", 5]})
    result = fold(model)
    assert result.after.params == 6 * 5 + 5
    assert same(model, result, rows(20, 6))
    net = Net()
    net.dense(net.dense("x", 40, 4), 4, 40, name="y")
    result = fold(net.model({"x": ["n", 40]}, {"y": ["n", 40]}))
    assert result.after == result.before
    assert any("does not pay" in reason for reason in reasons(result))


@pytest.mark.parametrize("kind, slope", [("PRelu", [1.0]), ("PRelu", np.ones(40)), ("LeakyRelu", None)])
def test_an_activation_with_slope_one_is_none(kind, slope):
    net = Net()
    hidden = net.dense("x", 6, 40)
    extra = [] if slope is None else [net.const(slope)]
    attributes = {"alpha": 1.0} if slope is None else {}
    net.dense(net.op(kind, hidden, *extra, **attributes), 40, 5, name="y")
    model = net.model({"x": ["n", 6]}, {"y": ["n", 5]})
    result = fold(model)
    assert result.after.params == 6 * 5 + 5
    assert same(model, result, rows(20, 6))


def test_nearly_one_is_not_one():
    model = mlp([6, 40, 5], "PRelu", slopes=[[1.0 + 1e-6]])
    assert "PRelu" in ops(fold(model).model)


def test_a_constant_that_mixes_rows_or_widens_stays():
    for constant, shape in ((np.ones((3, 6)) * 2, [3, 6]), (np.ones((1, 1, 6)) * 2, [1, "n", 6])):
        net = Net()
        net.op("Mul", net.dense("x", 6, 6), net.const(constant), name="y")
        model = net.model({"x": [shape[-2], 6]}, {"y": shape})
        assert ops(fold(model).model) == ops(model)


def test_an_operator_of_ones_that_widens_stays():
    net = Net()
    net.op("Relu", net.op("Mul", "x", net.const(np.ones(6))), name="y")
    model = net.model({"x": ["n", 1]}, {"y": ["n", 6]})
    assert "Mul" in ops(fold(model).model)


def test_what_a_graph_output_shows_stays():
    net = Net()
    inner = net.dense("x", 6, 40, name="z")
    net.dense(inner, 40, 5, name="y")
    model = net.model({"x": ["n", 6]}, {"y": ["n", 5], "z": ["n", 40]})
    assert fold(model).after == fold(model).before


def test_a_shared_weight_is_not_copied():
    net = Net()
    weight = net.const(net.random.normal(size=(6, 6)))
    first = net.op("Mul", net.op("MatMul", "x", weight), net.const(net.random.normal(size=6)))
    net.op("MatMul", first, weight, name="y")
    result = fold(net.model({"x": ["n", 6]}, {"y": ["n", 6]}))
    assert result.after.params <= result.before.params
    assert any("shared" in reason for reason in reasons(result))


def test_float16_that_would_overflow_is_declined(tmp_path):
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    from onnxcollapse import Model

    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Mul", ["h", "s"], ["y"])]
    weights = [
        numpy_helper.from_array(np.full((4, 4), 300, np.float16), "w"),
        numpy_helper.from_array(np.full(4, 400, np.float16), "s"),
    ]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT16, ["n", 4]) for name in "xy"]
    graph = helper.make_graph(nodes, "net", info[:1], info[1:], weights)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8),
        tmp_path / "m.onnx",
    )
    result = fold(Model.load(tmp_path / "m.onnx"))
    assert ops(result.model) == ["MatMul", "Mul"]
    assert any("does not fit into FLOAT16" in reason for reason in reasons(result))


def test_measured_where_data_is_given():
    net = Net()
    bn(net, net.dense("x", 6, 9), 9)
    model = net.model({"x": ["n", 6]}, {"y": ["n", 9]})
    result = optimize(model, data_for(model, rows(40, 6)), passes=[FoldAffine()], provider="cpu")
    assert 0 <= result.error < 1e-6
    assert result.journal.of("kept")


def test_off_means_byte_identical(tmp_path):
    model = mlp([4, 8, 4])
    assert file_bytes(fold(model).model, tmp_path) == file_bytes(model, tmp_path)


def test_neighbouring_folds_are_applied_together_and_save_what_the_journal_says():
    net = Net()
    value = "x"
    for last in (False, False, True):
        product = net.linear(value, net.random.normal(size=(8, 8)))
        value = net.op("Mul", product, net.const(net.random.normal(size=8)), name="y" if last else None)
    model = net.model({"x": ["n", 8]}, {"y": ["n", 8]})
    result = fold(model)
    assert ops(result.model) == ["MatMul"]
    kept = result.journal.of("kept")
    assert not [entry.site for entry in kept if "old" in entry.site]
    assert sum(entry.saving.params for entry in kept) == result.before.params - result.after.params
    assert sum(entry.saving.bytes for entry in kept) == result.before.bytes - result.after.bytes
    assert same(model, result, rows(50, 8))


def test_an_operator_that_widens_its_input_stays():
    net = Net()
    wide = net.op(
        "Mul", net.linear("x", net.random.normal(size=(8, 1))), net.const(net.random.normal(size=6))
    )
    net.linear(wide, net.random.normal(size=(6, 5)), name="y")
    model = net.model({"x": ["n", 8]}, {"y": ["n", 5]})
    assert ops(fold(model).model) == ["MatMul", "Mul", "MatMul"]


def test_a_chain_with_a_shared_weight_stays():
    net = Net()
    shared = net.const(net.random.normal(size=(64, 64)))
    first = net.op("MatMul", net.linear("x", net.random.normal(size=(8, 64))), shared)
    net.op("MatMul", net.op("Relu", first), shared, name="y")
    model = net.model({"x": ["n", 8]}, {"y": ["n", 64]})
    result = fold(model)
    assert ops(result.model) == ops(model)
    assert "is shared" in reasons(result)[0]


def test_an_int8_kernel_behind_a_cast_stays_int8():
    net = Net()
    kernel = net.op("Cast", net.const(np.arange(-16, 16).reshape(8, 4, 1, 1), dtype=np.int8), to=1)
    net.op("Mul", net.op("Conv", "x", kernel, strides=[2, 2]), net.const(np.ones((8, 1, 1)) * 2), name="y")
    model = net.model({"x": ["n", 4, 6, 6]}, {"y": ["n", 8, 3, 3]})
    assert ops(fold(model).model) == ["Cast", "Conv", "Mul"]


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_division_by_zero_is_left_to_the_runtime():
    net = Net()
    quotient = net.op("Div", net.linear("x", np.eye(4)), net.const([1.0, 0.0, 2.0, 3.0]))
    net.op("Clip", quotient, net.const(-1.0), net.const(1.0), name="y")
    model = net.model({"x": ["n", 4]}, {"y": ["n", 4]})
    assert ops(fold(model).model) == ops(model)


def test_a_bias_of_one_number_is_reckoned_with_its_new_length():
    net = Net()
    product = net.op("Add", net.linear("x", net.random.normal(size=(8, 6))), net.const(0.5))
    net.op("Mul", product, net.const(net.random.normal(size=6)), name="y")
    model = net.model({"x": ["n", 8]}, {"y": ["n", 6]})
    result = fold(model)
    [entry] = result.journal.of("kept")
    assert entry.saving.params == result.before.params - result.after.params == 1
    assert same(model, result, rows(20, 8))
