# SPDX-License-Identifier: Apache-2.0
"""What a review of the engine found."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnxcollapse.passes.collapse_ffn import CollapseFfn
from onnxcollapse.passes.fold_affine import FoldAffine

from onnxcollapse import Budget, Decline, Model, Pass, Proposal, Saving, Target, optimize
from onnxcollapse.errors import OptionError
from onnxcollapse.model import edit
from onnxcollapse.rewriting.passes import build
from onnxcollapse.rewriting.pipeline import shortfall
from tests.rewriting.branches import Branch, Drop, branches, kept, left, remaining, run
from tests.support import Net, data_for, mlp, outputs, relative, rows


@pytest.mark.parametrize("memory", [None, 1 << 20])
def test_sites_that_reach_over_the_borders_of_layers_are_rewritten_whole(memory):
    """The layers of an MLP end inside its sites, and those of the collapsed model are fewer than the original's."""
    model, x = mlp([8, 40, 40, 40, 8]), rows(200, 8)
    budget = Budget(10.0)
    result = optimize(model, data_for(model, x), budget=budget, passes=[CollapseFfn()], memory=memory)
    assert result.after.params < result.before.params / 4
    measured = relative(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"])
    assert result.error == pytest.approx(measured, rel=0.3)


@pytest.mark.parametrize("claims", [True, False])
def test_nodes_without_names_are_told_apart(claims):
    model = branches(1e-7, 1e-7, 1e-7)
    for node in model.graph:
        node.name = ""
    result = run(model, Drop(claims=claims))
    assert sorted(kept(result)) == ["b0", "b1", "b2"]


@dataclass(frozen=True)
class Mixed(Drop):
    """Drops b0 and makes b1 larger, and says so."""

    claims: bool = True

    def propose(self, site: Branch, statistics: object) -> Iterable[Proposal | Decline]:
        saved = 63 if site.name == "b0" else -40
        yield Proposal(site.name, saving=Saving(params=saved, bytes=4 * saved), payload=0.0)

    def rewrite(self, model: Model, site: Branch, proposal: Proposal) -> None:
        if site.name == "b0":
            super().rewrite(model, site, proposal)
            return
        more = edit.add_initializer(model.graph, "more", np.zeros((8, 13)), ir.DataType.FLOAT)
        made = ir.node("MatMul", [site.node.inputs[0], site.node.inputs[1]])
        extra = ir.node("ReduceSum", [more])
        total = ir.node("Add", [made.outputs[0], extra.outputs[0]])
        edit.insert_before(model.graph, site.node, [made, extra, total])
        edit.substitute(model, site.node.outputs[0], total.outputs[0])


@pytest.mark.parametrize("data", [True, False])
def test_what_one_rewrite_saves_does_not_pay_for_another_that_grows_the_model(data):
    result = run(branches(1e-7, 1e-7), Mixed(), data=data)
    assert kept(result) == ["b0"]
    assert "would grow the model: params by 104" in left(result)["b1"][1]
    assert remaining(result.model) == ["b1"]


@dataclass(frozen=True)
class DropBias(Pass):
    """Takes Adds of a constant away: parameters but no products."""

    name: ClassVar[str] = "drop-bias"

    def sites(self, model: Model) -> Iterator[Branch | Decline]:
        for node in model.graph:
            if node.op_type == "Add" and node.inputs[1].is_initializer():
                yield Branch(node)

    def propose(self, site: Branch, statistics: object) -> Iterable[Proposal | Decline]:
        yield Proposal(site.name)

    def rewrite(self, model: Model, site: Branch, proposal: Proposal) -> None:
        edit.replace_value(model.graph, site.node.outputs[0], site.node.inputs[0])


def test_what_saves_nothing_of_what_the_target_names_is_declined():
    net = Net()
    net.op("Relu", net.linear("x", np.eye(8), np.full(8, 1e-5)), name="y")
    model = net.model({"x": ["n", 8]}, {"y": ["n", 8]})
    result = run(model, DropBias(), budget=None, target=Target("flops", 0.5))
    assert list(left(result).values()) == [("declined", "saves no flops, which the target names")]
    assert shortfall(result) == "target flops=0.5 not met: 100.0% of the flops are left, error 0"
    assert len(kept(run(model, DropBias(), budget=None, target=Target("params", 0.9)))) == 1


def test_half_precision_in_constant_nodes_counts_as_half_precision():
    """Multiplying 0.1 by 3 beforehand rounds otherwise than at run time; no exact rewrite may be blamed for that."""
    net = Net()
    half = net.op("Cast", "x", to=onnx.TensorProto.FLOAT16)
    weight = net.random.normal(size=(8, 8)).astype(np.float16)
    held = net.op("Constant", value=onnx.numpy_helper.from_array(weight))
    scale = net.op("Constant", value=onnx.numpy_helper.from_array(np.full(8, 0.1, np.float16)))
    net.op("Cast", net.op("Mul", net.op("MatMul", half, held), scale), name="y", to=onnx.TensorProto.FLOAT)
    model = net.model({"x": ["n", 8]}, {"y": ["n", 8]})
    result = optimize(model, data_for(model, rows(100, 8)), passes=[FoldAffine()], provider="cpu")
    assert result.error > 1e-4
    assert len(kept(result)) == 1


def test_a_pass_that_cannot_be_made_is_one_line():
    class Half(Pass):
        name = "half"

    with pytest.raises(OptionError, match=r"pass 'half' cannot be made: .*abstract"):
        build(Half, {})


@dataclass(frozen=True)
class Twice(Pass):
    """Replaces each MatMul by one that reads the input its site held when it was found."""

    name: ClassVar[str] = "twice"

    @property
    def exact(self) -> bool:
        return True

    def sites(self, model: Model) -> Iterator[Held]:
        for node in model.graph:
            if node.op_type == "MatMul":
                yield Held(node, node.inputs[0])

    def propose(self, site: Held, statistics: object) -> Iterable[Proposal]:
        if site.node.inputs[1].shape[1] == 8:
            yield Proposal(site.name, saving=Saving(params=32, bytes=128))

    def rewrite(self, model: Model, site: Held, proposal: Proposal) -> None:
        half = site.node.inputs[1].const_value.numpy()[:, :4]
        thin = edit.add_initializer(model.graph, "thin", half, ir.DataType.FLOAT)
        made = ir.node("MatMul", [site.input, thin])
        both = ir.node("Concat", [made.outputs[0], made.outputs[0]], {"axis": 1})
        edit.insert_before(model.graph, site.node, [made, both])
        edit.substitute(model, site.node.outputs[0], both.outputs[0])


@dataclass(frozen=True)
class Held:
    node: ir.Node
    input: ir.Value

    @property
    def name(self) -> str:
        return self.node.outputs[0].name or ""

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        return (self.node,)


def test_a_site_may_hold_its_input_across_the_rewrites_before_it():
    net, value = Net(), "x"
    for index in range(3):
        half = net.random.normal(size=(8, 4))
        value = net.linear(value, np.concatenate([half, half], 1), name="y" if index == 2 else None)
    model = net.model({"x": ["n", 8]}, {"y": ["n", 8]})
    result = optimize(model, passes=[Twice()])
    assert len(kept(result)) == 3
    assert (result.before.params, result.after.params) == (192, 96)
    assert len(list(result.model.graph)) == 6, "nothing of the old chain is still alive"
    x = rows(20, 8)
    assert relative(outputs(result.model, x=x)["y"], outputs(model, x=x)["y"]) < 1e-6


def test_a_site_whose_offers_were_all_refused_is_not_asked_about_again():
    asked = []

    class Asked(Drop):
        def propose(self, site: Branch, statistics: object) -> Iterable[Proposal | Decline]:
            asked.append(site.name)
            return super().propose(site, statistics)

    result = run(branches(1e-5, 0.5), Asked())
    assert kept(result) == ["b0"]
    assert asked.count("b1") == 1
