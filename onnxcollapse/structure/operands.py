# SPDX-License-Identifier: Apache-2.0
"""What an op's operands must be for it to be a Linear, and the reason when they are not."""

from __future__ import annotations

import onnx_ir as ir

from onnxcollapse.structure.channels import lies_along
from onnxcollapse.structure.constants import (
    Folded,
    attribute,
    folded,
    is_op,
    is_overridable,
    through_identity,
)
from onnxcollapse.structure.refusal import RefusedError

FLOATING = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
_QUANTISED_STORAGE = frozenset(
    dtype for dtype in ir.DataType if dtype.is_floating_point() | dtype.is_integer() and dtype.bitwidth <= 8
)
# Ops that multiply by a weight but are not read: rewriting them needs their own packing or layout.
QUANTISED = frozenset({
    "ConvInteger", "DynamicQuantizeLSTM", "DynamicQuantizeMatMul", "GemmFloat8", "MatMulBnb4", "MatMulFpQ4",
    "MatMulInteger", "MatMulInteger16", "MatMulIntegerToFloat", "MatMulNBits", "QGemm", "QLinearConv",
    "QLinearMatMul", "QMoE",
})  # fmt: skip
FUSED = frozenset({
    "FusedConv", "FusedGemm", "FusedMatMul", "FusedMatMulActivation", "GemmFastGelu", "MoE", "SparseToDenseMatMul",
    "TransposeMatMul",
})  # fmt: skip


def not_read(node: ir.Node) -> RefusedError:
    """Why an op that is neither MatMul, Gemm nor Conv is no Linear."""
    if node.op_type in QUANTISED:
        return RefusedError(f"weight is quantised ({node.op_type})")
    if node.op_type in FUSED and not is_op(node, node.op_type):
        reason = f"{node.op_type} is a fused {node.domain} op; export without runtime optimisation"
        return RefusedError(reason, candidate=any(folded(value) for value in node.inputs[:2]))
    return RefusedError(f"{node.op_type} is not a Linear", candidate=False)


def check_frame(node: ir.Node) -> None:
    """Refuse attributes bound by a function's caller and broadcasting rules of opset 6 and below."""
    bound = [name for name, attr in node.attributes.items() if attr.is_ref()]
    if bound:
        raise RefusedError(f"attribute {bound[0]} is set by the function's caller")
    opset = node.graph.opset_imports.get("") if node.graph is not None else None
    if opset is not None and opset < 7:
        raise RefusedError(f"opset {opset} broadcasts by other rules; convert the model to opset 7 or later")


def check_pointwise_conv(node: ir.Node, kernel: tuple[int, ...]) -> None:
    """Refuse a Conv that mixes positions or splits channels."""
    if any(size != 1 for size in kernel):
        raise RefusedError(f"kernel is {'x'.join(map(str, kernel))}, not 1x1", candidate=False)
    if attribute(node, "group", 1) != 1:
        raise RefusedError(f"Conv has {attribute(node, 'group')} groups", candidate=False)
    if any(stride != 1 for stride in attribute(node, "strides", ())):
        raise RefusedError(f"Conv has strides {list(attribute(node, 'strides'))}", candidate=False)
    if any(attribute(node, "pads", ())):
        raise RefusedError(f"Conv pads by {list(attribute(node, 'pads'))}", candidate=False)


def check_bias(node: ir.Node, bias_rank: int, channels: int) -> ir.Value | None:
    """The built-in bias, operand 2; refused if it is no constant or differs between rows."""
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is None:
        return None
    known = folded(bias)
    if known is None:
        source = through_identity(bias)
        why = (
            "overridable: it is also a graph input"
            if source and is_overridable(source)
            else "computed at run time"
        )
        raise RefusedError(f"bias {bias.name} is {why}")
    if not lies_along(known.shape, -1, bias_rank, channels):
        raise RefusedError(f"bias {bias.name} of shape {known.shape} differs between rows")
    return bias


def operand(value: ir.Value | None) -> ir.Value:
    """`value`, which the op requires; refused if it is left out."""
    if value is None:
        raise RefusedError("an operand is missing")
    return value


def weight_operand(value: ir.Value | None, data: ir.Value | None) -> tuple[ir.Value, Folded]:
    """The constant weight at operand `value` beside the operand `data`, or the reason why it is none."""
    known = folded(value)
    if value is None or known is None:
        raise no_weight(value, data)
    if folded(data) is not None:
        raise RefusedError("both operands are constant", candidate=False)
    check_weight(known)
    return value, known


def check_weight(known: Folded) -> None:
    """Refuse weights stored in 8 bits or fewer, not floating, or empty."""
    if known.storage in _QUANTISED_STORAGE:
        raise RefusedError(f"weight is quantised ({known.storage.name.lower()} behind a Cast)")
    if known.dtype not in FLOATING:
        raise RefusedError(f"weight is {known.dtype.name.lower()}", candidate=False)
    if 0 in known.shape:
        raise RefusedError("weight is empty")


def no_weight(*operands: ir.Value | None) -> RefusedError:
    """Why none of `operands` is a constant weight, the most telling reason first."""
    reasons = [
        reason for operand in operands if operand is not None and (reason := _why_not_constant(operand))
    ]
    if reasons:
        return RefusedError(reasons[0])
    return RefusedError("no operand is a constant weight", candidate=False)


def _why_not_constant(value: ir.Value, limit: int = 16) -> str | None:
    """A reason if `value` is made of constants, overridable ones included; None if it is data."""
    stack, seen, leaves, overridable = [value], set[ir.Node](), [], None
    while stack:
        current = stack.pop()
        known, node = folded(current), current.producer()
        if known is not None:
            leaves.append(known.storage)
        elif is_overridable(current):
            overridable = current.name
        elif node is None or len(seen) >= limit:
            return None
        elif node not in seen:
            seen.add(node)
            stack += [operand for operand in node.inputs if operand is not None]
    return _constant_expression({node.op_type for node in seen}, leaves, overridable)


def _constant_expression(ops: set[str], leaves: list[ir.DataType], overridable: str | None) -> str | None:
    """What a weight that is no plain constant is, from the ops and stored types behind it."""
    listed = ", ".join(sorted(ops))
    if overridable is not None:
        return f"weight {overridable} is overridable: it is also a graph input"
    if "DequantizeLinear" in ops:
        return "weight is quantised (DequantizeLinear)"
    stored = next((leaf for leaf in leaves if leaf in _QUANTISED_STORAGE), None)
    if stored is not None:
        return f"weight is quantised ({stored.name.lower()} behind {listed})"
    return f"weight is computed at run time ({listed})" if ops else None
