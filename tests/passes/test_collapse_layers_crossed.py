# SPDX-License-Identifier: Apache-2.0
"""collapse-layers on decoders that look at an encoder's states: what lies beside the stream leaves with a layer."""

from __future__ import annotations

import json

import numpy as np
import pytest
from onnxcollapse.passes.collapse_layers import CollapseLayers

from onnxcollapse import Budget, Decline, Model, Proposal, open_data, optimize
from onnxcollapse.calibration import open_session
from onnxcollapse.calibration.filling import complete, step
from onnxcollapse.calibration.masks import cache_pairs, is_cache_name
from onnxcollapse.errors import DataError
from onnxcollapse.structure.spans import streams
from tests.passes.crossed import crossed, samples
from tests.passes.narrowing import narrowed
from tests.support import relative

SPELLINGS = [(caching, post) for caching in ("none", "given", "taken") for post in (False, True)]


def caches(model):
    return [v.name for v in (*model.graph.inputs, *model.graph.outputs) if is_cache_name(v.name)]


def products(model):
    return sum(node.op_type == "MatMul" for node in model.graph)


def run(model, feeds):
    """All outputs of one pass; the caches of the model's own tokens are empty."""
    known = {name: array for name, array in feeds.items() if name in {v.name for v in model.graph.inputs}}
    with open_session(model, provider="cpu") as session:
        return session.run(complete(known, model.signature()))


@pytest.mark.parametrize(("caching", "post"), SPELLINGS)
def test_a_layer_leaves_with_all_that_serves_it_alone(caching, post):
    model = crossed(caching=caching, post=post)
    (stream,) = streams(model.graph)
    assert [layer.end.name for layer in stream.layers] == ["h1", "h2", "h3", "h4"]
    item, feeds = CollapseLayers(merge="drop", longest=2), samples(model, 6)
    ends = {site.name: site for site in item.sites(model) if not isinstance(site, Decline)}
    plans = dict(ends["h3"].plans)
    copy = narrowed(model, item, Proposal("h3", "drop 2", payload=plans["drop 2"]))
    assert caches(copy) == [name for name in caches(model) if name.split(".")[1] not in ("1", "2")]
    assert products(copy) == products(crossed(2, caching=caching, post=post))
    assert relative(run(copy, feeds)["logits"], run(model, feeds)["logits"]) < 0.2


@pytest.mark.parametrize(("caching", "post", "merge"), [("none", True, "drop"), ("given", False, "fit")])
def test_layers_leave_and_are_priced_with_what_lies_beside_the_stream(caching, post, merge):
    model = crossed(caching=caching, post=post)
    data = open_data(samples(model), model)
    item = CollapseLayers(merge=merge, parts=False, longest=2)
    result = optimize(model, data, budget=Budget(0.2), passes=[item], provider="cpu")
    (kept,) = result.journal.of("kept")
    assert result.met and kept.variant == f"{merge} 2"
    assert kept.saving.params == result.before.params - result.after.params
    assert {name.split(".")[1] for name in caches(result.model)} == (
        {"0", "1"} if caching == "given" else set()
    )
    assert len(caches(result.model)) == len(caches(model)) / 2
    assert (result.model.layers_before, result.model.layers_left) == (4, (0, 3))
    fresh = samples(model, seed=5)
    assert relative(run(result.model, fresh)["logits"], run(model, fresh)["logits"]) < 0.2


def test_fits_one_behind_the_other_run_without_what_left_before_them():
    """Keys of the encoder's states wait for later layers, in the segment before the first one."""
    model = crossed(3, weak=(0, 2))
    item = CollapseLayers(parts=False, longest=1)
    result = optimize(
        model, open_data(samples(model), model), budget=Budget(0.2), passes=[item], provider="cpu"
    )
    assert result.met
    assert sorted(entry.site for entry in result.journal.of("kept")) == ["h1", "h3"]


def test_decoding_through_both_caches_is_one_pass_over_all_tokens(tmp_path):
    (tmp_path / "in").mkdir()
    crossed(caching="taken").save(tmp_path / "in" / "model.onnx")
    config = json.dumps({"is_encoder_decoder": True, "encoder_layers": 4, "decoder_layers": 4})
    (tmp_path / "in" / "config.json").write_text(config)
    model = Model.load(tmp_path / "in")
    data = open_data(samples(model), model)
    item = CollapseLayers(longest=2)
    result = optimize(model, data, budget=Budget(0.2), passes=[item], provider="cpu")
    result.model.save(tmp_path / "out")
    followed = json.loads((tmp_path / "out" / "config.json").read_text())
    assert followed == {"is_encoder_decoder": True, "encoder_layers": 4, "decoder_layers": 2}
    after = Model.load(tmp_path / "out")
    assert caches(after) == caches(crossed(2, caching="taken"))
    feeds = samples(after, 4)
    np.testing.assert_allclose(stepwise(after, feeds), run(after, feeds)["logits"], atol=1e-4)


def stepwise(model, feeds):
    """Logits of tokens that come one by one."""
    signature = model.signature()
    own = [value.name for value in model.graph.inputs if ".decoder." in value.name]
    pairs = cache_pairs(own, [value.name for value in model.graph.outputs])
    found, cache = [], {name: array for name, array in feeds.items() if name != "input_ids"}
    with open_session(model, provider="cpu") as session:
        for past, tokens in enumerate(np.split(feeds["input_ids"], feeds["input_ids"].shape[1], axis=1)):
            outputs = session.run(step(signature, tokens, past, cache))
            found.append(outputs["logits"])
            cache |= {name: outputs[output] for name, output in pairs.items()}
    return np.concatenate(found, axis=1)


def test_each_attention_leaves_alone_where_there_are_no_caches():
    sites = [site for site in CollapseLayers().sites(crossed()) if not isinstance(site, Decline)]
    variants = {site.name: [variant for variant, _ in site.plans] for site in sites}
    assert variants["self2"] == variants["cross2"] == ["fit part"]
    assert set(variants) == {f"{kind}{n}" for kind in ("self", "cross") for n in range(4)} | {
        "h1",
        "h2",
        "h3",
        "h4",
    }


def test_norms_behind_sums_are_no_parts():
    found = list(CollapseLayers(merge="drop").sites(crossed(post=True)))
    assert {site.name for site in found} == {
        f"{kind}{n}_sum" for kind in ("self", "cross") for n in range(4)
    } | {
        "h1",
        "h2",
        "h3",
        "h4",
    }


@pytest.mark.parametrize("caching", ["given", "taken"])
def test_one_attention_of_two_that_have_caches_is_declined_by_name(caching):
    found = list(CollapseLayers().sites(crossed(caching=caching)))
    reasons = {site.site: site.reason for site in found if isinstance(site, Decline)}
    assert set(reasons) == {f"{kind}{n}" for kind in ("self", "cross") for n in range(4)}
    way = "present" if caching == "given" else "past_key_values"
    assert reasons["self2"] == f"its layer would keep the cache '{way}.2.encoder.key' and lose others"
    assert reasons["cross2"] == f"its layer would keep the cache '{way}.2.decoder.key' and lose others"


def test_caches_of_the_encoder_are_never_taken_to_be_empty():
    model = crossed(caching="taken")
    feeds = {name: array for name, array in samples(model).items() if not is_cache_name(name)}
    with pytest.raises(DataError, match=r"input 'past_key_values\.0\.encoder\.key' is missing"):
        open_data(feeds, model)
