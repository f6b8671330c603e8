# SPDX-License-Identifier: Apache-2.0
"""Reading constants: initializers, `Constant` nodes, and cheap expressions of them.

A graph input with a default initializer is not a constant: the caller may override it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from onnxcollapse.model import weights

Array = np.ndarray[Any, np.dtype[Any]]

_STANDARD = ("", "ai.onnx")
_SUBBYTE_OR_FP8 = frozenset(
    dtype
    for dtype in ir.DataType
    if dtype.name.startswith(("FLOAT8", "FLOAT4", "FLOAT6", "INT4", "UINT4", "INT2", "UINT2"))
)


@dataclass(frozen=True, eq=False)
class Folded:
    """A constant expression: its type and shape at once, its values only when asked for.

    Attributes:
        dtype: Element type of the expression.
        shape: Its shape.
        root: The initializer or `Constant` output the values come from; None for a `ConstantOfShape`.
        storage: Element type of the root as stored (int8 behind a `Cast` shows here).
        load: Computes the values; nothing is kept.
        tensor: The root's tensor.
    """

    dtype: ir.DataType
    shape: tuple[int, ...]
    root: ir.Value | None
    storage: ir.DataType
    load: Callable[[], Array]
    tensor: ir.TensorProtocol | None = None

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    def wide(self) -> Array:
        """A float64 copy of the values; the mapping that they were read through is dropped."""
        copy = self.load().astype(np.float64)
        if self.tensor is not None:
            weights.release(self.tensor)
        return copy

    def take(self, indices: Array, axis: int) -> Array:
        """A copy of some entries along `axis`, bit for bit; the mapping that they were read through is dropped."""
        copy = np.take(self.load(), indices, axis)
        if self.tensor is not None:
            weights.release(self.tensor)
        return copy

    def derived(
        self, shape: tuple[int, ...], load: Callable[[], Array], dtype: ir.DataType | None = None
    ) -> Folded:
        """Another expression of the same root."""
        return replace(self, dtype=dtype or self.dtype, shape=shape, load=load)


def is_op(node: ir.Node | None, *op_types: str) -> bool:
    """Whether `node` is one of `op_types` of the standard domain."""
    return node is not None and node.domain in _STANDARD and node.op_type in op_types


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """Value of attribute `name`; `default` if it is absent or bound by a function call."""
    attr = node.attributes.get(name)
    if attr is None or attr.is_ref():
        return default
    return attr.value


def is_overridable(value: ir.Value) -> bool:
    """Whether `value` is a graph input with a default: a constant only as long as nobody feeds it."""
    return value.is_initializer() and value.is_graph_input()


def through_identity(value: ir.Value | None) -> ir.Value | None:
    """The value behind any chain of `Identity` nodes, `value` itself if there is none."""
    while value is not None and is_op(producer := value.producer(), "Identity"):
        assert producer is not None  # noqa: S101 (for the type checker; is_op refuses None)
        value = producer.inputs[0]
    return value


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor that `value` always has, or None if it is not constant.

    Initializers (unless overridable), `Constant` nodes in all attribute forms, either through `Identity`.
    """
    value = through_identity(value)
    if value is None or value.is_graph_input():
        return None
    if value.is_initializer():
        return value.const_value
    node = value.producer()
    return _constant_node(node) if node is not None and is_op(node, "Constant") else None


def constant_array(value: ir.Value | None) -> Array | None:
    """The array that `value` always has, evaluating cheap expressions of constants; None if there is none.

    Evaluates `Cast`, `Transpose`, `Reshape`, `Flatten`, `Squeeze`, `Unsqueeze`, `Expand` and
    `ConstantOfShape`. The array may be a read-only view of a mapped file: do not write to it.
    """
    known = folded(value)
    return None if known is None else known.load()


def folded(value: ir.Value | None) -> Folded | None:
    """Type, shape and loader of a constant expression (see `constant_array`) without reading weights."""
    value = through_identity(value)
    if value is None:
        return None
    tensor = constant(value)
    if tensor is not None:
        return _leaf(value, tensor)
    node = value.producer()
    if node is None or node.domain not in _STANDARD or value.is_graph_input():
        return None
    fold = _FOLDS.get(node.op_type)
    return None if fold is None else fold(node)


def is_shared(value: ir.Value, owners: frozenset[ir.Node] | set[ir.Node]) -> bool:
    """Whether the constant behind `value` is read by any node outside `owners`, or is a graph output.

    Looks through `Identity`, `Cast`, `Transpose`, ... nodes between the stored tensor and its readers.
    """
    known = folded(value)
    root = value if known is None or known.root is None else known.root
    return root.is_graph_output() or any(user not in owners for user in readers(root))


def readers(root: ir.Value) -> Iterator[ir.Node]:
    """Nodes that read the constant `root`, in any graph, seen through nodes that only reshape or cast it.

    Such a node that is itself a graph output's producer counts as a reader.
    """
    for node in root.consumers():
        output = node.outputs[0] if node.outputs else None
        passes_on = node.op_type == "Identity" or node.op_type in _FOLDS
        if passes_on and is_op(node, node.op_type) and output is not None and not output.is_graph_output():
            yield from readers(output)
        else:
            yield node


def _leaf(value: ir.Value, tensor: ir.TensorProtocol) -> Folded:
    shape = tuple(int(dim) for dim in tensor.shape)  # type: ignore[arg-type]
    return Folded(tensor.dtype, shape, value, tensor.dtype, lambda: weights.array(tensor), tensor)


def _constant_node(node: ir.Node) -> ir.TensorProtocol | None:
    for name, attr in node.attributes.items():
        if attr.is_ref():
            return None
        if name == "value":
            tensor: ir.TensorProtocol = (
                attr.value
            )  # as_tensor() looks at every member of the protocol each time
            return tensor if attr.type == ir.AttributeType.TENSOR else None
        if name in ("value_float", "value_floats"):
            return ir.tensor(np.asarray(attr.value, dtype=np.float32))
        if name in ("value_int", "value_ints"):
            return ir.tensor(np.asarray(attr.value, dtype=np.int64))
        if name == "value_string":
            return ir.tensor([attr.as_string()])
        if name == "value_strings":
            return ir.tensor(list(attr.as_strings()))
    return None


def integers(node: ir.Node, index: int, name: str = "axes") -> list[int] | None:
    """A small list of integers given as attribute `name` (older opsets) or as constant input `index`."""
    given = attribute(node, name)
    if given is not None:
        return [int(x) for x in given]
    array = constant_array(node.inputs[index]) if len(node.inputs) > index else None
    return None if array is None else [int(x) for x in array.reshape(-1)]


def _reshaped(inner: Folded, shape: tuple[int, ...]) -> Folded | None:
    if int(np.prod(shape, dtype=np.int64)) != inner.size:
        return None
    return inner.derived(shape, lambda: inner.load().reshape(shape))


def _fold_cast(node: ir.Node) -> Folded | None:
    inner = folded(node.inputs[0])
    to = attribute(node, "to")
    if inner is None or to is None:
        return None
    dtype = ir.DataType(int(to))
    if dtype.is_string() or inner.dtype.is_string() or dtype in _SUBBYTE_OR_FP8:
        return None  # text, and casts that saturate or round in ways the runtime decides
    target = dtype.numpy()
    return inner.derived(inner.shape, lambda: inner.load().astype(target), dtype)


def _fold_transpose(node: ir.Node) -> Folded | None:
    inner = folded(node.inputs[0])
    if inner is None:
        return None
    perm = tuple(attribute(node, "perm") or reversed(range(len(inner.shape))))
    shape = tuple(inner.shape[axis] for axis in perm)
    return inner.derived(shape, lambda: inner.load().transpose(perm))


def _fold_reshape(node: ir.Node) -> Folded | None:
    inner = folded(node.inputs[0])
    target = integers(node, 1, "shape")
    if inner is None or target is None:
        return None
    if not attribute(node, "allowzero", 0):
        target = [
            inner.shape[i] if dim == 0 and i < len(inner.shape) else dim for i, dim in enumerate(target)
        ]
    if target.count(-1) == 1:
        rest = -int(np.prod(target, dtype=np.int64))
        target = [inner.size // rest if dim == -1 and rest else dim for dim in target]
    return _reshaped(inner, tuple(target)) if min(target, default=0) >= 0 else None


def _fold_flatten(node: ir.Node) -> Folded | None:
    inner = folded(node.inputs[0])
    if inner is None:
        return None
    axis = int(attribute(node, "axis", 1))
    axis += len(inner.shape) if axis < 0 else 0
    rows = int(np.prod(inner.shape[:axis], dtype=np.int64))
    return _reshaped(inner, (rows, int(np.prod(inner.shape[axis:], dtype=np.int64))))


def _fold_squeeze(node: ir.Node) -> Folded | None:
    inner = folded(node.inputs[0])
    if inner is None:
        return None
    rank = len(inner.shape)
    axes = integers(node, 1)
    if axes is None and len(node.inputs) > 1 and node.inputs[1] is not None:
        return None
    drop = (
        {i for i, dim in enumerate(inner.shape) if dim == 1}
        if axes is None
        else {a % max(rank, 1) for a in axes}
    )
    return _reshaped(inner, tuple(dim for i, dim in enumerate(inner.shape) if i not in drop))


def _fold_unsqueeze(node: ir.Node) -> Folded | None:
    inner = folded(node.inputs[0])
    axes = integers(node, 1)
    if inner is None or axes is None:
        return None
    rank = len(inner.shape) + len(axes)
    added = {axis % rank for axis in axes}
    rest = iter(inner.shape)
    return _reshaped(inner, tuple(1 if i in added else next(rest) for i in range(rank)))


def _fold_expand(node: ir.Node) -> Folded | None:
    inner = folded(node.inputs[0])
    target = integers(node, 1, "shape")
    if inner is None or target is None:
        return None
    try:
        shape = np.broadcast_shapes(inner.shape, tuple(target))
    except ValueError:
        return None
    return inner.derived(shape, lambda: np.broadcast_to(inner.load(), shape))


def _fold_constant_of_shape(node: ir.Node) -> Folded | None:
    dims = constant_array(node.inputs[0])
    if dims is None:
        return None
    shape = tuple(int(dim) for dim in dims.reshape(-1))
    tensor = attribute(node, "value")
    fill = np.zeros((), np.float32) if tensor is None else tensor.numpy().reshape(())
    dtype = ir.DataType.FLOAT if tensor is None else tensor.dtype
    return Folded(dtype, shape, None, dtype, lambda: np.broadcast_to(fill, shape))


_FOLDS: dict[str, Callable[[ir.Node], Folded | None]] = {
    "Cast": _fold_cast,
    "ConstantOfShape": _fold_constant_of_shape,
    "Expand": _fold_expand,
    "Flatten": _fold_flatten,
    "Reshape": _fold_reshape,
    "Squeeze": _fold_squeeze,
    "Transpose": _fold_transpose,
    "Unsqueeze": _fold_unsqueeze,
}
