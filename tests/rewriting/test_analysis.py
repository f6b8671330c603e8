# SPDX-License-Identifier: Apache-2.0
"""What analyze says of a model: its structure, how linear it is, and what optimize would choose from."""

from __future__ import annotations

import json

import numpy as np
import pytest
from onnxcollapse.passes.cleanup import Cleanup
from onnxcollapse.passes.collapse_layers import CollapseLayers
from onnxcollapse.passes.narrow_ffn import NarrowFfn
from onnxcollapse.passes.refit import Refit

from onnxcollapse import Budget, analyze, open_data, optimize
from onnxcollapse.calibration import open_session
from onnxcollapse.errors import DataError, MetricError
from onnxcollapse.rewriting.journal import plain
from onnxcollapse.verification import Verifier
from tests.passes.layering import WIDTH, stream
from tests.rewriting.merged import data as decoder_data
from tests.rewriting.merged import decoder
from tests.support import Net, data_for, mlp, rows
from tests.verification.decoders import decoder as causal
from tests.verification.decoders import windows

X = rows(300, WIDTH)


def inner(model, data, *names):
    """Rows of inner tensors on the held-out part."""
    with open_session(model, provider="cpu", outputs=names) as session:
        batches = [session.run(batch) for batch in data.batches("heldout")]
    return [np.concatenate([batch[name] for batch in batches]).astype(np.float64) for name in names]


def test_structure_needs_no_data():
    model = stream(4)
    before = model.to_bytes()
    found = analyze(model)
    (run,) = found.layers
    assert [(layer.start, layer.end) for layer in run] == [
        ("h0", "s0"),
        ("s0", "s1"),
        ("s1", "s2"),
        ("s2", "s3"),
    ]
    assert [(block.site, block.d_in, block.d_hidden, block.d_out) for block in found.blocks] == [
        (f"u{layer}", WIDTH, 40, WIDTH) for layer in range(4)
    ]
    assert {(block.activation, block.gated) for block in found.blocks} == {("Tanh", False)}
    assert run[0].params > found.blocks[0].params == 2 * 40 * WIDTH, "biases are one tensor in all layers"
    assert {layer.similarity for layer in run} == {block.linearity for block in found.blocks} == {None}
    assert found.provider == ""
    assert "--calib DATA" in found.notes[0]
    assert not [offer for offer in found.offers if offer.impact is not None]
    assert model.to_bytes() == before


def test_similarity_and_linearity_are_those_of_the_held_out_rows():
    model = stream(3, linear=(1,))
    data = data_for(model, X)
    found = analyze(model, data, passes=(Cleanup(),), provider="cpu")
    h0, s0, n0, u0 = inner(model, data, "h0", "s0", "n0", "u0")
    cosines = np.sum(h0 * s0, axis=1) / np.linalg.norm(h0, axis=1) / np.linalg.norm(s0, axis=1)
    assert found.layers[0][0].similarity == pytest.approx(cosines.mean(), abs=1e-5)
    linearities = {block.site: block.linearity for block in found.blocks}
    assert linearities["u1"] == pytest.approx(1.0, abs=1e-6), "its activation is the identity"
    padded = np.c_[n0, np.ones(len(n0))]
    best = np.linalg.lstsq(padded, u0, rcond=None)[0]  # fitted to what it is measured on: no map does better
    bound = 1 - np.sum((u0 - padded @ best) ** 2) / np.sum(u0**2)
    assert 0.5 < linearities["u0"] <= bound < 1.0


def test_offers_are_what_optimize_chooses_from():
    model = mlp([8, 32, 12], "LeakyRelu")
    data = data_for(model, rows(200, 8))
    passes = (Cleanup(), NarrowFfn(skip=False), Refit())
    found = analyze(model, data, passes=passes, provider="cpu")
    offers = {(offer.site, offer.variant): offer for offer in found.offers}
    assert len(offers) == len(found.offers) > 3
    result = optimize(model, data, budget=Budget(0.2), passes=passes, provider="cpu")
    (kept,) = result.journal.of("kept")
    offer = offers[kept.site, kept.variant]
    assert (offer.impact, offer.predicted_error) == (kept.impact, kept.predicted_error)
    assert offer.saving.params == kept.saving.params > 0
    ordered = sorted(found.offers, key=lambda offer: offer.saving.params)
    assert ordered[0].impact < ordered[-1].impact


def test_a_fit_that_does_worse_than_nothing_explains_nothing():
    net, random = Net(0), np.random.default_rng(0)
    waves = net.op("Sin", net.op("MatMul", "x", net.const(100 * random.normal(size=(16, 64)))))
    net.op("MatMul", waves, net.const(random.normal(size=(64, 12))), name="y")
    model = net.model({"x": ["n", 16]}, {"y": ["n", 12]})
    (block,) = analyze(model, data_for(model, rows(20, 16)), passes=(Cleanup(),), provider="cpu").blocks
    assert block.linearity == 0.0


def test_what_works_in_optimize_alone_is_said():
    model = stream(3)
    data = data_for(model, X)
    laco = CollapseLayers(merge="rdsc", search="laco", threshold=0.5)
    for passes in ((laco, NarrowFfn(), Refit()), (Refit(),)):
        found = analyze(model, data, passes=passes, provider="cpu")
        (note,) = found.notes
        assert note.startswith(f"{passes[0].describe()}: nothing to show here; what searches by itself")
    assert not analyze(model, data, passes=(NarrowFfn(), Refit()), provider="cpu").notes


def test_a_metric_of_whole_models_is_not_measured(monkeypatch):
    model = causal((0, 1), hidden=48)
    data = open_data({"input_ids": windows(60)}, model, batch_size=12)
    monkeypatch.setattr(Verifier, "error", lambda *_: pytest.fail("it generates"))
    found = analyze(model, data, metric="continuation", passes=(NarrowFfn(skip=False),), provider="cpu")
    assert found.metric == "kl"
    assert found.offers
    (note,) = found.notes
    assert note == "errors at the outputs are in kl: continuation is of whole models, in optimize"


def test_no_error_is_too_large_to_be_told():
    model = stream(3)
    data = data_for(model, X)
    drop = CollapseLayers(merge="drop", parts=False)
    found = analyze(model, data, passes=(drop,), provider="cpu")
    assert {offer.pass_name for offer in found.offers} == {drop.describe()}
    assert max(offer.impact for offer in found.offers) > 0.3


def test_exact_rewrites_come_first_and_are_not_done():
    model = mlp([8, 32, 12], "Identity")
    found = analyze(model, data_for(model, rows(100, 8)), provider="cpu")
    assert found.offers[0].impact is None
    assert found.offers[0].saving.nodes == 1
    assert found.to_dict()["offers"][0]["nodes_saved"] == 1
    assert found.tidied.nodes < found.size.nodes
    assert found.to_dict()["after_exact"]["nodes"] == found.tidied.nodes
    assert found.size.nodes == len(model.graph)
    assert found.size.params == 8 * 32 + 32 + 32 * 12 + 12


def test_what_is_declined_comes_with_the_reason():
    model = mlp([8, 2, 8], "Tanh")
    found = analyze(model, data_for(model, rows(100, 8)), provider="cpu")
    reasons = {(entry.pass_name, entry.site): entry.reason for entry in found.declined}
    assert "does not pay" in reasons["collapse-ffn", "y"]
    assert all(entry.outcome != "kept" for entry in found.declined)


def test_little_memory_gives_the_same(monkeypatch):
    model = stream(4)
    data = data_for(model, X)
    passes = (Cleanup(), NarrowFfn(skip=False))
    one = analyze(model, data, passes=passes, provider="cpu")
    other = analyze(model, data, passes=passes, provider="cpu", memory=1)
    for first, second in zip(one.layers[0], other.layers[0], strict=True):
        assert first.similarity == pytest.approx(second.similarity, abs=1e-5)
    for first, second in zip(one.blocks, other.blocks, strict=True):
        assert first.linearity == pytest.approx(second.linearity, abs=1e-5)
    assert [(offer.site, offer.variant) for offer in one.offers] == [
        (offer.site, offer.variant) for offer in other.offers
    ]


def test_a_merged_decoder_is_read_where_it_has_no_cache():
    model = decoder()
    found = analyze(model, decoder_data(model), passes=(Cleanup(), NarrowFfn()), provider="cpu")
    assert len(found.layers[0]) == 4
    assert all(0.0 < block.linearity <= 1.0 for block in found.blocks)
    assert found.offers


def test_it_is_all_plain_json():
    model = stream(3)
    document = analyze(model, data_for(model, X), provider="cpu").to_dict()
    assert json.loads(json.dumps(plain(document))) == document
    assert document["layers"][0][0]["similarity"] > 0
    assert {"pass", "site", "variant", "params_saved", "impact"} <= document["offers"][0].keys()


def test_what_cannot_be_used_is_an_error():
    model = stream(2)
    with pytest.raises(MetricError):
        analyze(model, data_for(model, X), metric="nothing", provider="cpu")
    with pytest.raises(DataError):
        analyze(model, data_for(model, X[:1]), provider="cpu")


def test_a_tensor_that_is_asked_for_in_two_ways_is_kept_once():
    """Else batches get out of step with what is kept of them, or fail where the last one is smaller."""
    net = Net(4)
    h = net.op("Conv", "x", net.const(net.random.normal(size=(8, 8, 1, 1)) / 3), name="h0")
    for layer in range(3):
        up, down = (net.const(net.random.normal(size=(a, b, 1, 1)) / b) for a, b in ((24, 8), (8, 24)))
        hidden = net.op("Tanh", net.op("Conv", h, up))
        h = net.op("Add", h, net.op("Conv", hidden, down), name=f"h{layer + 1}")
    net.op("GlobalAveragePool", h, name="y")
    model = net.model({"x": ["n", 8, 4, 4]}, {"y": ["n", 8, 1, 1]})
    x = np.random.default_rng(0).normal(size=(109, 8, 4, 4)).astype(np.float32)
    found = analyze(model, data_for(model, x), provider="cpu")
    assert {"collapse-layers", "narrow-ffn"} <= {offer.pass_name for offer in found.offers}


def test_similarity_of_a_convolutional_net_is_over_channels():
    net, h = Net(4), "x"
    for layer in range(3):
        weight = net.const(net.random.normal(size=(6, 6, 3, 3)) / 12)
        h = net.op("Add", h, net.op("Tanh", net.op("Conv", h, weight, pads=[1] * 4)), name=f"h{layer}")
    net.op("Neg", h, name="y")
    model = net.model({"x": ["n", 6, 4, 5]}, {"y": ["n", 6, 4, 5]})
    x = np.random.default_rng(0).normal(size=(64, 6, 4, 5)).astype(np.float32)
    data = data_for(model, x)
    found = analyze(model, data, passes=(Cleanup(),), provider="cpu")
    layer = next(layer for run in found.layers for layer in run if layer.start == "h0")
    a, b = inner(model, data, "h0", "h1")
    cosines = np.sum(a * b, axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert layer.similarity == pytest.approx(cosines.mean(), abs=1e-4)
