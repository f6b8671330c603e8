# SPDX-License-Identifier: Apache-2.0
"""Interval arithmetic on bounds that broadcast, right-aligned, against the tensor they bound.

A tensor [n, t, C] with bounds of shape [C] is bounded per channel, one [n, C, h, w] with bounds [C, 1, 1] likewise,
one with bounds of shape () as a whole. Elementwise ops then need no notion of a channel axis.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcollapse.structure.channels import element_type
from onnxcollapse.structure.constants import Array

# Unit roundoff and largest finite number of the types that activations are computed in.
_ROUNDOFF = {
    ir.DataType.DOUBLE: 2.0**-53,
    ir.DataType.FLOAT: 2.0**-24,
    ir.DataType.FLOAT16: 2.0**-11,
    ir.DataType.BFLOAT16: 2.0**-8,
}
FLOATS = frozenset(_ROUNDOFF)
_LARGEST = {ir.DataType.DOUBLE: np.finfo(np.float64).max, ir.DataType.FLOAT16: 65504.0}
_SMALLEST = {ir.DataType.FLOAT16: 2.0**-14}
_SMALLEST_FLOAT = 2.0**-120  # above the denormals of float32, which a runtime may flush to zero
_MOST_ELEMENTS = 1 << 20


@dataclass(frozen=True, eq=False)
class Interval:
    """Bounds low <= x <= high, float64 arrays of one shape that broadcasts against the tensor."""

    low: Array
    high: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the bounds."""
        return tuple(self.low.shape)

    @property
    def is_unbounded(self) -> bool:
        """Whether nothing is known."""
        return bool(np.isneginf(self.low).all() and np.isposinf(self.high).all())

    @property
    def magnitude(self) -> Array:
        """Bound of |x|."""
        return np.maximum(np.abs(self.low), np.abs(self.high))

    def whole(self) -> Interval:
        """One pair of bounds for the whole tensor."""
        return make(self.low.min(), self.high.max())

    def reduced(self, axes: tuple[int, ...]) -> Interval:
        """The same bounds along `axes`, which become 1."""
        return make(self.low.min(axis=axes, keepdims=True), self.high.max(axis=axes, keepdims=True))

    def padded(self, rank: int) -> Interval:
        """Bounds with leading ones up to `rank` dimensions."""
        shape = (1,) * (rank - self.low.ndim) + self.shape
        return make(self.low.reshape(shape), self.high.reshape(shape))

    def along(self, axis: int, channels: int) -> Interval:
        """Bounds [channels] along the negative `axis`, the same for everything else.

        Falls back to the whole tensor's bounds when their length along the axis is another.
        """
        if -axis > self.low.ndim:
            only = self.whole()
        else:
            others = tuple(i for i in range(self.low.ndim) if i != self.low.ndim + axis)
            only = self.reduced(others)
            only = make(only.low.reshape(-1), only.high.reshape(-1))
            only = only if only.low.size in (1, channels) else only.whole()
        return make(np.broadcast_to(only.low, channels), np.broadcast_to(only.high, channels))

    def widened(self, relative: float, absolute: float | Array) -> Interval:
        """Bounds moved outward."""
        return make(
            self.low - np.abs(self.low) * relative - absolute,
            self.high + np.abs(self.high) * relative + absolute,
        )

    def rounded(self, dtype: ir.DataType | None, operations: float = 4.0) -> Interval:
        """Bounds that also hold after `operations` roundings to `dtype`; unbounded where that overflows.

        Rounding never crosses zero.
        """
        wide = self.widened(operations * roundoff(dtype), operations * underflow(dtype))
        low = np.where(self.low >= 0, np.maximum(wide.low, 0.0), wide.low)
        high = np.where(self.high <= 0, np.minimum(wide.high, 0.0), wide.high)
        largest = _LARGEST.get(dtype, 3.4e38) if dtype is not None else 65504.0
        return make(np.where(low < -largest, -math.inf, low), np.where(high > largest, math.inf, high))


def roundoff(dtype: ir.DataType | None) -> float:
    """Unit roundoff of `dtype`, the worst if it is unknown."""
    return _ROUNDOFF.get(dtype, 2.0**-8) if dtype is not None else 2.0**-8


def underflow(dtype: ir.DataType | None) -> float:
    """What a number of `dtype` may lose when it is flushed to zero, the worst if the type is unknown."""
    return _SMALLEST.get(dtype, _SMALLEST_FLOAT) if dtype is not None else 2.0**-14


def make(low: Array | float, high: Array | float) -> Interval:
    """An interval from bounds; NaN (0 * inf, inf - inf) becomes unbounded."""
    low, high = np.broadcast_arrays(np.asarray(low, np.float64), np.asarray(high, np.float64))
    if np.isnan(low).any() or np.isnan(high).any():
        low, high = np.where(np.isnan(low), -math.inf, low), np.where(np.isnan(high), math.inf, high)
    return Interval(low, high)


UNBOUNDED = make(-math.inf, math.inf)


def of_array(array: Array) -> Interval:
    """The interval of a constant; large ones keep the bounds of their last axis only."""
    wide = array.astype(np.float64)
    if wide.size == 0:
        return UNBOUNDED
    exact = make(wide, wide)
    return exact if wide.size <= _MOST_ELEMENTS else exact.reduced(tuple(range(wide.ndim - 1)))


def hull(*operands: Interval) -> Interval:
    """The smallest interval around all of them."""
    low, high = operands[0].low, operands[0].high
    for operand in operands[1:]:
        low, high = np.minimum(low, operand.low), np.maximum(high, operand.high)
    return make(low, high)


def add(a: Interval, b: Interval) -> Interval:
    """Bounds of a + b."""
    return make(a.low + b.low, a.high + b.high)


def negate(a: Interval) -> Interval:
    """Bounds of -a."""
    return make(-a.high, -a.low)


def multiply(a: Interval, b: Interval) -> Interval:
    """Bounds of a * b; a factor that is exactly 0 gives 0, for all tensors are taken to be finite."""
    corners = [_product(x, y) for x in (a.low, a.high) for y in (b.low, b.high)]
    return make(
        np.minimum.reduce(np.broadcast_arrays(*corners)), np.maximum.reduce(np.broadcast_arrays(*corners))
    )


def _product(x: Array, y: Array) -> Array:
    with np.errstate(invalid="ignore"):
        product = x * y
    return np.where((x == 0) | (y == 0), 0.0, product)


def divide(a: Interval, b: Interval) -> Interval:
    """Bounds of a / b; unbounded where b may be 0."""
    away = (b.low > 0) | (b.high < 0)
    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = make(np.where(away, 1.0 / b.high, -math.inf), np.where(away, 1.0 / b.low, math.inf))
    quotient = multiply(a, inverse)
    known = np.broadcast_to(away, quotient.shape)  # 0 / 0 is not 0
    return make(np.where(known, quotient.low, -math.inf), np.where(known, quotient.high, math.inf))


def increasing(function: Callable[[Array], Array], a: Interval) -> Interval:
    """Bounds of an increasing function of a."""
    with np.errstate(all="ignore"):
        return make(function(a.low), function(a.high))


def valley(function: Callable[[Array], Array], where: float, least: float, a: Interval) -> Interval:
    """Bounds of a function that falls to its minimum `least` at `where` and rises after it."""
    with np.errstate(all="ignore"):
        ends = [np.nan_to_num(function(end), nan=0.0, posinf=math.inf) for end in (a.low, a.high)]
    inside = (a.low <= where) & (where <= a.high)
    return make(np.where(inside, least, np.minimum(*ends)), np.maximum(*ends))


def affine_map(weight: Array, x: Interval, error: float) -> Interval:
    """Bounds [out] of weight [in, out] applied to x with bounds [in], each term off by at most `error` of itself.

    With t_i the least that w_ij x_i can be, y_j >= sum_i t_i - error |t_i|, and the mirror image above. Works in
    float64 on a few columns at a time.
    """
    step = max(1, _MOST_ELEMENTS // max(1, weight.shape[0]))
    low, high = np.empty(weight.shape[1]), np.empty(weight.shape[1])
    for start in range(0, weight.shape[1], step):
        part = slice(start, start + step)
        block = weight[:, part].astype(np.float64)
        up, down = np.maximum(block, 0.0), np.minimum(block, 0.0)
        low[part] = _least(x.low, up, error) + _least(x.high, down, error)
        high[part] = -_least(-x.high, up, error) - _least(-x.low, down, error)
    return make(low, high)


def _least(bound: Array, weight: Array, error: float) -> Array:
    """Sum over i of t_i - error |t_i|, t_i = bound_i weight_ij, for weights of one sign."""
    return _weighted(bound, weight) - error * _weighted(np.abs(bound), np.abs(weight))


def _weighted(bound: Array, weight: Array) -> Array:
    """Sum over i of bound_i weight_ij for weights of one sign; a weight of 0 silences an infinite bound."""
    infinite = np.isinf(bound)
    total = np.where(infinite, 0.0, bound) @ weight
    if not infinite.any():
        return total
    pull = np.where(infinite, np.sign(bound), 0.0)
    upward = np.maximum(pull, 0.0) @ np.sign(weight)
    downward = np.minimum(pull, 0.0) @ np.sign(weight)
    with np.errstate(invalid="ignore"):  # inf - inf is NaN, which `make` takes for unbounded
        return total + _infinite(upward) + _infinite(downward)


def _infinite(pull: Array) -> Array:
    return np.where(pull == 0, 0.0, np.copysign(math.inf, pull))


Bounds = Callable[[int], Interval]  # bounds of operand i; UNBOUNDED for one that is left out
Rule = Callable[[ir.Node, Bounds], Interval]


def computed_in(node: ir.Node) -> ir.DataType | None:
    """Element type that `node` computes in, if it is known."""
    return element_type(node.outputs[0])
