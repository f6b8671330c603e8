# SPDX-License-Identifier: Apache-2.0
"""factor-linear: what has a low rank is factored, and the error of the rest is known beforehand."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxcollapse.passes.factor_linear import SHARES, FactorLinear
from onnxcollapse.passes.narrow_ffn import NarrowFfn

from onnxcollapse import Budget, Decline, Proposal, Target, open_data, optimize
from onnxcollapse.calibration import collect
from onnxcollapse.errors import ModelError, OptionError
from onnxcollapse.model import size
from onnxcollapse.rewriting.fitting import apply
from onnxcollapse.rewriting.registry import parse
from onnxcollapse.structure import hidden_layers, linears
from onnxcollapse.verification import compare
from tests.passes.factoring import attention_like, of_low_rank, on_the_left, parallel_blocks, pointwise, thin
from tests.passes.narrowing import at, correlated, heldout, narrowed, offers, reasons, site_error
from tests.support import Net, data_for, file_bytes, mlp, outputs, relative, rows


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR)


def run(model, x, budget=0.01, target=None, passes=None):
    budget = Budget(budget, target=target)
    passes = passes or [FactorLinear()]
    return optimize(model, data_for(model, x), budget=budget, passes=passes, provider="cpu")


def kept(result):
    return list(result.journal.of("kept"))


EXACT = {
    "gemm": (of_low_rank, lambda seed: rows(400, 40, seed)),
    "matmul": (lambda: of_low_rank("matmul"), lambda seed: rows(400, 40, seed)),
    "conv 1x1": (pointwise, lambda seed: rows(60, 640, seed).reshape(60, 40, 4, 4)),
    "weight on the left": (on_the_left, lambda seed: rows(100, 200, seed).reshape(100, 40, 5)),
    "readers of one": (attention_like, lambda seed: rows(400, 160, seed).reshape(400, 4, 40)),
}


@pytest.mark.parametrize("case", EXACT)
def test_what_has_a_low_rank_is_factored_and_the_outputs_stay(case):
    build, draw = EXACT[case]
    model = build()
    result = run(model, draw(1), 2e-3)
    assert kept(result)
    assert {entry.variant for entry in kept(result)} == {"rank 8"}
    assert (
        sum(entry.saving.params for entry in kept(result)) == result.before.params - result.after.params > 0
    )
    x = draw(9)
    assert relative(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"]) < 2e-3
    assert result.model.signature() == model.signature()


def test_linears_that_read_one_tensor_share_the_first_factor():
    model = attention_like()
    [entry] = kept(run(model, rows(400, 160).reshape(400, 4, 40), 2e-3))
    assert entry.site == "q"
    assert entry.saving.params == 40 * 112 - 8 * (40 + 112)


@pytest.mark.parametrize("case", ["mlp", "bias-free", "shared"])
def test_the_error_known_beforehand_is_the_one_measured_on_the_held_out_rows(case):
    x = correlated(400, 40)
    if case == "mlp":
        model = mlp([40, 64, 48])
    elif case == "bias-free":
        net = Net(6)
        net.op("MatMul", "x", net.const(net.random.normal(size=(40, 64))), name="y")
        model = net.model({"x": ["n", 40]}, {"y": ["n", 64]})
    else:
        model, x = attention_like(full=True), correlated(1600, 40).reshape(400, 4, 40)
    data, item = data_for(model, x), FactorLinear()
    for site, offered in offers(model, data, item).items():
        clear = [offer for offer in offered if offer.predicted_error > 5e-3]
        assert len(clear) > 1
        for offer in clear[:3]:
            if site != "q":
                measured = site_error(model, item, offer, data)
            else:
                copy, held = narrowed(model, item, offer), heldout(data)
                sides = [np.concatenate([at(m, name, held) for name in "qkv"], -1) for m in (copy, model)]
                measured = relative(*sides)
            assert measured == pytest.approx(offer.predicted_error, rel=1e-3), offer.variant


def test_savings_known_beforehand_are_those_of_the_rewritten_model():
    model, item = mlp([40, 64, 48]), FactorLinear()
    for offered in offers(model, data_for(model, correlated(300, 40)), item).values():
        errors = [offer.predicted_error for offer in offered]
        assert errors == sorted(errors)
        for offer in offered:
            assert offer.saving.params == size(model).params - size(narrowed(model, item, offer)).params > 0


def test_outputs_that_count_less_for_the_layer_behind_are_fitted_less():
    """Half of the first Linear's neurons have next to no outgoing weight, so a rank says what the others need."""
    net = Net(8)
    first, second = net.random.normal(size=(40, 64)) / 6, net.random.normal(size=(64, 40))
    second[32:] *= 1e-3
    hidden = net.op("Relu", net.linear("x", first, np.zeros(64), name="z"))
    net.linear(hidden, second, np.zeros(40), name="y")
    model = net.model({"x": ["n", 40]}, {"y": ["n", 40]})
    data, item = data_for(model, rows(2000, 40)), FactorLinear()
    offer = next(x for x in offers(model, data, item)["z"] if x.variant == "rank 16")
    copy, x = narrowed(model, item, offer), heldout(data)
    lost = np.square(at(copy, "z", x) - at(model, "z", x)).mean(0)
    assert lost[:32].mean() < 0.6 * lost[32:].mean()


def test_a_rank_and_a_width_are_cut_in_one_selection():
    """The first Linear has rank 8 and the neurons behind it are redundant: both are needed for so small a target."""
    net = Net(9)
    picks = np.tile(np.arange(48), 4)
    first, bias = thin(net, 64, 48)[:, picks], net.random.normal(size=48)[picks]
    hidden = net.op("Tanh", net.linear("x", first, bias, name="z"))
    net.dense(hidden, 192, 8, name="y")
    model, x = net.model({"x": ["n", 64]}, {"y": ["n", 8]}), rows(600, 64)
    target = Target("params", 0.125)
    passes = [NarrowFfn(skip=False), FactorLinear()]  # whatever their order, the rank is cut first
    result = run(model, x, None, target, passes)
    assert result.met
    assert {(entry.pass_name, entry.site) for entry in kept(result)} == {
        ("factor-linear", "z"),
        ("narrow-ffn:skip=False", "y"),
    }
    assert sum(entry.saving.params for entry in kept(result)) == result.before.params - result.after.params
    narrower, factored = (run(model, x, None, target, [item]) for item in passes)
    assert not factored.met
    assert result.error < 0.01 * narrower.error


def test_a_rank_before_a_gate_leaves_the_block_what_it_is():
    net = Net(10)
    space = net.random.normal(size=(40, 8)) / 6
    gate, up = (space @ net.random.normal(size=(8, 96)) for _ in range(2))
    z = net.linear("x", gate)
    hidden = net.op("Mul", net.op("Mul", z, net.op("Sigmoid", z)), net.linear("x", up))
    net.dense(hidden, 96, 40, name="y")
    model = net.model({"x": ["n", 40]}, {"y": ["n", 40]})
    result = run(model, rows(400, 40), None, Target("params", 0.45), [FactorLinear(), NarrowFfn(skip=False)])
    assert result.met
    assert {entry.pass_name for entry in kept(result)} == {"factor-linear", "narrow-ffn:skip=False"}
    blocks = [layer.block for layer in hidden_layers(result.model.graph)[0] if layer.block is not None]
    assert any(block.gate is not None for block in blocks)


@pytest.mark.parametrize("biases", [(1.0, 0.0), (1.0, None), (None, None)])
def test_biases_that_only_some_have_stay(biases):
    net, space = Net(11), np.random.default_rng(0).normal(size=(40, 8)) / 6
    read = []
    for name, bias in zip("qk", biases, strict=True):
        offset = None if bias is None else np.full(40, bias)
        read.append(net.linear("x", space @ net.random.normal(size=(8, 40)), offset, name=name))
    net.op("Tanh", net.op("Concat", *read, axis=-1), name="y")
    model = net.model({"x": ["n", 40]}, {"y": ["n", 80]})
    result = run(model, rows(400, 40), 2e-3)
    assert [(entry.site, entry.variant) for entry in kept(result)] == [("q", "rank 8")]
    assert sum("Add" in node.op_type for node in result.model.graph) == sum(b is not None for b in biases)


def test_gate_and_up_share_the_first_factor_however_each_is_spelled():
    net = Net(12)
    space = net.random.normal(size=(40, 8)) / 6
    gate, up = (space @ net.random.normal(size=(8, 96)) for _ in range(2))
    z = net.op("Gemm", "x", net.const(gate), net.const(np.zeros(96)))
    u = net.op("Gemm", "x", net.const(up.T), net.const(np.zeros(96)), transB=1)
    net.dense(net.op("Mul", net.op("Sigmoid", z), u), 96, 40, spelling="gemm", name="y")
    model = net.model({"x": ["n", 40]}, {"y": ["n", 40]})
    result = run(model, rows(400, 40), None, Target("params", 0.45), [FactorLinear(), NarrowFfn(skip=False)])
    assert result.met
    assert not any(entry.outcome == "rolled-back" for entry in result.journal)
    assert {entry.pass_name for entry in kept(result)} == {"factor-linear", "narrow-ffn:skip=False"}


@pytest.mark.parametrize("opset", [9, 10, 13])
def test_a_gemm_that_needs_a_bias_gets_one(opset):
    net = Net(13)
    net.op("Gemm", "x", net.const(thin(net, 40, 48)), net.const(np.ones(48)), name="y")
    model = net.model({"x": ["n", 40]}, {"y": ["n", 48]}, opset)
    assert [entry.variant for entry in kept(run(model, rows(400, 40), 2e-3))] == ["rank 8"]


def test_a_target_is_met_closely_where_a_rank_is_shared_with_what_is_no_part_of_a_block():
    share = 0.4
    model, passes = parallel_blocks(), [NarrowFfn(skip=False), FactorLinear()]
    result = run(model, correlated(500, 48), None, Target("params", share), passes)
    assert result.met
    assert share - 0.03 <= result.after.params / result.before.params <= share


def test_under_a_budget_nothing_is_kept_that_grows_the_model():
    """Ranks that pay alone need not pay beside narrower layers."""
    budget = 0.1
    model, x = mlp([64, 128, 128, 128, 64], "Tanh"), correlated(500, 64)
    narrower = run(model, x, budget, passes=[NarrowFfn()])
    both = run(model, x, budget, passes=[NarrowFfn(), FactorLinear()])
    assert both.met
    assert all(entry.saving.params > 0 for entry in kept(both))
    assert both.after.params <= 1.2 * narrower.after.params


def test_few_rows_do_as_the_weights_are_known():
    """Only which directions matter is read from the data; a fit to 20 rows would know nothing of the others."""
    model, item = mlp([40, 64, 48], "Tanh"), FactorLinear()
    few, many = (data_for(model, rows(count, 40)) for count in (30, 3000))
    fresh = open_data({"x": rows(500, 40, seed=9)}, model)
    losses = []
    for data in (few, many):
        proposal = offers(model, data, item)["y"][0]
        losses.append(
            compare(model, narrowed(model, item, proposal), fresh, ["rel-l2"], provider="cpu").overall[
                "rel-l2"
            ]
        )
    assert losses[0] < 2 * losses[1]


def test_factors_for_other_shapes_are_refused_but_sized():
    model, item = mlp([40, 64, 48]), FactorLinear()
    [_, offered] = offers(model, data_for(model, correlated(300, 40)), item).values()
    mildest = offers(model, data_for(model, rows(300, 40)), NarrowFfn())["y"][-1]
    narrower = narrowed(model, NarrowFfn(), mildest)
    with pytest.raises(
        ModelError, match=r"y: factors for 64 x 48 are none of what is \d+ x 48 behind other rewrites"
    ):
        apply(narrower, item, offered[-1])
    before = size(narrower).params
    apply(narrower, item, offered[-1], outline=True)
    width, rank = (int(variant.split()[1]) for variant in (mildest.variant, offered[-1].variant))
    assert before - size(narrower).params == width * 48 - rank * (width + 48) > 0


def test_refit_gives_the_same_rank_again():
    model, item = mlp([40, 64, 48]), FactorLinear()
    data = data_for(model, correlated(400, 40))
    for site in item.sites(model):
        statistics = collect(model, item.requests(site), data, provider="cpu", reference=model)
        offered = list(item.propose(site, statistics))
        again = item.refit(site, offered[1], statistics)
        assert isinstance(again, Proposal)
        assert (again.variant, again.saving) == (offered[1].variant, offered[1].saving)
        assert again.predicted_error == pytest.approx(offered[1].predicted_error)


def test_a_site_found_by_its_name_is_the_one_found_with_all_others():
    for model in (attention_like(), mlp([40, 64, 48]), of_low_rank("matmul"), pointwise()):
        item = FactorLinear()
        for site in item.sites(model):
            alone = item.site(model, site.name)
            assert alone.nodes == site.nodes
            assert item.requests(alone) == item.requests(site)
            assert (alone.behind is None) == (site.behind is None)
        assert item.site(model, "nothing") is None
        assert item.site(model, "x") is None
    assert FactorLinear().site(attention_like(), "k") is None  # part of the site of q


def test_off_and_over_budget_mean_byte_identical(tmp_path):
    model = mlp([40, 64, 48])
    before = file_bytes(model, tmp_path)
    tight = run(model, rows(200, 40), 1e-6)
    assert not kept(tight)
    assert any("over the budget of 1e-06" in reason for reason in reasons(tight))
    assert file_bytes(tight.model, tmp_path) == before


def test_never_runs_without_data():
    result = optimize(mlp([40, 64, 48]), passes=[FactorLinear()])
    assert not kept(result)
    assert any("--calib" in reason for reason in reasons(result))


def test_what_is_small_wide_or_shared_is_declined_by_name(monkeypatch):
    [small] = FactorLinear().sites(mlp([40, 8]))
    assert isinstance(small, Decline)
    assert small.reason == "40 x 8 is small: two products would take longer than one"
    [wide] = FactorLinear(align=64).sites(mlp([40, 64]))
    assert wide.reason == "no multiple of 64 is a rank that saves anything"
    net = Net(1)
    weight = net.const(net.random.normal(size=(40, 40)), "w")
    net.op("MatMul", net.op("Tanh", net.op("MatMul", "x", weight)), weight, name="y")
    twice = list(FactorLinear().sites(net.model({"x": ["n", 40]}, {"y": ["n", 40]})))
    assert [site.reason for site in twice] == ["others read w, too, which would be stored twice"] * 2
    monkeypatch.setattr("onnxcollapse.passes.factor_linear.MOST", 50)
    [site] = FactorLinear().sites(mlp([40, 64]))
    assert site.reason == "40 x 64 is more than the 50 channels whose moments can be held"


def test_ranks_are_multiples_of_align_below_the_one_that_saves_nothing():
    [site] = FactorLinear().sites(mlp([96, 96]))
    ranks = FactorLinear(align=4)._ranks(site)
    assert site.pays_below == 48
    assert ranks == sorted(ranks, reverse=True)
    assert 5 < len(ranks) <= len(SHARES)
    assert all(rank % 4 == 0 and 0 < rank < 48 for rank in ranks)


def test_half_precision_stays_half():
    net = Net(3)
    cast = net.op("Cast", "x", to=onnx.TensorProto.FLOAT16)
    product = net.op("MatMul", cast, net.const(thin(net, 40, 48), dtype=np.float16))
    net.op("Cast", product, name="y", to=onnx.TensorProto.FLOAT)
    model = net.model({"x": ["n", 40]}, {"y": ["n", 48]})
    result = run(model, rows(400, 40), 5e-3)
    assert [entry.variant for entry in kept(result)] == ["rank 8"]
    assert {value.dtype for value in result.model.graph.initializers.values()} == {ir.DataType.FLOAT16}
    assert len(linears(result.model.graph)) == 2


def test_two_runs_write_the_same_bytes(tmp_path):
    model, x = mlp([40, 64, 48]), correlated(300, 40)
    first, second = (run(model, x, 0.2) for _ in range(2))
    assert kept(first)
    assert file_bytes(first.model, tmp_path) == file_bytes(second.model, tmp_path)


def test_options_come_from_text():
    assert parse("factor-linear:align=16") == FactorLinear(align=16)
    with pytest.raises(OptionError, match="align 0 must be 1 or more"):
        parse("factor-linear:align=0")


def test_with_little_memory_each_site_is_still_fitted_behind_what_came_before_it(monkeypatch):
    """Sums of three Linears that read one tensor come in several shares then."""
    model, real = attention_like(full=True), FactorLinear.refit
    x = np.random.default_rng(1).normal(size=(200, 6, 40)).astype(np.float32)
    fitted: list[str] = []

    def noted(self, site, proposal, statistics):
        fitted.append(site.name)
        return real(self, site, proposal, statistics)

    monkeypatch.setattr(FactorLinear, "refit", noted)
    budget, found = Budget(None, target=Target("params", 0.4)), []
    for memory in (None, 1_000_000):
        fitted.clear()
        result = optimize(
            model, data_for(model, x), budget=budget, passes=[FactorLinear()], provider="cpu", memory=memory
        )
        found.append((len(kept(result)), sorted(fitted), result.error))
    assert found[0][0] > 1 and found[0][:2] == found[1][:2]
    assert found[0][2] == pytest.approx(found[1][2], rel=1e-3)
