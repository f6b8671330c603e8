# SPDX-License-Identifier: Apache-2.0
"""Passes that break graphs, take other sites away, fail, or blow numbers up: the others go on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from onnxcollapse import Model, Pass, Proposal
from onnxcollapse.errors import ModelError
from onnxcollapse.model import edit
from tests.rewriting.branches import WIDTH, Branch, Drop, branches, kept, left, remaining, run
from tests.support import Net


@dataclass(frozen=True)
class Breaking(Drop):
    """Breaks the graph at b1 in one of several ways."""

    name: ClassVar[str] = "breaking"
    way: str = "refuses"

    def rewrite(self, model: Model, site: Branch, proposal: Proposal) -> None:
        if site.name != "b1":
            super().rewrite(model, site, proposal)
        elif self.way == "refuses":
            raise ModelError("b1 cannot be rewritten; leave it")
        elif self.way == "cycle":
            site.node.replace_input_with(0, model.graph.outputs[0])
        elif self.way == "domain":
            site.node.domain = "nobody"
        elif self.way == "operator":
            weight = site.node.inputs[1]
            model.graph.remove(made := site.node, safe=False)
            node = ir.node("NoSuchOperator", [made.inputs[0]], outputs=[ir.Value(name="fresh")])
            model.graph.insert_before(next(iter(model.graph)), node)
            made.outputs[0].replace_all_uses_with(node.outputs[0])
            assert weight is not None


@pytest.mark.parametrize(
    "way, reason",
    [
        ("refuses", "b1 cannot be rewritten; leave it"),
        ("cycle", "cycle"),
        ("domain", "'nobody', which is not imported"),
        ("operator", "ONNX Runtime cannot load"),
    ],
)
@pytest.mark.parametrize("claims", [False, True])
def test_a_rewrite_that_breaks_the_graph_is_declined_and_the_others_stay(way, reason, claims):
    result = run(branches(1e-7, 1e-7, 1e-7), Breaking(claims=claims, way=way))
    assert kept(result) == ["b0", "b2"]
    assert reason in left(result)["b1"][1]
    assert remaining(result.model) == ["b1"]
    edit.check(result.model, full=True)


@pytest.mark.parametrize("step", ["sites", "propose", "requests", "rewrite"])
@pytest.mark.parametrize("claims", [False, True])
def test_a_mistake_inside_a_pass_is_told_in_its_name(step, claims):
    def fail(*_):
        raise IndexError("list index out of range")

    kind = dataclass(frozen=True)(type("Wrong", (Drop,), {step: fail, "__annotations__": {}}))
    reason = "pass 'drop' failed with IndexError: list index out of range"
    if step == "requests" and claims:
        assert kept(run(branches(1e-7), kind(claims=True))) == ["b0"]
    elif step == "rewrite":
        assert reason in left(run(branches(1e-7), kind(claims=claims)))["b0"][1]
    else:
        with pytest.raises(ModelError, match=reason):
            run(branches(1e-7), kind(claims=claims))


@dataclass(frozen=True)
class OneOnly(Drop):
    """Sees branches only while there are three of them: the first rewrite takes the other sites away."""

    name: ClassVar[str] = "one-only"

    def sites(self, model: Model):
        found = list(super().sites(model))
        return found if len(found) == 3 else []

    def requests(self, site):
        from onnxcollapse.calibration.statistics import Moments, Ref

        return [Moments(Ref(site.name))]


@pytest.mark.parametrize("claims", [False, True])
def test_a_site_that_another_rewrite_took_away_is_no_crash(claims):
    result = run(branches(1e-7, 1e-7, 1e-7), OneOnly(claims=claims))
    assert len(kept(result)) == (3 if claims else 1)
    for outcome, reason in left(result).values():
        assert outcome == "rolled-back"
        assert "is gone; an earlier rewrite consumed it" in reason


@dataclass(frozen=True)
class Reshaping(Drop):
    """Gives the output another shape."""

    name: ClassVar[str] = "reshaping"

    def rewrite(self, model: Model, site: Branch, proposal: Proposal) -> None:
        column = edit.add_initializer(model.graph, "column", np.zeros((WIDTH, 1, 1)), ir.DataType.FLOAT)
        made = ir.node("Mul", [site.node.inputs[0], column])
        edit.insert_before(model.graph, site.node, made)
        made.outputs[0].dtype = ir.DataType.FLOAT
        site.node.outputs[0].replace_all_uses_with(made.outputs[0])


@pytest.mark.parametrize("claims", [False, True])
def test_outputs_of_another_shape_are_declined(claims):
    result = run(branches(1e-7, 1e-7), Reshaping(claims=claims))
    assert kept(result) == []
    assert all("shape" in reason for _, reason in left(result).values())


def test_calibration_that_turns_to_nan_behind_a_rewrite_rolls_it_back():
    """The first rewrite is harmless at the output, but what the second is fitted to becomes infinite."""

    @dataclass(frozen=True)
    class Blowing(Pass):
        name: ClassVar[str] = "blowing"

        def sites(self, model):
            for node in model.graph:
                if node.outputs[0].name in ("big", "next"):
                    yield Branch(node)

        def requests(self, site):
            from onnxcollapse.calibration.statistics import Moments, Ref

            return [Moments(Ref(site.node.inputs[0].name))]

        def propose(self, site, statistics):
            yield Proposal(site.name, payload=1e30 if site.name == "big" else 0.0)

        def rewrite(self, model, site, proposal):
            factor = edit.add_initializer(
                model.graph, "factor", np.full(1, proposal.payload), ir.DataType.FLOAT
            )
            made = ir.node("Mul", [site.node.inputs[0], factor])
            edit.insert_before(model.graph, site.node, made)
            edit.substitute(model, site.node.outputs[0], made.outputs[0])

    net = Net()
    big = net.op("MatMul", "x", net.const(np.eye(WIDTH)), name="big")
    square = net.op("Mul", big, big, name="square")
    following = net.op("Mul", square, net.const(np.full(WIDTH, 1e-9)), name="next")
    net.op("Add", "x", net.op("Clip", following, net.const(-1e-6), net.const(1e-6)), name="y")
    model = net.model({"x": ["n", WIDTH]}, {"y": ["n", WIDTH]})
    result = run(model, Blowing(), budget=0.5)
    assert kept(result) == ["next"]
    outcome, reason = left(result)["big"]
    assert outcome == "rolled-back"
    assert "NaN or infinite" in reason
