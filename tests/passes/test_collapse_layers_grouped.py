# SPDX-License-Identifier: Apache-2.0
"""collapse-layers on decoders of ONNX Runtime's generative model builder: GroupQueryAttention, fused norms, caches."""

from __future__ import annotations

import json

import numpy as np
import pytest
from onnxcollapse.passes.collapse_layers import CollapseLayers
from onnxcollapse.passes.narrow_ffn import NarrowFfn
from onnxcollapse.passes.refit import Refit

from onnxcollapse import Budget, Decline, Model, Target, open_data, optimize
from onnxcollapse.model import size
from onnxcollapse.rewriting.settling import settle
from tests.passes.grouped import caches, decoded, folder, grouped, prefill, tensor, windows
from tests.passes.layering import offers
from tests.passes.narrowing import narrowed
from tests.support import relative

BUDGET = 0.05
FRESH = windows(6, seed=9)


def smaller(path, passes, target=None, budget=BUDGET, **options):
    """The original in its folder, and what is read back from the folder of the smaller one."""
    model = folder(path / "in", grouped(**options), options.get("layers", 4))
    wanted = Budget(budget, target=None if target is None else Target("params", target))
    result = optimize(
        model, open_data({"input_ids": windows(40)}, model), budget=wanted, passes=passes, provider="cpu"
    )
    assert result.met
    result.model.save(path / "out")
    return model, result, Model.load(path / "out")


def stays_a_decoder(model):
    """Decoding through the cache gives what one pass over all tokens gives."""
    np.testing.assert_allclose(decoded(model, FRESH), prefill(model, FRESH), atol=1e-4)


def test_the_graph_decodes_through_its_cache():
    for packed in (False, True):
        stays_a_decoder(grouped(packed=packed))


@pytest.mark.parametrize(("merge", "packed"), [("fit", False), ("drop", True)])
def test_layers_leave_with_their_caches_and_both_configs_follow(tmp_path, caplog, merge, packed):
    with caplog.at_level("WARNING"):
        model, result, after = smaller(tmp_path, [CollapseLayers(merge=merge)], packed=packed)
    assert not caplog.records
    assert [entry.variant for entry in result.journal.of("kept")] == [f"{merge} 2"]
    assert size(after).params < 0.6 * size(model).params
    assert caches(after) == [
        f"{way}.{n}.{kind}"
        for way in ("past_key_values", "present")
        for n in (0, 1)
        for kind in ("key", "value")
    ]
    stays_a_decoder(after)
    assert relative(prefill(after, FRESH), prefill(model, FRESH)) < BUDGET
    for name in ("config.json", "genai_config.json"):
        before = (tmp_path / "in" / name).read_text()
        assert (tmp_path / "out" / name).read_text() == before.replace(
            '"num_hidden_layers": 4', '"num_hidden_layers": 2'
        )
    templates = json.loads((tmp_path / "out" / "genai_config.json").read_text())["model"]["decoder"]
    named = [*templates["inputs"].values(), *templates["outputs"].values()]
    asked = {name % n if "%d" in name else name for name in named for n in range(2)}
    assert asked == {value.name for value in (*after.graph.inputs, *after.graph.outputs)}


def test_the_first_layer_is_declined_by_name_where_nothing_could_sum_again():
    found = [site for site in CollapseLayers(merge="drop").sites(grouped()) if isinstance(site, Decline)]
    assert {site.reason for site in found} == {
        "its end is a sum inside SkipSimplifiedLayerNormalization, its start is none that could be summed there again"
    }
    assert len(found) == 2  # its attention, and itself


@pytest.mark.parametrize("merge", ["fit", "drop"])
def test_attention_leaves_without_its_layer(merge):
    model = grouped()
    item = CollapseLayers(merge=merge)
    found = offers(model, open_data({"input_ids": windows(40)}, model), item)
    site = "/model/layers.2/post_attention_layernorm/SkipLayerNorm/output_3"
    copy = narrowed(model, item, found[site, f"{merge} part"])
    assert set(caches(model)) - set(caches(copy)) == {
        f"{way}.2.{kind}" for way in ("past_key_values", "present") for kind in ("key", "value")
    }
    assert any(node.name == "/model/layers.2/mlp/down_proj/MatMul" for node in copy.graph)
    assert settle(model, copy, frozenset()) is not None
    assert caches(copy) == caches(grouped(3))  # a runtime goes by the caches when it counts layers
    stays_a_decoder(copy)
    assert relative(prefill(copy, FRESH), prefill(model, FRESH)) < BUDGET


def test_a_map_is_folded_into_the_projection_that_a_skip_norm_adds():
    model = grouped()
    data, item = open_data({"input_ids": windows(40)}, model), CollapseLayers(merge="fold", longest=1)
    site = "/model/layers.3/input_layernorm/SkipLayerNorm/output_3"
    offer = offers(model, data, item)[site, "fold 1"]
    copy = narrowed(model, item, offer)
    held = np.concatenate([batch["input_ids"] for batch in data.batches("heldout")])
    assert relative(tensor(copy, site, held), tensor(model, site, held)) == pytest.approx(
        offer.predicted_error, rel=1e-3
    )
    assert size(copy).params < size(model).params
    stays_a_decoder(copy)


def test_spans_widths_and_repairs_go_together(tmp_path, caplog):
    passes = [CollapseLayers(longest=2, parts=False), NarrowFfn(align=8), Refit()]
    with caplog.at_level("WARNING"):
        model, result, after = smaller(tmp_path, passes, target=0.6, budget=None, layers=3, weak=(1,))
    assert not caplog.records  # what cannot be repaired is warned of
    kept = {entry.pass_name.split(":")[0] for entry in result.journal.of("kept")}
    assert {"collapse-layers", "narrow-ffn"} <= kept
    assert any(entry.pass_name.startswith("refit") for entry in result.journal)
    assert len(caches(after)) < len(caches(model))
    stays_a_decoder(after)
    assert relative(prefill(after, FRESH), prefill(model, FRESH)) < 1.3 * result.error
