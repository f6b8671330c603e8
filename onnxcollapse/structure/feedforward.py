# SPDX-License-Identifier: Apache-2.0
r"""FeedForward sites: Linear -> pointwise region -> Linear, plain or gated, found by structure.

::

    plain                               gated
    x -- up -- region -- down -- y      x --- gate -- region -- down -- y
                                         \--- up  ---/
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnxcollapse.model import walk
from onnxcollapse.structure.constants import Array, folded, is_shared
from onnxcollapse.structure.linear import Linear, linear_at
from onnxcollapse.structure.pointwise import Region, region_behind
from onnxcollapse.structure.refusal import Refusal, RefusedError, label

_SILENT = frozenset({"Cast", "Dropout", "Identity"})  # left out of an activation's description


@dataclass(frozen=True, eq=False)
class FeedForward:
    """A hidden layer: y = f(x W1 + b1) W2 + b2, or f(x Wg + bg, x W1 + b1) W2 + b2.

    Attributes:
        up: The Linear that the nonlinearity is not applied to, or the only one.
        gate: The Linear that the nonlinearity is applied to in the gated form, else None.
        down: The Linear that reads the hidden tensor.
        pointwise: What lies between, with its constants.
    """

    up: Linear
    gate: Linear | None
    down: Linear
    pointwise: Region

    @property
    def region(self) -> tuple[ir.Node, ...]:
        """The elementwise nodes between the Linears, each after those it reads."""
        return self.pointwise.nodes

    @property
    def input(self) -> ir.Value:
        """What the site reads, x."""
        return self.up.input

    @property
    def output(self) -> ir.Value:
        """What the site yields, y."""
        return self.down.output

    @property
    def hidden(self) -> ir.Value:
        """The hidden activations, which `down` reads."""
        return self.down.input

    @property
    def name(self) -> str:
        """The output's name: what the site is called in reports."""
        return self.down.name

    @property
    def d_in(self) -> int:
        """Input channels."""
        return self.up.in_features

    @property
    def d_hidden(self) -> int:
        """Neurons."""
        return self.up.out_features

    @property
    def d_out(self) -> int:
        """Output channels."""
        return self.down.out_features

    @property
    def linears(self) -> tuple[Linear, ...]:
        """The Linears: gate (if any), up, down."""
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)

    @property
    def nodes(self) -> tuple[ir.Node, ...]:
        """All nodes of the site, each after those it reads."""
        sources = [node for linear in self.linears[:-1] for node in linear.nodes]
        return (*sources, *self.region, *self.down.nodes)

    @property
    def params(self) -> int:
        """Elements of weights, biases and per-channel constants that nothing outside the site reads.

        A tensor that two of the site's Linears share counts once.
        """
        owners = frozenset(self.nodes)
        operands = [
            value for linear in self.linears for value in (linear.weight, linear.bias) if value is not None
        ]
        operands += [value for value, array in self.pointwise.constants.items() if array.ndim]
        sizes: dict[ir.Value, int] = {}
        for value in operands:
            known = folded(value)
            if known is not None and not is_shared(value, owners):
                sizes[known.root or value] = known.size
        return sum(sizes.values())

    @property
    def activation(self) -> str:
        """A short description of the region: its op types in order, repeated ones once."""
        kinds = dict.fromkeys(node.op_type for node in self.region if node.op_type not in _SILENT)
        return "-".join(kinds) or "Identity"

    def evaluate(self, z: Array, g: Array | None = None) -> Array:
        """The hidden activations [n, h] for pre-activations, in their precision.

        Args:
            z: `up`'s output [n, h].
            g: `gate`'s output [n, h], for gated sites.

        Raises:
            ValueError: `g` is given for a plain site or missing for a gated one.
            ModelError: An op of the region cannot be evaluated.
        """
        if (g is None) != (self.gate is None):
            raise ValueError(
                f"{self.name} is {'plain' if self.gate is None else 'gated'}: give z"
                + " and g" * bool(self.gate)
            )
        given = {self.up: z} if self.gate is None or g is None else {self.up: z, self.gate: g}
        return self.pointwise.evaluate(*(given[source] for source in self.pointwise.sources))


def feedforwards(
    graph: ir.Graph, functions: Iterable[ir.Function] = ()
) -> tuple[list[FeedForward], list[Refusal]]:
    """All FeedForward sites of `graph`, in graph order, and the places that resemble one but are none.

    In a chain of Linears each but the last is the `up` of a site and each but the first the `down` of one, so
    neighbouring sites share a Linear.

    Args:
        graph: The graph; sites in its If, Loop and Scan bodies are refused.
        functions: Model-local functions; sites in them are refused, too.

    Returns:
        Sites, and refusals: quantised or fused Linears, hidden tensors used elsewhere, constants that mix rows.
    """
    found = search(graph)
    sites = [item for item in found if isinstance(item, FeedForward)]
    refusals = [item for item in found if isinstance(item, Refusal)]
    for body, where in inner_bodies(graph, functions):
        for site in search(body):
            if isinstance(site, FeedForward):
                refusals.append(Refusal(site.name, f"inside {where}"))
    return sites, refusals


def inner_bodies(graph: ir.Graph, functions: Iterable[ir.Function]) -> Iterator[tuple[ir.Graph, str]]:
    """The bodies below `graph` and of `functions`, where sites are refused, with words for where they are."""
    yield from _bodies(graph)
    for function in functions:
        yield function.graph, f"the model-local function {function.name}"
        yield from _bodies(function.graph)


def search(graph: ir.Graph, read: Iterable[Linear | Refusal] | None = None) -> list[FeedForward | Refusal]:
    """The sites and refusals of `graph` itself, in graph order; `read` is what `linear_at` says of its nodes."""
    read = [linear_at(node) for node in graph] if read is None else list(read)
    stop = {linear.output: linear for linear in read if isinstance(linear, Linear)}
    found: list[FeedForward | Refusal] = []
    for item in read:
        site = site_above(item, stop) if isinstance(item, Linear) else item
        if site is not None and not (isinstance(site, Refusal) and not site.candidate):
            found.append(site)
    return found


def site_above(down: Linear, stop: Mapping[ir.Value, Linear]) -> FeedForward | Refusal | None:
    """The site whose last Linear is `down`; None if a Linear feeds it directly."""
    if down.input in stop:
        return None
    region = region_behind(down.input, stop)
    if isinstance(region, Refusal):
        return Refusal(down.name, region.reason, region.candidate)
    try:
        site = _arranged(region, down)
        _check_shape(site)
        _check_private(site)
    except RefusedError as refused:
        return Refusal(down.name, refused.reason, refused.candidate)
    return site


def _arranged(region: Region, down: Linear) -> FeedForward:
    """Tell gate from up: the gate is the Linear whose own part of the region holds the nonlinearity.

    If both or neither do, the first in graph order is the gate.
    """
    if len(region.sources) == 1:
        return FeedForward(region.sources[0], None, down, region)
    first, second = region.sources
    if first.input is not second.input:
        raise RefusedError(f"{first.name} and {second.name} meet in the region but read different tensors")
    on_first, on_second = region.depends(first), region.depends(second)
    curved = [region.is_nonlinear(on_first - on_second), region.is_nonlinear(on_second - on_first)]
    gate, up = (second, first) if curved == [False, True] else (first, second)
    return FeedForward(up, gate, down, region)


def _check_shape(site: FeedForward) -> None:
    up, down = site.up, site.down
    if not _same_axis(up, down):
        raise RefusedError(
            f"{up.name} has its channels on axis {up.axis}, {down.name} reads them on axis {down.axis}"
        )
    if up.out_features != down.in_features:
        raise RefusedError(f"{up.name} has {up.out_features} channels, {down.name} reads {down.in_features}")


def _same_axis(up: Linear, down: Linear) -> bool:
    if up.axis == down.axis:
        return True
    rank = up.rank or down.rank
    return rank is not None and up.axis % rank == down.axis % rank


def _check_private(site: FeedForward) -> None:
    """Refuse sites whose inner tensors are seen from outside."""
    inner = [linear.output for linear in site.linears[:-1]]
    inner += [value for node in site.region for value in node.outputs]
    check_private(inner, frozenset(site.nodes))


def check_private(inner: Iterable[ir.Value], inside: Collection[ir.Node]) -> None:
    """Refuse inner tensors that are outputs or that nodes other than those `inside` read."""
    for value in inner:
        if value.is_graph_output():
            raise RefusedError(f"hidden tensor {value.name} is a graph output")
        outside = next((user for user in value.consumers() if user not in inside), None)
        if outside is not None:
            raise RefusedError(
                f"hidden tensor {value.name} is also used by {label(outside)} ({outside.op_type})"
            )


def _bodies(graph: ir.Graph) -> Iterator[tuple[ir.Graph, str]]:
    """All subgraphs, at any depth, with words for where they are."""
    for node in graph:
        for body in walk.subgraphs(node):
            yield body, f"an If branch of {label(node)}" if node.op_type == "If" else f"a {node.op_type} body"
            yield from _bodies(body)
