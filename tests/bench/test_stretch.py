# SPDX-License-Identifier: Apache-2.0
"""Stretches of models: how long they take, and that equal ones are measured once."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from onnxcollapse import Model
from onnxcollapse.bench import StretchTimer
from onnxcollapse.bench.likeness import likeness
from onnxcollapse.errors import ModelError
from onnxcollapse.model import edit
from tests.support import Net, mlp, rows

D = 64
QUICK = {"rounds": 3, "warmup": 1, "repeats": 3, "min_seconds": 0.0}


def timer(width: int = D, samples: int = 4, **options) -> StretchTimer:
    return StretchTimer({"x": rows(samples, width)}, "cpu", **{**QUICK, **options})


def stack(*hidden: int, seed: int = 0, scale: float = 1.0) -> Model:
    """x -> h0 -> h1 -> ... -> y, each by Linear, Relu, Linear with so many hidden neurons."""
    net = Net(seed)
    value = "x"
    for index, width in enumerate(hidden):
        last = index == len(hidden) - 1
        middle = net.op("Relu", net.dense(value, D, width), name=f"a{index}")
        half = net.op("Mul", net.dense(middle, width, D), net.const(scale))
        value = net.op("Identity", half, name="y" if last else f"h{index}")
    return net.model({"x": ["n", D]}, {"y": ["n", D]})


def test_a_wide_stretch_takes_longer_than_a_narrow_one():
    clock = timer(samples=64, rounds=5, min_seconds=0.002)
    model = stack(4096, 8)
    wide, narrow = clock.seconds(model, ["x"], "h0"), clock.seconds(model, ["h0"], "y")
    assert wide > 4 * narrow > 0
    assert clock.whole(model) > 4 * narrow


def test_equal_stretches_are_measured_once():
    clock = timer()
    model = stack(32, 32, 32, 16)
    first = clock.seconds(model, ["x"], "h0")
    assert clock.seconds(model, ["h0"], "h1") == clock.seconds(model, ["h1"], "h2") == first
    assert clock.measured == 1
    clock.seconds(model, ["h2"], "y")
    assert clock.measured == 2
    assert clock.seconds(stack(32, 32, seed=5), ["h0"], "y") == first, "other weights of the same shapes"
    assert clock.measured == 2


def test_two_models_are_compared_between_the_same_tensors():
    clock = timer(samples=64, rounds=5)
    before, after = stack(4096, 8), stack(8, 8)
    slow, fast = clock.compare(before, after, ["x"], "h0")
    assert slow > 4 * fast
    assert clock.measured == 2
    assert clock.compare(before, after, ["x"], "h0") == (slow, fast)
    assert clock.measured == 2


def test_what_has_the_same_structure_takes_equally_long():
    clock = timer()
    a, b = clock.compare(stack(32, 8), stack(32, 24, seed=3), ["x"], "h0")
    assert a == b
    assert clock.measured == 1


def test_equal_work_in_two_spellings_takes_about_equally_long():
    clock = timer(width=512, samples=64, rounds=7, min_seconds=0.002)
    gemm, matmul = mlp([512, 512, 512]), mlp([512, 512, 512], spelling="matmul")
    a, b = clock.compare_whole(gemm, matmul)
    assert 1 / 3 < a / b < 3


def test_whole_models_are_measured_again_when_asked():
    clock = timer()
    pair = stack(32), stack(16)
    first = clock.compare_whole(*pair)
    assert clock.compare_whole(*pair) == first
    assert clock.measured == 2
    clock.compare_whole(*pair, again=True)
    assert clock.measured == 4


def test_tensors_have_the_shapes_of_the_sample():
    kinds = timer(samples=5).tensors(stack(32, 16))
    assert kinds["a0"].shape == (5, 32)
    assert kinds["h0"].shape == (5, D)
    assert kinds["h0"].dtype == ir.DataType.FLOAT


@pytest.mark.parametrize(
    ("inputs", "output", "words"),
    [
        (["x"], "nowhere", "no tensor 'nowhere'"),
        (["nowhere"], "y", "no tensor 'nowhere'"),
        (["a0"], "y", "needs more than a0"),
    ],
)
def test_what_is_no_stretch_is_refused(inputs, output, words):
    net = Net()
    hidden = net.op("Relu", net.dense("x", D, D), name="a0")
    net.op("Add", hidden, "x", name="y")
    model = net.model({"x": ["n", D]}, {"y": ["n", D]})
    with pytest.raises(ModelError, match=words):
        timer().seconds(model, inputs, output)


def test_the_second_model_may_lack_inputs_that_it_does_not_read():
    def build(*, gated: bool) -> Model:
        net = Net()
        hidden = net.dense("x", D, D, name="h")
        if gated:
            hidden = net.op("Mul", hidden, net.op("Sigmoid", "x", name="g"))
        net.op("Relu", hidden, name="y")
        return net.model({"x": ["n", D]}, {"y": ["n", D]})

    a, b = timer().compare(build(gated=True), build(gated=False), ["h", "g"], "y")
    assert a > 0
    assert b > 0


def test_shapes_that_zeros_do_not_fit_are_computed():
    net = Net()
    shape = net.op("Neg", net.op("Neg", net.op("Shape", "x")), name="shape")
    row = net.op("ReduceMax", "x", axes=[0], keepdims=1, name="row")
    net.op("Add", "x", net.op("Expand", row, shape), name="y")
    model = net.model({"x": ["n", D]}, {"y": ["n", D]})
    assert timer().seconds(model, ["x", "row", "shape"], "y") > 0


def test_likeness_sees_operators_shapes_attributes_and_scalars_but_no_weights():
    feeds = {"x": rows(4, D)}
    base = likeness(stack(32), feeds)
    assert likeness(stack(32, seed=1), feeds) == base
    changed = [stack(24), stack(32, 32), stack(32, scale=2.0), mlp([D, 32, D]), mlp([D, 32, D], "Tanh")]
    other = [likeness(model, feeds) for model in changed] + [likeness(stack(32), {"x": rows(3, D)})]
    assert len({base, *other}) == 7


def test_likeness_does_not_see_names():
    model, feeds = stack(32, 16), {"x": rows(4, D)}
    base = likeness(model, feeds)
    for node in model.graph:
        if not node.outputs[0].is_graph_output():
            node.outputs[0].name = f"other_{node.outputs[0].name}"
    edit.check(model)
    assert likeness(model, feeds) == base
