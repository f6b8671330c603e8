# SPDX-License-Identifier: Apache-2.0
"""Variants that are measured beside each other in one walk against each measured whole."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxcollapse import open_data
from onnxcollapse.calibration import cut_points
from onnxcollapse.errors import ModelError
from onnxcollapse.verification import Trials, Variant, Verifier
from tests.support import LAYERS, WIDTH, residual

rng = np.random.default_rng(0)


def data_for(model):
    feeds = {
        name: rng.standard_normal((40, width)).astype(np.float32) for name, width in (("x", WIDTH), ("s", 3))
    }
    return open_data(feeds, model, batch_size=3)


def scaled(layer, factor):
    """Multiplies what a layer's Relu gives, in a graph or in a segment of it."""

    def change(model):
        node = next(node for node in model.graph if node.outputs[0].name == f"a{layer}")
        weight = node.inputs[0].producer().inputs
        for value in weight[1:]:
            tensor = value.const_value.numpy()
            model.graph.initializers[value.name].const_value = ir.tensor(tensor * np.float32(factor))
        return f"told {layer}", None

    return change


@pytest.mark.parametrize("metric", ["rel-l2", "cosine"])
@pytest.mark.parametrize("whole", [False, True])
def test_each_variant_costs_what_it_costs_alone(metric, whole):
    model = residual()
    data = data_for(model)
    points = [] if whole else cut_points(model.graph)
    assert whole or len(points) == LAYERS + 1  # the first projection too
    verifier = Verifier(model, data, metric, "cpu")
    trials = Trials(model, data, verifier, points, provider="cpu")
    places = {f"{layer} {factor}": (layer, factor) for layer in (0, 2, LAYERS - 1) for factor in (0.5, 0.9)}
    variants = {
        key: Variant(frozenset({f"a{layer}"}), scaled(layer, factor))
        for key, (layer, factor) in places.items()
    }
    assert sorted(trials.run(variants)) == sorted(variants)
    for key, (layer, factor) in places.items():
        changed = model.clone()
        scaled(layer, factor)(changed)
        outcome = trials.outcomes[key]
        assert outcome.problem is None and outcome.told == f"told {layer}"
        assert outcome.error == pytest.approx(verifier.error(changed), rel=1e-5)
        assert outcome.error > 1e-7


def test_what_cannot_be_measured_says_why_and_the_others_are():
    model = residual()
    data = data_for(model)
    verifier = Verifier(model, data, "rel-l2", "cpu")
    trials = Trials(model, data, verifier, cut_points(model.graph), limit=5, provider="cpu")

    def broken(scratch):
        raise ModelError("it broke; leave it")

    variants = {
        "good": Variant(frozenset({"a1"}), scaled(1, 0.5)),
        "broken": Variant(frozenset({"a1"}), broken),
        "unwanted": Variant(frozenset({"a3"}), lambda scratch: ("half", "does not pay")),
        "unchanged": Variant(frozenset({"a0"}), lambda scratch: (None, None)),
    }
    list(trials.run(variants))
    assert trials.outcomes["good"].error > 0.01
    assert trials.outcomes["broken"].problem == "it broke; leave it"
    assert (trials.outcomes["unwanted"].told, trials.outcomes["unwanted"].problem) == ("half", "does not pay")
    assert trials.outcomes["unchanged"].error < 1e-6


def test_the_reference_runs_once_for_all_variants(monkeypatch):
    model = residual()
    data = data_for(model)
    verifier = Verifier(model, data, "rel-l2", "cpu")
    runs, real = [], Verifier.references

    def counted(self, part, limit=None):
        if (part, limit) not in self._cache:
            runs.append(limit)
        yield from real(self, part, limit)

    monkeypatch.setattr(Verifier, "references", counted)
    trials = Trials(model, data, verifier, (), limit=5, provider="cpu")
    variants = {str(layer): Variant(frozenset({f"a{layer}"}), scaled(layer, 0.5)) for layer in range(LAYERS)}
    assert len(list(trials.run(variants))) == LAYERS
    assert runs == [5]
