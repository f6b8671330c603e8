# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import numpy as np
import pytest
from onnxcollapse.passes.collapse_ffn import CollapseFfn

from onnxcollapse import Budget, optimize
from onnxcollapse.errors import OptionError
from onnxcollapse.model import size
from onnxcollapse.rewriting.registry import parse
from tests.support import Net, data_for, file_bytes, mlp, outputs, relative, rows


def run(model, array, budget=0.5, **options):
    return optimize(
        model, data_for(model, array), budget=Budget(budget), passes=[CollapseFfn(**options)], provider="cpu"
    )


def kept(result):
    return result.journal.of("kept")


def reasons(result):
    return [entry.reason for entry in result.journal if entry.outcome != "kept"]


@pytest.mark.parametrize("spelling", ["gemm", "matmul"])
def test_fold_with_slope_one_is_exact_and_saves_what_the_arithmetic_says(spelling):
    model = mlp([6, 40, 5], "PRelu", slopes=[[1.0]], spelling=spelling)
    x = rows(200, 6)
    result = run(model, x, method="fold")
    assert [entry.variant for entry in kept(result)] == ["fold"]
    assert relative(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"]) < 1e-6
    before, after = 6 * 40 + 40 + 1 + 40 * 5 + 5, 6 * 5 + 5
    assert (result.before.params, result.after.params) == (before, after)
    assert kept(result)[0].saving.params == before - after


def test_fold_bound_holds_and_is_not_vacuous():
    model = mlp([6, 40, 5], "PRelu", slopes=[[0.97]])
    x = rows(400, 6)
    result = run(model, x, method="fold")
    [entry] = kept(result)
    measured = relative(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"])
    assert 0.0 < measured <= entry.predicted_error * 1.05
    assert entry.predicted_error < 0.2


def test_fold_takes_slopes_per_channel_and_operators_around_the_prelu():
    net = Net()
    z = net.dense("x", 6, 40)
    z = net.op("Mul", z, net.const(net.random.uniform(0.5, 2.0, 40)))
    z = net.op("PRelu", z, net.const(net.random.uniform(0.96, 1.04, 40)))
    z = net.op("Add", z, net.const(net.random.normal(size=40)))
    net.dense(z, 40, 5, name="y")
    model = net.model({"x": ["n", 6]}, {"y": ["n", 5]})
    x = rows(400, 6)
    result = run(model, x, method="fold")
    [entry] = kept(result)
    measured = relative(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"])
    assert 0.0 < measured <= entry.predicted_error * 1.05


def test_fold_through_batch_normalization_is_exact_at_slope_one():
    net = Net()
    z = net.dense("x", 6, 40)
    parts = [net.random.uniform(0.5, 2.0, 40), net.random.normal(size=40), net.random.normal(size=40),
             net.random.uniform(0.5, 2.0, 40)]  # fmt: skip
    z = net.op("BatchNormalization", z, *(net.const(part) for part in parts))
    z = net.op("PRelu", z, net.const([1.0]))
    net.dense(z, 40, 5, name="y")
    model = net.model({"x": ["n", 6]}, {"y": ["n", 5]})
    x = rows(100, 6)
    result = run(model, x, method="fold")
    assert len(kept(result)) == 1
    assert relative(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"]) < 1e-6


@pytest.mark.parametrize(
    "slope, tolerance, fires", [(0.951, 0.05, True), (0.949, 0.05, False), (0.9, 0.11, True)]
)
def test_fold_obeys_its_tolerance(slope, tolerance, fires):
    result = run(mlp([6, 40, 5], "PRelu", slopes=[[slope]]), rows(100, 6), method="fold", tolerance=tolerance)
    assert bool(kept(result)) is fires
    if not fires:
        assert any("|1 - alpha|" in reason for reason in reasons(result))


def test_fit_of_a_near_linear_block_keeps_to_its_predicted_error():
    model = mlp([8, 64, 8], "LeakyRelu")
    x = rows(2000, 8)
    result = run(model, x, budget=0.8, method="fit", ranks=False)
    [entry] = kept(result)
    fresh = rows(2000, 8, seed=7)
    measured = relative(outputs(result.model, x=fresh)["y"], outputs(model, x=fresh)["y"])
    assert measured == pytest.approx(entry.predicted_error, rel=0.1)


def test_fit_is_exact_where_the_block_is_linear():
    model = mlp([8, 64, 8], "PRelu", slopes=[[1.0]])
    result = run(model, rows(2000, 8), method="fit", ranks=False)
    x = rows(100, 8, seed=3)
    assert relative(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"]) < 2e-3  # the ridge's own bias


def gated(bias: bool = True):
    net = Net()
    gate = net.dense("x", 8, 48)
    up = net.dense("x", 8, 48) if bias else net.linear("x", net.random.normal(size=(8, 48)))
    silu = net.op("Mul", gate, net.op("Sigmoid", gate))
    net.dense(net.op("Mul", silu, up), 48, 8, name="y")
    return net.model({"x": ["n", "t", 8]}, {"y": ["n", "t", 8]})


def test_fit_takes_gated_blocks_and_more_axes():
    model = gated()
    x = rows(1200, 8).reshape(300, 4, 8)
    result = run(model, x, budget=2.0, method="fit", ranks=False)
    [entry] = kept(result)
    assert "Sigmoid" in entry.reason
    measured = relative(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"])
    assert measured == pytest.approx(entry.predicted_error, rel=0.15)
    assert result.after.params == 8 * 8 + 8


def test_limited_rank_is_taken_where_the_data_has_no_more():
    model = mlp([64, 256, 64], "PRelu", slopes=[[0.98]])
    result = run(model, rows(3000, 64, rank=6), budget=0.1, method="fit")
    assert kept(result)[0].variant.startswith("fit, low rank")
    assert result.after.params < 64 * 64


def test_bottleneck_is_declined_with_the_inequality():
    model = mlp([32, 4, 32])
    result = run(model, rows(100, 32))
    assert not kept(result)
    assert any("4 hidden neurons are no more than" in reason for reason in reasons(result))


def test_what_does_not_fit_the_budget_is_declined_with_the_figures(tmp_path):
    model = mlp([8, 64, 8])
    result = run(model, rows(500, 8), budget=0.01, method="fit")
    assert not kept(result)
    assert any("over the budget of 0.01" in reason for reason in reasons(result))
    assert file_bytes(result.model, tmp_path) == file_bytes(model, tmp_path)


def test_off_means_byte_identical(tmp_path):
    model = mlp([8, 64, 8])
    result = optimize(model, data_for(model, rows(100, 8)), passes=[], provider="cpu")
    assert file_bytes(result.model, tmp_path) == file_bytes(model, tmp_path)


def test_a_chain_collapses_in_rounds_to_one_map():
    model = mlp([8, 64, 48, 32, 4], "PRelu", slopes=[[1.0]] * 3)
    x = rows(400, 8)
    result = run(model, x, method="fold")
    assert result.after.params == 8 * 4 + 4
    assert relative(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"]) < 1e-5


def test_a_shared_weight_saves_nothing_and_is_declined():
    net = Net()
    up, down = net.const(net.random.normal(size=(8, 40))), net.const(net.random.normal(size=(40, 8)))
    value = "x"
    for name in ("m", "y"):
        hidden = net.op("PRelu", net.op("MatMul", value, up), net.const([1.0]))
        value = net.op("MatMul", hidden, down, name=name)
    model = net.model({"x": ["n", 8]}, {"y": ["n", 8]})
    result = run(model, rows(200, 8), method="fold")
    assert result.after.params <= size(model).params
    x = rows(50, 8, seed=5)
    assert relative(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"]) < 1e-5


def test_signature_and_dynamic_axes_stay():
    model = mlp([6, 40, 5], "PRelu", slopes=[[1.0]])
    result = run(model, rows(100, 6), method="fold")
    assert result.model.signature() == model.signature()


def test_never_runs_without_data():
    result = optimize(mlp([6, 40, 5]), passes=[CollapseFfn()])
    assert not kept(result)
    assert any("--calib" in reason for reason in reasons(result))


def test_options_come_from_text():
    assert parse("collapse-ffn:method=fit,ranks=false,tolerance=0.1") == CollapseFfn("fit", 0.1, False)
    with pytest.raises(OptionError, match=r"takes auto\|fold\|fit"):
        parse("collapse-ffn:method=guess")
    with pytest.raises(OptionError, match="tolerance 2"):
        parse("collapse-ffn:tolerance=2")


def test_channels_on_axis_one_collapse_too():
    net = Net()
    up, down = net.random.normal(size=(40, 6, 1, 1)), net.random.normal(size=(5, 40, 1, 1))
    z = net.op("Conv", "x", net.const(up), net.const(net.random.normal(size=40)))
    z = net.op("PRelu", z, net.const(np.full((40, 1, 1), 1.0)))
    net.op("Conv", z, net.const(down), name="y")
    model = net.model({"x": ["n", 6, 7, 7]}, {"y": ["n", 5, 7, 7]})
    x = np.random.default_rng(0).normal(size=(64, 6, 7, 7)).astype(np.float32)
    for method in ("fold", "fit"):
        result = run(model, x, method=method, ranks=False)
        assert result.after.params == 6 * 5 + 5
        assert relative(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"]) < 2e-3


def test_a_block_that_changes_its_type_inside_is_declined():
    net = Net()
    narrow = net.op("Cast", "x", to=10)
    hidden = net.op(
        "Relu", net.op("MatMul", narrow, net.const(net.random.normal(size=(6, 40)), dtype=np.float16))
    )
    net.linear(net.op("Cast", hidden, to=1), net.random.normal(size=(40, 5)), name="y")
    model = net.model({"x": ["n", 6]}, {"y": ["n", 5]})
    result = run(model, rows(100, 6))
    assert not kept(result)
    assert reasons(result) == ["input is float16, output float: no one map is both"]
