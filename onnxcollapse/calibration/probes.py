# SPDX-License-Identifier: Apache-2.0
"""Probes: nodes added to a scratch clone that reduce activations to sums inside the graph.

::

    before:  ... -> tensor -> ...
    after:   tensor -> Cast fp32 -> rows [n, C] -> Z = rows - shift -> Gemm(Z', Z, state in) -> state out

The sums are states: they stay where the model runs, each run adds its batch, and the host reads them now and then
and adds up in fp64. The shift is the mean of the first batch of a part: it keeps the rounding of fp32 relative to the
spread of the activations rather than to their offset, and is undone in fp64 on the host. Padding counts as zeros.
Only standard-domain ops of opset 9 and later are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from onnxcollapse.calibration.additions import PREFIX, Additions
from onnxcollapse.calibration.sessions import State, main_values
from onnxcollapse.calibration.statistics import Cross, Gram, Moments, Patches, Ref, Request
from onnxcollapse.errors import ModelError
from onnxcollapse.model import edit
from onnxcollapse.model.model import Model

ROWS_INPUT = f"{PREFIX}_rows"
SLICES = 3
WIDE = 256
"""Tensors with fewer columns are not sliced: small products cost more than they save."""

INT64 = ir.DataType.INT64

_BIG = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Column:
    """The states that every statistic of one tensor shares, by their names.

    Attributes:
        count: Rows that are no padding, [1, 1].
        shift: What its rows were shifted by, [1, C].
        total: Sum of the shifted rows, [1, C].
    """

    count: str
    shift: str
    total: str


class ProbeSet(Additions):
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
        super().__init__(scratch.graph)
        self._scratch, self._names = scratch, names
        self._values = main_values(scratch.graph)
        self._masked = masked
        self._rows_input: ir.Value | None = None
        self._columns: dict[Ref, Column] = {}
        self._sums: dict[Request, list[str]] = {}
        self.states: dict[str, State] = {}

    def add(self, requests: Iterable[Request], keep: Sequence[str] = ()) -> None:
        """Adds the probes of these requests and leaves nothing but them and the tensors to keep in the clone."""
        for request in requests:
            self._sums[request] = self._probe(request)
        results = main_values(self._graph)
        kept = [self._values[name] for name in keep]
        used = [*kept, *(results[state.output] for state in self.states.values())]
        self._graph.outputs[:] = list(dict.fromkeys(used))
        edit.prune(self._scratch)

    def column(self, ref: Ref) -> Column:
        """The states of a tensor."""
        return self._columns[self._own(ref)]

    def sums(self, request: Request) -> list[str]:
        """The states of a request, by their names.

        A Gram's are the row panels of Z'Z: one holds the rows of a slice of columns from these columns on, as Z'Z
        is symmetric and what lies left of that is not computed. Moments have sums of squares, of positive signs and of
        squared negative parts, then minima and maxima, each [1, C]. A Cross has Z_left'Z_right and the sums of both
        squares. A Cosine has its sum, [1, 1].
        """
        return self._sums[request]

    @property
    def needs_rows(self) -> bool:
        """Whether the clone has the input ROWS_INPUT: float32 [R + 1], a weight a row and a 1 behind them."""
        return self._rows_input is not None

    def _probe(self, request: Request) -> list[str]:
        for ref in request.refs:
            self._centred(self._own(ref))
        if isinstance(request, Gram):
            return self._gram(request)
        if isinstance(request, Moments):
            return self._moments(self._own(request.tensor))
        left, right = (self._own(ref) for ref in request.refs)
        return self._cross(left, right) if isinstance(request, Cross) else self._cosine(left, right)

    def _gram(self, request: Gram) -> list[str]:
        slices = [piece for ref in request.refs for piece in self._slices(self._own(ref))]
        return [
            self._add_up(piece, self._beside(slices[place:]), "panel") for place, piece in enumerate(slices)
        ]

    def _cross(self, left: Ref, right: Ref) -> list[str]:
        a, b = self._centred(left), self._centred(right)
        return [
            self._add_up(a, b, "cross"),
            *(self._sum(ref, self._square(self._centred(ref))) for ref in (left, right)),
        ]

    def _cosine(self, left: Ref, right: Ref) -> list[str]:
        """Sum of cos(a, b) over the rows; a row of zeros has the cosine 0."""
        a, b = self._kept(left), self._kept(right)
        dot, aa, bb = (self._over_channels(self._op("Mul", pair)) for pair in ((a, b), (a, a), (b, b)))
        norms = self._op("Mul", [self._op("Sqrt", [aa]), self._op("Sqrt", [bb])])
        tiny = self._constant(float(np.finfo(np.float32).tiny))
        return [self._sum(left, self._op("Div", [dot, self._op("Add", [norms, tiny])]))]

    def _over_channels(self, rows: ir.Value) -> ir.Value:
        if self._opset < 13:
            return self._op("ReduceSum", [rows], axes=[1], keepdims=1)
        return self._op("ReduceSum", [rows, self._constant([1], INT64)], keepdims=1)

    def _square(self, rows: ir.Value) -> ir.Value:
        return self._op("Mul", [rows, rows])

    def _slices(self, ref: Ref) -> list[ir.Value]:
        """The centred rows in SLICES pieces of columns, so that half of a wide tensor's own square is not computed."""
        value = self._values.get(ref.value)
        width = value.shape[ref.axis] if value is not None and value.shape is not None else None
        if ref.patches is not None and isinstance(width, int):
            width *= int(np.prod(ref.patches.window.kernel_shape))
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

    def _beside(self, pieces: list[ir.Value]) -> ir.Value:
        return pieces[0] if len(pieces) == 1 else self._op("Concat", pieces, axis=1)

    def _moments(self, ref: Ref) -> list[str]:
        kept = self._kept(ref)
        negative = self._op("Relu", [self._op("Neg", [kept])])
        positive = self._to_float(self._op("Greater", [kept, self._constant(0.0)]))
        rows = [self._square(self._centred(ref)), positive, self._square(negative)]
        sums = [self._sum(ref, value) for value in rows]
        return [*sums, self._extreme(ref, "Min", _BIG), self._extreme(ref, "Max", -_BIG)]

    def _state(self, hint: str, initial: float, *, kept: bool = False) -> tuple[str, ir.Value]:
        """Adds an input for a state; it starts as one number, which broadcasts."""
        name = f"{PREFIX}_{hint}_{len(self.states)}"
        value = ir.Value(name=name, shape=ir.Shape([None, None]), type=ir.TensorType(ir.DataType.FLOAT))
        self._graph.inputs.append(value)
        self.states[name] = State("", np.full((1, 1), initial, np.float32), kept)
        return name, value

    def _close(self, name: str, result: ir.Value) -> str:
        """Says what a state is after a run."""
        before = self.states[name]
        self.states[name] = State(result.name or "", before.initial, before.kept)
        return name

    def _add_up(self, left: ir.Value, right: ir.Value, hint: str) -> str:
        """A state that left'right is added to, in the product itself."""
        name, state = self._state(hint, 0.0)
        return self._close(name, self._op("Gemm", [left, right, state], transA=1))

    def _sum(self, ref: Ref, rows: ir.Value) -> str:
        """Column sums as a matrix product: it adds in blocks, which rounds less than ReduceSum."""
        return self._add_up(self._ones(ref), rows, "sum")

    def _rows(self, ref: Ref) -> ir.Value:
        """The tensor as float32 rows [n, C]."""

        def build() -> ir.Value:
            value = self._to_float(self._find(ref))
            for part in ref.parts[1:]:
                shape = value.shape
                value = self._op("Sub", [value, self._to_float(self._find(part))])
                value.shape = None if shape is None else shape.copy()
                value.type = ir.TensorType(ir.DataType.FLOAT)
            if ref.patches is not None:
                value = self._patches(value, ref.patches)
            rows = self._flatten(value, ref)
            return (
                rows if ref.positions is None or self._opset < 10 else self._some(rows, value, ref.positions)
            )

        return self._once(("rows", ref), build)

    def _patches(self, value: ir.Value, patches: Patches) -> ir.Value:
        """[N, C, ...] -> [N, C * taps, ...]: a Conv whose filters each pick one tap of one channel."""
        window, taps = patches.window, int(np.prod(patches.window.kernel_shape))
        filters = np.tile(np.eye(taps, dtype=np.float32), (patches.channels, 1))
        shape = (patches.channels * taps, 1, *window.kernel_shape)
        weight = edit.add_initializer(
            self._graph, f"{PREFIX}_taps", filters.reshape(shape), ir.DataType.FLOAT
        )
        picked = self._op(
            "Conv",
            [value, weight],
            group=patches.channels,
            kernel_shape=list(window.kernel_shape),
            strides=list(window.strides),
            pads=list(window.pads),
            dilations=list(window.dilations),
        )
        picked.shape = ir.Shape([None] * (2 + len(window.kernel_shape)))
        picked.type = ir.TensorType(ir.DataType.FLOAT)
        return picked

    def _some(self, rows: ir.Value, value: ir.Value, positions: int) -> ir.Value:
        """Every so many rows; an odd step, which does not stay in one column of an image of even width."""
        zero = self._constant([0], INT64)
        count, samples = (
            self._op("Gather", [self._op("Shape", [tensor]), zero], axis=0) for tensor in (rows, value)
        )
        each = self._op("Div", [count, samples])
        half = self._op("Div", [each, self._constant([2 * positions], INT64)])
        step = self._op("Add", [self._op("Add", [half, half]), self._constant([1], INT64)])
        end = self._constant([int(np.iinfo(np.int64).max)], INT64)
        return self._op("Slice", [rows, zero, end, zero, step])

    def _kept(self, ref: Ref) -> ir.Value:
        """Rows with the padding, which may hold NaN, set to 0."""
        return self._once(("kept", ref), lambda: self._fill(ref, self._rows(ref), 0.0))

    def _centred(self, ref: Ref) -> ir.Value:
        """Rows minus the shift, padding 0; records the tensor's column of states."""

        def build() -> ir.Value:
            ones = self._ones(ref)
            name, known = self._state("shift", float("nan"), kept=True)
            total = self._op("MatMul", [self._op("Transpose", [ones], perm=[1, 0]), self._kept(ref)])
            mean = self._op("Div", [total, self._at_least_one(self._row_total(ref))])
            shift = self._op("Where", [self._op("IsNaN", [known]), mean, known])
            rows = self._fill(ref, self._op("Sub", [self._rows(ref), shift]), 0.0)
            count = self._add_up(ones, ones, "count")
            self._columns[ref] = Column(count, self._close(name, shift), self._sum(ref, rows))
            return rows

        return self._once(("centred", ref), build)

    def _row_total(self, ref: Ref) -> ir.Value:
        ones = self._ones(ref)
        return self._op("MatMul", [self._op("Transpose", [ones], perm=[1, 0]), ones])

    def _at_least_one(self, count: ir.Value) -> ir.Value:
        """Never 0/0, and no opset-dependent Max: a batch of padding only has the mean 0."""
        if self._opset < 11:
            return self._op("Clip", [count], min=1.0)
        return self._op("Clip", [count, self._constant(1.0)])

    def _extreme(self, ref: Ref, op_type: str, neutral: float) -> str:
        rows = self._fill(ref, self._rows(ref), neutral)
        if self._opset < 18:
            found = self._op(f"Reduce{op_type}", [rows], axes=[0], keepdims=1)
        else:
            found = self._op(f"Reduce{op_type}", [rows, self._constant([0], INT64)], keepdims=1)
        name, state = self._state(op_type.lower(), neutral)
        return self._close(name, self._op(op_type, [found, state]))

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
        shape = value.shape if ref.patches is not None else self._find(ref).shape
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
        subtracted = [self._names.get(part, part.value) for part in ref.parts[1:]]
        minus = subtracted[0] if subtracted else None
        return replace(ref, value=self._names.get(ref, ref.value), source="model", minus=minus)

    def _find(self, ref: Ref) -> ir.Value:
        if ref.value in self._values:
            return self._values[ref.value]
        if any(ref.value in main_values(body) for body in self._graph.subgraphs()):
            raise ModelError(f"tensor {ref.value!r} lies in a subgraph (If, Loop, Scan) and cannot be probed")
        raise ModelError(f"tensor {ref.value!r} is not in the model's main graph; request another")
