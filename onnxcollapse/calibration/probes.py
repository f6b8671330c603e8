# SPDX-License-Identifier: Apache-2.0
"""Probes: nodes added to a scratch clone that reduce activations to sums inside the graph.

Before: ``... -> tensor -> ...``
After:  ``tensor -> Cast fp32 -> rows [n, C] -> centre on the batch's mean -> Z = [m, z...] -> Z'Z``

m is 1 for real rows and 0 for padding. Sums over a batch are fp32; centring on that batch's own mean keeps
their rounding relative to the spread of the activations rather than to their offset, and is undone exactly in
fp64 on the host. Only standard-domain ops of opset 9 and later are used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from onnxcollapse.calibration.sessions import main_values
from onnxcollapse.calibration.statistics import Gram, Moments, Ref, Request
from onnxcollapse.errors import ModelError
from onnxcollapse.model import edit
from onnxcollapse.model.model import Model

PREFIX = "onnxcollapse_probe"
ROWS_INPUT = f"{PREFIX}_rows"
MOMENT_ROWS = ("mean", "residual", "square", "minimum", "maximum", "positive", "negative_square")
OLDEST_OPSET = 9
SLICES = 3
WIDE = 256
"""Tensors with fewer columns are not sliced: small products cost more than they save."""

Attribute = int | float | Sequence[int] | ir.TensorProtocol
INT64 = ir.DataType.INT64

_BIG = float(np.finfo(np.float32).max)


class ProbeSet:
    """The probes of a clone: which outputs hold which sums."""

    def __init__(self, scratch: Model, names: Mapping[Ref, str], *, masked: bool) -> None:
        """Starts on a clone.

        Args:
            scratch: A clone that nobody else uses.
            names: What tensors are called in it that do not go by their own names, because they are fed to it.
            masked: Whether the data has an attention mask, whose rows are fed as ROWS_INPUT.

        Raises:
            ModelError: The model's opset is too old.
        """
        self._scratch, self._graph = scratch, scratch.graph
        self._names = names
        self._values = main_values(scratch.graph)
        self._opset = _opset(scratch.graph)
        self._masked = masked
        self._rows_input: ir.Value | None = None
        self._made: dict[object, ir.Value] = {}
        self._nodes = 0
        self._counts: dict[Ref, ir.Value] = {}
        self._means: dict[Ref, ir.Value] = {}
        self._sums: dict[Request, list[ir.Value]] = {}

    def add(self, requests: Iterable[Request], keep: Sequence[str] = ()) -> None:
        """Adds the probes of these requests and leaves nothing but them and the tensors to keep in the clone."""
        for request in requests:
            self._sums[request] = (
                self._gram(request) if isinstance(request, Gram) else [self._moments(request)]
            )
        kept = [self._values[name] for name in keep]
        sums = [value for panels in self._sums.values() for value in panels]
        used = [*kept, *self._counts.values(), *self._means.values(), *sums]
        self._graph.outputs[:] = list(dict.fromkeys(used))
        edit.prune(self._scratch)

    def count(self, ref: Ref) -> str:
        """The output that holds the rows summed of a tensor, [1, 1]."""
        return self._counts[self._own(ref)].name or ""

    def mean(self, ref: Ref) -> str:
        """The output that holds the batch's mean of a tensor, the shift of its columns, [1, C]."""
        return self._means[self._own(ref)].name or ""

    def sums(self, request: Request) -> list[str]:
        """The outputs of a request: the row panels of a Gram's Z'Z, or moments [7, C] in MOMENT_ROWS' order.

        A panel holds the rows of a slice of columns (the first one's with the 1 before them) from these columns on:
        Z'Z is symmetric, and what lies left of that is not computed.
        """
        return [value.name or "" for value in self._sums[request]]

    @property
    def needs_rows(self) -> bool:
        """Whether the clone has the input ROWS_INPUT: float32 [R + 1], a weight a row and a 1 behind them."""
        return self._rows_input is not None

    def _gram(self, request: Gram) -> list[ir.Value]:
        refs = [self._own(ref) for ref in request.refs]
        slices = [piece for ref in refs for piece in self._slices(ref)]
        chunks = [[self._ones(refs[0]), slices[0]], *([piece] for piece in slices[1:])]
        return [
            self._product(chunk, [column for group in chunks[place:] for column in group])
            for place, chunk in enumerate(chunks)
        ]

    def _slices(self, ref: Ref) -> list[ir.Value]:
        """The centred rows in SLICES pieces of columns, so that half of a wide tensor's own square is not computed."""
        value = self._values.get(ref.value)
        width = value.shape[ref.axis] if value is not None and value.shape is not None else None
        rows = self._centred(ref)
        if self._opset < 10 or (isinstance(width, int) and width < WIDE):
            return [rows]
        width_now = self._op("Gather", [self._op("Shape", [rows]), self._constant([1], INT64)], axis=0)
        steps = self._constant([SLICES], INT64)
        ends = [
            self._op("Div", [self._op("Mul", [width_now, self._constant([place], INT64)]), steps])
            for place in range(SLICES + 1)
        ]
        axis = self._constant([1], INT64)
        return [self._op("Slice", [rows, start, end, axis]) for start, end in pairwise(ends)]

    def _product(self, left: list[ir.Value], right: list[ir.Value]) -> ir.Value:
        rows = left[0] if len(left) == 1 else self._op("Concat", left, axis=1)
        others = right[0] if len(right) == 1 else self._op("Concat", right, axis=1)
        return self._op("MatMul", [self._op("Transpose", [rows], perm=[1, 0]), others])

    def _moments(self, request: Moments) -> ir.Value:
        ref = self._own(request.tensor)
        z, kept = self._centred(ref), self._kept(ref)
        negative = self._op("Relu", [self._op("Neg", [kept])])
        positive = self._to_float(self._op("Greater", [kept, self._constant(0.0)]))
        rows = [
            self._means[ref],
            self._sum(ref, z),
            self._sum(ref, self._op("Mul", [z, z])),
            self._extreme(ref, "ReduceMin", _BIG),
            self._extreme(ref, "ReduceMax", -_BIG),
            self._sum(ref, positive),
            self._sum(ref, self._op("Mul", [negative, negative])),
        ]
        return self._op("Concat", rows, axis=0)

    def _rows(self, ref: Ref) -> ir.Value:
        """The tensor as float32 rows [n, C]."""
        return self._once(("rows", ref), lambda: self._flatten(self._to_float(self._find(ref)), ref))

    def _kept(self, ref: Ref) -> ir.Value:
        """Rows with the padding, which may hold NaN, set to 0."""
        return self._once(("kept", ref), lambda: self._fill(ref, self._rows(ref), 0.0))

    def _centred(self, ref: Ref) -> ir.Value:
        """Rows minus the batch's mean, padding 0; records the count and the mean as outputs."""

        def build() -> ir.Value:
            ones = self._ones(ref)
            count = self._op("MatMul", [self._op("Transpose", [ones], perm=[1, 0]), ones])
            # never 0/0, and no opset-dependent Max: a batch of padding only has the mean 0
            divisor = self._op("Clip", [count], min=1.0) if self._opset < 11 else self._clip_from_one(count)
            self._counts[ref] = count
            self._means[ref] = self._op("Div", [self._sum(ref, self._kept(ref)), divisor])
            return self._fill(ref, self._op("Sub", [self._rows(ref), self._means[ref]]), 0.0)

        return self._once(("centred", ref), build)

    def _clip_from_one(self, count: ir.Value) -> ir.Value:
        return self._op("Clip", [count, self._constant(1.0)])

    def _sum(self, ref: Ref, rows: ir.Value) -> ir.Value:
        """Column sums [1, C] as a matrix product: it adds in blocks, which rounds less than ReduceSum."""
        return self._op("MatMul", [self._op("Transpose", [self._ones(ref)], perm=[1, 0]), rows])

    def _extreme(self, ref: Ref, op_type: str, neutral: float) -> ir.Value:
        rows = self._fill(ref, self._rows(ref), neutral)
        if self._opset < 18:
            return self._op(op_type, [rows], axes=[0], keepdims=1)
        return self._op(op_type, [rows, self._constant([0], INT64)], keepdims=1)

    def _fill(self, ref: Ref, rows: ir.Value, fill: float) -> ir.Value:
        mask = self._mask(ref)
        return rows if mask is None else self._op("Where", [mask, rows, self._constant(fill)])

    def _ones(self, ref: Ref) -> ir.Value:
        """The column m [n, 1] of the row weights, 1 or 0."""

        def build() -> ir.Value:
            mask = self._mask(ref)
            if mask is not None:
                return self._to_float(mask)
            shape = self._op("Concat", [self._row_count(ref), self._constant([1], INT64)], axis=0)
            return self._op("ConstantOfShape", [shape], value=ir.tensor(np.ones(1, np.float32)))

        return self._once(("ones", ref), build)

    def _mask(self, ref: Ref) -> ir.Value | None:
        """Which rows count, bool [n, 1]; None in a model without an attention mask.

        With R weights and a 1 behind them fed, row i takes weight i if the tensor has R rows, else weight R.
        So a tensor whose rows are not the batch's tokens is not masked, and that is decided at run time.
        """
        if not self._masked:
            return None

        def build() -> ir.Value:
            fed, count = self._feed(), self._row_count(ref)
            known = self._op("Sub", [self._op("Shape", [fed]), self._constant([1], INT64)])
            ones = self._op("ConstantOfShape", [count], value=ir.tensor(np.ones(1, np.int64)))
            flat = self._constant([-1], INT64)
            places = self._op("Reshape", [self._op("NonZero", [ones]), flat])
            picked = self._op("Where", [self._op("Equal", [count, known]), places, known])
            weights = self._op("Gather", [fed, picked], axis=0)
            column = self._op("Reshape", [weights, self._constant([-1, 1], INT64)])
            return self._op("Greater", [column, self._constant(0.5)])

        return self._once(("mask", ref), build)

    def _row_count(self, ref: Ref) -> ir.Value:
        def build() -> ir.Value:
            return self._op(
                "Gather",
                [self._op("Shape", [self._rows(ref)]), self._constant([0], INT64)],
                axis=0,
            )

        return self._once(("count", ref), build)

    def _feed(self) -> ir.Value:
        if self._rows_input is None:
            shape, kind = ir.Shape([None]), ir.TensorType(ir.DataType.FLOAT)
            self._rows_input = ir.Value(name=ROWS_INPUT, shape=shape, type=kind)
            self._graph.inputs.append(self._rows_input)
        return self._rows_input

    def _flatten(self, value: ir.Value, ref: Ref) -> ir.Value:
        """Moves the channel axis last and merges the others: [..., C] -> [n, C]."""
        shape = self._find(ref).shape
        if shape is None:
            return self._flatten_unranked(value, ref)
        rank = len(shape)
        if not -rank <= ref.axis < rank:
            raise ModelError(
                f"tensor {ref.value!r} has rank {rank} and no axis {ref.axis}; request another axis"
            )
        axis = ref.axis % rank
        if axis != rank - 1:
            perm = [i for i in range(rank) if i != axis] + [axis]
            value = self._op("Transpose", [value], perm=perm)
        return self._op("Flatten", [value], axis=rank - 1)

    def _flatten_unranked(self, value: ir.Value, ref: Ref) -> ir.Value:
        """Does so without a rank: axis -1 as [rest, C], -2 through [rest, C, L], 1 through [N, C, rest]."""
        if ref.axis == -1:
            return self._op("Reshape", [value, self._kept_tail(value, 1)])
        if ref.axis not in (1, -2):
            raise ModelError(
                f"tensor {ref.value!r} has no known rank; run shape inference to take axis {ref.axis}"
            )
        target = self._constant([0, 0, -1], INT64) if ref.axis == 1 else self._kept_tail(value, 2)
        middle = self._op("Transpose", [self._op("Reshape", [value, target])], perm=[0, 2, 1])
        return self._op("Flatten", [middle], axis=2)

    def _kept_tail(self, value: ir.Value, count: int) -> ir.Value:
        """The shape that keeps the last `count` axes and merges the others."""
        shape, end = self._op("Shape", [value]), int(np.iinfo(np.int32).max)
        if self._opset < 10:
            tail = self._op("Slice", [shape], starts=[-count], ends=[end])
        else:
            tail = self._op("Slice", [shape, self._constant([-count], INT64), self._constant([end], INT64)])
        return self._op("Concat", [self._constant([-1], INT64), tail], axis=0)

    def _own(self, ref: Ref) -> Ref:
        """The same tensor by its name in the clone; a model that is its own reference is probed once."""
        return Ref(self._names.get(ref, ref.value), axis=ref.axis)

    def _find(self, ref: Ref) -> ir.Value:
        if ref.value in self._values:
            return self._values[ref.value]
        if any(ref.value in main_values(body) for body in self._graph.subgraphs()):
            raise ModelError(f"tensor {ref.value!r} lies in a subgraph (If, Loop, Scan) and cannot be probed")
        raise ModelError(f"tensor {ref.value!r} is not in the model's main graph; request another")

    def _to_float(self, value: ir.Value) -> ir.Value:
        if value.dtype == ir.DataType.FLOAT:
            return value
        return self._op("Cast", [value], to=int(ir.DataType.FLOAT))

    def _constant(self, data: float | Sequence[int], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
        def build() -> ir.Value:
            return edit.add_initializer(self._graph, f"{PREFIX}_constant", np.asarray(data), dtype)

        return self._once(("constant", str(data), str(dtype)), build)

    def _op(self, op_type: str, inputs: Sequence[ir.Value], **attributes: Attribute) -> ir.Value:
        node = ir.node(op_type, inputs, attributes)
        self._nodes += 1
        node.name = node.outputs[0].name = f"{PREFIX}_{self._nodes}_{op_type}"
        self._graph.append(node)
        return node.outputs[0]

    def _once(self, key: object, build: Callable[[], ir.Value]) -> ir.Value:
        if key not in self._made:
            self._made[key] = build()
        return self._made[key]


def _opset(graph: ir.Graph) -> int:
    opset = graph.opset_imports.get("", graph.opset_imports.get("ai.onnx", 0))
    if opset < OLDEST_OPSET:
        raise ModelError(
            f"the model is at opset {opset}, probes need {OLDEST_OPSET}; run onnx.version_converter on it"
        )
    return opset
