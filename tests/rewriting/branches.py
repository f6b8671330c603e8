# SPDX-License-Identifier: Apache-2.0
"""A model of parallel branches and a pass that drops them, whose effect at the output is known beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxcollapse import Budget, Decline, Model, Pass, Proposal, Saving, optimize
from onnxcollapse.model import edit
from onnxcollapse.rewriting.pipeline import Result
from tests.support import Net, data_for, rows

WIDTH = 8
BRANCH = WIDTH * WIDTH


def branches(*scales: float, twins: bool = False) -> Model:
    """y = x + sum of x W_i with W_i of the size of scale, b0, b1, ... each. Twins: of b0 = b1 the larger |b| counts."""
    net = Net()
    matrices = [net.random.normal(size=(WIDTH, WIDTH)) * scale / WIDTH**0.5 for scale in scales]
    if twins:
        matrices[1] = matrices[0]
    made = [net.op("MatMul", "x", net.const(matrix), name=f"b{i}") for i, matrix in enumerate(matrices)]
    if twins:
        made[:2] = [net.op("Max", net.op("Abs", made[0]), net.op("Abs", made[1]))]
    total = "x"
    for index, branch in enumerate(made):
        total = net.op("Add", total, branch, name="y" if index == len(made) - 1 else None)
    return net.model({"x": ["n", WIDTH]}, {"y": ["n", WIDTH]})


@dataclass(frozen=True)
class Branch:
    node: ir.Node

    @property
    def name(self) -> str:
        return self.node.outputs[0].name or ""

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        return (self.node,)


@dataclass(frozen=True)
class Drop(Pass):
    """Replaces branches by x times a number.

    Attributes:
        claims: Whether it says that it is exact.
        variants: Names of the alternatives, and what each multiplies x with.
        extra: Parameters added to each rewrite for nothing.
        only: Names of the branches looked at; all if empty.
    """

    name: ClassVar[str] = "drop"
    claims: bool = False
    variants: tuple[tuple[str, float], ...] = (("zero", 0.0),)
    extra: int = 0
    only: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        return self.claims

    def sites(self, model: Model) -> Iterator[Branch | Decline]:
        for node in model.graph:
            name = node.outputs[0].name or ""
            if node.op_type == "MatMul" and (not self.only or name in self.only):
                yield Branch(node)

    def propose(self, site: Branch, statistics: object) -> Iterable[Proposal | Decline]:
        for variant, factor in self.variants:
            yield Proposal(site.name, variant, f"{variant} it is", 0.0, Saving(params=BRANCH - 1), factor)

    def rewrite(self, model: Model, site: Branch, proposal: Proposal) -> None:
        factor = edit.add_initializer(model.graph, "factor", np.full(1, proposal.payload), ir.DataType.FLOAT)
        made = ir.node("Mul", [site.node.inputs[0], factor])
        edit.insert_before(model.graph, site.node, made)
        value = made.outputs[0]
        for _ in range(self.extra):
            one = edit.add_initializer(model.graph, "one", np.ones(WIDTH), ir.DataType.FLOAT)
            more = ir.node("Mul", [value, one])
            edit.insert_before(model.graph, site.node, more)
            value = more.outputs[0]
        edit.substitute(model, site.node.outputs[0], value)


def run(
    model: Model, *passes: Pass, budget: float | None = 0.01, target: object = None, data: bool = True
) -> Result:
    dataset = data_for(model, rows(200, WIDTH)) if data else None
    return optimize(model, dataset, budget=Budget(budget, target=target), passes=passes, provider="cpu")


def kept(result: Result) -> list[str]:
    return [entry.site for entry in result.journal.of("kept")]


def left(result: Result) -> dict[str, tuple[str, str]]:
    """Site -> outcome and reason of what was not kept."""
    return {entry.site: (entry.outcome, entry.reason) for entry in result.journal if entry.outcome != "kept"}


def remaining(model: Model) -> Sequence[str]:
    return [node.outputs[0].name or "" for node in model.graph if node.op_type == "MatMul"]
