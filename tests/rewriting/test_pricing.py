# SPDX-License-Identifier: Apache-2.0
"""Prices of candidates: what is measured is what the model would show, and little is measured."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
from onnxcollapse.passes.narrow_ffn import NarrowFfn

from onnxcollapse import Budget, Target
from onnxcollapse.calibration import collect, plan
from onnxcollapse.calibration.segments import segments
from onnxcollapse.calibration.sessions import Session
from onnxcollapse.calibration.walk import Walk
from onnxcollapse.model import size
from onnxcollapse.rewriting import pricing
from onnxcollapse.rewriting.extents import Extents
from onnxcollapse.rewriting.fitting import Place, apply
from onnxcollapse.rewriting.passes import sites_of
from onnxcollapse.rewriting.pricing import ANCHORS, FEWEST, FORWARDS, Pricer
from onnxcollapse.rewriting.progress import Progress
from onnxcollapse.rewriting.proposal import Proposal, Saving
from onnxcollapse.rewriting.selection import Candidate
from onnxcollapse.verification import Verifier
from tests.passes.narrowing import correlated
from tests.rewriting.branches import Drop, branches
from tests.support import Net, data_for, mlp


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR)


class Case:
    """A model with all candidates of narrow-ffn and what prices them."""

    def __init__(self, model, x, budget=None):
        self.model, self.data, self.item = model, data_for(model, x), NarrowFfn()
        self.budget = budget or Budget(None, target=Target("params", 0.5))
        self.verifier = Verifier(model, self.data, provider="cpu")
        self.plan = plan(model)
        self.candidates = self.offered()
        self.pricer = Pricer(
            model,
            self.data,
            self.verifier,
            self.budget,
            self.plan,
            "cpu",
            Extents(model, self.budget.target, self.data),
        )

    def offered(self):
        order = {node: index for index, node in enumerate(self.model.graph)}
        sites = [site for site in sites_of(self.item, self.model) if hasattr(site, "nodes")]
        wanted = [request for site in sites for request in self.item.requests(site)]
        statistics = collect(self.model, wanted, self.data, provider="cpu")
        found = []
        for site in sites:
            place = Place.of(self.item, site, order)
            found += [place.candidate(offer) for offer in self.item.propose(site, statistics)]
        return found

    def prices(self, label="pricing"):
        found = self.pricer.price(self.candidates, Progress(), label)
        return {price.candidate.key: price for price in found}

    def rewritten(self, candidate):
        copy = self.model.clone()
        apply(copy, candidate.maker, candidate.proposal)
        return copy


def blocks(layers=3, width=12, hidden=32):
    """h + FFN(h) a few times."""
    net = Net(1)
    h = net.dense("x", 16, width, name="h0")
    for layer in range(layers):
        update = net.dense(net.op("Relu", net.dense(h, width, hidden)), hidden, width, name=f"u{layer}")
        h = net.op("Add", h, update, name=f"h{layer + 1}")
    net.dense(h, width, 4, name="y")
    return net.model({"x": ["n", 16]}, {"y": ["n", 4]})


CASES = {"chain": lambda: mlp([16, 40, 40, 8]), "blocks": blocks}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    logging.getLogger("onnx_ir").setLevel(logging.ERROR)
    return Case(CASES[request.param](), correlated(400, 16))


@pytest.fixture(scope="module")
def priced(case):
    limits = []
    kept = Walk.__init__

    def watch(self, *args, **options):
        kept(self, *args, **options)
        limits.append(self)

    Walk.__init__ = watch
    try:
        prices = case.prices()
    finally:
        Walk.__init__ = kept
    [limit] = {walk.limit for walk in limits if walk.limit is not None}
    return prices, limit


def test_all_candidates_have_a_price(case, priced):
    prices, _ = priced
    assert set(prices) == {item.key for item in case.candidates}
    assert all(price.objection is None for price in prices.values())


def test_what_was_measured_is_what_the_model_with_that_rewrite_alone_shows(case, priced):
    prices, limit = priced
    measured = [price.candidate for price in prices.values() if price.measured]
    assert measured
    for item in measured[::2]:
        error = case.verifier.error(case.rewritten(item), "heldout", limit)
        assert item.impact == pytest.approx(error, rel=1e-4)


def test_what_was_measured_saves_what_the_model_loses(case, priced):
    for price in [price for price in priced[0].values() if price.measured][::2]:
        saved, after = price.candidate.saving, size(case.rewritten(price.candidate))
        assert saved.params == size(case.model).params - after.params > 0
        assert saved.bytes == size(case.model).bytes - after.bytes
        assert saved.flops > 0


def test_few_variants_of_a_site_are_measured_the_ends_among_them(case, priced):
    prices, _ = priced
    sites = {key[1] for key in prices}
    assert len(sites) > 1
    for site in sites:
        mine = [price for key, price in prices.items() if key[1] == site]
        mine.sort(key=lambda price: price.candidate.proposal.predicted_error)
        assert len(mine) > ANCHORS
        assert sum(price.measured for price in mine) == ANCHORS
        assert mine[0].measured
        assert mine[-1].measured


@dataclass(frozen=True)
class Kinds(NarrowFfn):
    """Variants that are taken to differ by kind."""

    graded = False


def test_variants_that_differ_by_kind_are_all_measured():
    case = Case(blocks(2), correlated(200, 16))
    case.item = Kinds()
    case.candidates = case.offered()
    assert len(case.candidates) > 2 * ANCHORS
    assert all(price.measured for price in case.prices().values())


def test_an_estimate_lies_between_its_measured_neighbours(case, priced):
    prices, _ = priced
    for site in {key[1] for key in prices}:
        mine = [price for key, price in prices.items() if key[1] == site]
        mine.sort(key=lambda price: price.candidate.proposal.predicted_error)
        known = [place for place, price in enumerate(mine) if price.measured]
        for place, price in enumerate(mine):
            before = max(p for p in known if p <= place)
            after = min(p for p in known if p >= place)
            ends = sorted(mine[p].candidate.impact for p in (before, after))
            assert ends[0] * (1 - 1e-9) <= price.candidate.impact <= ends[1] * (1 + 1e-9)
            saved = price.candidate.saving.params
            real = size(case.model).params - size(case.rewritten(price.candidate)).params
            assert saved == pytest.approx(real, rel=0.05)


def test_all_measurements_together_cost_no_more_than_a_few_runs_of_the_data(case, priced, monkeypatch):
    """Rows times segments that pass through sessions, where a run of all data is samples times segments."""
    done, own = [], set()
    opened, run = pricing.Trials._open, Session.run

    def remember(self, scratch):
        session = opened(self, scratch)
        own.add(session)
        return session

    def counted(self, feeds, *more):
        if self in own:
            done.append(len(next(iter(feeds.values()))))
        return run(self, feeds, *more)

    monkeypatch.setattr(pricing.Trials, "_open", remember)
    monkeypatch.setattr(Session, "run", counted)
    case.prices()
    parts = len(segments(case.model.graph, case.pricer._points))
    variants = sum(done) / parts - priced[1]  # the model itself goes beside them once
    assert 0.25 * case.data.samples < variants <= FORWARDS * case.data.samples


def test_many_candidates_are_measured_on_few_samples_but_never_on_fewer_than_two(monkeypatch):
    case = Case(mlp([16, 40, 8]), correlated(24, 16))
    monkeypatch.setattr(pricing, "FORWARDS", 1e-6)
    limits = []
    trials = pricing.Trials.run

    def watch(self, variants):
        limits.append(self.limit)
        return trials(self, variants)

    monkeypatch.setattr(pricing.Trials, "run", watch)
    assert all(math.isfinite(price.candidate.impact) for price in case.prices().values())
    assert limits == [FEWEST]


def test_what_alone_is_over_the_budget_is_declined_with_the_figure():
    case = Case(mlp([16, 40, 40, 8]), correlated(400, 16), Budget(0.12))
    prices = case.prices().values()
    for price in prices:
        over = price.candidate.impact > 0.12
        how = "moves" if price.measured else "is estimated to move"
        expected = f"alone it {how} the outputs by {price.candidate.impact:.4g}, over the budget of 0.12"
        assert price.objection == (expected if over else None)
    kinds = {(price.measured, price.objection is None) for price in prices}
    assert kinds == {(True, True), (True, False), (False, True), (False, False)}


def tied(layers=2):
    """Blocks that read the same matrices."""
    net = Net(1)
    up, down = (
        net.const(net.random.normal(size=(12, 32)) / 4),
        net.const(net.random.normal(size=(32, 12)) / 6),
    )
    h = net.dense("x", 16, 12, name="h0")
    for layer in range(layers):
        hidden = net.op("Relu", net.op("MatMul", h, up))
        update = net.op("MatMul", hidden, down, name=f"u{layer}")
        h = net.op("Add", h, update, name=f"h{layer + 1}")
    net.dense(h, 12, 4, name="y")
    return net.model({"x": ["n", 16]}, {"y": ["n", 4]})


def test_weights_that_others_still_read_are_not_saved():
    case = Case(tied(), correlated(300, 16), Budget(10.0))
    assert len(case.plan.points) > 1
    prices = [price for price in case.prices().values() if price.measured]
    assert len(prices) > ANCHORS
    for price in prices:
        after = size(case.rewritten(price.candidate))
        assert after.params > size(case.model).params
        assert price.objection is not None
        assert price.objection.startswith(
            f"would grow the model: params by {after.params - size(case.model).params:,}"
        )


@dataclass(frozen=True)
class Failing(Drop):
    """Proposes what cannot be applied or becomes no number."""

    def rewrite(self, model, site, proposal):
        factor = math.inf if proposal.variant == "inf" else 0.0
        if proposal.variant == "gone":
            raise pricing.ModelError("it is gone")
        super().rewrite(model, site, replace(proposal, payload=factor))


def test_a_candidate_that_fails_or_is_no_number_ends_with_its_reason():
    model = branches(0.1, 0.1)
    data = data_for(model, np.ones((40, 8), np.float32))
    budget = Budget(0.5)
    verifier = Verifier(model, data, provider="cpu")
    pricer = Pricer(model, data, verifier, budget, plan(model), "cpu", Extents(model, None, data))
    item = Failing()
    node = next(node for node in model.graph if node.outputs[0].name == "b0")
    place = Place(item, next(iter(item.sites(model))), ((0, node),))
    candidates = [
        place.candidate(Proposal("b0", variant, "", error, Saving(params=63)))
        for variant, error in (("zero", 0.1), ("gone", 0.2), ("inf", 0.3))
    ]
    prices = {p.candidate.key[2]: p for p in pricer.price(candidates, Progress(), "")}
    assert prices["zero"].objection is None
    assert prices["gone"].objection == "it is gone"
    assert prices["inf"].objection == "its error at the outputs is not finite"


def test_between_takes_no_part_in_what_was_not_finite():
    item = Candidate(Drop(), Proposal("s", "c", "", 0.2, Saving(params=8)), 0, frozenset())

    def known(error, impact, params):
        made = replace(
            item, proposal=Proposal("s", str(error), "", error, Saving(params=params)), impact=impact
        )
        return pricing.Price(
            replace(made, saving=Saving(params=2 * params, bytes=8 * params)),
            "no" * math.isinf(impact) or None,
        )

    def judge(tried, measured):
        return pricing.Price(tried, None, measured)

    prices = [known(0.1, 0.01, 10), known(0.15, math.inf, 9), known(0.4, 0.16, 4)]
    found = pricing._between(item, prices, judge).candidate
    assert found.impact == pytest.approx(0.04)  # half the way in logarithms of error and impact
    assert (found.saving.params, found.saving.bytes) == (16, 64)
    hopeless = pricing._between(item, [known(0.1, math.inf, 10)], judge)
    assert hopeless.objection == "no"


def test_what_a_pass_does_not_predict_to_save_is_taken_from_the_nearest_in_error():
    item = Candidate(Drop(), Proposal("s", "c", "", 0.35), 0, frozenset())
    known = [
        pricing.Price(
            replace(item, proposal=Proposal("s", f"{error}", "", error), saving=Saving(params), impact=error)
        )
        for error, params in ((0.1, 10), (0.4, 40))
    ]
    found = pricing._between(item, known, lambda tried, measured: pricing.Price(tried, None, measured))
    assert found.candidate.saving.params == 40
    assert found.candidate.impact == pytest.approx(0.35)
    assert not found.measured
