# SPDX-License-Identifier: Apache-2.0
"""refit: what it repairs behind lossy rewrites, and what it leaves alone."""

from __future__ import annotations

import logging

import numpy as np
import onnx_ir as ir
import pytest
from onnxcollapse.passes.narrow_ffn import NarrowFfn
from onnxcollapse.passes.refit import Refit

from onnxcollapse import Budget, Decline, Model, Target, optimize
from onnxcollapse.calibration import collect
from onnxcollapse.errors import ModelError, OptionError
from onnxcollapse.rewriting.fitting import Fitter
from onnxcollapse.rewriting.registry import parse
from tests.passes.narrowing import at, correlated, heldout, narrowed, offers
from tests.structure.hidden_nets import NETS, conv_flatten, swiglu
from tests.support import Net, data_for, file_bytes, mlp, outputs, relative

CRUDE = NarrowFfn(criterion="magnitude", refit_rest=False)


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR)


def stream(layers: int = 3, *, bias: bool = True, shape=("n",)) -> Model:
    """h + FFN(h) a few times, from a first projection and to a last one."""
    net = Net()
    h = net.dense("x", 16, 16, name="h0")
    for layer in range(layers):
        hidden = net.op("Relu", net.dense(h, 16, 48))
        matrix = net.random.normal(size=(48, 16)) / 48**0.5
        update = net.linear(hidden, matrix, np.full(16, 0.1) if bias else None, name=f"u{layer}")
        h = net.op("Add", h, update, name=f"h{layer + 1}")
    net.dense(h, 16, 4, name="y")
    return net.model({"x": [*shape, 16]}, {"y": [*shape, 4]})


def shrink(model, x, *passes, share=0.6, budget=None):
    target = None if share is None else Target("params", share)
    return optimize(
        model, data_for(model, x), budget=Budget(budget, target=target), passes=passes, provider="cpu"
    )


def of(result, outcome):
    return [entry for entry in result.journal.of(outcome) if entry.pass_name == Refit.name]


def kinds(model):
    return [node.op_type for node in model.graph]


NETWORKS = {
    # model, rows, operators that may be refitted
    "stream": (lambda: stream(2), lambda: correlated(600, 16), {"u1"}),
    "stream without biases": (lambda: stream(2, bias=False), lambda: correlated(600, 16), {"u1"}),
    "tokens": (
        lambda: stream(2, shape=("n", "t")),
        lambda: correlated(800, 16).reshape(200, 4, 16),
        {"u1"},
    ),
    "chain": (
        lambda: mlp([16, 48, 48, 8], "Tanh"),
        lambda: correlated(800, 16),
        {"gemm2", "y"},
    ),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_refit_lowers_the_error_behind_a_damaging_rewrite_and_nothing_else_changes(case):
    build, draw, candidates = NETWORKS[case]
    model, x = build(), draw()
    damaged, repaired = shrink(model, x, CRUDE), shrink(model, x, CRUDE, Refit())
    assert repaired.error < 0.9 * damaged.error
    entries = of(repaired, "kept")
    assert {entry.site for entry in entries} & candidates
    assert all(entry.reason.startswith("refitted: error ") for entry in entries)
    assert all(entry.error == repaired.error for entry in entries)
    assert all(entry.saving.params == 0 for entry in entries)
    assert repaired.after.params == damaged.after.params
    assert repaired.after.bytes == damaged.after.bytes
    assert kinds(repaired.model) == kinds(damaged.model)
    held = heldout(data_for(model, x))
    measured = relative(outputs(repaired.model, x=held)["y"], outputs(model, x=held)["y"])
    assert repaired.error == pytest.approx(measured, rel=1e-3)


def test_layer_by_layer_it_does_the_same():
    model, x = stream(2), correlated(300, 16)
    budget, passes = Budget(None, target=Target("params", 0.6)), [CRUDE, Refit()]
    whole, cut = (
        optimize(model, data_for(model, x), budget=budget, passes=passes, provider="cpu", memory=memory)
        for memory in (None, 1 << 20)
    )
    assert [entry.site for entry in of(cut, "kept")] == [entry.site for entry in of(whole, "kept")] != []
    assert cut.error == pytest.approx(whole.error, rel=1e-3)


@pytest.mark.parametrize("seed", range(2))
def test_it_never_raises_the_error(seed):
    model, x = mlp([16, 32, 32, 8], seed=seed), correlated(200, 16, seed=seed)
    without, beside = (
        shrink(model, x, NarrowFfn(), share=0.5),
        shrink(model, x, NarrowFfn(), Refit(), share=0.5),
    )
    assert beside.error <= without.error
    assert beside.after.params == without.after.params


def test_where_it_helps_nowhere_the_journal_says_so():
    model, x = mlp([16, 64, 8]), correlated(400, 16)
    result = shrink(model, x, NarrowFfn(skip=False), Refit())
    assert [entry.pass_name for entry in result.journal.of("kept")] == ["narrow-ffn:skip=False"]
    [entry] = of(result, "declined")
    assert (entry.site, entry.reason) == ("graph", "refitting lowered the error nowhere")


def test_alone_it_does_nothing_and_says_what_it_is_for(tmp_path):
    model = stream()
    result = shrink(model, correlated(100, 16), Refit(), share=None, budget=0.1)
    assert [(entry.outcome, entry.site) for entry in result.journal] == [("declined", "graph")]
    assert "run it beside passes that save something" in result.journal.entries[0].reason
    assert file_bytes(result.model, tmp_path) == file_bytes(model, tmp_path)


def test_behind_nothing_kept_it_does_nothing(tmp_path):
    model = stream()
    result = shrink(model, correlated(100, 16), CRUDE, Refit(), share=None, budget=1e-9)
    assert not result.journal.of("kept")
    assert [entry.site for entry in of(result, "declined")] == ["graph"]
    assert file_bytes(result.model, tmp_path) == file_bytes(model, tmp_path)


def damaged_stream(**options):
    """A model, its copy with the first layer cut, data, and the sums of the second layer's projection."""
    model = stream(**options)
    data = data_for(model, correlated(800, 16))
    found = offers(model, data, CRUDE)["u0"]
    worse = narrowed(model, CRUDE, max(found, key=lambda offer: offer.predicted_error))
    item = Refit()
    site = item.site(worse, "u1")
    statistics = collect(worse, item.requests(site), data, provider="cpu", reference=model)
    return model, worse, data, item, site, statistics


@pytest.mark.parametrize("bias", [True, False])
def test_the_target_is_the_original_stream_less_the_one_that_arrives(bias):
    """The error it names is that of the projection against what would bring h2 back, on the held-out rows."""
    model, worse, data, item, site, statistics = damaged_stream(bias=bias)
    assert (site.stream.name, site.sum.name) == ("h1", "h2")
    [offer] = item.propose(site, statistics)
    x = heldout(data)
    wanted = at(model, "h2", x) - at(worse, "h1", x)
    before = relative(at(worse, "u1", x), wanted)
    repaired = narrowed(worse, item, offer)
    after = relative(at(repaired, "u1", x), wanted)
    assert after == pytest.approx(offer.predicted_error, rel=1e-3)
    assert after < 0.97 * before
    assert f"error {before:.3g} -> {after:.3g}" in offer.detail
    restored = [relative(at(some, "h2", x), at(model, "h2", x)) for some in (repaired, worse)]
    assert restored[0] < restored[1]


def test_it_declines_where_there_is_nothing_to_gain():
    model, _, data, item, _, _ = damaged_stream()
    site = item.site(model, "u1")
    statistics = collect(model, item.requests(site), data, provider="cpu", reference=model)
    [decline] = item.propose(site, statistics)
    assert isinstance(decline, Decline)
    assert decline.reason.startswith("a refit leaves the error at ")


def test_least_is_what_it_has_to_gain():
    _, _, _, item, site, statistics = damaged_stream()
    [offer] = item.propose(site, statistics)
    assert not isinstance(offer, Decline)
    [offer] = Refit(least=0.97).propose(site, statistics)
    assert isinstance(offer, Decline)


def test_a_weight_that_others_read_stays_one():
    net = Net()
    up, down = (
        net.const(net.random.normal(size=(16, 48)) / 4),
        net.const(net.random.normal(size=(48, 16)) / 7),
    )
    h = net.dense("x", 16, 16, name="h0")
    for layer in range(2):
        hidden = net.op("Relu", net.op("MatMul", h, up))
        h = net.op("Add", h, net.op("MatMul", hidden, down, name=f"u{layer}"), name=f"h{layer + 1}")
    net.dense(h, 16, 4, name="y")
    model = net.model({"x": ["n", 16]}, {"y": ["n", 4]})
    found = list(Refit().sites(model))
    assert [x.site for x in found if isinstance(x, Decline)] == ["u0", "u1"]
    assert all("stored twice" in x.reason for x in found if isinstance(x, Decline))


def test_a_stream_that_is_repeated_is_none():
    net = Net()
    hidden = net.op("Relu", net.dense("x", 16, 48))
    start = net.op("ReduceMean", "x", axes=[1], keepdims=1)
    net.dense(net.op("Add", start, net.dense(hidden, 48, 16, name="u"), name="h"), 16, 4, name="y")
    model = net.model({"x": ["n", 5, 16]}, {"y": ["n", 5, 4]})
    x = correlated(1000, 16).reshape(200, 5, 16)
    damaged, repaired = shrink(model, x, CRUDE), shrink(model, x, CRUDE, Refit())
    assert damaged.journal.of("kept")
    assert repaired.met
    assert repaired.error <= damaged.error


def test_a_repair_that_fails_costs_the_repair_only(monkeypatch):
    def fails(*_):
        raise ModelError("no")

    monkeypatch.setattr(Fitter, "repair", fails)
    model, x = stream(1), correlated(200, 16)
    assert shrink(model, x, CRUDE, Refit()).after == shrink(model, x, CRUDE).after


def test_half_precision_stays_half():
    net, half = Net(), np.float16
    h = net.op("Cast", "x", to=10)
    for layer in range(2):
        up = net.const(net.random.normal(size=(16, 48)) / 4, dtype=half)
        down = net.const(net.random.normal(size=(48, 16)) / 7, dtype=half)
        update = net.op("MatMul", net.op("Relu", net.op("MatMul", h, up)), down, name=f"u{layer}")
        h = net.op("Add", h, update, name=f"h{layer + 1}")
    net.op("Cast", h, to=1, name="y")
    model = net.model({"x": ["n", 16]}, {"y": ["n", 16]})
    x = correlated(800, 16)
    damaged, repaired = shrink(model, x, CRUDE), shrink(model, x, CRUDE, Refit())
    assert of(repaired, "kept")
    assert repaired.error < damaged.error
    assert {v.dtype for v in repaired.model.graph.initializers.values()} == {ir.DataType.FLOAT16}


@pytest.mark.parametrize("case", [*NETS, "chain", "stream"])
def test_a_site_found_by_its_name_is_the_one_found_with_all_others(case):
    more = {"chain": lambda: mlp([4, 6, 7, 5], "Tanh"), "stream": stream}
    model, item = (more[case] if case in more else NETS[case][0])(), Refit()
    sites = [site for site in item.sites(model) if not isinstance(site, Decline)]
    for site in sites:
        alone = item.site(model, site.name)
        assert (alone.name, alone.nodes) == (site.name, site.nodes)
        assert (alone.stream, alone.sum) == (site.stream, site.sum)
        assert item.requests(alone) == item.requests(site)
    assert item.site(model, "nothing") is None


def test_sites_are_projections_to_a_stream_and_ends_of_hidden_layers():
    def names(model):
        return [site.name for site in Refit().sites(model)]

    assert names(stream()) == ["u0", "u1", "u2"]
    assert names(mlp([4, 6, 7, 5])) == ["gemm2", "y"]
    assert names(swiglu()) == ["y"]
    assert names(conv_flatten()) == ["y"]


def test_two_runs_write_the_same_bytes(tmp_path):
    model, x = stream(2), correlated(200, 16)
    first, second = (shrink(model, x, CRUDE, Refit()) for _ in range(2))
    assert of(first, "kept")
    assert file_bytes(first.model, tmp_path) == file_bytes(second.model, tmp_path)


def test_options_come_from_text():
    assert parse("refit:least=0.2") == Refit(least=0.2)
    with pytest.raises(OptionError, match=r"least 1.0 must lie in \[0, 1\)"):
        parse("refit:least=1")


def test_never_runs_without_data():
    result = optimize(stream(), passes=[Refit()])
    assert ["--calib" in entry.reason for entry in result.journal] == [True]
