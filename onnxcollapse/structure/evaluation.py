# SPDX-License-Identifier: Apache-2.0
"""Elementwise ops on numpy arrays, in the arrays' own precision.

The common ones are written out (`onnx.reference` evaluates some of them element by element in Python); the rest
of the standard domain goes through `onnx.reference`, other domains through ONNX Runtime.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcollapse.errors import ModelError
from onnxcollapse.structure.affine import batch_normalization
from onnxcollapse.structure.constants import Array, attribute, is_op

Operands = Sequence[Array | None]


def evaluate(nodes: Sequence[ir.Node], known: Mapping[ir.Value, Array], wanted: ir.Value) -> Array:
    """The value of `wanted`, computed from the values `known` by `nodes` in order.

    Casts between floating types are skipped: everything is computed in the precision of the arrays given.

    Raises:
        ModelError: An op is known to neither evaluator.
    """
    values = dict(known)
    left = {value: _last_reader(value, nodes) for node in nodes for value in node.outputs}
    for index, node in enumerate(nodes):
        values[node.outputs[0]] = evaluate_node(node, [None if v is None else values[v] for v in node.inputs])
        for value in node.inputs:  # free what nobody reads any more: these arrays are large
            if value is not None and value is not wanted and left.get(value) == index:
                values.pop(value, None)
    return values[wanted]


def _last_reader(value: ir.Value, nodes: Sequence[ir.Node]) -> int:
    return max((index for index, node in enumerate(nodes) if value in node.inputs), default=-1)


def evaluate_node(node: ir.Node, operands: Operands) -> Array:
    """First output of one elementwise `node`."""
    written = _FUNCTIONS.get((node.domain or "", node.op_type)) or _FUNCTIONS.get(("", node.op_type))
    if written is not None and (is_op(node, node.op_type) or (node.domain, node.op_type) in _FUNCTIONS):
        with np.errstate(over="ignore", under="ignore", divide="ignore", invalid="ignore"):
            return np.asarray(written(node, *operands))
    try:
        return _by_reference(node, operands) if is_op(node, node.op_type) else _by_runtime(node, operands)
    except Exception as error:
        raise ModelError(f"{node.op_type} of domain '{node.domain}' cannot be evaluated: {error}") from error


def _by_reference(node: ir.Node, operands: Operands) -> Array:
    from onnx.reference import ReferenceEvaluator

    feeds = {f"x{i}": array for i, array in enumerate(operands) if array is not None}
    outputs: Any = ReferenceEvaluator(_single(node, operands)).run(None, feeds)
    return np.asarray(outputs[0])


def _by_runtime(node: ir.Node, operands: Operands) -> Array:
    import onnxruntime

    narrow = [None if array is None else array.astype(np.float32) for array in operands]
    session = onnxruntime.InferenceSession(
        _single(node, narrow).SerializeToString(), providers=["CPUExecutionProvider"]
    )
    feeds = {f"x{i}": array for i, array in enumerate(narrow) if array is not None}
    dtype = next(array.dtype for array in operands if array is not None)
    return np.asarray(session.run(None, feeds)[0]).astype(dtype)


def _single(node: ir.Node, operands: Operands) -> Any:
    """A model of that one node with operands x0, x1, ... and output y."""
    import onnx
    from onnx import helper

    copy = onnx.NodeProto()
    copy.op_type, copy.domain = node.op_type, node.domain
    copy.input.extend("" if array is None else f"x{i}" for i, array in enumerate(operands))
    copy.output.append("y")
    copy.attribute.extend(ir.to_proto(attr) for attr in node.attributes.values())
    given = [(f"x{i}", array) for i, array in enumerate(operands) if array is not None]
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
        for name, array in given
    ]
    graph = helper.make_graph([copy], "one", inputs, [helper.make_empty_tensor_value_info("y")])
    versions = {"": 17, node.domain: 1} | dict(node.graph.opset_imports if node.graph is not None else {})
    opsets = [helper.make_opsetid(domain, version) for domain, version in sorted(versions.items())]
    return helper.make_model(graph, opset_imports=opsets, ir_version=min(10, onnx.IR_VERSION))


def _sigmoid(x: Array) -> Array:
    from scipy.special import expit

    return expit(x)


def _erf(x: Array) -> Array:
    from scipy.special import erf

    return erf(x)


def _gelu(x: Array, approximate: bool) -> Array:
    """Hendrycks and Gimpel, arXiv 1606.08415: x Phi(x), or its tanh form."""
    if approximate:
        return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0)))


def _clip(node: ir.Node, x: Array, low: Array | None = None, high: Array | None = None) -> Array:
    low = attribute(node, "min") if low is None else low
    high = attribute(node, "max") if high is None else high
    x = x if low is None else np.maximum(x, low)
    return x if high is None else np.minimum(x, high)


def _cast(node: ir.Node, x: Array, *_: Array | None) -> Array:
    to = ir.DataType(int(attribute(node, "to")))
    if not to.is_floating_point():
        return x.astype(to.numpy())
    return x if np.issubdtype(x.dtype, np.floating) else x.astype(np.float32)


def _normalised(node: ir.Node, x: Array, *_: Array | None) -> Array:
    both = batch_normalization(node)
    if both is None:
        raise ModelError(f"{node.name}: BatchNormalization is not at inference")
    return x * both[0].astype(x.dtype) + both[1].astype(x.dtype)


def _fold(function: Callable[..., Array]) -> Callable[..., Array]:
    def variadic(node: ir.Node, first: Array, *rest: Array) -> Array:
        for operand in rest:
            first = function(first, operand)
        return first

    return variadic


def _plain(function: Callable[..., Any]) -> Callable[..., Array]:
    return lambda node, *operands: function(*operands)


def _hard_sigmoid(node: ir.Node, x: Array) -> Array:
    return np.clip(attribute(node, "alpha", 0.2) * x + attribute(node, "beta", 0.5), 0.0, 1.0)


def _elu(node: ir.Node, x: Array) -> Array:
    return np.where(x > 0, x, attribute(node, "alpha", 1.0) * np.expm1(np.minimum(x, 0)))


def _leaky(node: ir.Node, x: Array) -> Array:
    return np.where(x >= 0, x, attribute(node, "alpha", 0.01) * x)


_MS = "com.microsoft"
_FUNCTIONS: dict[tuple[str, str], Callable[..., Array]] = {
    ("", "Abs"): _plain(np.abs),
    ("", "Add"): _plain(np.add),
    ("", "BatchNormalization"): _normalised,
    ("", "Cast"): _cast,
    ("", "Clip"): _clip,
    ("", "Div"): _plain(np.divide),
    ("", "Dropout"): lambda node, x, *_: x,
    ("", "Elu"): _elu,
    ("", "Erf"): _plain(_erf),
    ("", "Exp"): _plain(np.exp),
    ("", "Gelu"): lambda node, x: _gelu(x, attribute(node, "approximate", "none") == "tanh"),
    ("", "HardSigmoid"): _hard_sigmoid,
    ("", "HardSwish"): lambda node, x: x * np.clip(x / 6.0 + 0.5, 0.0, 1.0),
    ("", "Identity"): lambda node, x: x,
    ("", "LeakyRelu"): _leaky,
    ("", "Max"): _fold(np.maximum),
    ("", "Min"): _fold(np.minimum),
    ("", "Mish"): lambda node, x: x * np.tanh(np.logaddexp(0.0, x)),
    ("", "Mul"): _plain(np.multiply),
    ("", "Neg"): _plain(np.negative),
    ("", "PRelu"): lambda node, x, slope: np.where(x >= 0, x, slope * x),
    ("", "Pow"): _plain(np.power),
    ("", "Reciprocal"): _plain(np.reciprocal),
    ("", "Relu"): lambda node, x: np.maximum(x, 0),
    ("", "Sigmoid"): _plain(_sigmoid),
    ("", "Softplus"): lambda node, x: np.logaddexp(x.dtype.type(0), x),
    ("", "Sqrt"): _plain(np.sqrt),
    ("", "Sub"): _plain(np.subtract),
    ("", "Sum"): _fold(np.add),
    ("", "Swish"): lambda node, x: x * _sigmoid(attribute(node, "alpha", 1.0) * x),
    ("", "Tanh"): _plain(np.tanh),
    ("", "Where"): _plain(np.where),
    (_MS, "BiasGelu"): lambda node, x, bias: _gelu(x + bias, approximate=False),
    (_MS, "FastGelu"): lambda node, x, bias=None: _gelu(x if bias is None else x + bias, approximate=True),
    (_MS, "Gelu"): lambda node, x: _gelu(x, approximate=False),
    (_MS, "QuickGelu"): lambda node, x: x * _sigmoid(attribute(node, "alpha", 1.702) * x),
}
