# SPDX-License-Identifier: Apache-2.0
"""Bounds of sums of products, norms and pools."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from onnxcollapse.structure import intervals
from onnxcollapse.structure.affine import batch_normalization
from onnxcollapse.structure.channels import rank
from onnxcollapse.structure.constants import Array, attribute, constant_array, folded
from onnxcollapse.structure.intervals import (
    UNBOUNDED,
    Bounds,
    Interval,
    Rule,
    computed_in,
    make,
    roundoff,
    underflow,
)

_POOLED = 1 << 16  # elements that a mean is taken over when the number is not known


def _matmul(node: ir.Node, bounds: Bounds) -> Interval:
    left, right = folded(node.inputs[0]), folded(node.inputs[1])
    if right is not None and left is None and len(right.shape) == 2:
        return _sums(node, right.load, right.shape, -1, bounds(0))
    if left is not None and right is None and len(left.shape) == 2 and (rank(node.inputs[1]) or 1) > 1:
        column = _sums(node, lambda: left.load().T, left.shape[::-1], -2, bounds(1))
        return make(column.low.reshape(-1, 1), column.high.reshape(-1, 1))
    return UNBOUNDED


def _gemm(node: ir.Node, bounds: Bounds) -> Interval:
    right = folded(node.inputs[1])
    if right is None or folded(node.inputs[0]) is not None or attribute(node, "transA", 0):
        return UNBOUNDED
    flip = bool(attribute(node, "transB", 0))
    shape = right.shape[::-1] if flip else right.shape
    alpha, beta = float(attribute(node, "alpha", 1.0)), float(attribute(node, "beta", 1.0))
    weight = lambda: (right.load().T if flip else right.load()) * np.float64(alpha)  # noqa: E731
    product = _sums(node, weight, shape, -1, bounds(0))
    if len(node.inputs) < 3 or node.inputs[2] is None or beta == 0.0:
        return product
    bias = intervals.multiply(bounds(2), make(beta, beta)).rounded(computed_in(node))
    return intervals.add(product, bias).rounded(computed_in(node))


def _conv(node: ir.Node, bounds: Bounds) -> Interval:
    known = folded(node.inputs[1])
    if known is None or len(known.shape) < 3:
        return UNBOUNDED
    spatial, groups = len(known.shape) - 2, int(attribute(node, "group", 1))
    x = bounds(0)
    if x.is_unbounded:
        return UNBOUNDED
    if _pads(node):
        x = intervals.hull(x, make(0.0, 0.0))
    x = x.along(-1 - spatial, known.shape[1] * groups)
    taps = int(np.prod(known.shape[2:], dtype=np.int64))
    weight = known.load().reshape(groups, known.shape[0] // groups, known.shape[1], taps)
    parts = []
    for group, part in enumerate(weight):
        channels = slice(group * known.shape[1], (group + 1) * known.shape[1])
        spread = make(np.repeat(x.low[channels], taps), np.repeat(x.high[channels], taps))
        parts.append(_accumulated(node, part.reshape(part.shape[0], -1).T, spread))
    low, high = (np.concatenate([getattr(part, side) for part in parts]) for side in ("low", "high"))
    shape = (-1,) + (1,) * spatial
    total = make(low.reshape(shape), high.reshape(shape))
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return total
    bias = bounds(2).along(-1, known.shape[0])
    return intervals.add(total, make(bias.low.reshape(shape), bias.high.reshape(shape))).rounded(
        computed_in(node)
    )


def _pads(node: ir.Node) -> bool:
    automatic = attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return automatic or any(attribute(node, "pads", ())) or bool(attribute(node, "ceil_mode", 0))


def _sums(
    node: ir.Node, load: Callable[[], Array], shape: tuple[int, ...], axis: int, x: Interval
) -> Interval:
    """Bounds [out] of x @ weight; the weight is not read when nothing is known of x."""
    return UNBOUNDED if x.is_unbounded else _accumulated(node, load(), x.along(axis, shape[0]))


def _accumulated(node: ir.Node, weight: Array, x: Interval) -> Interval:
    """Bounds of x @ weight with the worst rounding error of any order of summation.

    Computed: sum_i w_i x_i (1 + e_i) with |e_i| <= n u / (1 - n u) (Higham, Accuracy and Stability, eq. 3.3), n
    counted with slack. A sum of which no term can be negative is not, however it is rounded: then 0 stays a bound.
    """
    terms, dtype = weight.shape[0] + 8, computed_in(node)
    steps = terms * roundoff(dtype)
    if steps >= 1:
        return make(np.full(weight.shape[1], -math.inf), math.inf)
    total = intervals.affine_map(weight, x, steps / (1 - steps) + 1e-12)
    wide = total.widened(1e-12, terms * underflow(dtype))
    falling, rising = np.minimum(np.sign(x.low), 0.0), np.maximum(np.sign(x.high), 0.0)
    signs = intervals.affine_map(np.sign(weight), make(falling, rising), 0.0)
    return make(
        np.where(signs.low == 0, np.maximum(wide.low, 0.0), wide.low),
        np.where(signs.high == 0, np.minimum(wide.high, 0.0), wide.high),
    )


def _batch_norm(node: ir.Node, bounds: Bounds) -> Interval:
    both, tensor_rank = batch_normalization(node), rank(node.inputs[0])
    if both is None or tensor_rank is None or tensor_rank < 2:
        return UNBOUNDED
    shape = (-1,) + (1,) * (tensor_rank - 2)
    scale, shift = (array.reshape(shape) for array in both)
    x = bounds(0)
    product = intervals.multiply(x, make(scale, scale))
    # x - mean may cancel: the error is relative to the terms, not to their difference
    mean = np.abs(np.asarray(constant_array(node.inputs[3]), np.float64)).reshape(shape)
    finite = np.maximum(*(np.where(np.isinf(side), 0.0, np.abs(side)) for side in (x.low, x.high)))
    error = ((finite + 2 * mean) * np.abs(scale) + np.abs(shift)) * 16 * roundoff(computed_in(node))
    return intervals.add(product, make(shift, shift)).widened(
        1e-12, error + 16 * underflow(computed_in(node))
    )


def _layer_norm(scale_at: int, shift_at: int | None) -> Rule:
    """|y_j| <= sqrt(d) |gamma_j| + beta_j: a vector of d numbers with mean square 1 has none above sqrt(d)."""

    def rule(node: ir.Node, bounds: Bounds) -> Interval:
        gamma = folded(node.inputs[scale_at]) if len(node.inputs) > scale_at else None
        if gamma is None or 1 in gamma.shape or -int(attribute(node, "axis", -1)) != len(gamma.shape):
            return UNBOUNDED  # the number of elements under the norm is not known
        reach = math.sqrt(gamma.size) * (1 + 1e-4) * np.abs(gamma.load().astype(np.float64))
        total = make(-reach, reach)
        if shift_at is not None and len(node.inputs) > shift_at and node.inputs[shift_at] is not None:
            total = intervals.add(total, bounds(shift_at))
        return total.rounded(computed_in(node))

    return rule


def _softmax(node: ir.Node, bounds: Bounds) -> Interval:
    return make(0.0, 1.0 + 1e-5)


def _max_pool(node: ir.Node, bounds: Bounds) -> Interval:
    return _pooled(node, bounds(0))


def _average_pool(node: ir.Node, bounds: Bounds) -> Interval:
    x = intervals.hull(bounds(0), make(0.0, 0.0)) if _pads(node) else bounds(0)
    taps = float(np.prod(attribute(node, "kernel_shape", [_POOLED]), dtype=np.float64))
    return _pooled(node, x).widened(
        0.0, x.magnitude.max() * taps * roundoff(computed_in(node)) + underflow(computed_in(node))
    )


def _global_average(node: ir.Node, bounds: Bounds) -> Interval:
    x = bounds(0)
    if x.is_unbounded:
        return x
    return _pooled(node, x).widened(0.0, x.magnitude.max() * _POOLED * roundoff(computed_in(node)))


def _pooled(node: ir.Node, x: Interval) -> Interval:
    """Bounds without what varies over the image."""
    kernel = attribute(node, "kernel_shape")
    spatial = len(kernel) if kernel is not None else (rank(node.inputs[0]) or 0) - 2
    if spatial < 1 or x.low.ndim <= spatial:
        return x.whole()
    return x.reduced(tuple(range(x.low.ndim - spatial, x.low.ndim)))


RULES: dict[str, Rule] = {
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Conv": _conv,
    "Gemm": _gemm,
    "GlobalAveragePool": _global_average,
    "GlobalMaxPool": _max_pool,
    "LayerNormalization": _layer_norm(1, 2),
    "LogSoftmax": lambda node, bounds: make(-math.inf, 1e-5),
    "MatMul": _matmul,
    "MaxPool": _max_pool,
    "RMSNormalization": _layer_norm(1, None),
    "SimplifiedLayerNormalization": _layer_norm(1, None),
    "Softmax": _softmax,
}
CONTRIB_RULES: dict[str, Rule] = {
    "SimplifiedLayerNormalization": _layer_norm(1, None),
    "SkipLayerNormalization": _layer_norm(2, 3),
    "SkipSimplifiedLayerNormalization": _layer_norm(2, None),
}
SELF_BOUNDED = {
    "LayerNormalization": 1,
    "LogSoftmax": 1,
    "RMSNormalization": 1,
    "SimplifiedLayerNormalization": 1,
    "SkipLayerNormalization": 2,
    "SkipSimplifiedLayerNormalization": 2,
    "Softmax": 1,
}
"""Ops whose bounds need nothing of their first operands: that many."""
