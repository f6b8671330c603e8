# SPDX-License-Identifier: Apache-2.0
"""Reads the negative slope of PReLU-like operators, whatever spells them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxcollapse.structure.constants import constant_array


def prelu_slope(node: ir.Node) -> np.ndarray | None:
    """Returns alpha of f(z) = max(z, 0) + alpha min(z, 0), or None when the node is no such function.

    Args:
        node: Any node.

    Returns:
        float64, scalar or [C] along the channel axis: PRelu's constant slope in any of its shapes ([C],
        [C, 1, 1], [1, C], scalar), LeakyRelu's attribute, 0 for Relu. None for other operators and for slopes that
        are computed at run time or vary along more than one axis.
    """
    if node.domain not in ("", "ai.onnx"):
        return None
    if node.op_type == "Relu":
        return np.zeros(())
    if node.op_type == "LeakyRelu":
        alpha = node.attributes.get("alpha")
        return np.asarray(0.01 if alpha is None else alpha.as_float(), np.float64)
    if node.op_type != "PRelu":
        return None
    slope = constant_array(node.inputs[1])
    if slope is None:
        return None
    slope = np.asarray(slope, np.float64)
    if slope.size == 1:
        return slope.reshape(())
    if max(slope.shape) != slope.size:
        return None
    return slope.reshape(-1)
