# SPDX-License-Identifier: Apache-2.0
"""Several targets from one gathering of statistics: what is shared, and that nothing else comes out of it."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from onnxcollapse.passes.cleanup import Cleanup
from onnxcollapse.passes.narrow_ffn import NarrowFfn

from onnxcollapse import Budget, Model, Target, frontier, optimize
from onnxcollapse.calibration import Sweep
from onnxcollapse.rewriting.fitting import Fitter
from onnxcollapse.rewriting.frontier import Result
from onnxcollapse.rewriting.journal import Journal
from onnxcollapse.rewriting.lossy import LossyStage
from onnxcollapse.rewriting.opening import Opening
from onnxcollapse.rewriting.pricing import Pricer
from tests.rewriting.branches import WIDTH, Drop, branches, left
from tests.support import Net, data_for, mlp, rows

PASSES = (Cleanup(), NarrowFfn(skip=False))
SHARES = (0.9, 0.6)


def targets(*shares: float, measure: str = "params") -> list[Target]:
    return [Target(measure, share) for share in shares or SHARES]


@pytest.fixture(scope="module")
def model() -> Model:
    return mlp([8, 32, 12, 32, 8], "LeakyRelu")


def sweep(model: Model, wanted: Sequence[Target], passes=PASSES, width: int = 8, **options) -> list[Result]:
    data = data_for(model, rows(100, width))
    return list(frontier(model, data, wanted, passes=passes, provider="cpu", **options))


def calls(monkeypatch, owner: type, name: str) -> list:
    """Counts calls of a method."""
    made, real = [], getattr(owner, name)

    def count(self, *arguments, **options):
        made.append(arguments)
        return real(self, *arguments, **options)

    monkeypatch.setattr(owner, name, count)
    return made


def test_each_result_is_that_of_a_run_of_its_own_byte_for_byte(model):
    data = data_for(model, rows(100, 8))
    for target, shared in zip(targets(), sweep(model, targets()), strict=True):
        budget = Budget(None, target=target)
        alone = optimize(model, data, budget=budget, passes=PASSES, provider="cpu")
        assert shared.model.to_bytes() == alone.model.to_bytes()
        assert shared.journal.to_json() == alone.journal.to_json()
        assert (shared.error, shared.met, shared.after) == (alone.error, True, alone.after)


def test_what_the_exact_stage_did_and_what_was_declined_is_in_every_journal():
    net = Net()
    dead = net.op("Identity", net.op("MatMul", "x", net.const(net.random.normal(size=(WIDTH, WIDTH)))))
    hidden = net.op("Relu", net.op("MatMul", dead, net.const(net.random.normal(size=(WIDTH, 64)))))
    net.op("MatMul", hidden, net.const(net.random.normal(size=(64, WIDTH))), name="y")
    made = net.model({"x": ["n", WIDTH]}, {"y": ["n", WIDTH]})
    first, second = sweep(made, targets(0.9, 0.5), width=WIDTH)
    exact = [[item for item in result.journal if "cleanup" in item.pass_name] for result in (first, second)]
    assert exact[0] == exact[1]
    assert [entry.outcome for entry in exact[0]] == ["kept"]
    assert all("Identity" not in {node.op_type for node in item.model.graph} for item in (first, second))
    assert (first.met, second.met) == (True, True)


def test_refusals_of_the_first_round_are_in_every_journal_and_hold():
    made = branches(1e-4, 0.5, 2e-4)
    found = sweep(made, targets(0.9, 0.6, 0.2), [Drop()], WIDTH, error=0.01)
    assert [result.met for result in found] == [True, True, False]
    assert all("over the budget of 0.01" in left(result)["b1"][1] for result in found)


def test_statistics_proposals_and_first_prices_are_computed_once(model, monkeypatch):
    gathered = calls(monkeypatch, Fitter, "statistics")
    priced = calls(monkeypatch, Pricer, "price")
    rounds = calls(monkeypatch, LossyStage, "_round")
    found = sweep(model, targets())
    assert [result.met for result in found] == [True] * len(SHARES)
    first = [number for (number,) in rounds if number == 0]
    assert len(first) == len(SHARES), "each target chooses for itself"
    assert len(gathered) == len(priced) == 1 + len(rounds) - len(first)


def test_a_further_target_costs_only_the_fit_of_what_it_chose(model, monkeypatch):
    runs = calls(monkeypatch, Sweep, "__iter__")
    sweep(model, targets(0.6))
    one = len(runs)
    sweep(model, targets(0.6, 0.6))
    fits = one - 1
    assert len(runs) - one == 1 + 2 * fits


def test_nothing_is_gathered_for_a_target_that_exact_passes_reach():
    made = mlp([8, 32, 8])
    [easy, hard] = sweep(made, targets(0.999, 0.5), [Drop(claims=True, only=("none",)), *PASSES], 8)
    assert easy.met
    assert hard.met
    assert hard.after.params < easy.after.params


def test_measures_do_not_share_prices(model):
    mixed = [*targets(0.6), *targets(0.6, measure="flops")]
    for target, result in zip(mixed, sweep(model, mixed), strict=True):
        [alone] = sweep(model, [target])
        assert result.model.to_bytes() == alone.model.to_bytes()
        assert result.journal.to_json() == alone.journal.to_json()


def test_results_are_made_when_they_are_asked_for(model, monkeypatch):
    rounds = calls(monkeypatch, LossyStage, "run")
    data = data_for(model, rows(100, 8))
    found = frontier(model, data, targets(), passes=PASSES, provider="cpu")
    assert not rounds
    next(found)
    assert len(rounds) == 1


def test_an_opening_is_for_runs_that_differ_in_the_share_only(model):
    opening, data = Opening(), data_for(model, rows(100, 8))
    optimize(model, data, budget=Budget(None, target=Target("params", 0.9)), passes=PASSES, opening=opening)
    with pytest.raises(ValueError, match="differ in more than the share"):
        optimize(model, data, budget=Budget(0.1), passes=PASSES, opening=opening)


def test_an_opening_without_entries_adds_none():
    opening, journal = Opening(), Journal()
    assert [opening.noted("x", journal, lambda: 1) for _ in range(2)] == [1, 1]
    assert journal.entries == []
