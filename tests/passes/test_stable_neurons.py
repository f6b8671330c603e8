# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from onnxcollapse.passes.stable_neurons import StableNeurons

from onnxcollapse import optimize
from onnxcollapse.errors import OptionError
from onnxcollapse.rewriting.registry import parse
from tests.support import Net, file_bytes, mlp, outputs, relative


def block(up, bias, down, *, activation="Relu", positive=True, slope=None):
    """(Relu ->) Linear -> activation -> Linear."""
    net = Net()
    x = net.op("Relu", "x") if positive else "x"
    hidden = net.linear(x, up, bias)
    extra = [] if slope is None else [net.const(slope)]
    net.linear(net.op(activation, hidden, *extra), down, net.random.normal(size=down.shape[1]), name="y")
    return net.model({"x": ["n", up.shape[0]]}, {"y": ["n", down.shape[1]]})


def parts(d_in=6, h=40, d_out=5, seed=0):
    random = np.random.default_rng(seed)
    return random.normal(size=(d_in, h)), random.normal(size=h), random.normal(size=(h, d_out))


def run(model, **options):
    return optimize(model, passes=[StableNeurons(**options)])


def same(model, result, d_in=6, low=-3.0, high=3.0):
    x = np.random.default_rng(5).uniform(low, high, size=(500, d_in)).astype(np.float32)
    return relative(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"]) < 1e-5


def test_neurons_that_are_never_on_go():
    up, bias, down = parts()
    up[:, :15], bias[:15] = -np.abs(up[:, :15]), -np.abs(bias[:15])  # x >= 0 behind the Relu
    model = block(up, bias, down)
    result = run(model)
    assert result.before.params - result.after.params == 15 * (6 + 5 + 1)
    assert same(model, result)
    assert result.model.graph.inputs[0].name == "x"


def test_all_neurons_always_on_become_one_map():
    up, bias, down = parts()
    model = block(np.abs(up), np.abs(bias), down)
    result = run(model)
    assert result.after.params == 6 * 5 + 5
    assert same(model, result)


def test_many_always_on_become_a_skip_path():
    up, bias, down = parts()
    up[:, :20], bias[:20] = np.abs(up[:, :20]), np.abs(bias[:20])
    model = block(up, bias, down)
    result = run(model)
    assert result.after.params == 20 * (6 + 5 + 1) + 6 * 5 + 5
    assert same(model, result)


def test_dependent_always_on_neurons_are_carried_by_a_basis():
    random = np.random.default_rng(0)
    up, bias, down = parts(d_in=30, h=40, d_out=30)
    up[:, :4] = np.abs(up[:, :4])
    up[:, 4:10] = up[:, :4] @ random.uniform(0.1, 1, size=(4, 6))
    bias[:10] = np.abs(bias[:10])
    model = block(up, bias, down)
    result = run(model)  # 10 neurons do not pay for a 30 x 30 skip, but their rank is 4
    assert result.before.params - result.after.params == 6 * (30 + 30 + 1)
    assert same(model, result, d_in=30)


def test_few_independent_ones_are_declined_with_the_break_even():
    up, bias, down = parts(d_in=30, h=40, d_out=30)
    up[:, :3], bias[:3] = np.abs(up[:, :3]), np.abs(bias[:3])
    result = run(block(up, bias, down))
    assert result.after == result.before
    [entry] = result.journal.of("declined")
    assert "3 of 40" in entry.reason and "14.8" in entry.reason


def test_a_declared_box_proves_and_is_recorded():
    up, bias, down = parts()
    model = block(up, bias + 100.0, down, positive=False)
    assert not run(model).journal.of("kept")
    result = run(model, input_range="-1..1")
    assert result.after.params == 6 * 5 + 5
    assert same(model, result, low=-1, high=1)
    assert result.model.ir.metadata_props["onnxcollapse.input-range"] == "-1..1"
    named = run(model, input_range="x=-1..1")
    assert named.after == result.after


def test_leaky_slopes_per_channel():
    up, bias, down = parts()
    up[:, :30], bias[:30] = -np.abs(up[:, :30]), -np.abs(bias[:30])
    slope = np.random.default_rng(3).uniform(0.1, 0.9, 40)
    model = block(up, bias, down, activation="PRelu", slope=slope)
    result = run(model)
    assert result.after.params < result.before.params
    assert same(model, result)


def test_all_dead_leaves_the_bias():
    up, bias, down = parts()
    model = block(-np.abs(up), -np.abs(bias), down)
    result = run(model)
    assert result.after.params < 20
    assert same(model, result)


def test_near_the_boundary_nothing_is_claimed():
    up, bias, down = parts()
    up[:, 0], bias[0] = np.abs(up[:, 0]), -1e-4  # on for nearly all x, off at x = 0
    result = run(block(up, bias, down))
    assert not result.journal.of("kept")


@pytest.mark.parametrize("text", ["1", "1..", "2..1", "a..b", "x=3"])
def test_a_bad_box_is_one_clear_error(text):
    with pytest.raises(OptionError, match="input-range"):
        parse(f"stable-neurons:input-range={text}")


def test_off_means_byte_identical(tmp_path):
    model = mlp([4, 8, 4])
    assert file_bytes(run(model).model, tmp_path) == file_bytes(model, tmp_path)


def test_a_block_without_biases_gets_none():
    net = Net()
    positive = np.abs(net.random.normal(size=(6, 40)))
    net.linear(
        net.op("Relu", net.linear(net.op("Relu", "x"), positive)), net.random.normal(size=(40, 5)), name="y"
    )
    model = net.model({"x": ["n", 6]}, {"y": ["n", 5]})
    result = run(model)
    assert [node.op_type for node in result.model.graph] == ["Relu", "MatMul"]
    assert (result.after.params, result.journal.of("kept")[0].saving.params) == (30, 40 * 11 - 30)
    assert same(model, result)


def test_neurons_without_weights_are_dead_without_a_bias():
    net = Net()
    up = net.random.normal(size=(6, 40))
    up[:, 10:] = 0.0
    net.linear(net.op("Relu", net.linear(net.op("Relu", "x"), up)), net.random.normal(size=(40, 5)), name="y")
    model = net.model({"x": ["n", 6]}, {"y": ["n", 5]})
    result = run(model)
    assert result.after.params == 10 * 11
    assert same(model, result)


def test_a_silent_block_is_cut_once():
    up, bias, down = parts()
    result = run(block(-np.abs(up), -np.abs(bias), down))
    assert [entry.outcome for entry in result.journal] == ["kept", "declined"]
    assert "1 of 1 neurons never switch" in result.journal.of("declined")[0].reason


def test_a_box_for_an_input_that_is_none_is_an_error():
    with pytest.raises(OptionError, match="no input 'z'; its inputs are x"):
        run(block(*parts()), input_range="z=0..1")
