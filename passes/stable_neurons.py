# SPDX-License-Identifier: Apache-2.0
r"""stable-neurons: neurons that provably never switch are no neurons (METHODS 2; Serra et al., NeurIPS 2021).

::

    y = f(x W1 + b1) W2 + b2,  S the neurons whose pre-activation has one sign for every possible input

    never on:             the neuron goes
    always on, all:       y = x (W1 W2) + (b1 W2 + b2)
    always on, many:      y = f(x W1' + b1') W2' + x U + b,     U = W1[:,S] W2[S,:]      once \|S\| (p + q + 1) > p q
    always on, dependent: only rank(W1[:,S]) of them stay, the others are combinations of those

The signs follow from interval bounds: of an operator before (ReLU gives >= 0, Sigmoid [0, 1], LayerNorm is bounded)
or of a declared input box. No data is needed and nothing is lost; a declared box is recorded in the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from scipy import linalg

from onnxcollapse.calibration.statistics import Statistics
from onnxcollapse.errors import OptionError
from onnxcollapse.model import Model, provenance
from onnxcollapse.rewriting import Decline, Pass, Proposal, Saving
from onnxcollapse.structure import FeedForward, HiddenLayer, Linear, feedforwards, narrow, prelu_slope, ranges

DEPENDENT = 1e-6
"""Relative size of a pivot below which a column is a combination of those before it: float32 weights hold no more."""


@dataclass(frozen=True, eq=False)
class Stable:
    """A feed-forward block with neurons that never switch.

    Attributes:
        block: The block; it has one activation with slope 1 above zero and `slope` below.
        slopes: float64 [h]: the neuron's constant slope, NaN where it may switch.
    """

    block: FeedForward
    slopes: np.ndarray

    @property
    def name(self) -> str:
        """The block's name."""
        return self.block.name

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """The block's nodes."""
        return self.block.nodes


@dataclass(frozen=True)
class Plan:
    """What a block becomes: neurons that stay, with their new weights, and a linear path beside them or None."""

    keep: np.ndarray
    down: np.ndarray
    offset: np.ndarray
    skip: np.ndarray | None


@dataclass(frozen=True)
class StableNeurons(Pass):
    """Removes neurons that interval bounds prove always on or always off.

    Attributes:
        input_range: Box that the floating inputs lie in: ``lo..hi`` for all, or ``name=lo..hi`` joined by ``;``. The
            model is only right inside it, so it is recorded in the metadata.
    """

    name: ClassVar[str] = "stable-neurons"
    input_range: str = ""

    def __post_init__(self) -> None:
        _parse(self.input_range)

    @property
    def exact(self) -> bool:
        """Proven, inside the declared box."""
        return True

    def sites(self, model: Model) -> Iterator[Stable | Decline]:
        """Bounds every tensor and finds blocks with a ReLU-like activation and stable neurons."""
        blocks = [block for block in feedforwards(model.graph)[0] if _activation(block) is not None]
        if not blocks:
            return
        bounds = ranges(model.graph, self._boxes(model))
        for block in blocks:
            low, high = bounds.channels(block.up.output, block.up.axis, block.d_hidden)
            slope = np.broadcast_to(_slope(block), low.shape)
            slopes = np.where(low >= 0.0, 1.0, np.where(high <= 0.0, slope, np.nan))
            if not np.all(np.isnan(slopes)):
                yield Stable(block, slopes)

    def propose(self, site: Stable, statistics: Statistics | None) -> Iterable[Proposal | Decline]:
        """Chooses the smallest exact form, or says why none is smaller."""
        block = site.block
        plan = _plan(site)
        saved = block.params - _params(block, plan)
        stable = int(np.sum(~np.isnan(site.slopes)))
        if saved <= 0:
            yield Decline(
                site.name,
                f"{stable} of {block.d_hidden} neurons never switch; neither a skip path (which pays from "
                f"{block.d_in * block.d_out / (block.d_in + block.d_out + 1):.1f} on) nor their dependence "
                "saves parameters",
            )
            return
        detail = f"{stable} of {block.d_hidden} neurons never switch: {len(plan.keep)} stay"
        if plan.skip is not None:
            detail += f", with a {block.d_in} x {block.d_out} linear path"
        saving = Saving(params=saved, bytes=saved * block.up.dtype.bitwidth // 8)
        yield Proposal(site.name, detail=detail, saving=saving, payload=plan)

    def rewrite(self, model: Model, site: Stable, proposal: Proposal) -> None:
        """Builds the smaller block and records the box it holds in."""
        plan: Plan = proposal.payload
        skip = None if plan.skip is None else (plan.skip,)
        narrow(model, HiddenLayer.of(site.block), plan.keep, plan.down, plan.offset, skip)
        if self.input_range:
            provenance.record(model, "input-range", self.input_range)

    def _boxes(self, model: Model) -> dict[str, tuple[float, float]]:
        declared = _parse(self.input_range)
        everywhere = declared.pop("", None)
        names = [value.name or "" for value in model.graph.inputs]
        unknown = next((name for name in declared if name not in names), None)
        if unknown is not None:
            raise OptionError(
                f"input-range: the model has no input '{unknown}'; its inputs are {', '.join(names)}"
            )
        boxes = {}
        for value in model.graph.inputs:
            floating = value.dtype is not None and value.dtype.is_floating_point()
            if floating and everywhere is not None:
                boxes[value.name or ""] = everywhere
        return boxes | declared


def _parse(text: str) -> dict[str, tuple[float, float]]:
    """Reads ``lo..hi`` or ``name=lo..hi;...``; the key is empty for a box that holds for all inputs."""
    boxes = {}
    for part in filter(None, text.split(";")):
        name, equals, box = part.rpartition("=")
        low, dots, high = box.partition("..")
        try:
            boxes[name.strip() if equals else ""] = (float(low), float(high))
        except ValueError:
            dots = ""
        if not dots or not boxes or not list(boxes.values())[-1][0] <= list(boxes.values())[-1][1]:
            raise ValueError(f"input-range '{part}' is no box lo..hi with lo <= hi, or name=lo..hi")
    return boxes


def _activation(block: FeedForward) -> ir.Node | None:
    """Returns the block's activation when it is one node with slope 1 above zero."""
    if block.gate is not None or len(block.region) != 1 or block.up.axis != block.down.axis:
        return None
    return block.region[0] if prelu_slope(block.region[0]) is not None else None


def _slope(block: FeedForward) -> np.ndarray:
    slope = prelu_slope(block.region[0])
    return np.zeros(()) if slope is None else slope  # never None: `_activation` chose the block


def _params(block: FeedForward, plan: Plan) -> int:
    """Parameters of a plan; a block without a linear path keeps one neuron, if only to have a shape."""
    skip = 0 if plan.skip is None else plan.skip.size
    neurons = len(plan.keep) if plan.skip is not None else max(len(plan.keep), 1)
    each = block.d_in + block.d_out + (block.up.bias is not None) + (_slope(block).ndim > 0)
    return neurons * each + skip + (0 if _bias(block.down, plan.offset) is None else block.d_out)


def _bias(linear: Linear, offset: np.ndarray) -> np.ndarray | None:
    """The new bias of a Linear; None where it had none and needs none."""
    return offset if linear.bias is not None or offset.any() else None


def _plan(site: Stable) -> Plan:
    """Compares the exact forms of a block and returns the smallest."""
    linear = _with_skip(site)
    dependent = _with_basis(site)
    return min((dependent, linear), key=lambda plan: _params(site.block, plan))


def _with_skip(site: Stable) -> Plan:
    """All stable neurons leave: U = W1[:,S] diag(s) W2[S,:], b += b1[S] diag(s) W2[S,:] (arXiv 2506.21146)."""
    block, stable = site.block, ~np.isnan(site.slopes)
    slopes = site.slopes[stable]
    up, down = block.up.matrix(), block.down.matrix()
    skip = (up[:, stable] * slopes) @ down[stable]
    offset = block.down.offset() + (block.up.offset()[stable] * slopes) @ down[stable]
    keep = np.flatnonzero(~stable)
    return Plan(keep, down[keep], offset, skip if np.any(slopes != 0.0) else None)


def _with_basis(site: Stable) -> Plan:
    """A basis of the linear neurons stays and takes over the others' outgoing weights; dead neurons go."""
    block = site.block
    up, bias, down = block.up.matrix(), block.up.offset(), block.down.matrix()
    slopes = np.nan_to_num(site.slopes)
    live = np.flatnonzero(~np.isnan(site.slopes) & (slopes != 0.0))
    columns, constants = up[:, live] * slopes[live], bias[live] * slopes[live]
    basis, rest, combination = _basis(columns)
    new_down, offset = down.copy(), block.down.offset()
    new_down[live[basis]] += combination @ down[live[rest]]
    offset = offset + (constants[rest] - constants[basis] @ combination) @ down[live[rest]]
    keep = np.sort(np.concatenate([np.flatnonzero(np.isnan(site.slopes)), live[basis]]))
    return Plan(keep, new_down[keep], offset, None)


def _basis(columns: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Splits columns [p, n] into a basis and the rest, with columns[:, rest] = columns[:, basis] @ combination."""
    if not columns.shape[1]:
        none = np.zeros(0, np.intp)
        return none, none, np.zeros((0, 0))
    _, triangle, order = linalg.qr(columns, mode="economic", pivoting=True)
    pivots = np.abs(np.diag(triangle))
    rank = int(np.sum(pivots > DEPENDENT * pivots[0])) if pivots[0] > 0 else 0
    combination = linalg.solve_triangular(triangle[:rank, :rank], triangle[:rank, rank:])
    return order[:rank], order[rank:], combination
