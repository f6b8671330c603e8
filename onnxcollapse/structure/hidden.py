# SPDX-License-Identifier: Apache-2.0
r"""HiddenLayer sites: operators whose output channels can be cut, and the one that reads them.

::

    FeedForward     x -- Linear(s) -- pointwise region -- Linear -- y
    Conv channels   x -- Conv -- region -- [Flatten] -- Conv or Linear -- y

The region of a Conv may pool, pad and resize positions, normalise at inference and filter channels one by one.
Each channel is computed from the same channel of the sources only, and read by nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnxcollapse.structure import feedforward
from onnxcollapse.structure.channelwise import channelwise_behind
from onnxcollapse.structure.constants import Array, folded, is_op, is_shared
from onnxcollapse.structure.convolution import Convolution, Operator, Window, operator_at
from onnxcollapse.structure.feedforward import FeedForward
from onnxcollapse.structure.linear import Linear
from onnxcollapse.structure.pointwise import is_elementwise
from onnxcollapse.structure.refusal import Refusal, RefusedError

# Left out of an activation's description.
_SILENT = frozenset({"Cast", "Dropout", "Flatten", "Identity", "Reshape", "Squeeze"})


@dataclass(frozen=True, eq=False)
class HiddenLayer:
    """Channels that can be cut: y = region(sources(x)) W + b, with `group` rows of W to a channel.

    Attributes:
        sources: The operators whose output channels are cut: gate (if any) and up, or one Conv.
        region: The nodes between, each after those it reads; every channel stays to itself.
        consumer: The operator whose input features are cut.
        nodes: All nodes in graph order: sources, region, consumer.
        block: The FeedForward that it is, or None for a Conv's channels.
        hidden: The last tensor in which a channel is one entry of `hidden_axis`, before any Flatten.
        flat: The tensors [N, features] behind a Flatten, where a channel owns consecutive features.
    """

    sources: tuple[Operator, ...]
    region: tuple[ir.Node, ...]
    consumer: Operator
    nodes: tuple[ir.Node, ...]
    block: FeedForward | None
    hidden: ir.Value
    flat: frozenset[ir.Value] = frozenset()

    @classmethod
    def of(cls, block: FeedForward) -> HiddenLayer:
        """The neurons of a FeedForward."""
        return cls(block.linears[:-1], block.region, block.down, block.nodes, block, block.hidden)

    @property
    def name(self) -> str:
        """The output's name: what the site is called in reports."""
        return self.consumer.name

    @property
    def input(self) -> ir.Value | None:
        """What the sources read, x; None when they read different tensors."""
        first = self.sources[0].input
        return first if all(source.input is first for source in self.sources) else None

    @property
    def output(self) -> ir.Value:
        """What the site yields, y."""
        return self.consumer.output

    @property
    def in_axis(self) -> int:
        """Channel axis of the input."""
        return self.sources[0].axis

    @property
    def out_axis(self) -> int:
        """Channel axis of the output."""
        return self.consumer.axis

    @property
    def width(self) -> int:
        """Hidden channels."""
        return self.sources[0].out_features

    @property
    def d_out(self) -> int:
        """Output channels."""
        return self.consumer.out_features

    @property
    def group(self) -> int:
        """Rows of `matrix` to a channel: taps of a Conv, positions behind a Flatten, else 1."""
        taps = math.prod(self.consumer.kernel) if isinstance(self.consumer, Convolution) else 1
        return self.consumer.in_features * taps // self.width

    @property
    def features(self) -> ir.Value:
        """The tensor whose entries along `feature_axis` the consumer reads, each at `window` where there is one."""
        return self.consumer.input

    @property
    def feature_axis(self) -> int:
        """Axis of the features."""
        return self.consumer.axis

    @property
    def hidden_axis(self) -> int:
        """Axis of the channels in `hidden`."""
        return self.consumer.axis if self.hidden is self.features else self.pre_axis

    @property
    def pre(self) -> list[ir.Value]:
        """The pre-activations: what the sources yield."""
        return [source.output for source in self.sources]

    @property
    def pre_axis(self) -> int:
        """Axis of the channels in `pre` and in the region's tensors."""
        return self.sources[0].axis

    @property
    def window(self) -> Window | None:
        """The positions that the consumer reads; None where it reads features as they are."""
        return self.consumer.window if isinstance(self.consumer, Convolution) else None

    @property
    def params(self) -> int:
        """Elements of weights, biases and per-channel constants that nothing outside the site reads.

        A tensor that is read twice inside counts once.
        """
        owners = frozenset(self.nodes)
        sizes: dict[ir.Value, int] = {}
        for value in self._operands():
            known = folded(value)
            if known is not None and not is_shared(value, owners):
                sizes[known.root or value] = known.size
        return sum(sizes.values())

    @property
    def activation(self) -> str:
        """A short description of the region: its op types in order, repeated ones once."""
        kinds = dict.fromkeys(node.op_type for node in self.region if node.op_type not in _SILENT)
        return "-".join(kinds) or "Identity"

    def matrix(self) -> Array:
        """The consumer's weights, float64 [width * group, d_out], rows channel-major: row = channel * group + j."""
        return self.consumer.matrix()

    def offset(self) -> Array:
        """The consumer's bias, float64 [d_out], zeros without one."""
        return self.consumer.offset()

    def source_weights(self) -> Array:
        """Each channel's incoming weights as a column, float64 [fan_in, width]; gate above up."""
        return np.concatenate([source.matrix() for source in self.sources])

    def _operands(self) -> list[ir.Value]:
        operators = (*self.sources, self.consumer)
        found = [value for x in operators for value in (x.weight, x.bias) if value is not None]
        for node in self.region:
            found += channel_operands(node)
        return found


def holds_vectors(node: ir.Node) -> bool:
    """Whether a region's node has a constant for each channel in order, on axis 0 of each operand but the data."""
    return is_op(node, "BatchNormalization", "Conv", "InstanceNormalization")


def channel_operands(node: ir.Node) -> list[ir.Value]:
    """The constant operands of a region's node that hold a number or filter for each channel."""
    if holds_vectors(node):
        return [value for value in node.inputs[1:] if value is not None]
    if not is_elementwise(node):
        return []
    known = [(value, folded(value)) for value in node.inputs]
    return [value for value, array in known if value is not None and array is not None and array.size > 1]


def hidden_layers(
    graph: ir.Graph, functions: Iterable[ir.Function] = ()
) -> tuple[list[HiddenLayer], list[Refusal]]:
    """All HiddenLayer sites of `graph`, in graph order, and the places that resemble one but are none.

    FeedForward sites are those that `feedforwards` finds, under the same names.

    Args:
        graph: The graph; sites in its If, Loop and Scan bodies are refused.
        functions: Model-local functions; sites in them are refused, too.

    Returns:
        Sites, and refusals: channels that are joined, mixed, read elsewhere, quantised or flattened in a way that
        is not known before the model runs.
    """
    found = _search(graph)
    sites = [item for item in found if isinstance(item, HiddenLayer)]
    refusals = [item for item in found if isinstance(item, Refusal)]
    for body, where in feedforward.inner_bodies(graph, functions):
        refusals += [Refusal(x.name, f"inside {where}") for x in _search(body) if isinstance(x, HiddenLayer)]
    return sites, refusals


def hidden_layer_at(graph: ir.Graph, name: str) -> HiddenLayer | None:
    """The site of that name as `hidden_layers` would give it, without looking at the rest of the graph."""
    consumer = operator_of(graph, name)
    if consumer is None:
        return None
    stop = OperatorsByOutput()
    place = {node: index for index, node in enumerate(graph)}
    block = feedforward.site_above(consumer, stop.linears()) if isinstance(consumer, Linear) else None
    if isinstance(block, FeedForward):
        return _placed(HiddenLayer.of(block), place)
    site = _channels(consumer, stop, place)
    return site if isinstance(site, HiddenLayer) else None


def operator_of(graph: ir.Graph, name: str) -> Operator | None:
    """The Linear or Convolution whose output has a name."""
    value = next((v for node in graph for v in node.outputs if v.name == name), None)
    return None if value is None else OperatorsByOutput().get(value)


class OperatorsByOutput(Mapping[ir.Value, Operator]):
    """Operators by their outputs, read from the graph when they are asked for."""

    def __init__(self) -> None:
        self._known: dict[ir.Value, Operator | None] = {}

    def __getitem__(self, value: ir.Value) -> Operator:
        if value not in self._known:
            self._known[value] = self._read(value)
        found = self._known[value]
        if found is None:
            raise KeyError(value)
        return found

    def __iter__(self) -> Iterator[ir.Value]:
        return iter([value for value, found in self._known.items() if found is not None])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def linears(self) -> Mapping[ir.Value, Linear]:
        """The same without Convolutions."""
        return _LinearsOf(self)

    @staticmethod
    def _read(value: ir.Value) -> Operator | None:
        """What makes a tensor, or what makes the tensor that a bias was added to."""
        node = value.producer()
        if node is None:
            return None
        behind = [x.producer() for x in node.inputs if x is not None] if is_op(node, "Add") else []
        for maker in (node, *behind):
            found = None if maker is None else operator_at(maker)
            if found is not None and not isinstance(found, Refusal) and found.output is value:
                return found
        return None


class _LinearsOf(Mapping[ir.Value, Linear]):
    """The Linears among operators."""

    def __init__(self, operators: OperatorsByOutput) -> None:
        self._operators = operators

    def __getitem__(self, value: ir.Value) -> Linear:
        found = self._operators[value]
        if not isinstance(found, Linear):
            raise KeyError(value)
        return found

    def __iter__(self) -> Iterator[ir.Value]:
        return iter([value for value, found in self._operators.items() if isinstance(found, Linear)])

    def __len__(self) -> int:
        return len(list(iter(self)))


def _search(graph: ir.Graph) -> list[HiddenLayer | Refusal]:
    read = [operator_at(node) for node in graph]
    linears = [item for item in read if not isinstance(item, Convolution)]
    blocks = {item.name: item for item in feedforward.search(graph, linears)}
    place = {node: index for index, node in enumerate(graph)}
    stop = {item.output: item for item in read if not isinstance(item, Refusal)}
    found: list[HiddenLayer | Refusal] = []
    for item in read:
        if isinstance(item, Refusal):
            found += [item] * item.candidate
            continue
        block = blocks.get(item.name)
        if isinstance(block, FeedForward):
            found.append(_placed(HiddenLayer.of(block), place))
            continue
        site = _channels(item, stop, place)
        if isinstance(site, HiddenLayer) or site.candidate:
            found.append(site)
        elif block is not None:
            found.append(block)
    return found


def _channels(
    consumer: Operator, stop: Mapping[ir.Value, Operator], place: Mapping[ir.Node, int]
) -> HiddenLayer | Refusal:
    """The channels of a Conv that `consumer` reads, or why they cannot be cut."""
    try:
        region = channelwise_behind(consumer, stop)
        site = HiddenLayer(
            (region.source,),
            region.nodes,
            consumer,
            (*region.source.nodes, *region.nodes, *consumer.nodes),
            None,
            region.hidden,
            region.flat,
        )
        inner = [region.source.output, *(value for node in region.nodes for value in node.outputs)]
        feedforward.check_private(inner, frozenset(site.nodes))
        if isinstance(consumer, Convolution) and consumer.window is None:
            raise RefusedError(
                f"the pads of {consumer.name} depend on the size of its input (auto_pad); make them explicit"
            )
    except RefusedError as refused:
        return Refusal(consumer.name, refused.reason, refused.candidate)
    return _placed(site, place)


def _placed(site: HiddenLayer, place: Mapping[ir.Node, int]) -> HiddenLayer:
    """The site with its nodes in graph order."""
    return replace(site, nodes=tuple(sorted(dict.fromkeys(site.nodes), key=place.__getitem__)))
