# SPDX-License-Identifier: Apache-2.0
"""narrow-ffn by residual: what is redundant leaves, and the error of the rest is known beforehand."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxcollapse.passes import narrow_ffn
from onnxcollapse.passes.narrow_ffn import NarrowFfn
from onnxcollapse.passes.narrowing_criteria import pays_from

from onnxcollapse import Decline, Model, Proposal, Target, optimize
from onnxcollapse.calibration import collect
from onnxcollapse.errors import OptionError
from onnxcollapse.model import size
from onnxcollapse.rewriting.registry import parse
from onnxcollapse.structure import hidden_layers
from tests.passes.narrowing import (
    correlated,
    gelu_block,
    images,
    kept,
    narrowed,
    offers,
    reasons,
    redundant_conv,
    redundant_mlp,
    run,
    site_error,
    swiglu,
)
from tests.structure.hidden_nets import NETS, Builder
from tests.support import Net, data_for, file_bytes, mlp, outputs, relative, rows


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR)


def tokens(samples, seed=1):
    return rows(4 * samples, 8, seed).reshape(samples, 4, 8)


REDUNDANT = {
    # name: model, rows, site, width that is enough, tolerance at fresh rows
    "gemm": (redundant_mlp, lambda seed: rows(400, 8, seed), "y", 6, 2e-4),
    "matmul": (lambda: redundant_mlp(spelling="matmul"), lambda seed: rows(400, 8, seed), "y", 6, 2e-4),
    "swiglu": (swiglu, lambda seed: tokens(200, seed), "y", 6, 1e-3),
    "residual gelu": (gelu_block, lambda seed: tokens(200, seed), "u", 6, 1e-3),
    "conv 1x1": (lambda: redundant_conv(1), lambda seed: images(60, seed), "y", 4, 2e-3),
    "conv 3x3": (lambda: redundant_conv(3), lambda seed: images(100, seed), "y", 4, 2e-3),
}


@pytest.mark.parametrize("case", REDUNDANT)
def test_redundant_channels_leave_and_the_outputs_stay(case):
    build, draw, site, enough, tolerance = REDUNDANT[case]
    model = build()
    result = run(model, draw(1), tolerance, skip=False)
    [entry] = kept(result)
    assert (entry.site, entry.variant) == (site, f"keep {enough}")
    layer = next(x for x in hidden_layers(result.model.graph)[0] if x.name == site)
    assert layer.width == enough
    saved = result.before.params - result.after.params
    assert saved > 0
    assert entry.saving.params == pytest.approx(
        saved, rel=0.01
    )  # interpolated between variants that were tried
    x = draw(9)
    assert relative(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"]) < 2 * tolerance


def test_conv_whose_positions_are_flattened_loses_whole_channels():
    """The Gemm behind it has 256 features to fit, too many for the rows to be exact."""
    model = redundant_conv(3, "flatten")
    result = run(model, images(600), 0.01, skip=False)
    assert [entry.variant for entry in kept(result)] == ["keep 4"]
    assert result.after.params == 4 * 27 + 4 + 16 + 4 * 64 * 5 + 5
    x = images(50, seed=9)
    assert relative(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"]) < 0.02


def test_both_neighbours_of_a_linear_shrink():
    """The Linear between two hidden layers loses rows to one and columns to the other."""
    net, value = Net(2), "x"
    for width in (24, 24):
        d_in = 8 if value == "x" else 24
        matrix = net.random.normal(size=(d_in, 6)) / d_in**0.5
        offset = np.zeros(6)
        value = net.op("Relu", net.linear(value, np.tile(matrix, width // 6), np.tile(offset, width // 6)))
    net.dense(value, 24, 5, name="y")
    model = net.model({"x": ["n", 8]}, {"y": ["n", 5]})
    result = run(model, rows(400, 8), 1e-3)
    sizes = [layer.width for layer in hidden_layers(result.model.graph)[0]]
    assert sizes == [6, 6]
    assert result.after.params == (8 * 6 + 6) + (6 * 6 + 6) + (6 * 5 + 5)
    x = rows(50, 8, seed=9)
    assert relative(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"]) < 2e-3


def test_a_neighbour_of_a_layer_with_a_path_beside_is_fitted_to_what_it_was_asked_for():
    """A path joins its input to the features, and the layer behind is then the neighbour of none any more."""
    model = mlp([16, 64, 48, 8], "LeakyRelu", seed=2)
    result = run(model, rows(400, 16), None, target=Target("params", 0.4))
    assert result.met
    variants = {entry.site: entry.variant for entry in kept(result)}
    assert variants["gemm2"].endswith("path")
    assert variants["y"].startswith("keep")
    x = rows(400, 16, seed=9)
    assert relative(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"]) < 0.4


def gated() -> Model:
    net = Net()
    gate = net.dense("x", 16, 48)
    silu = net.op("Mul", gate, net.op("Sigmoid", gate))
    net.linear(
        net.op("Mul", silu, net.dense("x", 16, 48)), net.random.normal(size=(48, 8)), np.ones(8), name="y"
    )
    return net.model({"x": ["n", 16]}, {"y": ["n", 8]})


def self_gated_conv() -> Model:
    net = Builder()
    z = net.conv("x", 3, 16)
    net.conv(net.op("Mul", z, net.op("Sigmoid", z)), 16, 5, name="y")
    return net.model({"x": ["n", 3, 8, 8]}, {"y": ["n", 5, 8, 8]})


def gated_conv() -> Model:
    net = Builder()
    gate, up = (net.conv("x", 3, 32, kernel=1) for _ in range(2))
    net.conv(net.op("Mul", net.op("Sigmoid", gate), up), 32, 5, kernel=1, name="y")
    return net.model({"x": ["n", 3, 8, 8]}, {"y": ["n", 5, 8, 8]})


MEASURED = {
    # name: model, rows, paths that must be among what is offered
    "plain": (lambda: mlp([16, 64, 24]), lambda: correlated(400, 16), {"none", "full", "low"}),
    "gated": (gated, lambda: correlated(400, 16), {"none", "full", "low"}),
    "chain": (lambda: mlp([16, 64, 48, 8]), lambda: correlated(400, 16), {"none", "full", "low"}),
    "conv": (self_gated_conv, lambda: images(60), {"none"}),
    "gated conv": (gated_conv, lambda: images(60), {"none", "full", "low"}),
    "pooled": (lambda: redundant_conv(3), lambda: images(60), {"none"}),
    "flat": (lambda: redundant_conv(3, "flatten"), lambda: images(200), {"none"}),
}


@pytest.mark.parametrize("case", MEASURED)
def test_the_error_known_beforehand_is_the_one_measured_on_the_held_out_rows(case):
    build, draw, paths = MEASURED[case]
    model, item = build(), NarrowFfn()
    data = data_for(model, draw())
    found = [offer for offered in offers(model, data, item).values() for offer in offered]
    assert {offer.payload.choice.path for offer in found} == paths
    clear = [offer for offer in found if offer.predicted_error > 5e-3]  # less is lost in float32 sums
    for path in paths:
        for offer in [x for x in clear if x.payload.choice.path == path][:4]:
            measured = site_error(model, item, offer, data)
            assert measured == pytest.approx(offer.predicted_error, rel=1e-3), offer.variant


def test_savings_known_beforehand_are_those_of_the_rewritten_model():
    model, item = gated(), NarrowFfn()
    data = data_for(model, correlated(400, 16))
    [offered] = offers(model, data, item).values()
    for offer in offered:
        after = size(narrowed(model, item, offer))
        assert offer.saving.params == size(model).params - after.params > 0
        assert offer.saving.bytes >= size(model).bytes - after.bytes - 64  # a Concat's attributes and no more


def test_offers_are_those_that_no_other_one_beats_in_both():
    model = mlp([16, 64, 24])
    [offered] = offers(model, data_for(model, correlated(400, 16)), NarrowFfn()).values()
    order = sorted(offered, key=lambda offer: offer.saving.params)
    errors = [offer.predicted_error for offer in order]
    assert errors == sorted(errors)
    assert len({offer.variant for offer in offered}) == len(offered) > 5


def test_a_path_is_offered_only_where_it_pays():
    model = mlp([16, 64, 24])
    [layer] = hidden_layers(model.graph)[0]
    assert pays_from(layer) == pytest.approx(16 * 24 / (16 + 24 + 1))
    [offered] = offers(model, data_for(model, correlated(400, 16)), NarrowFfn()).values()
    full = [x.payload.choice.count for x in offered if x.payload.choice.path == "full"]
    assert full
    assert all(64 - count > pays_from(layer) for count in full)
    narrow = mlp([16, 8, 24])  # 8 neurons are fewer than 9.4
    [offered] = offers(narrow, data_for(narrow, correlated(400, 16)), NarrowFfn()).values()
    assert {x.payload.choice.path for x in offered} == {"none"}
    [offered] = offers(model, data_for(model, correlated(400, 16)), NarrowFfn(skip=False)).values()
    assert {x.payload.choice.path for x in offered} == {"none"}


def test_a_linear_region_is_reproduced_by_a_path():
    """16 neurons would do it as well, at more parameters than a few and a path."""
    model, item = mlp([16, 64, 24], "PRelu", slopes=[[1.0]]), NarrowFfn(align=1)
    data = data_for(model, rows(2000, 16))
    [offered] = offers(model, data, item).values()
    cheapest = max((x for x in offered if x.predicted_error < 1e-3), key=lambda x: x.saving.params)
    assert cheapest.payload.choice.path == "full"
    assert cheapest.payload.choice.count < 8
    assert site_error(model, item, cheapest, data) < 5e-4  # the ridge's own bias


def test_off_and_over_budget_mean_byte_identical(tmp_path):
    model = mlp([8, 64, 8])
    before = file_bytes(model, tmp_path)
    off = optimize(model, data_for(model, rows(100, 8)), passes=[], provider="cpu")
    assert file_bytes(off.model, tmp_path) == before
    tight = run(model, rows(200, 8), 1e-6)
    assert not kept(tight)
    assert any("over the budget of 1e-06" in reason for reason in reasons(tight))
    assert file_bytes(tight.model, tmp_path) == before


def test_never_runs_without_data():
    result = optimize(mlp([6, 40, 5]), passes=[NarrowFfn()])
    assert not kept(result)
    assert any("--calib" in reason for reason in reasons(result))


def test_one_channel_is_declined():
    model = mlp([8, 1, 8])
    assert reasons(run(model, rows(100, 8))) == ["1 channel cannot become fewer"]


def test_more_features_than_can_be_summed_are_declined(monkeypatch):
    monkeypatch.setattr(narrow_ffn, "MOST_FEATURES", 63)
    result = run(mlp([8, 64, 8]), rows(100, 8))
    assert any(reason.startswith("64 features are more than the 63") for reason in reasons(result))


def test_what_structure_refuses_is_declined_with_its_reason():
    net = Net()
    hidden = net.op("Relu", net.dense("x", 8, 40), name="hidden")
    net.dense(hidden, 40, 5, name="y")
    net.op("Neg", hidden, name="spy")
    model = net.model({"x": ["n", 8]}, {"y": ["n", 5], "spy": ["n", 40]})
    [reason] = reasons(run(model, rows(100, 8)))
    assert "hidden tensor hidden is also used by node_spy (Neg)" in reason


@pytest.mark.parametrize("align, widths", [(8, 8), (16, 16), (1, 1)])
def test_widths_are_multiples_of_align_where_the_layer_is_wide(align, widths):
    model = mlp([16, 128, 24])
    [offered] = offers(model, data_for(model, correlated(300, 16)), NarrowFfn(align=align)).values()
    counts = [offer.payload.choice.count for offer in offered]
    assert all(count % widths == 0 for count in counts)
    if align == 1:
        assert any(count % 8 for count in counts)


def test_narrow_layers_are_not_aligned():
    model = mlp([16, 40, 24])
    [offered] = offers(model, data_for(model, correlated(300, 16)), NarrowFfn()).values()
    assert any(offer.payload.choice.count % 8 for offer in offered)


def half_precision() -> Model:
    net = Net(3)
    up = np.tile(net.random.normal(size=(8, 6)) / 3, 4)
    cast = net.op("Cast", "x", to=onnx.TensorProto.FLOAT16)
    product = net.op("MatMul", cast, net.const(up, dtype=np.float16))
    z = net.op("Add", product, net.const(np.full(24, 0.1), dtype=np.float16))
    down = net.const(net.random.normal(size=(24, 5)), dtype=np.float16)
    net.op("Cast", net.op("MatMul", net.op("Relu", z), down), name="y", to=onnx.TensorProto.FLOAT)
    return net.model({"x": ["n", 8]}, {"y": ["n", 5]})


def test_half_precision_stays_half_and_is_measured_in_it():
    model, x = half_precision(), rows(400, 8)
    result = run(model, x, 5e-3, skip=False)
    assert [entry.variant for entry in kept(result)] == ["keep 6"]
    [layer] = hidden_layers(result.model.graph)[0]
    assert layer.consumer.dtype == ir.DataType.FLOAT16
    kinds = {value.dtype for value in result.model.graph.initializers.values()}
    assert kinds == {ir.DataType.FLOAT16}
    held = np.concatenate([batch["x"] for batch in data_for(model, x).batches("heldout")])
    measured = relative(outputs(result.model, x=held)["y"], outputs(model, x=held)["y"])
    assert result.error == pytest.approx(measured, rel=1e-3)
    assert 1e-5 < result.error < 5e-3  # rounding of float16 shows


def test_two_runs_write_the_same_bytes(tmp_path):
    model, x = mlp([16, 64, 48, 8]), correlated(300, 16)
    first, second = (run(model, x, 0.2) for _ in range(2))
    assert kept(first)
    assert file_bytes(first.model, tmp_path) == file_bytes(second.model, tmp_path)
    assert [entry.to_dict() for entry in first.journal] == [entry.to_dict() for entry in second.journal]


def test_signature_stays():
    model = redundant_mlp()
    assert run(model, rows(200, 8)).model.signature() == model.signature()


def test_options_come_from_text():
    assert parse("narrow-ffn:criterion=magnitude,refit-rest=false,align=4") == NarrowFfn(
        criterion="magnitude", refit_rest=False, align=4
    )
    with pytest.raises(OptionError, match=r"takes residual\|activation-rate\|magnitude\|random"):
        parse("narrow-ffn:criterion=guess")
    with pytest.raises(OptionError, match="align 0 must be 1 or more"):
        parse("narrow-ffn:align=0")
    with pytest.raises(OptionError, match="seed -1 must be 0 or more"):
        parse("narrow-ffn:criterion=random,seed=-1")


CHAINS = {
    "chain": lambda: mlp([4, 6, 7, 5], "Tanh"),
    "long chain": lambda: mlp([4, 6, 7, 8, 9, 5], "Relu", spelling="matmul"),
}


@pytest.mark.parametrize("case", [*NETS, *CHAINS])
def test_a_site_found_by_its_name_is_the_one_found_with_all_others(case):
    model = (CHAINS[case] if case in CHAINS else NETS[case][0])()
    item = NarrowFfn()
    sites = [site for site in item.sites(model) if not isinstance(site, Decline)]
    assert sites
    for site in sites:
        alone = item.site(model, site.name)
        assert alone.name == site.name
        assert alone.nodes == site.nodes
        assert (alone.chained, alone.skippable) == (site.chained, site.skippable)
        names = [None if x.after is None else x.after.name for x in (alone, site)]
        assert names[0] == names[1]
        assert item.requests(alone) == item.requests(site)
    assert item.site(model, "nothing") is None


def test_refit_gives_the_same_variant_again():
    model = mlp([16, 64, 24])
    data, item = data_for(model, correlated(400, 16)), NarrowFfn()
    [offered] = offers(model, data, item).values()
    [site] = item.sites(model)
    statistics = collect(model, item.requests(site), data, provider="cpu", reference=model)
    for offer in offered[::3]:
        again = item.refit(site, offer, statistics)
        assert isinstance(again, Proposal)
        assert (again.variant, again.saving) == (offer.variant, offer.saving)
        assert again.predicted_error <= offer.predicted_error * 1.05


def test_weights_on_the_left_are_found_where_no_shapes_are_declared():
    net, h = Net(0), "x"
    for block in range(3):
        up, down = (net.const(net.random.normal(size=shape) / 4) for shape in ((24, 8), (8, 24)))
        update = net.op("MatMul", down, net.op("Relu", net.op("MatMul", up, h)), name=f"u{block}")
        h = net.op("Add", h, update)
    net.op("Identity", h, name="y")
    model = net.model({"x": ["n", 8, 6]}, {"y": ["n", 8, 6]})
    x = rows(200, 48).reshape(200, 8, 6)
    result = run(model, x, None, target=Target("params", 0.5), align=1)
    assert result.met
    assert {entry.site for entry in kept(result)} == {"u0", "u1", "u2"}
    assert not any("is gone" in reason for reason in reasons(result))
