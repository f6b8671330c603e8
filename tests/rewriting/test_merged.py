# SPDX-License-Identifier: Apache-2.0
"""Decoders merged for runs without and with a cache: both branches are rewritten alike and put together again."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxcollapse.passes import factor_linear
from onnxcollapse.passes.cleanup import Cleanup
from onnxcollapse.passes.collapse_layers import CollapseLayers
from onnxcollapse.passes.factor_linear import FactorLinear
from onnxcollapse.passes.merge_ffn import MergeFfn
from onnxcollapse.passes.narrow_ffn import NarrowFfn

from onnxcollapse import Budget, Model, Target, compare, open_data, optimize
from onnxcollapse.calibration import open_session
from onnxcollapse.calibration.filling import complete
from onnxcollapse.calibration.masks import is_cache_name
from onnxcollapse.model import edit, size
from onnxcollapse.rewriting import Decline
from onnxcollapse.rewriting.fitting import apply
from onnxcollapse.rewriting.frontier import frontier
from onnxcollapse.rewriting.merged import Merged
from onnxcollapse.rewriting.passes import sites_of
from onnxcollapse.verification.caching import cache_gap
from tests.passes.crossed import crossed, samples
from tests.passes.layering import stream
from tests.passes.merging import merged
from tests.passes.narrowing import offers
from tests.rewriting.merged import data, decoder, logits, names

CACHES = [
    f"{layer}.{kind}.{what}"
    for layer in range(4)
    for kind in ("decoder", "encoder")
    for what in ("key", "value")
]


def test_each_branch_becomes_a_model():
    model = decoder()
    apart = Merged.of(model)
    (cached,) = apart.lead.followers
    assert apart.branches == ("else_branch", "then_branch")
    assert names(apart.lead.graph.inputs) == ["input_ids", "encoder_attention_mask", "encoder_hidden_states"]
    assert names(cached.graph.inputs)[2:] == [f"past_key_values.{name}" for name in CACHES]
    for part in (apart.lead, cached):
        assert sorted(names(part.graph.outputs)) == sorted(
            ["logits", *(f"present.{name}" for name in CACHES)]
        )
        assert not any(node.op_type == "If" for node in part.graph)
    np.testing.assert_array_equal(logits(apart.lead), logits(model))
    assert "h2" in {value.name for node in cached.graph for value in node.outputs}


def test_together_again_it_is_the_same_model(tmp_path):
    model = decoder()
    apart = Merged.of(model)
    again = apart.join(apart.lead)
    assert again.signature() == model.signature()
    np.testing.assert_array_equal(logits(again), logits(model))
    assert cache_gap(again, data(model), "cpu") == cache_gap(model, data(model), "cpu") < 1e-6
    again.save(tmp_path / "again.onnx")
    model.save(tmp_path / "model.onnx")
    onnx.checker.check_model(tmp_path / "again.onnx", full_check=True)
    sizes = [(tmp_path / f"{name}.onnx").stat().st_size for name in ("again", "model")]
    assert _params(again) == _params(model) and sizes[0] < 1.1 * sizes[1]


def test_models_that_are_no_merged_decoders():
    assert Merged.of(stream(2)) is None
    twice = merged(crossed(caching="given"), crossed(caching="given"))
    assert Merged.of(twice) is None  # no branch takes caches


@pytest.mark.parametrize("post", [False, True])
def test_layers_leave_both_branches(post):
    model = decoder(post)
    item = CollapseLayers(longest=2)
    result = optimize(model, data(model), budget=Budget(0.2), passes=[item], provider="cpu")
    assert result.met and 0 < result.error <= 0.2
    assert (result.model.layers_before, len(result.model.layers_left)) == (4, 2)
    left = [name for name in CACHES if name[0] in "01"]
    assert names(result.model.graph.outputs) == ["logits", *(f"present.{name}" for name in left)]
    cached = [name for name in names(result.model.graph.inputs) if is_cache_name(name)]
    assert cached == [f"past_key_values.{name}" for name in left]
    assert names(result.model.graph.inputs)[-1] == "use_cache_branch"
    assert cache_gap(result.model, data(result.model, 3), "cpu") < 1e-5
    found = compare(model, result.model, data(model), ["rel-l2"], "heldout", "cpu")
    assert found.overall["rel-l2"] == pytest.approx(result.error, rel=1e-3)
    (kept,) = result.journal.of("kept")
    assert kept.saving.params == result.before.params - result.after.params
    assert (result.before.params, result.after.params) == (_params(model), _params(result.model))


def _params(model):
    """Numbers in the file: what both branches read is there once."""
    proto = onnx.load_from_string(model.to_bytes())
    graphs = [proto.graph, *(a.g for node in proto.graph.node for a in node.attribute if a.HasField("g"))]
    tensors = [
        tensor
        for graph in graphs
        for tensor in graph.initializer
        if tensor.data_type == onnx.TensorProto.FLOAT
    ]
    return sum(int(np.prod(tensor.dims)) for tensor in tensors)


@pytest.mark.parametrize(
    "item",
    [NarrowFfn(), MergeFfn(), CollapseLayers(merge="rdsc", search="laco", merged=2, threshold=-1.0)],
)
def test_every_kind_of_rewrite_is_applied_to_both(item):
    model = decoder()
    budget = Budget(None, target=Target("params", 0.9))
    result = optimize(model, data(model), budget=budget, passes=[Cleanup(), item], provider="cpu")
    assert result.journal.of("kept") and result.met
    assert cache_gap(result.model, data(result.model, 3), "cpu") < 1e-5
    assert result.after.params < result.before.params
    assert Merged.of(result.model) is not None  # another run finds the branches


def test_exact_rewrites_need_no_data():
    """An Identity in both branches leaves both."""
    parts = [crossed(caching=caching) for caching in ("given", "taken")]
    for part in parts:
        value = next(v for node in part.graph for v in node.outputs if v.name == "h2")
        copy = edit.like(value)
        node = ir.Node("", "Identity", [value], outputs=[copy], name="idle")
        edit.insert_before(part.graph, value.uses()[0].node, node)
        edit.replace_value(part.graph, value, copy)
    model = merged(*parts)
    result = optimize(model, passes=[Cleanup()])
    assert result.journal.of("kept")
    idle = [
        n
        for branch in Merged.of(result.model).lead.followers
        for n in branch.graph
        if n.op_type == "Identity"
    ]
    assert not [node for node in idle if node.name == "idle"]
    np.testing.assert_array_equal(logits(result.model), logits(model))
    assert cache_gap(result.model, data(model), "cpu") < 1e-6


def test_caches_that_are_handed_on_leave_with_their_layer():
    model = merged(crossed(caching="given"), crossed(caching="taken"), hands_on=True)
    passes = [Cleanup(), CollapseLayers(longest=2)]
    result = optimize(model, data(model), budget=Budget(0.2), passes=passes, provider="cpu")
    left = [name for name in CACHES if name[0] in "01"]
    assert names(result.model.graph.outputs) == ["logits", *(f"present.{name}" for name in left)]
    feeds = samples(crossed(caching="taken"), 3) | {"use_cache_branch": np.array([True])}
    feeds = {name: array for name, array in feeds.items() if name in names(result.model.graph.inputs)}
    with open_session(result.model, provider="cpu") as session:
        found = session.run(complete(feeds, result.model.signature()))
    for name in (name for name in left if "encoder" in name):
        np.testing.assert_array_equal(found[f"present.{name}"], feeds[f"past_key_values.{name}"])
    assert cache_gap(result.model, data(result.model, 3), "cpu") < 1e-5


def test_an_output_that_is_a_weight_is_made_by_a_node(tmp_path):
    model = decoder()
    apart = Merged.of(model)
    graph = apart.lead.followers[0].graph
    place, value = next((i, v) for i, v in enumerate(graph.outputs) if v.name == "present.1.encoder.key")
    array = value.producer().attributes["value"].value.numpy()
    weight = ir.Value(
        name=value.name, const_value=ir.tensor(array), type=value.type, shape=ir.Shape(array.shape)
    )
    value.name = "idle"
    graph.outputs[place] = weight
    graph.initializers.add(weight)
    made = apart.join(apart.lead)
    assert made.signature() == model.signature()
    assert cache_gap(made, data(made), "cpu") < 1e-6


def test_what_nothing_was_done_to_is_the_same_byte_for_byte():
    model = decoder()
    result = optimize(model, data(model), budget=Budget(1e-9), passes=[CollapseLayers()], provider="cpu")
    assert not result.journal.of("kept")
    assert result.model.to_bytes() == model.to_bytes()


def test_a_frontier_takes_it_apart_once_for_each_share():
    model = decoder()
    targets = [Target("params", share) for share in (0.9, 0.6)]
    found = list(frontier(model, data(model), targets, passes=[CollapseLayers(longest=2)], provider="cpu"))
    assert [round(r.after.params / r.before.params, 1) for r in found][1] < 0.7
    for result in found:
        assert cache_gap(result.model, data(result.model), "cpu") < 1e-5


def test_all_layers_may_leave():
    model = merged(crossed(2, caching="given", weak=(0, 1)), crossed(2, caching="taken", weak=(0, 1)))
    result = optimize(
        model,
        data(model),
        budget=Budget(0.9),
        passes=[CollapseLayers(merge="drop", longest=2)],
        provider="cpu",
    )
    assert names(result.model.graph.outputs) == ["logits"]
    assert cache_gap(result.model, data(model), "cpu") < 1e-5


def test_branches_of_different_weights_are_left_as_they_are(caplog):
    parts = [crossed(caching=caching) for caching in ("given", "taken")]
    weight = next(v for v in parts[1].graph.initializers.values() if v.const_value.shape.numpy() == (16, 32))
    weight.const_value = ir.tensor(weight.const_value.numpy() * 1.5, name=weight.name)
    model = merged(*parts)
    result = optimize(model, data(model), budget=Budget(0.5), passes=[CollapseLayers()], provider="cpu")
    assert [entry.outcome for entry in result.journal] == ["declined"]
    assert result.model.to_bytes() == model.to_bytes()
    assert "differ by" in caplog.text and "left as they are" in caplog.text


def test_what_only_the_leader_computes_is_rewritten_there_alone(monkeypatch):
    """Keys and values of the encoder's states are projected where there is no cache yet."""
    monkeypatch.setattr(factor_linear, "LEAST", 8)
    model = decoder()
    apart, item = Merged.of(model), FactorLinear(align=1)
    lead = apart.lead
    here, there = (
        {site.name for site in item.sites(part) if not isinstance(site, Decline)}
        for part in (lead, *lead.followers)
    )
    (own,) = here - there
    assert own not in {site.site for site in sites_of(item, lead) if isinstance(site, Decline)}
    proposal = offers(lead, data(model).fed_to(lead), item)[own][0]
    cached = lead.followers[0].clone()
    apply(lead, item, proposal)
    assert lead.followers[0].imprint() == cached.imprint()
    made = apart.join(lead)
    assert size(made).params < size(model).params
    assert cache_gap(made, data(made), "cpu") < 1e-5


def test_a_site_that_the_follower_lacks_is_declined():
    model = decoder()
    lead = Merged.of(model).lead
    (cached,) = lead.followers
    sites = [site.name for site in NarrowFfn().sites(lead)]
    value = next(v for node in cached.graph for v in node.outputs if v.name == sites[0])
    value.name = "called_otherwise"
    reasons = {site.site: site.reason for site in sites_of(NarrowFfn(), lead) if isinstance(site, Decline)}
    assert reasons == {sites[0]: "the branch with a cache has no such site, and both have to stay alike"}


def test_a_rewrite_of_one_branch_only_is_rolled_back(monkeypatch):
    model = merged(crossed(2, caching="given", weak=(0,)), crossed(2, caching="taken", weak=(0,)))
    real = CollapseLayers.rewrite

    def unequal(self, graph, site, proposal):
        if any("past" in name for name in names(graph.graph.inputs)):
            proposal = replace(proposal, payload=replace(proposal.payload, merge="drop"))
        real(self, graph, site, proposal)

    monkeypatch.setattr(CollapseLayers, "rewrite", unequal)
    passes = [CollapseLayers(longest=1, parts=False), NarrowFfn()]
    result = optimize(model, data(model), budget=Budget(0.1), passes=passes, provider="cpu")
    assert {entry.pass_name for entry in result.journal.of("kept")} == {"narrow-ffn"}
    assert any("through its cache it is" in entry.reason for entry in result.journal)
    assert cache_gap(result.model, data(result.model), "cpu") < 1e-5


def test_weights_that_are_equal_and_not_one_change_together():
    """The leader stores twice what the follower reads from one place: no site is taken for the leader's own."""
    model = decoder()
    graph = model.graph
    branch = next(iter(graph)).attributes["else_branch"].value
    for node in branch:
        for place, value in enumerate(node.inputs):
            if (
                value is not None
                and value.const_value is not None
                and value.const_value.shape.numpy() == (16, 32)
            ):
                copy = ir.Value(
                    name=f"again_{node.name}",
                    type=value.type,
                    shape=value.shape,
                    const_value=ir.tensor(value.const_value.numpy().copy()),
                )
                graph.initializers.add(copy)
                node.replace_input_with(place, copy)
    feeds = samples(crossed(caching="given"), length=1)
    result = optimize(
        model, open_data(feeds, model), budget=Budget(0.3), passes=[NarrowFfn()], provider="cpu"
    )
    assert cache_gap(result.model, data(result.model), "cpu") < 1e-5


def test_names_stay(tmp_path):
    model = decoder()
    made = Merged.of(model).join(Merged.of(model).lead)
    before, after = (next(iter(one.graph)) for one in (model, made))
    assert before.name == after.name and list(before.attributes) == list(after.attributes)
    for name in before.attributes:
        assert before.attributes[name].value.name == after.attributes[name].value.name
    lead = [[v.name for v in n.outputs] for n in before.attributes["else_branch"].value]
    assert [[v.name for v in n.outputs] for n in after.attributes["else_branch"].value] == lead
    assert set(made.graph.initializers) == set(model.graph.initializers)


def test_tables_of_integers_are_stored_once():
    parts = [crossed(caching=caching) for caching in ("given", "taken")]
    for part in parts:
        table = ir.Value(
            name="table", const_value=ir.tensor(np.arange(5000)), type=ir.TensorType(ir.DataType.INT64)
        )
        table.shape = ir.Shape([5000])
        part.graph.initializers.add(table)
        ids = next(v for v in part.graph.inputs if v.name == "input_ids")
        first = ids.uses()[0].node
        node = ir.Node("", "Gather", [table, ids], outputs=[edit.like(ids)], name="look_up")
        edit.insert_before(part.graph, first, node)
        ids.uses()[0].node.replace_input_with(ids.uses()[0].idx, node.outputs[0])
    model = merged(*parts)
    graph = model.graph
    branches = [attribute.value for attribute in next(iter(graph)).attributes.values()]
    shared = branches[0].initializers.pop("table")  # as other exporters have it: once, around both
    other = branches[1].initializers.pop("table")
    graph.initializers.add(shared)
    for node, place in list(other.uses()):
        node.replace_input_with(place, shared)
    made = Merged.of(model).join(Merged.of(model).lead)
    assert len(made.to_bytes()) < 1.02 * len(model.to_bytes())


def test_a_branch_may_give_out_a_weight():
    model = decoder()
    branch = next(iter(model.graph)).attributes["then_branch"].value
    place, value = next((i, v) for i, v in enumerate(branch.outputs) if v.name == "present.1.encoder.key")
    weight = ir.Value(
        name="given_out",
        type=value.type,
        shape=value.shape,
        const_value=value.producer().attributes["value"].value,
    )
    branch.initializers.add(weight)
    branch.outputs[place] = weight
    result = optimize(
        model, data(model), budget=Budget(0.2), passes=[CollapseLayers(longest=2)], provider="cpu"
    )
    assert result.journal.of("kept")
    assert cache_gap(result.model, data(result.model), "cpu") < 1e-5


@pytest.mark.parametrize("branch", ["else_branch", "then_branch"])
def test_exact_rewrites_of_one_branch_are_made_there(branch):
    model = optimize(decoder(), passes=[Cleanup()]).model
    graph = next(iter(model.graph)).attributes[branch].value
    value = next(v for node in graph for v in node.outputs if node.op_type == "Softmax")
    readers = list(value.uses())
    node = ir.Node("", "Identity", [value], outputs=[edit.like(value)], name="idle")
    graph.insert_before(readers[0].node, node)
    node.outputs[0].name = "idle_out"
    for reader, place in readers:
        reader.replace_input_with(place, node.outputs[0])
    result = optimize(model, data(model), passes=[Cleanup()], provider="cpu")
    (kept,) = result.journal.of("kept")
    assert ("in the branch with a cache" in kept.reason) == (branch == "then_branch")
    graphs = [attribute.value for attribute in next(iter(result.model.graph)).attributes.values()]
    assert not any(node.name == "idle" for graph in graphs for node in graph)
    assert cache_gap(result.model, data(result.model), "cpu") < 1e-6


def test_a_folder_takes_the_encoder_along(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    decoder().save(source / "decoder_model_merged.onnx")
    for name in ("decoder_model.onnx", "decoder_with_past_model.onnx", "other.bin"):
        (source / name).write_bytes(b"bytes of " + name.encode())
    stream(2).save(source / "encoder_model.onnx", external=True)
    (weights,) = source.glob("encoder_model.onnx?*")
    encoder = onnx.load(source / "encoder_model.onnx", load_external_data=False)
    for tensor in encoder.graph.initializer:
        for entry in tensor.external_data:
            entry.value = "encoder.bin" if entry.key == "location" else entry.value
    weights.rename(source / "encoder.bin")
    (source / "encoder_model.onnx").write_bytes(encoder.SerializeToString())
    config = {"is_encoder_decoder": True, "num_layers": 4, "num_decoder_layers": 4}
    (source / "config.json").write_text(json.dumps(config))
    model = Model.load(source)
    item = CollapseLayers(longest=2)
    result = optimize(model, data(model), budget=Budget(0.2), passes=[item], provider="cpu")
    result.model.save(tmp_path / "out")
    out = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert out == ["config.json", "decoder_model_merged.onnx", "encoder.bin", "encoder_model.onnx"]
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"num_decoder_layers": 2}
    assert (tmp_path / "out" / "encoder_model.onnx").read_bytes() == (
        source / "encoder_model.onnx"
    ).read_bytes()
