# SPDX-License-Identifier: Apache-2.0
"""Latency as what is to be saved: measured for each candidate, and for both models at the end."""

from __future__ import annotations

import numpy as np
import pytest
from onnxcollapse.passes.collapse_ffn import CollapseFfn, LinearMap

from onnxcollapse import Budget, Model, Saving, Target, optimize
from onnxcollapse.bench import StretchTimer
from onnxcollapse.errors import ModelError
from onnxcollapse.report.html import render
from onnxcollapse.rewriting.extents import Extents
from onnxcollapse.rewriting.fitting import apply
from onnxcollapse.rewriting.pipeline import require_met, shortfall
from onnxcollapse.rewriting.proposal import Proposal
from onnxcollapse.rewriting.selection import Candidate, choose
from tests.rewriting.branches import Drop, branches, run
from tests.support import Net, data_for, mlp, rows

D = 16
HALF = Target("latency", 0.5)
FIT = CollapseFfn(method="fit", ranks=False)


def block(hidden: int = 8192) -> Model:
    """A feed-forward block in which all the time goes."""
    return mlp([D, hidden, D], "LeakyRelu", spelling="matmul")


def collapse(model: Model, target: Target = HALF, samples: int = 200):
    data = data_for(model, rows(samples, D))
    return optimize(model, data, budget=Budget(None, target=target), passes=[FIT], provider="cpu")


@pytest.fixture(scope="module")
def collapsed():
    return collapse(block())


def test_a_large_block_is_collapsed_until_it_is_fast_enough(collapsed):
    (entry,) = collapsed.journal.of("kept")
    before, after = collapsed.latency
    assert collapsed.met
    assert shortfall(collapsed) is None
    assert 0 < after <= 0.5 * before
    assert 0 < entry.saving.latency < 10 * before


def test_the_summary_and_the_report_have_what_was_measured(collapsed):
    summary = collapsed.to_dict()
    assert (summary["latency_before"], summary["latency_after"]) == collapsed.latency
    assert summary["target"] == "latency=0.5"
    saved = collapsed.journal.of("kept")[0].to_dict()["saving"]["latency"]
    assert saved == pytest.approx(collapsed.journal.of("kept")[0].saving.latency, rel=1e-4)
    page = render(collapsed, summary)
    assert f"<td>latency<td class=n>{1e3 * collapsed.latency[0]:.4g} ms" in page


def test_a_target_out_of_reach_is_said_with_the_latency_reached():
    result = collapse(mlp([D, 64, D], "LeakyRelu"), Target("latency", 0.001))
    assert not result.met
    with pytest.raises(
        Exception, match=r"target latency=0\.001 not met: .*% of the latency is left"
    ) as failed:
        require_met(result)
    assert failed.value.exit_status == 1


def test_other_targets_measure_no_latency(monkeypatch):
    monkeypatch.setattr(StretchTimer, "_time", lambda *_: pytest.fail("something was timed"))
    result = run(branches(1e-4, 0.5), Drop(), budget=None, target=Target("params", 0.9))
    assert result.latency is None
    assert result.to_dict()["latency_before"] is None
    assert "latency" not in result.journal.of("kept")[0].to_dict()["saving"]
    assert "<td>latency" not in render(result, result.to_dict())


def test_without_data_latency_is_measured_on_drawn_numbers():
    model = block(64)
    result = optimize(model, budget=Budget(None, target=HALF), passes=[FIT], provider="cpu")
    before, after = result.latency
    assert before == after > 0, "nothing was rewritten"
    assert result.provider == "CPUExecutionProvider"
    assert not result.met


class Clock(StretchTimer):
    """Says that a stretch takes as many seconds as it has products, and that some cannot be cut out."""

    def __init__(self, *uncut: str) -> None:
        self.uncut, self.asked = uncut, []

    def tensors(self, model):
        return {}

    def compare(self, a, b, inputs, output, tensors=None):
        if output in self.uncut:
            raise ModelError("cannot be cut out")
        self.asked.append((tuple(inputs), output))
        return 1.0, 0.99 if output == "b1" else 0.5

    def compare_whole(self, a, b, *, again=False):
        return _products(a), _products(b)


def _products(model: Model) -> float:
    return float(sum(node.op_type == "MatMul" for node in model.graph))


def extents(model: Model, clock: Clock, share: float = 0.5) -> Extents:
    made = Extents(model, Target("latency", share), None, "cpu")
    made._timer = clock
    return made


def candidate(name: str) -> Candidate:
    return Candidate(Drop(), Proposal(name), 0, frozenset(), tensors=frozenset({name}))


def without(model: Model, *names: str) -> Model:
    trial = model.clone()
    for name in names:
        apply(trial, Drop(), Proposal(name, payload=0.0))
    return trial


def test_a_candidate_is_measured_on_its_own_nodes():
    model, clock = branches(1.0, 1.0, 1.0), Clock()
    sizes = extents(model, clock)
    saving = sizes.saving(model, sizes.of(model), without(model, "b0"), candidate("b0"))
    assert saving.latency == 0.5
    assert clock.asked == [(("x",), "b0")]


def test_a_difference_within_the_noise_is_none():
    model = branches(1.0, 1.0, 1.0)
    sizes = extents(model, Clock())
    assert sizes.saving(model, Saving(), without(model, "b1"), candidate("b1")).latency == 0.0


@pytest.mark.parametrize("item", [candidate("b0"), Candidate(Drop(), Proposal("graph"), 0, frozenset())])
def test_what_cannot_be_cut_out_is_measured_with_the_whole_model(item):
    model = branches(1.0, 1.0, 1.0)
    sizes = extents(model, Clock("b0"))
    assert sizes.saving(model, Saving(), without(model, "b0", "b2"), item).latency == 2.0


def test_what_is_missing_is_measured_and_has_a_margin():
    model = branches(1.0, 1.0, 1.0, 1.0)
    sizes = extents(model, Clock())
    assert sizes.missing(model) == pytest.approx(4 - 0.98 * 2)
    assert sizes.missing(without(model, "b0", "b1")) == pytest.approx(0.04)
    assert sizes.missing(without(model, "b0", "b1", "b2")) < 0
    assert sizes.latency(without(model, "b0")) == (4.0, 3.0)


def test_a_stretch_reads_what_its_nodes_do_not_make():
    net = Net()
    hidden = net.op("Relu", net.dense("x", D, 64), name="a")
    gate = net.op("Sigmoid", "x", name="g")
    net.op("Mul", net.dense(hidden, 64, D, name="d"), gate, name="y")
    model, clock = net.model({"x": ["n", D]}, {"y": ["n", D]}), Clock()
    made = [node.outputs[0].name for node in model.graph if node.outputs[0].name != "g"]
    item = Candidate(Drop(), Proposal("y"), 0, frozenset(), tensors=frozenset(made))
    extents(model, clock).saving(model, Saving(), model, item)
    assert clock.asked == [(("x", "g"), "y")]


def test_savings_of_fractions_of_a_second_add_up():
    items = [
        Candidate(Drop(), Proposal(name), 0, frozenset(name), Saving(params=1, latency=0.002), place / 10)
        for place, name in enumerate("abcd")
    ]
    assert [item.proposal.site for item in choose(items, "latency", needed=0.003)] == ["a", "b"]
    assert (Saving(latency=0.5) - Saving(latency=0.25)).latency == 0.25


def test_a_target_of_latency_is_read():
    assert Target.parse("latency=0.8") == Target("latency", 0.8)


def test_layers_that_are_alike_are_measured_once():
    net, value = Net(), "x"
    for layer in range(4):
        hidden = net.op("Relu", net.dense(value, D, 64))
        value = net.op("Add", value, net.dense(hidden, 64, D), name="y" if layer == 3 else None)
    model = net.model({"x": ["n", D]}, {"y": ["n", D]})
    clock = StretchTimer({"x": rows(1, D)}, "cpu", rounds=3, warmup=1, min_seconds=0.0)
    sizes = extents(model, clock)
    whole = sizes.of(model)
    for site in list(FIT.sites(model)):
        trial = model.clone()
        FIT.apply(trial, [_proposal(site)])
        made = frozenset(value.name for node in site.nodes for value in node.outputs)
        item = Candidate(FIT, _proposal(site), 0, frozenset(), tensors=made)
        sizes.saving(model, whole, trial, item)
    assert clock.measured == 2


def _proposal(site) -> Proposal:
    return Proposal(site.name, payload=LinearMap.of((np.eye(D),), np.zeros(D)))
