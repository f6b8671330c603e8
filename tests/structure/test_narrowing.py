# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onnxcollapse import Model
from onnxcollapse.errors import ModelError
from onnxcollapse.model import edit
from onnxcollapse.structure import constant_array, hidden_layers, narrow
from tests.structure.hidden_nets import NETS, Builder, conv_flatten, gemm_factors, plain, swiglu
from tests.support import mlp, outputs, rows


def feeds(model, seed=7):
    shape = [dim if isinstance(dim, int) else 3 for dim in model.graph.inputs[0].shape]
    dtype = model.graph.inputs[0].dtype.numpy()
    return np.random.default_rng(seed).normal(size=shape).astype(dtype)


def result(model, x=None):
    return outputs(model, x=feeds(model) if x is None else x)["y"]


def site_of(model, name="y"):
    return next(site for site in hidden_layers(model.graph)[0] if site.name == name)


def finished(model):
    """The model as a transaction leaves it, with strict shape inference: no declared shape may contradict."""
    edit.prune(model)
    edit.check(model)
    proto = ir.to_proto(model.ir)
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    return model


def entries(site, keep):
    return (np.asarray(keep)[:, None] * site.group + np.arange(site.group)).reshape(-1)


def masked(model, name, keep):
    """The same with the consumer deaf to all channels but `keep`."""
    copy = model.clone()
    site = site_of(copy, name)
    matrix, heard = site.matrix(), entries(site, keep)
    silent = np.setdiff1d(np.arange(len(matrix)), heard)
    matrix = matrix.copy()
    matrix[silent] = 0.0
    narrow(copy, site, np.arange(site.width), matrix, site.offset())
    return finished(copy)


def cut(model, name, keep):
    copy = model.clone()
    site = site_of(copy, name)
    narrow(copy, site, np.array(keep, np.intp), site.matrix()[entries(site, keep)], site.offset())
    return finished(copy)


@pytest.mark.parametrize("case", NETS)
def test_all_channels_with_the_old_weights_change_nothing(case):
    model = NETS[case][0]()
    np.testing.assert_array_equal(result(cut(model, "y", range(6))), result(model))


@pytest.mark.parametrize("keep", [[0, 2, 5], [3]])
@pytest.mark.parametrize("case", NETS)
def test_cutting_is_masking(case, keep):
    model = NETS[case][0]()
    small = cut(model, "y", keep)
    assert site_of(small).width == len(keep)
    np.testing.assert_allclose(result(small), result(masked(model, "y", keep)), rtol=1e-5, atol=1e-6)
    assert np.abs(result(small) - result(model)).max() > 1e-3


@pytest.mark.parametrize("case", NETS)
def test_dead_channels_go_without_a_trace(case):
    alive = [1, 2, 4]
    model = masked(NETS[case][0](), "y", alive)
    small = cut(model, "y", alive)
    np.testing.assert_allclose(result(small), result(model), rtol=1e-6, atol=1e-6)
    assert site_of(small).params < site_of(model).params


@pytest.mark.parametrize("case", NETS)
def test_without_channels_the_offset_is_left(case):
    model = NETS[case][0]()
    site = site_of(model)
    offset = np.arange(5.0)
    narrow(model, site, np.empty(0, np.intp), np.empty((0, 5)), offset)
    y = np.moveaxis(result(finished(model)), site.out_axis, -1)
    np.testing.assert_array_equal(y, np.broadcast_to(offset, y.shape))
    assert site_of(model).width == 1


def test_gemm_keeps_its_factors_and_a_single_number_stays_one():
    model = gemm_factors()
    names = [site.name for site in hidden_layers(model.graph)[0]]
    small = cut(cut(model, names[0], [1, 3]), "y", [0, 5])
    reference = masked(masked(model, names[0], [1, 3]), "y", [0, 5])
    np.testing.assert_allclose(result(small), result(reference), rtol=1e-5, atol=1e-6)
    first, middle, _ = (node for node in small.graph if node.op_type == "Gemm")
    assert first.attributes["alpha"].value == 0.5
    assert [constant_array(node.inputs[2]).shape for node in (first, middle)] == [(1, 2), (2,)]


def test_a_source_bias_that_is_one_number_stays_shared():
    net = Builder()
    one = net.const([0.25])
    hidden = net.op("Relu", net.op("Gemm", "x", net.const(net.normal(4, 6)), one))
    net.dense(hidden, 6, 5, name="y")
    model = net.finish([3, 4], [3, 5])
    small = cut(model, "y", [1, 4])
    np.testing.assert_allclose(result(small), result(masked(model, "y", [1, 4])), rtol=1e-5, atol=1e-6)
    assert one in small.graph.initializers


@pytest.mark.parametrize("spelling", ["gemm", "matmul"])
def test_neighbours_in_a_chain_are_cut_one_after_the_other(spelling):
    model = mlp([4, 8, 7, 5], "Relu", spelling=spelling)
    first, last = (site.name for site in hidden_layers(model.graph)[0])
    small = cut(cut(model, first, [0, 3, 4, 7]), last, [1, 2, 6])
    reference = masked(masked(model, first, [0, 3, 4, 7]), last, [1, 2, 6])
    assert [site.width for site in hidden_layers(small.graph)[0]] == [4, 3]
    x = rows(20, 4)
    np.testing.assert_allclose(result(small, x), result(reference, x), rtol=1e-5, atol=1e-6)


def test_a_tensor_that_loses_channels_loses_its_name():
    """A name means the same tensor in every version of a model: what compares versions relies on it."""
    model = mlp([4, 8, 7, 5])
    first, last = (site.name for site in hidden_layers(model.graph)[0])
    small = cut(model, last, [1, 2, 6])
    now, same = hidden_layers(small.graph)[0]
    assert (now.d_out, same.name) == (3, last)
    assert first not in {value.name for node in small.graph for value in node.outputs}
    again = cut(small, now.name, [0, 5])
    np.testing.assert_allclose(result(again), result(masked(small, now.name, [0, 5])), rtol=1e-5, atol=1e-6)


def test_what_others_read_stays_as_it_is():
    """Two layers share a weight, a slope and a bias; one of them is cut."""
    net = Builder()
    weight, slope, bias = net.const(net.normal(6, 6)), net.const(net.normal(6)), net.const(net.normal(6))
    value = "x"
    for index in range(3):
        last = {"name": "y"} if index == 2 else {}
        value = net.op("Add", net.op("MatMul", value, weight), bias, **last)
        value = value if index == 2 else net.op("PRelu", value, slope)
    model = net.finish([3, 6], [3, 6])
    names = [site.name for site in hidden_layers(model.graph)[0]]
    before = {n: model.graph.initializers[n].const_value.numpy().copy() for n in (weight, slope, bias)}
    small = cut(model, names[0], [0, 4])
    np.testing.assert_allclose(result(small), result(masked(model, names[0], [0, 4])), rtol=1e-5, atol=1e-6)
    for name, array in before.items():
        np.testing.assert_array_equal(small.graph.initializers[name].const_value.numpy(), array)
    assert site_of(small, names[1]).width == 6


def test_weights_are_copied_bit_for_bit(parse):
    """fp16, a weight behind Identity and Transpose, NaN payloads and all."""
    random = np.random.default_rng(0)
    weight = random.integers(0, 2**16, size=(6, 4), dtype=np.uint16).view(np.float16)
    bias = random.integers(0, 2**16, size=6, dtype=np.uint16).view(np.float16)
    model = Model(
        parse(
            """g (float16[3, 4] x) => (float16[3, 5] y) {
                i = Identity(W) t = Transpose(i) m = MatMul(x, t) z = Add(m, b) h = Relu(z) y = MatMul(h, V)
            }""",
            {"W": weight, "b": bias, "V": random.normal(size=(6, 5)).astype(np.float16)},
        )
    )
    site = site_of(model)
    narrow(model, site, np.array([0, 2, 3]), site.matrix()[[0, 2, 3]], site.offset())
    source = site_of(finished(model)).sources[0]
    taken = constant_array(source.weight), constant_array(source.bias)
    assert taken[0].dtype == np.float16
    np.testing.assert_array_equal(taken[0].view(np.uint16), weight.T[:, [0, 2, 3]].copy().view(np.uint16))
    np.testing.assert_array_equal(taken[1].view(np.uint16), bias[[0, 2, 3]].view(np.uint16))


def test_half_precision(parse):
    random = np.random.default_rng(0)
    shapes = {"W": (6, 3, 3, 3), "a": (6,), "s": (6, 1, 1), "V": (5, 6, 1, 1), "b": (5,)}
    weights = {name: (random.normal(size=shape) / 4).astype(np.float16) for name, shape in shapes.items()}
    model = Model(
        parse(
            """g (float16[2, 3, 5, 5] x) => (float16[2, 5, 3, 3] y) {
                c = Conv(x, W, a) h = PRelu(c, s) y = Conv(h, V, b)
            }""",
            weights,
        )
    )
    small = cut(model, "y", [1, 5])
    assert {v.dtype for v in small.graph.initializers.values()} == {ir.DataType.FLOAT16}
    np.testing.assert_allclose(result(small), result(masked(model, "y", [1, 5])), atol=2e-3)


def test_declared_shapes_follow_the_cut():
    model = conv_flatten()
    model = Model(ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model.ir))))
    small = cut(model, "y", [0, 5])
    shapes = {n.op_type: tuple(n.outputs[0].shape) for n in small.graph}
    assert shapes == {"Conv": (2, 2, 4, 4), "Relu": (2, 2, 4, 4), "Flatten": (2, 32), "Gemm": (2, 5)}


@pytest.mark.parametrize("factors", [1, 2])
@pytest.mark.parametrize("keep", [[], [1, 2, 5]])
@pytest.mark.parametrize("build", [plain, swiglu])
def test_a_linear_path_goes_beside(build, keep, factors):
    model = build()
    random = np.random.default_rng(1)
    skip = (
        (random.normal(size=(4, 5)),)
        if factors == 1
        else (random.normal(size=(4, 2)), random.normal(size=(2, 5)))
    )
    without = cut(model, "y", keep) if keep else None
    site = site_of(model)
    offset = site.offset() + 1.0
    narrow(model, site, np.array(keep, np.intp), site.matrix()[keep], offset, skip)
    whole = skip[0] if factors == 1 else skip[0] @ skip[1]
    expected = (
        (0.0 if without is None else result(without) - site_bias(without)) + feeds(model) @ whole + offset
    )
    np.testing.assert_allclose(result(finished(model)), expected, rtol=1e-5, atol=1e-5)
    assert model.graph.outputs[0].name == "y"


def site_bias(model):
    return site_of(model).offset()


def test_what_does_not_fit_is_an_error():
    model = plain()
    site = site_of(model)
    matrix, offset = site.matrix(), site.offset()
    for keep in ([1, 1], [2, 0], [5, 6], [-1, 2]):
        with pytest.raises(ModelError, match="in order, each once, below 6"):
            narrow(model, site, np.array(keep), matrix[:2], offset)
    with pytest.raises(ModelError, match=r"need a matrix \(2, 5\)"):
        narrow(model, site, np.array([0, 1]), matrix, offset)
    for skip in ((), (np.ones((5, 4)),), (np.ones((4, 2)), np.ones((3, 5))), (np.ones((4, 4)),)):
        with pytest.raises(ModelError, match="does not map 4 channels to 5"):
            narrow(model, site, np.array([0, 1]), matrix[:2], offset, skip)
    conv = conv_flatten()
    site = site_of(conv)
    with pytest.raises(ModelError, match="a skip needs a feed-forward block"):
        narrow(conv, site, np.arange(6), site.matrix(), site.offset(), (np.ones((3, 5)),))
    finished(model)


LAYERS = st.lists(
    st.tuples(st.integers(1, 5), st.sampled_from(["Relu", "Tanh", "PRelu"])), min_size=1, max_size=3
)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(layers=LAYERS, kind=st.sampled_from(["gemm", "matmul", "conv", "flatten"]), data=st.data())
def test_random_chains_cut_at_random(layers, kind, data):
    model = chain(layers, kind)
    sites, refusals = hidden_layers(model.graph)
    assert (len(sites), refusals) == (len(layers), [])
    site = data.draw(st.sampled_from(sites))
    keep = data.draw(st.lists(st.integers(0, site.width - 1), min_size=1, unique=True).map(sorted))
    np.testing.assert_allclose(
        result(cut(model, site.name, keep)), result(masked(model, site.name, keep)), rtol=1e-4, atol=1e-5
    )


def chain(layers, kind):
    net = Builder(3)
    value, width = "x", 3
    images = kind in ("conv", "flatten")
    for index, (size, activation) in enumerate(layers):
        if images:
            value = net.conv(value, width, size, kernel=1 + 2 * (index % 2), bias=index % 2 == 0)
            value = net.batch_norm(value, size) if index % 2 else value
        else:
            value = net.dense(value, width, size, spelling=kind)
        slope = (
            [net.const(net.normal(size, 1, 1) if images else net.normal(size))]
            if activation == "PRelu"
            else []
        )
        value, width = net.op(activation, value, *slope), size
    if kind == "flatten":
        net.dense(net.op("Flatten", value), width * 16, 5, name="y")
    elif kind == "conv":
        net.conv(value, width, 5, name="y")
    else:
        net.dense(value, width, 5, spelling=kind, name="y")
    shape = [2, 3, 4, 4] if images else [2, 3]
    return net.finish(shape, [2, 5, 4, 4] if kind == "conv" else [2, 5])
