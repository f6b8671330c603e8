# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of one run: matrix products, convolutions and recurrent layers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from math import prod
from typing import TYPE_CHECKING, TypeVar, cast

import onnx
import onnx.inliner

from onnxcollapse.errors import ModelError
from onnxcollapse.model import carry, skeleton
from onnxcollapse.model.shapes import infer

if TYPE_CHECKING:
    from onnxcollapse.model.model import Model

logger = logging.getLogger(__name__)

T = TypeVar("T")
Shape = tuple[int, ...]
_STANDARD = ("", "ai.onnx")


def flops(
    model: Model, dims: Mapping[str, int] | None = None, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> int:
    """Twice the multiply-accumulates of one run.

    MatMul-like nodes, Gemm, Conv, ConvTranspose, LSTM, GRU, RNN, Einsum and attention nodes count; the rest
    is taken as free. The body of a Loop or Scan counts once, the larger branch of an If, a function once for
    each call. Where a shape cannot be inferred, a product counts as if one row went through its weight.

    Args:
        model: The model; its weights are not read.
        dims: Sizes of dynamic axes, by symbol.
        shapes: Shapes of inputs, by name; they come before `dims`. What neither says is 1.

    Raises:
        ModelError: `shapes` names an input that there is not, or gives it another rank.
    """
    return _count(concrete(model, dims, shapes), {})


def concrete(
    model: Model, dims: Mapping[str, int] | None = None, shapes: Mapping[str, tuple[int, ...]] | None = None
) -> onnx.GraphProto:
    """The main graph without weights, functions inlined, every shape as large as inputs of given shapes make it.

    Args:
        model: The model; its weights are not read.
        dims: Sizes of dynamic axes, by symbol.
        shapes: Shapes of inputs, by name; they come before `dims`. What neither says is 1.

    Raises:
        ModelError: `shapes` names an input that there is not, or gives it another rank.
    """
    proto = _inlined(skeleton.for_inference(model.ir))
    _bind_inputs(proto.graph, dict(dims or {}), dict(shapes or {}))
    for graph in carry.proto_graphs(proto):
        if isinstance(graph, onnx.GraphProto):
            _forget_shapes(graph, outputs=graph is not proto.graph)
    return infer(proto).graph


def _inlined(proto: onnx.ModelProto) -> onnx.ModelProto:
    if not proto.functions:
        return proto
    try:
        return onnx.inliner.inline_local_functions(proto)
    except (RuntimeError, ValueError) as error:
        logger.debug("functions are not counted, because they cannot be inlined: %s", error)
        return proto


def _bind_inputs(graph: onnx.GraphProto, dims: dict[str, int], shapes: dict[str, Shape]) -> None:
    """Make every input's shape concrete; what settles a symbol once settles it for all."""
    unknown = set(shapes) - {info.name for info in graph.input}
    if unknown:
        raise ModelError(f"the model has no input {sorted(unknown)[0]!r}; its inputs are "
                         f"{[info.name for info in graph.input]}")  # fmt: skip
    for info in graph.input:
        if info.name in shapes and info.type.HasField("tensor_type"):
            _give_shape(info, shapes[info.name], dims)
    for info in graph.input:
        for dim in info.type.tensor_type.shape.dim if info.type.HasField("tensor_type") else ():
            if not dim.HasField("dim_value"):
                dim.dim_value = dims.get(dim.dim_param, 1)


def _give_shape(info: onnx.ValueInfoProto, shape: Shape, dims: dict[str, int]) -> None:
    declared = info.type.tensor_type
    if not declared.HasField("shape"):
        declared.shape.dim.extend(onnx.TensorShapeProto.Dimension() for _ in shape)
    if len(declared.shape.dim) != len(shape):
        raise ModelError(
            f"input {info.name!r} has rank {len(declared.shape.dim)}, but the shape given is {shape}"
        )
    for dim, size in zip(declared.shape.dim, shape, strict=True):
        if dim.dim_param:
            dims.setdefault(dim.dim_param, size)
        dim.dim_value = size


def _forget_shapes(graph: onnx.GraphProto, *, outputs: bool) -> None:
    """Drop declared shapes that inference finds again, because dynamic ones would stand in its way.

    Outputs of operators that inference does not know keep theirs.
    """
    foreign = {name for node in graph.node if node.domain not in _STANDARD for name in node.output}
    kept = [info for info in graph.value_info if info.name in foreign]
    graph.ClearField("value_info")
    graph.value_info.extend(kept)
    for info in graph.output:
        if info.name not in foreign and info.type.HasField("tensor_type"):
            info.type.tensor_type.ClearField("shape")


def _count(graph: onnx.GraphProto, outer: Mapping[str, Shape]) -> int:
    shapes = dict(outer)
    for info in [*graph.input, *graph.output, *graph.value_info]:
        if info.type.tensor_type.HasField("shape"):
            shapes[info.name] = tuple(map(_extent, info.type.tensor_type.shape.dim))
    for tensor in graph.initializer:
        shapes[tensor.name] = tuple(tensor.dims)
    total = 0
    for node in graph.node:
        total += _count_node(_Call(node, shapes))
        inner = [_count(body, shapes) for body in _bodies(node)]
        total += max(inner, default=0) if node.op_type == "If" else sum(inner)
    return total


def _extent(dim: onnx.TensorShapeProto.Dimension) -> int:
    """An axis that nothing settles counts as 1, and so does one that such axes make negative."""
    return dim.dim_value if dim.HasField("dim_value") and dim.dim_value >= 0 else 1


def _bodies(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    bodies = []
    for attribute in node.attribute:
        bodies += [attribute.g] if attribute.HasField("g") else list(attribute.graphs)
    return bodies


def _count_node(call: _Call) -> int:
    counter = _COUNTERS.get(call.node.op_type)
    if counter is None:
        return 0
    try:
        return counter(call)
    except (IndexError, TypeError, ValueError):  # a damaged or foreign node
        logger.debug("node %s (%s) is not counted: unexpected shapes", call.node.name, call.node.op_type)
        return 0


class _Call:
    """A node with the shapes of what it reads and writes."""

    def __init__(self, node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> None:
        self.node = node
        self._shapes = shapes

    def input(self, index: int) -> Shape | None:
        names = self.node.input
        return self._shapes.get(names[index]) if index < len(names) and names[index] else None

    def output(self, index: int = 0) -> Shape | None:
        return self._shapes.get(self.node.output[index])

    def attribute(self, name: str, default: T) -> T:
        for attribute in self.node.attribute:
            if attribute.name == name:
                return cast(T, onnx.helper.get_attribute_value(attribute))
        return default


def _product(a: Shape | None, b: Shape | None) -> int:
    """A [..., m, k] times B [..., k, n]; with one unknown, one row or column through the other."""
    if a is None or b is None:
        return 2 * prod(a or b or (0,))
    a = (1, *a) if len(a) == 1 else a
    b = (*b, 1) if len(b) == 1 else b
    batch = _broadcast(a[:-2], b[:-2])
    return 2 * prod(batch) * a[-2] * a[-1] * b[-1]


def _broadcast(a: Shape, b: Shape) -> Shape:
    rank = max(len(a), len(b))
    a, b = (1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b
    return tuple(y if x == 1 else x for x, y in zip(a, b, strict=True))


def _swap(shape: Shape | None, flag: int) -> Shape | None:
    return (*shape[:-2], shape[-1], shape[-2]) if flag and shape is not None and len(shape) > 1 else shape


def _matmul(left: int, right: int) -> Callable[[_Call], int]:
    def count(call: _Call) -> int:
        a = _swap(call.input(left), call.attribute("transA", 0))
        b = _swap(call.input(right), call.attribute("transB", 0))
        return _product(a, b)

    return count


def _nbits(call: _Call) -> int:
    """A quantised weight of K x N, which its attributes say because its shape is packed."""
    rows = call.input(0)
    return 2 * prod(rows[:-1] if rows else ()) * call.attribute("K", 0) * call.attribute("N", 0)


def _conv(weight: int) -> Callable[[_Call], int]:
    def count(call: _Call) -> int:
        kernel, out = call.input(weight), call.output()
        if kernel is None:
            return 0
        return 2 * prod(out if out is not None else kernel[:1]) * prod(kernel[1:])

    return count


def _conv_transpose(call: _Call) -> int:
    x, kernel = call.input(0), call.input(1)
    if kernel is None:
        return 0
    return 2 * prod(x if x is not None else kernel[:1]) * prod(kernel[1:])


def _recurrent(call: _Call) -> int:
    x, w, r = call.input(0), call.input(1), call.input(2)
    steps = prod(x[:2]) if x is not None else 1  # sequence and batch, in either layout
    return 2 * steps * (prod(w or (0,)) + prod(r or (0,)))


def _einsum(call: _Call) -> int:
    """Every combination of indices is one multiplication for each operand behind the first."""
    equation = call.attribute("equation", b"").decode().replace(" ", "")
    terms = equation.split("->")[0].split(",")
    operands = [call.input(i) for i in range(len(terms))]
    if len(terms) < 2:
        return 0
    sizes: dict[str, int] = {}
    for term, shape in zip(terms, operands, strict=True):
        if shape is None:
            return 2 * max((prod(s) for s in operands if s is not None), default=0)
        for label, size in zip(_labels(term, len(shape)), shape, strict=True):
            sizes[label] = max(sizes.get(label, 1), size)
    return 2 * (len(terms) - 1) * prod(sizes.values())


def _labels(term: str, rank: int) -> list[str]:
    """The labels of a term, those that the dots stand for numbered from the right."""
    if "..." not in term:
        return list(term)
    before, after = term.split("...")
    hidden = rank - len(before) - len(after)
    return [*before, *(f".{hidden - i}" for i in range(hidden)), *after]


def _scores(q: Shape | None, keys: int, heads: int, value_width: int) -> int:
    """Q K' and the weighting of V: q is [batch, heads, rows, width] or [batch, rows, heads * width]."""
    if q is None:
        return 0
    rows, width = (q[0] * q[2], q[1] * q[3]) if len(q) == 4 else (q[0] * q[1], q[2])
    return 2 * rows * keys * (width + heads * value_width)


def _attention(call: _Call) -> int:
    """Attention on Q, K, V, mask and past key; the contrib operator of that name projects as well."""
    if call.node.domain not in _STANDARD:
        return _fused_attention(call)
    q, k, v, past = call.input(0), call.input(1), call.input(2), call.input(4)
    if q is None or k is None or v is None:
        return 0
    heads = q[1] if len(q) == 4 else call.attribute("q_num_heads", 1)
    value_width = v[3] if len(v) == 4 else v[2] // max(call.attribute("kv_num_heads", 1), 1)
    return _scores(q, k[-2] + (past[2] if past else 0), heads, value_width)


def _fused_attention(call: _Call) -> int:
    x, weight = call.input(0), call.input(1)
    if x is None or weight is None:
        return 2 * prod(weight or (0,))
    past = call.input(4)
    value = call.attribute("qkv_hidden_sizes", [weight[1] // 3])[-1]
    q_width = (weight[1] - value) // 2
    return _product(x, weight) + _scores((x[0], x[1], q_width), x[1] + (past[3] if past else 0), 1, value)


def _multi_head(call: _Call) -> int:
    """MultiHeadAttention: Q [batch, rows, width], K and V alike or [batch, heads, rows, width]."""
    q, k, v = call.input(0), call.input(1), call.input(2)
    if q is None or len(q) != 3:
        return 0
    k = k if k is not None else q
    past = call.input(6)
    keys = (k[2] if len(k) == 4 else k[1]) + (past[2] if past else 0)
    value = v if v is not None else q
    return _scores(q, keys, 1, value[1] * value[3] if len(value) == 4 else value[-1])


def _grouped(call: _Call) -> int:
    """GroupQueryAttention: every query head does as much work as in plain attention."""
    q, past, heads = call.input(0), call.input(3), call.attribute("num_heads", 1)
    if q is None:
        return 0
    groups = call.attribute("kv_num_heads", heads)
    width = (
        q[2] // heads if call.input(1) is not None else q[2] // (heads + 2 * groups)
    )  # else Q, K, V packed
    return _scores((q[0], q[1], heads * width), q[1] + (past[2] if past else 0), heads, width)


_COUNTERS: dict[str, Callable[[_Call], int]] = {
    **dict.fromkeys(
        ["MatMul", "MatMulInteger", "FusedMatMul", "TransposeMatMul", "GemmFastGelu"], _matmul(0, 1)
    ),
    **dict.fromkeys(["Gemm", "FusedGemm", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"], _matmul(0, 1)),
    **dict.fromkeys(["QLinearMatMul", "QGemm"], _matmul(0, 3)),
    **dict.fromkeys(["MatMulNBits", "MatMulBnb4"], _nbits),
    **dict.fromkeys(["Conv", "ConvInteger", "FusedConv", "DeformConv"], _conv(1)),
    "QLinearConv": _conv(3),
    "ConvTranspose": _conv_transpose,
    **dict.fromkeys(["LSTM", "GRU", "RNN"], _recurrent),
    "Einsum": _einsum,
    **dict.fromkeys(["Attention", "QAttention"], _attention),
    "MultiHeadAttention": _multi_head,
    "GroupQueryAttention": _grouped,
}
