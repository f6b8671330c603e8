# SPDX-License-Identifier: Apache-2.0
"""Bounds of elementwise ops."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from scipy import special

from onnxcollapse.structure import intervals
from onnxcollapse.structure.affine import is_inference
from onnxcollapse.structure.constants import Array, attribute, constant_array
from onnxcollapse.structure.intervals import UNBOUNDED, Bounds, Interval, Rule, computed_in, make

_APPROXIMATE = (1e-5, 1e-6)  # relative and absolute error that runtimes' exp, tanh, erf, ... may have


def _rounded(function: Callable[..., Interval]) -> Rule:
    """A rule for a correctly rounded op of one or more operands, which rounds after each: partial sums may cancel."""

    def rule(node: ir.Node, bounds: Bounds) -> Interval:
        operands = [bounds(i) for i in range(len(node.inputs))]
        total = operands[0] if len(operands) > 1 else function(operands[0])
        for operand in operands[1:]:
            total = function(total, operand).rounded(computed_in(node))
        return total if len(operands) > 1 else total.rounded(computed_in(node))

    return rule


def _exact(function: Callable[[Interval], Interval]) -> Rule:
    return lambda node, bounds: function(bounds(0))


def _unary(function: Callable[[Interval], Interval]) -> Rule:
    """A rule for a function that runtimes approximate."""
    return lambda node, bounds: function(bounds(0)).widened(*_APPROXIMATE).rounded(computed_in(node))


def _increasing(function: Callable[[Array], Array]) -> Rule:
    return _unary(lambda x: intervals.increasing(function, x))


def _valley(function: Callable[[Array], Array], where: float, least: float) -> Rule:
    return _unary(lambda x: intervals.valley(function, where, least, x))


def _extreme(pick: Callable[[Array, Array], Array]) -> Callable[[Interval, Interval], Interval]:
    return lambda a, b: make(pick(a.low, b.low), pick(a.high, b.high))


def _clip(node: ir.Node, bounds: Bounds) -> Interval:
    x = bounds(0)
    for index, name, pick in ((1, "min", np.maximum), (2, "max", np.minimum)):
        given = attribute(node, name)
        if given is not None:
            x = _extreme(pick)(x, make(float(given), float(given)))
        elif len(node.inputs) > index and node.inputs[index] is not None:
            x = _extreme(pick)(x, bounds(index))
    return x


def _leaky(node: ir.Node, bounds: Bounds) -> Interval:
    return _sloped(bounds(0), make(*[float(attribute(node, "alpha", 0.01))] * 2)).rounded(computed_in(node))


def _prelu(node: ir.Node, bounds: Bounds) -> Interval:
    return _sloped(bounds(0), bounds(1)).rounded(computed_in(node))


def _sloped(x: Interval, slope: Interval) -> Interval:
    """Bounds of max(x, 0) + slope min(x, 0)."""
    above = make(np.maximum(x.low, 0.0), np.maximum(x.high, 0.0))
    below = intervals.multiply(slope, make(np.minimum(x.low, 0.0), np.minimum(x.high, 0.0)))
    both = intervals.hull(above, below)
    positive, negative = np.broadcast_to(x.low >= 0, both.shape), np.broadcast_to(x.high <= 0, both.shape)
    low = np.where(positive, above.low, np.where(negative, below.low, both.low))
    return make(low, np.where(positive, above.high, np.where(negative, below.high, both.high)))


def _abs(x: Interval) -> Interval:
    least = np.where((x.low <= 0) & (x.high >= 0), 0.0, np.minimum(np.abs(x.low), np.abs(x.high)))
    return make(least, x.magnitude)


def _relu(x: Interval) -> Interval:
    return make(np.maximum(x.low, 0.0), np.maximum(x.high, 0.0))


def _power(node: ir.Node, bounds: Bounds) -> Interval:
    exponent = constant_array(node.inputs[1])
    if exponent is None or exponent.size != 1 or float(exponent.reshape(())) != 2.0:
        return UNBOUNDED
    x = _abs(bounds(0))
    return intervals.multiply(x, x).widened(*_APPROXIMATE).rounded(computed_in(node))


def _sqrt(x: Interval) -> Interval:
    return intervals.increasing(lambda bound: np.sqrt(np.maximum(bound, 0.0)), x)


def _hard_sigmoid(node: ir.Node, bounds: Bounds) -> Interval:
    alpha, beta = float(attribute(node, "alpha", 0.2)), float(attribute(node, "beta", 0.5))
    slope = intervals.multiply(bounds(0), make(alpha, alpha)).rounded(computed_in(node))  # the sum may cancel
    wide = intervals.add(slope, make(beta, beta)).rounded(computed_in(node))
    return make(np.clip(wide.low, 0.0, 1.0), np.clip(wide.high, 0.0, 1.0))


def _elu(node: ir.Node, bounds: Bounds) -> Interval:
    alpha = float(attribute(node, "alpha", 1.0))
    if alpha < 0:
        return UNBOUNDED
    return _increasing(lambda x: np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0.0))))(node, bounds)


def _swish(node: ir.Node, bounds: Bounds) -> Interval:
    """Bounds of x sigmoid(alpha x) = s(alpha x) / alpha with s(t) = t sigmoid(t)."""
    alpha = float(attribute(node, "alpha", 1.0 if node.op_type == "Swish" else 1.702))
    if alpha <= 0:
        return UNBOUNDED
    return _valley(lambda x: x * special.expit(alpha * x), -1.278465 / alpha, -0.278465 / alpha)(node, bounds)


def _biased(rule: Rule) -> Rule:
    """A rule for an op that first adds its second operand, if it has one."""

    def biased(node: ir.Node, bounds: Bounds) -> Interval:
        if len(node.inputs) < 2 or node.inputs[1] is None:
            return rule(node, bounds)
        total = intervals.add(bounds(0), bounds(1)).rounded(computed_in(node))
        return rule(node, lambda _: total)

    return biased


def _gelu_erf(x: Array) -> Array:
    return 0.5 * x * (1.0 + special.erf(x / math.sqrt(2.0)))


def _gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


_GELU = _valley(_gelu_erf, -0.75179, -0.169972)
_GELU_TANH = _valley(_gelu_tanh, -0.75246, -0.170042)


def _gelu(node: ir.Node, bounds: Bounds) -> Interval:
    return (_GELU_TANH if attribute(node, "approximate", "none") == "tanh" else _GELU)(node, bounds)


def _cast(node: ir.Node, bounds: Bounds) -> Interval:
    to = ir.DataType(int(attribute(node, "to")))
    if to == ir.DataType.BOOL:
        return make(0.0, 1.0)
    if to in intervals.FLOATS:
        return bounds(0).rounded(to, 2.0)
    return UNBOUNDED


def _where(node: ir.Node, bounds: Bounds) -> Interval:
    return intervals.hull(bounds(1), bounds(2))


def _dropout(node: ir.Node, bounds: Bounds) -> Interval:
    return bounds(0) if is_inference(node) else UNBOUNDED


RULES: dict[str, Rule] = {
    "Abs": _exact(_abs),
    "Add": _rounded(intervals.add),
    "Cast": _cast,
    "Ceil": _exact(lambda x: intervals.increasing(np.ceil, x)),
    "Clip": _clip,
    "Div": _rounded(intervals.divide),
    "Dropout": _dropout,
    "Elu": _elu,
    "Erf": _increasing(special.erf),
    "Exp": _increasing(np.exp),
    "Floor": _exact(lambda x: intervals.increasing(np.floor, x)),
    "Gelu": _gelu,
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": _valley(lambda x: x * np.clip(x / 6.0 + 0.5, 0.0, 1.0), -1.5, -0.375),
    "Identity": _exact(lambda x: x),
    "LeakyRelu": _leaky,
    "Max": _rounded(_extreme(np.maximum)),
    "Min": _rounded(_extreme(np.minimum)),
    "Mish": _valley(lambda x: x * np.tanh(np.logaddexp(0.0, x)), -1.1924, -0.308843),
    "Mul": _rounded(intervals.multiply),
    "Neg": _exact(intervals.negate),
    "PRelu": _prelu,
    "Pow": _power,
    "Relu": _exact(_relu),
    "Sigmoid": _increasing(special.expit),
    "Softplus": _increasing(lambda x: np.logaddexp(0.0, x)),
    "Sqrt": _unary(_sqrt),
    "Sub": _rounded(lambda a, b: intervals.add(a, intervals.negate(b))),
    "Sum": _rounded(intervals.add),
    "Swish": _swish,
    "Tanh": _increasing(np.tanh),
    "Where": _where,
}
CONTRIB_RULES: dict[str, Rule] = {
    "FastGelu": _biased(_GELU_TANH),
    "BiasGelu": _biased(_GELU),
    "Gelu": _GELU,
    "QuickGelu": _swish,
}
