# SPDX-License-Identifier: Apache-2.0
"""The engine against passes that lie, break things, do harm together, or save nothing."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxcollapse.passes.factor_linear import FactorLinear

from onnxcollapse import Budget, Decline, Model, Pass, Proposal, Target, optimize
from onnxcollapse.errors import BudgetNotMetError, DataError
from onnxcollapse.model import edit, size
from onnxcollapse.rewriting.pipeline import require_met, shortfall
from onnxcollapse.verification import Verifier
from tests.rewriting.branches import BRANCH, WIDTH, Branch, Drop, branches, kept, left, remaining, run
from tests.support import Net, data_for, mlp, outputs, relative, rows


def test_what_fits_is_kept_and_what_does_not_is_declined_with_the_figures():
    model = branches(1e-4, 0.5, 2e-4)
    result = run(model, Drop())
    assert kept(result) == ["b0", "b2"]
    outcome, reason = left(result)["b1"]
    assert outcome == "declined"
    assert "alone it moves the outputs by 0.4" in reason
    assert "over the budget of 0.01" in reason
    assert remaining(result.model) == ["b1"]
    x = rows(500, WIDTH, seed=9)
    measured = relative(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"])
    assert result.error == pytest.approx(measured, rel=0.1)
    assert result.met


def test_the_model_that_is_given_stays_as_it_is():
    model = branches(1e-4, 1e-4)
    before = model.to_bytes()
    result = run(model, Drop())
    assert kept(result) == ["b0", "b1"]
    assert model.to_bytes() == before


def test_harm_done_together_is_found_by_bisection_and_only_its_cause_rolled_back():
    """Each of the twins can go alone without any effect, since the other stands in for it; both cannot."""
    result = run(branches(1.0, 1.0, 1e-4, 2e-4, twins=True), Drop())
    assert kept(result) == ["b0", "b2", "b3"]
    [(site, (outcome, reason))] = left(result).items()
    assert (site, outcome) == ("b1", "rolled-back")
    assert "with what was kept before it the held-out error is 0." in reason
    assert "over the budget of 0.01" in reason
    [entry] = result.journal.of("rolled-back")
    assert entry.impact == 0.0
    assert entry.error > 0.3
    assert result.error < 0.01
    assert remaining(result.model) == ["b1"]


def test_an_exact_pass_that_is_not_is_found_by_measurement_and_the_others_stay(caplog):
    model = branches(1e-7, 0.5, 1e-7)
    with caplog.at_level(logging.INFO, logger="onnxcollapse"):
        result = run(model, Drop(claims=True))
    assert "exact rewrites moved the outputs" in caplog.text
    assert kept(result) == ["b0", "b2"]
    outcome, reason = left(result)["b1"]
    assert outcome == "declined"
    assert "the outputs moved by 0.4" in reason
    assert result.error < 1e-4


@pytest.mark.parametrize("metric", ["rel-l2", "cosine"])
def test_no_stage_runs_what_another_has_measured(monkeypatch, metric):
    """The exact stage's model runs once, in whatever metric it is held; a chosen plan that stays is measured once."""
    model = branches(1e-8, 0.001, 0.5)
    data = data_for(model, rows(200, WIDTH))
    measured, real = [], Verifier._run

    def counted(self, tallies, model, imprint, part, limit):
        measured.append((imprint, [tally.spec for tally in tallies]))
        return real(self, tallies, model, imprint, part, limit)

    monkeypatch.setattr(Verifier, "_run", counted)
    budget, passes = Budget(0.01, metric), [Drop(claims=True, only=("b0",)), Drop(only=("b1",))]
    result = optimize(model, data, budget=budget, passes=passes, provider="cpu")
    assert kept(result) == ["b0", "b1"]
    assert len({imprint for imprint, _ in measured}) == len(measured) == 2
    assert [set(specs) for _, specs in measured] == [{"rel-l2", metric}, {metric}]


def test_an_exact_pass_is_believed_without_data():
    result = run(branches(1e-7, 0.5), Drop(claims=True), data=False)
    assert kept(result) == ["b0", "b1"]
    assert result.error is None


def test_outputs_that_are_no_numbers_are_declined():
    result = run(branches(1e-4, 1e-4), Drop(variants=(("nan", float("nan")),)), budget=1e6)
    assert kept(result) == []
    assert left(result) == dict.fromkeys(("b0", "b1"), ("declined", "its error at the outputs is not finite"))
    assert result.journal.to_json()


@pytest.mark.parametrize("claims", [False, True])
def test_what_grows_the_model_is_declined_however_small_the_error(claims):
    result = run(branches(1e-7), Drop(claims=claims, extra=BRANCH // WIDTH))
    assert kept(result) == []
    assert left(result)["b0"] == ("declined", "would grow the model: params by 1, bytes by 4")


@pytest.mark.parametrize("claims", [False, True])
def test_what_saves_nothing_is_declined(claims):
    @dataclass(frozen=True)
    class Same(Drop):
        name: ClassVar[str] = "same"

        def rewrite(self, model: Model, site: Branch, proposal: Proposal) -> None:
            matrix = site.node.inputs[1].const_value.numpy()
            weight = edit.add_initializer(model.graph, "w", matrix, ir.DataType.FLOAT)
            made = ir.node("MatMul", [site.node.inputs[0], weight])
            edit.insert_before(model.graph, site.node, made)
            edit.substitute(model, site.node.outputs[0], made.outputs[0])

    result = run(branches(1e-4), Same(claims=claims))
    assert kept(result) == []
    assert left(result)["b0"] == ("declined", "would save nothing")


def test_the_variant_with_the_least_error_for_what_it_saves_is_taken():
    model = branches(0.0)
    weights = np.eye(WIDTH) * 0.5
    model.graph.initializers["c0"].const_value = ir.tensor(weights.astype(np.float32))
    variants = (("zero", 0.0), ("half", 0.5), ("third", 0.33))
    [entry] = run(model, Drop(variants=variants), budget=0.5).journal.of("kept")
    assert (entry.variant, entry.reason) == ("half", "half it is")
    assert entry.error == pytest.approx(0.0, abs=1e-6)


def error_without(model: Model, names: Iterable[str]) -> float:
    x = rows(2000, WIDTH, seed=4)
    total = x.astype(np.float64)
    for index, value in enumerate(model.graph.initializers.values()):
        if f"b{index}" not in names:
            total = total + x @ value.const_value.numpy()
    return relative(total, outputs(model, x=x)["y"])


@pytest.mark.parametrize("measure", ["params", "bytes", "flops"])
def test_a_target_is_reached_with_the_least_error(measure):
    scales = (0.3, 0.05, 0.4, 0.1, 0.2)
    model = branches(*scales)
    result = run(model, Drop(), budget=None, target=Target(measure, 0.65))
    best = min(combinations([f"b{i}" for i in range(5)], 2), key=lambda names: error_without(model, names))
    assert sorted(kept(result)) == sorted(best) == ["b1", "b3"]
    assert result.met
    assert result.error == pytest.approx(error_without(model, best), rel=0.1)


def test_a_target_stops_where_it_is_reached_although_more_would_fit():
    result = run(branches(1e-5, 1e-5, 1e-5, 1e-5), Drop(), target=Target("params", 0.76))
    assert len(kept(result)) == 1
    assert [reason for _, reason in left(result).values()] == [
        "alone it fits, but the target was reached without it"
    ] * 3


def test_a_target_that_the_budget_forbids_is_missed_and_the_best_is_there():
    result = run(branches(1e-4, 0.5, 0.5, 0.5), Drop(), budget=0.01, target=Target("params", 0.5))
    assert kept(result) == ["b0"]
    assert not result.met
    assert shortfall(result).startswith("target params=0.5 not met: 75.4% of the params are left, error ")
    with pytest.raises(BudgetNotMetError, match="--allow-partial") as caught:
        require_met(result)
    assert caught.value.exit_status == 1


def test_a_target_can_be_met_by_exact_rewrites_with_and_without_data():
    model = branches(1e-7, 1e-7)
    for data in (True, False):
        result = run(model, Drop(claims=True), target=Target("params", 0.5), data=data)
        assert result.met, data
    result = run(model, Drop(claims=True, only=("b0",)), target=Target("params", 0.5), data=False)
    assert not result.met


def test_passes_that_decline_are_heard_once():
    @dataclass(frozen=True)
    class Picky(Drop):
        name: ClassVar[str] = "picky"

        def sites(self, model: Model):
            for site in super().sites(model):
                yield site if site.name == "b0" else Decline(site.name, "not to my taste")

    for claims in (False, True):
        result = run(branches(1e-7, 1e-7), Picky(claims=claims))
        assert kept(result) == ["b0"]
        entries = [(e.outcome, e.site, e.reason) for e in result.journal if e.outcome != "kept"]
        assert entries == [("declined", "b1", "not to my taste")]


def test_a_pass_that_was_asked_for_is_applied_once_and_also_when_it_saves_nothing():
    calls = []

    @dataclass(frozen=True)
    class Asked(Pass):
        name: ClassVar[str] = "asked"
        on_request: ClassVar[bool] = True
        claims: bool = True

        @property
        def exact(self) -> bool:
            return self.claims

        def sites(self, model):
            yield Branch(model.graph[0])

        def propose(self, site, statistics):
            yield Proposal(site.name)

        def rewrite(self, model, site, proposal):
            calls.append(site.name)
            site.node.name = "touched"

    for claims in (True, False):
        calls.clear()
        result = run(branches(1e-7, 1e-7), Asked(claims), Drop(claims=claims))
        assert [entry.pass_name for entry in result.journal.of("kept")].count(Asked(claims).describe()) == 1
        if claims:
            assert calls == ["b0"]


def test_too_little_data_is_said_before_the_work():
    model = branches(1e-7)

    @dataclass(frozen=True)
    class Never(Drop):
        def sites(self, model):
            raise AssertionError("the work began")

    with pytest.raises(DataError, match="at least 2"):
        optimize(model, data_for(model, rows(1, WIDTH)), passes=[Never(claims=True)])


def test_random_data_is_noted():
    from onnxcollapse import open_data

    model = branches(1e-4)
    result = optimize(model, open_data("random:16", model), passes=[Drop()], provider="cpu")
    assert any("random" in note for note in result.notes)


def test_more_operators_than_there_were_are_noted():
    net = Net(2)
    thin = net.random.normal(size=(64, 8)) @ net.random.normal(size=(8, 64))
    net.op("Tanh", net.linear("x", thin / 8, net.random.normal(size=64), name="z"), name="y")
    model = net.model({"x": ["n", 64]}, {"y": ["n", 64]})
    result = optimize(model, data_for(model, rows(300, 64)), passes=[FactorLinear()], provider="cpu")
    (note,) = [note for note in result.notes if "more operators" in note]
    assert f"leave {size(result.model).nodes - size(model).nodes} more operators" in note
    assert "a target of latency" in note
    assert not [note for note in run(branches(1e-4), Drop()).notes if "more operators" in note]


def test_what_was_kept_is_recorded_in_the_model_without_a_time():
    result = run(branches(1e-4, 1e-4), Drop())
    assert result.model.ir.metadata_props == {"onnxcollapse.passes": "drop"}
    untouched = run(branches(1.0), Drop())
    assert not untouched.model.ir.metadata_props


def test_sizes_and_errors_of_the_summary_are_those_of_the_model():
    model = branches(1e-4, 0.5)
    result = run(model, Drop())
    found = result.to_dict()
    assert (found["params_before"], found["params_after"]) == (2 * BRANCH, BRANCH + 1)
    assert found["bytes_after"] == 4 * (BRANCH + 1)
    assert found["flops_before"] == 2 * found["flops_after"] + 0
    assert size(result.model).params == found["params_after"]
    [rewrite] = found["rewrites"]
    assert rewrite["params_saved"] == BRANCH - 1


def test_cleaning_up_after_lossy_rewrites_is_measured_against_what_they_left():
    from onnxcollapse.passes.cleanup import Cleanup
    from onnxcollapse.passes.collapse_ffn import CollapseFfn

    model = mlp([8, 64, 8], "LeakyRelu")
    result = optimize(
        model,
        data_for(model, rows(500, 8)),
        budget=Budget(0.9),
        passes=[Cleanup(), CollapseFfn()],
        provider="cpu",
    )
    assert [entry.pass_name for entry in result.journal.of("kept")] == ["collapse-ffn"]


def test_string_metric_facts_are_in_the_journal():
    result = run(branches(1e-4), Drop(), target=Target("params", 0.9))
    facts = result.journal.facts
    assert facts == {
        "model": None,
        "passes": [Drop().describe()],
        "metric": "rel-l2",
        "budget": 0.01,
        "target": "params=0.9",
        "seed": 0,
        "data": {"samples": 200, "evidence": True},
        "provider": {"requested": "cpu", "obtained": "CPUExecutionProvider", "options": {}},
    }
    onnx.checker.check_model(ir.to_proto(result.model.ir))
