# SPDX-License-Identifier: Apache-2.0
"""collapse-layers on other graphs: KV caches, sums inside fused norms, layers that share their weights."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from onnxcollapse.passes.collapse_ffn import CollapseFfn
from onnxcollapse.passes.collapse_layers import CollapseLayers
from onnxcollapse.passes.fold_affine import FoldAffine
from onnxcollapse.passes.narrow_ffn import NarrowFfn
from onnxcollapse.passes.refit import Refit
from onnxcollapse.passes.tie_weights import TieWeights

from onnxcollapse import Budget, Model, Target, open_data, optimize
from onnxcollapse.model import edit
from tests.passes.layering import WIDTH, offers, shrink, stream
from tests.passes.narrowing import at, narrowed
from tests.support import Net, data_for, relative, rows
from tests.verification.decoders import decoder, windows

# Caches


def test_caches_of_removed_layers_go_and_the_others_are_numbered_anew():
    model = decoder((0, 1, 2, 3, 4), masked=False)
    ids = windows(40)
    data = open_data({"input_ids": ids, "position_ids": np.tile(np.arange(16), (40, 1))}, model)
    result = optimize(
        model,
        data,
        budget=Budget(None, "kl", Target("params", 0.7)),
        passes=[CollapseLayers(merge="drop")],
        provider="cpu",
    )
    assert result.met
    names = [value.name for value in (*result.model.graph.inputs, *result.model.graph.outputs)]
    layers = len(result.model.layers_left)
    assert result.model.layers_before == 5
    assert layers < 5
    numbers = {int(name.split(".")[1]) for name in names if "." in name}
    assert numbers == set(range(layers))
    assert any("layers are gone" in note for note in result.notes)


def test_layers_that_are_narrowed_or_folded_are_still_there():
    model, x = stream(6), rows(900, WIDTH)
    result = shrink(model, x, NarrowFfn(align=1), CollapseFfn(), FoldAffine(), target=0.4)
    assert result.met
    assert not result.model.layers_before
    assert not any("layers are gone" in note for note in result.notes)


def test_layers_without_caches_that_leave_are_counted():
    model, x = stream(6), rows(900, WIDTH)
    result = shrink(model, x, CollapseLayers(merge="drop"), Refit(), target=0.7)
    kept = [entry for entry in result.journal.of("kept") if entry.pass_name.startswith("collapse-layers")]
    gone = sum(int(entry.variant.split()[-1]) for entry in kept)
    assert gone
    assert (result.model.layers_before, len(result.model.layers_left)) == (6, 6 - gone)


def test_attention_leaves_with_its_cache():
    model = decoder((0, 1, 2))
    data = open_data({"input_ids": windows(30), "position_ids": np.tile(np.arange(16), (30, 1))}, model)
    item = CollapseLayers(merge="drop")
    found = offers(model, data, item)
    part = next(offer for (_, variant), offer in found.items() if variant == "drop part")
    copy = narrowed(model, item, part)
    before = {v.name for v in (*model.graph.inputs, *model.graph.outputs)}
    after = {v.name for v in (*copy.graph.inputs, *copy.graph.outputs)}
    gone = before - after
    assert len(gone) == 4 and len({name.split(".")[1] for name in gone}) == 1


def test_caches_that_are_gone_stop_neither_repairs_nor_later_rounds(caplog):
    model = decoder((0, 1, 2, 3, 4, 5))
    ids = windows(40)
    data = open_data({"input_ids": ids, "position_ids": np.tile(np.arange(16), (40, 1))}, model)
    budget = Budget(None, "kl", Target("params", 0.6))
    passes = [CollapseLayers(longest=2, parts=False), Refit(least=0.0)]
    with caplog.at_level("WARNING"):
        result = optimize(model, data, budget=budget, passes=passes, provider="cpu")
    assert result.met
    assert (
        len({entry.site for entry in result.journal.of("kept") if entry.pass_name.startswith("collapse")}) > 1
    )
    assert not [record for record in caplog.records if "nothing is repaired" in record.message]


# Fused norms, as ONNX Runtime's optimizer and its generative builder leave them


def fused(layers=5, *, simplified=True, bias=True):
    """A stream whose sums lie inside skip norms: the layers read the norm, the next skip norm the sum."""
    net = Net(4)
    kind = "SkipSimplifiedLayerNormalization" if simplified else "SkipLayerNormalization"
    scales = [net.const(net.random.normal(1, 0.1, size=WIDTH)) for _ in range(1 if simplified else 2)]
    h, update = net.dense("x", WIDTH, WIDTH, name="h0"), net.dense("x", WIDTH, WIDTH, name="u")
    for layer in range(layers + 1):
        norm, total = (f"n{layer}", f"s{layer}") if layer < layers else ("last", "s_last")
        more = [net.const(np.full(WIDTH, 0.05))] if bias else []
        net.nodes.append(
            helper.make_node(
                kind,
                [h, update, *scales, *more],
                [norm, "", "", total],
                name=f"skip{layer}",
                domain="com.microsoft",
            )
        )
        h = total
        if layer < layers:
            hidden = net.op("Tanh", net.dense(norm, WIDTH, 40, name=f"z{layer}"))
            matrix = net.random.normal(size=(40, WIDTH)) / 16
            update = net.linear(hidden, matrix, name=f"u{layer}")
    net.dense("last", WIDTH, 5, name="y")
    graph = helper.make_graph(
        net.nodes, "fused",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", "t", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", "t", 5])],
        net.initializers,
    )  # fmt: skip
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return Model(ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=8)))


@pytest.mark.parametrize("simplified", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_skip_norm_forms_the_sum_that_the_stream_was_before(simplified, bias):
    model, x = fused(simplified=simplified, bias=bias), rows(300, WIDTH).reshape(60, 5, WIDTH)
    item = CollapseLayers(merge="drop")
    found = offers(model, data_for(model, x), item)
    offer = found["s3", "drop 1"]
    copy = narrowed(model, item, offer)
    np.testing.assert_allclose(at(copy, "s3", x), at(model, "s2", x), atol=1e-6)
    assert not any(value.name == "z2" for node in copy.graph for value in node.outputs)


@pytest.mark.parametrize("simplified", [True, False])
def test_a_skip_norm_sums_the_stream_and_its_map(simplified):
    model, x = fused(simplified=simplified), rows(4500, WIDTH).reshape(900, 5, WIDTH)
    data, item = data_for(model, x), CollapseLayers()
    held = np.concatenate([batch["x"] for batch in data.batches("heldout")])
    offer = offers(model, data, item)["s4", "fit 2"]
    copy = narrowed(model, item, offer)
    assert relative(at(copy, "s4", held), at(model, "s4", held)) == pytest.approx(
        offer.predicted_error, rel=1e-3
    )
    result = shrink(model, x, CollapseLayers(), target=0.7)
    assert result.met
    assert result.error < shrink(model, x, CollapseLayers(merge="drop"), target=0.7).error


# Layers that share their weights, as in an ALBERT


def shared():
    random = np.random.default_rng(2)
    pair = random.normal(size=(WIDTH, 40)) / 8, random.normal(size=(40, WIDTH)) / 8
    model = stream(5, weights=[pair] * 5)
    item = TieWeights()
    item.apply(model, [offer for site in item.sites(model) for offer in item.propose(site, None)])
    edit.prune(model)
    return model


def test_layers_that_share_weights_are_left_where_parameters_count():
    model, x = shared(), rows(300, WIDTH)
    result = shrink(model, x, CollapseLayers(), target=0.9)
    assert not result.journal.of("kept")
    assert any("saves no params" in entry.reason for entry in result.journal.of("declined"))
    merges = shrink(model, x, CollapseLayers(merge="mean"), target=0.9)
    assert any("share their weights" in entry.reason for entry in merges.journal.of("declined"))


def test_layers_that_share_weights_go_where_flops_count():
    model, x = shared(), rows(600, WIDTH)
    budget = Budget(None, target=Target("flops", 0.7))
    result = optimize(
        model, data_for(model, x), budget=budget, passes=[CollapseLayers(merge="drop")], provider="cpu"
    )
    assert result.met
    assert result.after.params == result.before.params
