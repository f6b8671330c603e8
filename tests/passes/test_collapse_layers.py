# SPDX-License-Identifier: Apache-2.0
"""collapse-layers: fitted maps, published merges and searches, what it leaves alone."""

from __future__ import annotations

import numpy as np
import pytest
from onnxcollapse.passes.collapse_layers import CollapseLayers, Plan
from onnxcollapse.passes.narrow_ffn import NarrowFfn

from onnxcollapse.errors import ModelError, OptionError
from onnxcollapse.model import size
from onnxcollapse.rewriting.fitting import apply
from onnxcollapse.rewriting.registry import parse
from onnxcollapse.structure.spans import first_projection, streams
from tests.passes.layering import WIDTH, offers, shrink, stream
from tests.passes.narrowing import at, narrowed
from tests.support import data_for, file_bytes, mlp, outputs, relative, rows

# Structure


@pytest.mark.parametrize("post", [False, True])
def test_a_stream_has_a_span_for_every_run_of_layers_that_leaves_one(post):
    (found,) = streams(stream(6, post=post).graph)
    assert len(found.layers) == 6
    spans = found.spans(3)
    assert {span.layers for span in spans} == {1, 2, 3}
    assert all(first_projection(span).input.name for span in spans)


def test_what_the_first_projection_of_a_pre_norm_span_reads_is_the_norm():
    (found,) = streams(stream(4).graph)
    assert [first_projection(span).input.name for span in found.spans(1)] == ["n0", "n1", "n2", "n3"]


def test_a_chain_of_layers_without_a_stream_has_none():
    item = CollapseLayers()
    assert [site.reason for site in item.sites(mlp([16] * 6))] == [
        "no run of equal layers adds to a residual stream of one width"
    ]


# Fit


@pytest.mark.parametrize("post", [False, True])
def test_a_fit_has_the_error_at_its_end_that_it_predicts(post):
    model, x = stream(6, post=post), rows(900, WIDTH)
    data, item = data_for(model, x), CollapseLayers()
    held = np.concatenate([batch["x"] for batch in data.batches("heldout")])
    checked = 0
    for (site, variant), offer in offers(model, data, item).items():
        found = relative(at(narrowed(model, item, offer), site, held), at(model, site, held))
        assert found == pytest.approx(offer.predicted_error, rel=1e-3), (site, variant)
        checked += 1
    assert checked >= 10


def test_a_layer_that_is_linear_in_what_it_reads_is_reproduced():
    model, x = stream(5, linear=(2,)), rows(900, WIDTH)
    data, item = data_for(model, x), CollapseLayers(longest=1)
    offer = offers(model, data, item)["s2", "fit 1"]
    assert offer.predicted_error < 2e-4  # a ridge of 1e-4 shrinks the map a little
    assert relative(outputs(narrowed(model, item, offer), x=x)["y"], outputs(model, x=x)["y"]) < 1e-3


def test_limited_rank_takes_two_thin_matrices_and_costs_more():
    model, x = stream(5), rows(900, WIDTH)
    data = data_for(model, x)
    full, thin = CollapseLayers(longest=2), CollapseLayers(longest=2, rank=3)
    a, b = offers(model, data, full)["s2", "fit 2"], offers(model, data, thin)["s2", "fit 2"]
    assert b.predicted_error >= a.predicted_error
    matrices, _ = b.payload.fit
    assert [tuple(m.shape) for m in matrices] == [(WIDTH, 3), (3, WIDTH)]
    held = np.concatenate([batch["x"] for batch in data.batches("heldout")])
    assert relative(at(narrowed(model, thin, b), "s2", held), at(model, "s2", held)) == pytest.approx(
        b.predicted_error, rel=1e-3
    )


def test_spans_are_fitted_anew_behind_others():
    model, x = stream(6), rows(900, WIDTH)
    data, item = data_for(model, x), CollapseLayers()
    found = offers(model, data, item)
    both = [found["s1", "fit 1"], found["s4", "fit 2"]]
    result = shrink(model, x, CollapseLayers(), target=0.55)
    held = np.concatenate([batch["x"] for batch in data.batches("heldout")])
    plain = relative(outputs(narrowed(model, item, *both), x=held)["y"], outputs(model, x=held)["y"])
    assert result.met and len(result.journal.of("kept")) >= 1
    assert plain > 0
    assert result.error < relative(
        outputs(shrink(model, x, CollapseLayers(merge="drop"), target=0.55).model, x=held)["y"],
        outputs(model, x=held)["y"],
    )


# Published merges


@pytest.mark.parametrize(
    ("merge", "formula"),
    [
        ("rdsc", lambda a: a[0] + sum(b - a[0] for b in a[1:])),
        ("last", lambda a: a[-1]),
        ("mean", lambda a: sum(a) / len(a)),
    ],
)
def test_merged_weights_are_those_of_the_formula(merge, formula):
    random = np.random.default_rng(5)
    weights = [(random.normal(size=(WIDTH, 40)) / 8, random.normal(size=(40, WIDTH)) / 8) for _ in range(5)]
    model, x = stream(5, weights=weights), rows(60, WIDTH)
    data, item = data_for(model, x), CollapseLayers(merge=merge)
    offer = offers(model, data, item)["s3", f"{merge} 2"]  # layers 2 and 3 go into layer 1
    ups, downs = zip(*weights[1:4], strict=True)
    expected = stream(3, weights=[weights[0], (formula(ups), formula(downs)), weights[4]])
    merged = narrowed(model, item, offer)
    assert relative(at(merged, "s3", x), at(expected, "s1", x)) < 1e-5
    assert relative(at(merged, "s4", x), at(expected, "s2", x)) < 1e-5


def test_drop_passes_the_stream_by():
    model, x = stream(4), rows(60, WIDTH)
    item = CollapseLayers(merge="drop")
    offer = offers(model, data_for(model, x), item)["s2", "drop 2"]
    copy = narrowed(model, item, offer)
    np.testing.assert_array_equal(at(copy, "s2", x), at(model, "s0", x))
    assert not any(value.name in ("u1", "z2") for node in copy.graph for value in node.outputs)


def test_fold_changes_the_projection_before_and_adds_no_parameters():
    model, x = stream(5), rows(900, WIDTH)
    data, item = data_for(model, x), CollapseLayers(merge="fold", longest=1)
    found = offers(model, data, item)
    offer = found["s2", "fold 1"]
    copy = narrowed(model, item, offer)
    held = np.concatenate([batch["x"] for batch in data.batches("heldout")])
    drop = narrowed(
        model, CollapseLayers(merge="drop"), offers(model, data, CollapseLayers(merge="drop"))["s2", "drop 1"]
    )
    assert relative(at(copy, "s2", held), at(model, "s2", held)) == pytest.approx(
        offer.predicted_error, rel=1e-3
    )
    assert size(copy).params == size(drop).params
    assert relative(at(copy, "s2", held), at(model, "s2", held)) < relative(
        at(drop, "s2", held), at(model, "s2", held)
    )
    assert ("s0", "fold 1") not in found  # the first layer has no layer before it


# Searches


def test_greedy_takes_the_layers_whose_ends_are_most_alike():
    model, x = stream(6), rows(400, WIDTH)
    item = CollapseLayers(merge="drop", search="greedy")
    found = offers(model, data_for(model, x), item)
    order = sorted(found.values(), key=lambda offer: offer.cost)
    result = shrink(model, x, item, target=0.7)
    kept = {entry.site for entry in result.journal.of("kept")}
    assert result.met
    assert kept == {offer.site for offer in order[: len(kept)]}


def test_random_depends_on_its_seed_alone():
    model, x = stream(6), rows(400, WIDTH)

    def kept(seed):
        result = shrink(model, x, CollapseLayers(merge="drop", search="random", seed=seed), target=0.6)
        return frozenset(entry.site for entry in result.journal.of("kept"))

    assert kept(0) == kept(0)
    assert len({kept(seed) for seed in range(6)}) > 1


def test_laco_stops_where_the_final_state_is_no_longer_alike():
    model, x = stream(8, scale=0.05), rows(200, WIDTH)
    strict, lax = (
        shrink(model, x, CollapseLayers(merge="last", search="laco", threshold=t, merged=2), target=0.3)
        for t in (1.0, 0.5)
    )
    assert not strict.journal.of("kept")
    kept = lax.journal.of("kept")
    assert len(kept) >= 2
    assert lax.after.params < lax.before.params
    assert all("cosine of the final state" in entry.reason for entry in kept)


def test_laco_is_rolled_back_by_a_budget_that_it_breaks():
    model, x = stream(8), rows(200, WIDTH)
    result = shrink(
        model, x, CollapseLayers(merge="rdsc", search="laco", threshold=-1.0), target=None, budget=1e-6
    )
    assert not result.journal.of("kept")
    assert result.journal.of("rolled-back")
    assert result.error == 0.0


# The choice


def test_off_means_byte_identical(tmp_path):
    model, x = stream(4), rows(100, WIDTH)
    result = shrink(model, x, CollapseLayers(), target=None, budget=1e-9)
    assert file_bytes(result.model, tmp_path) == file_bytes(model, tmp_path)
    assert {entry.pass_name for entry in result.journal} == {"collapse-layers"}


def test_spans_and_widths_compete_in_one_selection():
    model, x = stream(6), rows(900, WIDTH)
    result = shrink(model, x, CollapseLayers(), NarrowFfn(), target=0.5)
    assert result.met
    alone = [shrink(model, x, item, target=0.5) for item in (CollapseLayers(), NarrowFfn())]
    assert result.error <= 1.2 * min(other.error for other in alone if other.met)


def test_pricing_over_several_segments_is_what_the_whole_model_shows():
    model, x = stream(6), rows(300, WIDTH)
    result = shrink(model, x, CollapseLayers(longest=3), target=None, budget=0.8)
    one = [entry for entry in result.journal if entry.impact is not None and entry.outcome == "declined"]
    assert one
    data, item = data_for(model, x), CollapseLayers(longest=3)
    found = offers(model, data, item)
    entry = one[0]
    held = np.concatenate([batch["x"] for batch in data.batches("heldout")])
    trial = narrowed(model, item, found[entry.site, entry.variant])
    assert relative(outputs(trial, x=held)["y"], outputs(model, x=held)["y"]) == pytest.approx(
        entry.impact, rel=0.35
    )


# Options


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("collapse-layers:longest=0", "at least 1"),
        ("collapse-layers:rank=0", "at least 1"),
        ("collapse-layers:threshold=2", "cosine"),
        ("collapse-layers:search=laco", "rdsc, last, mean or drop"),
        ("collapse-layers:merge=melt", "takes"),
    ],
)
def test_bad_options_are_named(spec, words):
    with pytest.raises(OptionError, match=words):
        parse(spec)


def test_a_span_that_an_earlier_rewrite_took_is_an_error_by_name():
    model, x = stream(4), rows(100, WIDTH)
    item = CollapseLayers(merge="drop")
    offer = offers(model, data_for(model, x), item)["s2", "drop 1"]
    lost = Plan("drop", "nowhere", "s2", frozenset(), frozenset())
    with pytest.raises(ModelError, match="nowhere"):
        apply(model.clone(), item, type(offer)(offer.site, offer.variant, payload=lost))


def test_a_fitter_needs_no_more_than_one_maps_sums():
    model, x = stream(4), rows(100, WIDTH)
    item = CollapseLayers()
    offer = offers(model, data_for(model, x), item)["s2", "fit 2"]
    site = item.site(model, "s2")
    assert len(item.requests_again(site, offer)) == 3


@pytest.mark.parametrize("merge", ["fit", "drop", "fold", "mean"])
def test_offers_predict_what_they_save(merge):
    model, x = stream(6), rows(400, WIDTH)
    item = CollapseLayers(merge=merge)
    for offer in offers(model, data_for(model, x), item).values():
        saved = size(model).params - size(narrowed(model, item, offer)).params
        norms = 2 * WIDTH  # shared by all layers, so they stay
        assert 0 <= offer.saving.params - saved <= 4 * norms
