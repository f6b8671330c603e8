# SPDX-License-Identifier: Apache-2.0
"""The search for the best selection under a budget or for a target."""

from __future__ import annotations

import logging

import numpy as np
import pytest
from onnxcollapse.passes.collapse_ffn import CollapseFfn
from onnxcollapse.passes.narrow_ffn import NarrowFfn

from onnxcollapse import Budget, Target, open_data, optimize
from onnxcollapse.model import size
from onnxcollapse.rewriting.fitting import Fitter
from onnxcollapse.rewriting.pricing import Pricer
from onnxcollapse.structure import hidden_layers
from tests.passes.narrowing import correlated, heldout
from tests.support import Net, data_for, mlp, outputs, relative, rows
from tests.verification.decoders import decoder, windows


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR)


def shrink(model, x, error, target=None, passes=None):
    budget = Budget(error, target=None if target is None else Target(*target))
    passes = passes or [NarrowFfn(skip=False)]
    return optimize(model, data_for(model, x), budget=budget, passes=passes, provider="cpu")


def kept(result):
    return {entry.site: entry.variant for entry in result.journal.of("kept")}


def widths(model):
    return [layer.width for layer in hidden_layers(model.graph)[0]]


@pytest.mark.parametrize("error", [0.05, 0.3])
def test_a_budget_alone_is_spent_but_not_overspent(error):
    model, x = mlp([16, 64, 64, 8]), correlated(400, 16)
    result = shrink(model, x, error)
    assert result.met
    assert 0.75 * error < result.error <= error
    held = heldout(data_for(model, x))
    measured = relative(outputs(result.model, x=held)["y"], outputs(model, x=held)["y"])
    assert result.error == pytest.approx(measured, rel=1e-3)
    assert measured <= error * 1.001


def test_a_larger_budget_saves_more():
    model, x = mlp([16, 64, 64, 8]), correlated(300, 16)
    sizes = [shrink(model, x, error).after.params for error in (0.05, 0.3)]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 2


@pytest.mark.parametrize("share", [0.5])
def test_a_target_is_met_closely_where_the_savings_of_neighbours_overlap(share):
    """Each Linear between two hidden layers is counted by both, so that sums of savings promise too much."""
    model, x = mlp([32, *[64] * 5, 8]), correlated(200, 32)
    result = shrink(model, x, None, ("params", share), [NarrowFfn(skip=False, align=1)])
    assert result.met
    assert share - 0.015 <= result.after.params / result.before.params <= share
    assert len(kept(result)) > 1


@pytest.mark.parametrize("measure", ["flops", "bytes"])
def test_targets_of_other_measures_are_met(measure):
    model, x = mlp([32, 128, 128, 16]), correlated(300, 32)
    result = shrink(model, x, None, (measure, 0.5), [NarrowFfn(skip=False, align=1)])
    before, after = result.extent(measure)
    assert result.met
    assert 0.48 <= after / before <= 0.5


def test_a_target_out_of_reach_is_not_met_and_what_saves_most_is_kept():
    model, x = mlp([16, 64, 8]), correlated(300, 16)
    result = shrink(model, x, None, ("params", 0.01))
    assert not result.met
    assert widths(result.model) == [1]


def test_a_budget_beside_a_target_is_a_cap():
    model, x = mlp([16, 64, 64, 8]), correlated(400, 16)
    loose, tight = (shrink(model, x, error, ("params", 0.3)) for error in (None, 0.15))
    assert loose.met
    assert loose.error > 0.15
    assert not tight.met
    assert tight.error <= 0.15
    assert 0.3 * size(model).params < tight.after.params < size(model).params


def one_redundant_layer():
    """x -> 64 copies of 8 neurons -> 16 -> 64 neurons of their own -> y, equally large."""
    net = Net(7)
    picks = np.tile(np.arange(8), 8)
    up, bias = net.random.normal(size=(16, 8))[:, picks] / 4, net.random.normal(size=8)[picks] * 0.1
    first = net.dense(net.op("Relu", net.linear("x", up, bias)), 64, 16, name="first")
    first = net.op("Add", "x", first)
    net.dense(net.op("Tanh", net.dense(first, 16, 64)), 64, 16, name="y")
    return net.model({"x": ["n", 16]}, {"y": ["n", 16]})


@pytest.mark.parametrize("error, target", [(None, ("params", 0.62)), (0.02, None)])
def test_the_redundant_layer_pays_for_the_essential_one(error, target):
    model, x = one_redundant_layer(), rows(800, 16)
    result = shrink(model, x, error, target)
    assert result.met
    assert kept(result)["first"] == "keep 8"
    uniform = optimize(
        model,
        data_for(model, x),
        budget=Budget(None, target=Target("params", result.after.params / result.before.params + 0.01)),
        passes=[NarrowFfn(criterion="random", skip=False)],
        provider="cpu",
    )
    assert result.error < 0.2 * uniform.error
    assert widths(result.model)[1] >= 56


def test_passes_compete_for_the_same_site():
    """A block that is linear on its data is collapsed, one that is not is narrowed."""
    net = Net(3)
    linear = net.dense(net.op("PRelu", net.dense("x", 16, 64), net.const([0.99])), 64, 16, name="linear")
    net.dense(net.op("Relu", net.dense(net.op("Tanh", linear), 16, 64)), 64, 16, name="y")
    model = net.model({"x": ["n", 16]}, {"y": ["n", 16]})
    result = shrink(model, correlated(800, 16), 0.1, passes=[NarrowFfn(skip=False), CollapseFfn(ranks=False)])
    by_pass = {entry.site: entry.pass_name.split(":")[0] for entry in result.journal.of("kept")}
    assert (
        by_pass.items() >= {"linear": "collapse-ffn", "y": "narrow-ffn"}.items()
    )  # later rounds may add to it
    assert result.error <= 0.1


def test_a_model_without_declared_types_between_its_layers_is_rewritten_like_one_with():
    net = Net()
    h = net.dense("x", 16, 16, name="h0")
    for layer in range(3):
        update = net.dense(net.op("Relu", net.dense(h, 16, 64)), 64, 16, name=f"u{layer}")
        h = net.op("Add", h, update, name=f"h{layer + 1}")
    net.dense(h, 16, 4, name="y")
    model = net.model({"x": ["n", 16]}, {"y": ["n", 4]})
    assert all(value.type is None for node in model.graph for value in node.outputs if value.name != "y")
    result = shrink(model, correlated(400, 16), None, ("params", 0.6))
    assert result.met
    assert set(kept(result)) == {"u0", "u1", "u2"}


def test_a_site_that_reads_what_another_pass_has_renamed_is_fitted_to_it():
    """The collapsed block's input is the narrowed layer's hidden tensor, which loses its name with its channels."""
    net = Net(3)
    hidden = net.dense(net.op("Relu", net.dense("x", 16, 64)), 64, 96)
    net.dense(net.op("PRelu", hidden, net.const([0.97])), 96, 24, name="y")
    model = net.model({"x": ["n", 16]}, {"y": ["n", 24]})
    result = shrink(model, correlated(600, 16), 0.2, passes=[NarrowFfn(), CollapseFfn(ranks=False)])
    names = {entry.pass_name.split(":")[0] for entry in result.journal.of("kept")}
    assert names == {"narrow-ffn", "collapse-ffn"}
    assert not [entry for entry in result.journal if "is not in the model's main graph" in entry.reason]
    assert 0.1 < result.error <= 0.2


def test_what_neighbours_save_adds_up_to_what_is_saved():
    """Alone both would count the weights between them, which either of them cuts."""
    model, x = mlp([16, 64, 64, 8]), correlated(400, 16)
    result = shrink(model, x, 0.3)
    saved = [entry.saving for entry in result.journal.of("kept")]
    assert len(saved) >= 2
    assert sum(saving.params for saving in saved) == result.before.params - result.after.params
    assert sum(saving.bytes for saving in saved) == result.before.bytes - result.after.bytes
    assert sum(saving.flops for saving in saved) == result.flops_before - result.flops_after


def test_what_was_left_out_for_want_of_budget_says_so():
    model, x = mlp([64] * 5), rows(200, 64)
    result = shrink(model, x, 0.3)
    reasons = [entry.reason for entry in result.journal.of("declined")]
    assert any(reason.endswith("the budget has no room for it") for reason in reasons)
    assert not any("rounds ended" in reason for reason in reasons)


def test_later_rounds_count_the_error_of_earlier_ones_once():
    """One round leaves 8 channels and four fifths of the budget's square: what the others add still fits."""
    model, x = mlp([64] * 7), rows(300, 64)
    result = shrink(model, x, 0.6)
    assert result.met
    assert min(widths(result.model)) < 8


def test_nothing_is_priced_or_built_twice_for_one_model(monkeypatch):
    """Rounds that keep nothing leave the model as it is, and with it what is known of it.

    There are several where prices are in another metric, so that they only give the order.
    """
    tried, priced = [], []
    realize, price = Fitter.realize, Pricer.price

    def noting_selections(self, start, chosen):
        tried.append((start.to_bytes(), tuple(sorted(item.key for item in chosen))))
        return realize(self, start, chosen)

    def noting_models(self, candidates, *rest):
        priced.append(self._model.to_bytes())
        return price(self, candidates, *rest)

    monkeypatch.setattr(Fitter, "realize", noting_selections)
    monkeypatch.setattr(Pricer, "price", noting_models)
    model = decoder((0, 1), hidden=48)
    data = open_data({"input_ids": windows(36)}, model, batch_size=12)
    budget = Budget(0.2, "continuation")
    result = optimize(model, data, budget=budget, passes=[NarrowFfn(skip=False)], provider="cpu")
    assert result.journal.of("kept")
    assert len([entry for entry in result.journal if entry.outcome == "rolled-back"]) > 2
    assert len(set(tried)) == len(tried) > 10
    assert len(set(priced)) == len(priced) < 6
