# SPDX-License-Identifier: Apache-2.0
"""narrow-ffn by the published criterion (arXiv 2506.21146), and its controls."""

from __future__ import annotations

import logging
from itertools import pairwise

import numpy as np
import pytest
from onnxcollapse.passes.narrow_ffn import NarrowFfn

from onnxcollapse.errors import OptionError
from onnxcollapse.model import size
from onnxcollapse.rewriting.registry import parse
from onnxcollapse.structure import hidden_layers
from tests.passes.narrowing import (
    always_on,
    at,
    correlated,
    gelu_block,
    heldout,
    kept,
    narrowed,
    offers,
    reasons,
    redundant_conv,
    run,
    site_error,
    swiglu,
)
from tests.structure.hidden_nets import Builder
from tests.support import data_for, mlp, outputs, relative, rows


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR)


def published(model, x, budget=0.5, threshold=1.0):
    return run(model, x, budget, criterion="activation-rate", threshold=threshold)


def close(result, model, x, limit=1e-5):
    return relative(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"]) < limit


def test_linear_neurons_leave_and_the_outputs_are_the_same_where_they_are_on():
    model, x = always_on([8, 40, 6], on=0.75), rows(400, 8)
    rates = (at(model, "a0", x) > 0).mean(0)
    assert (rates == 1).sum() == 30
    result = published(model, x)
    [entry] = kept(result)
    assert entry.variant == "keep 10, full path"
    assert "30 neurons with an activation rate of 1 or more moved to a skip path" in entry.reason
    assert entry.predicted_error < 1e-4
    assert result.after.params == (8 * 10 + 10) + (10 + 8) * 6 + 6
    assert close(result, model, rows(200, 8, seed=5))


def test_what_the_skip_does_not_pay_for_is_refused_with_the_numbers():
    model, x = always_on([24, 40, 24], on=0.25), rows(400, 24)
    result = published(model, x)
    assert not kept(result)
    assert reasons(result) == [
        "does not pay: 10 of 40 neurons have an activation rate of 1 or more, and a skip path of 24 x 24 pays from "
        "more than p q / (p + q + 1) = 11.8 on"
    ]


@pytest.mark.parametrize("on, fires", [(12, True), (11, False)])
def test_break_even_is_where_the_parameters_say(on, fires):
    """|S| (p + q + 1) > p q: 12 of 24 x 24 save 588 - 576, 11 would cost 37."""
    model = always_on([24, 40, 24], on=on / 40)
    result = published(model, rows(400, 24))
    assert bool(kept(result)) is fires
    if fires:
        assert result.before.params - result.after.params == 12 * 49 - 24 * 24


def test_the_skip_of_the_second_of_two_layers_spans_the_input_and_the_skip_of_the_first():
    model, x = always_on([8, 40, 40, 6], on=0.75), rows(400, 8)
    linear = [int((at(model, f"a{i}", x) > 0).all(0).sum()) for i in range(2)]
    result = published(model, x)
    left = [40 - count for count in linear]
    assert [entry.variant for entry in kept(result)] == [f"keep {count}, full path" for count in left]
    first, second = left
    joined = first + 8
    assert result.after.params == (8 * first + first) + (joined + 1) * second + (second + joined) * 6 + 6
    joins = [node for node in result.model.graph if node.op_type == "Concat"]
    assert len(joins) == 2
    assert joins[0].outputs[0] in joins[1].inputs, "the second skip reads what the first one joined"
    fresh = rows(200, 8, seed=5)
    on = [np.flatnonzero((at(model, f"a{i}", x) > 0).all(0)) for i in range(2)]
    everywhere = [(at(model, f"a{i}", fresh)[:, s] > 0).all(1) for i, s in enumerate(on)]
    assert np.all(everywhere)
    assert close(result, model, fresh)


def test_layers_of_nothing_but_linear_neurons_become_one_map_with_its_bias():
    model, x = always_on([8, 40, 40, 6]), rows(400, 8)
    result = published(model, x)
    assert len(kept(result)) == 2
    assert result.after.params == 8 * 6 + 6
    assert {node.op_type for node in result.model.graph} <= {"MatMul", "Add", "Gemm"}
    y = outputs(result.model, x=np.zeros((1, 8), np.float32))["y"]
    np.testing.assert_allclose(y, outputs(model, x=np.zeros((1, 8), np.float32))["y"], rtol=1e-4)
    assert np.abs(y).min() > 1.0, "the bias is most of it"
    assert close(result, model, rows(200, 8, seed=5))


def test_a_lower_threshold_takes_more_neurons_and_is_no_longer_exact():
    """Ten neurons are off for a few rows in a hundred."""
    model, x = always_on([8, 40, 6], on=0.75, rest=2.0), rows(1000, 8)
    rates = (at(model, "a0", x) > 0).mean(0)
    more = int((rates >= 0.95).sum())
    assert 30 <= (rates == 1).sum() < more <= 40
    exact, close_to = published(model, x), published(model, x, threshold=0.95)
    assert kept(exact)[0].variant == f"keep {40 - int((rates == 1).sum())}, full path"
    assert kept(close_to)[0].variant == f"keep {40 - more}, full path"
    assert exact.error < 1e-5 < 1e-4 < close_to.error
    data = data_for(model, x)
    item = NarrowFfn(criterion="activation-rate", threshold=0.95)
    [[offer]] = offers(model, data, item).values()
    assert site_error(model, item, offer, data) == pytest.approx(offer.predicted_error, rel=1e-3)


def direct_conv():
    net = Builder()
    net.conv(net.op("Relu", net.conv("x", 3, 12, kernel=1)), 12, 5, kernel=3, name="y")
    return net.model({"x": ["n", 3, 8, 8]}, {"y": ["n", 5, 8, 8]})


@pytest.mark.parametrize(
    "model, shape, reason",
    [
        (gelu_block(), (50, 4, 8), "activation Div-Erf-Add-Mul is not linear above zero"),
        (swiglu(), (50, 4, 8), "a gated block is not linear where it is on"),
        (redundant_conv(3), (50, 3, 8, 8), "would need a wider kernel"),
        (direct_conv(), (50, 3, 8, 8), "would need a wider kernel"),
        (mlp([8, 24, 5], "LeakyRelu"), (50, 8), "does not pay: 0 of 24 neurons"),
        (mlp([8, 24, 5], "Tanh"), (50, 8), "activation Tanh is not linear above zero"),
    ],
)
def test_what_it_does_not_know_is_declined_by_name(model, shape, reason):
    result = published(model, np.random.default_rng(0).normal(size=shape).astype(np.float32))
    assert not kept(result)
    assert any(reason in found for found in reasons(result))


@pytest.mark.parametrize("threshold", ["0", "1.01", "-1", "nan"])
def test_a_threshold_outside_its_range_is_an_error(threshold):
    with pytest.raises(OptionError, match=r"pass 'narrow-ffn': threshold .* must lie in \(0, 1\]"):
        parse(f"narrow-ffn:criterion=activation-rate,threshold={threshold}")


# Controls


def choices(model, data, **options):
    item = NarrowFfn(**options)
    [offered] = offers(model, data, item).values()
    return item, {x.payload.choice.count: x for x in offered}


def test_magnitude_keeps_the_largest_norms():
    model = mlp([16, 64, 24])
    _, found = choices(model, data_for(model, correlated(400, 16)), criterion="magnitude")
    [layer] = hidden_layers(model.graph)[0]
    up, down = layer.block.up.matrix(), layer.block.down.matrix()
    scores = np.sqrt((up**2).sum(0) * (down**2).sum(1))
    assert len(found) > 4
    for count, offer in found.items():
        np.testing.assert_array_equal(offer.payload.keep, np.sort(np.argsort(-scores)[:count]))


def test_magnitude_of_conv_channels_counts_every_tap():
    model = direct_conv()
    x = np.random.default_rng(0).normal(size=(50, 3, 8, 8)).astype(np.float32)
    _, found = choices(model, data_for(model, x), criterion="magnitude")
    [layer] = hidden_layers(model.graph)[0]
    up, down = (x.weight.const_value.numpy().astype(np.float64) for x in (layer.sources[0], layer.consumer))
    scores = np.linalg.norm(up.reshape(12, -1), axis=1) * np.linalg.norm(down.transpose(1, 0, 2, 3).reshape(12, -1), axis=1)  # fmt: skip  # noqa: E501
    for count, offer in found.items():
        np.testing.assert_array_equal(offer.payload.keep, np.sort(np.argsort(-scores)[:count]))


def test_random_sets_are_nested_follow_the_seed_and_differ_from_layer_to_layer():
    model = mlp([16, 64, 24])
    data = data_for(model, correlated(400, 16))
    _, found = choices(model, data, criterion="random", refit_rest=False)
    _, again = choices(model, data, criterion="random", refit_rest=False)
    _, other = choices(model, data, criterion="random", refit_rest=False, seed=1)
    counts = sorted(found)
    for count in counts:
        np.testing.assert_array_equal(found[count].payload.keep, again[count].payload.keep)
        assert len(np.unique(found[count].payload.keep)) == count
    for small, large in pairwise(counts):
        assert set(found[small].payload.keep) < set(found[large].payload.keep)
    both = set(found) & set(other)
    assert both
    assert any(not np.array_equal(found[c].payload.keep, other[c].payload.keep) for c in both)
    chain = mlp([16, 64, 64, 24])
    item = NarrowFfn(criterion="random")
    first, second = offers(chain, data_for(chain, correlated(400, 16)), item).values()
    sets = [{x.payload.choice.count: x.payload.keep.tolist() for x in found} for found in (first, second)]
    shared = set(sets[0]) & set(sets[1])
    assert any(sets[0][count] != sets[1][count] for count in shared)


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
def test_without_a_refit_what_stays_is_bit_for_bit_what_was(criterion):
    model = mlp([16, 64, 24])
    data = data_for(model, correlated(400, 16))
    item, found = choices(model, data, criterion=criterion, refit_rest=False)
    [old] = hidden_layers(model.graph)[0]
    for offer in found.values():
        copy, keep = narrowed(model, item, offer), offer.payload.keep
        [new] = hidden_layers(copy.graph)[0]
        np.testing.assert_array_equal(new.block.up.matrix(), old.block.up.matrix()[:, keep])
        np.testing.assert_array_equal(new.block.up.offset(), old.block.up.offset()[keep])
        np.testing.assert_array_equal(new.block.down.matrix(), old.block.down.matrix()[keep])
        np.testing.assert_array_equal(new.block.down.offset(), old.block.down.offset())
        assert size(copy).params == size(model).params - offer.saving.params
        assert site_error(model, item, offer, data) == pytest.approx(offer.predicted_error, rel=1e-3)


def test_residual_beats_the_controls_at_the_same_width_and_a_refit_beats_none():
    model = mlp([16, 64, 24])
    data = data_for(model, correlated(600, 16))
    x = heldout(data)
    wanted = outputs(model, x=x)["y"]

    def error(count, **options):
        item, found = choices(model, data, **options)
        return relative(outputs(narrowed(model, item, found[count]), x=x)["y"], wanted)

    ours = error(16, skip=False)
    for criterion in ("magnitude", "random"):
        fitted, plain = (error(16, criterion=criterion, refit_rest=refit) for refit in (True, False))
        assert ours < 0.9 * fitted
        assert fitted < 0.7 * plain
