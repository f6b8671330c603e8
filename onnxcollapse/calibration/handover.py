# SPDX-License-Identifier: Apache-2.0
"""Hands a model to ONNX Runtime: a skeleton of some kilobytes, and the mapped weights beside it, uncopied."""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
import onnx
import onnx_ir as ir

from onnxcollapse.calibration.providers import runtime
from onnxcollapse.errors import ModelError
from onnxcollapse.model import weights
from onnxcollapse.model.model import Model

if TYPE_CHECKING:
    from onnxruntime import OrtValue, SessionOptions

INDEX_BYTES = 1 << 20
"""Index tensors below this stay in the skeleton: they may be shapes, which ONNX Runtime's inference reads."""

_INDEX = {ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL}
_DIRECT = _INDEX | {
    ir.DataType.FLOAT,
    ir.DataType.DOUBLE,
    ir.DataType.FLOAT16,
    ir.DataType.INT8,
    ir.DataType.UINT8,
    ir.DataType.INT16,
    ir.DataType.UINT16,
    ir.DataType.UINT32,
    ir.DataType.UINT64,
}
_BY_BITS: dict[ir.DataType, type[np.unsignedinteger]] = {
    ir.DataType.BFLOAT16: np.uint16,
    ir.DataType.FLOAT8E4M3FN: np.uint8,
    ir.DataType.FLOAT8E4M3FNUZ: np.uint8,
    ir.DataType.FLOAT8E5M2: np.uint8,
    ir.DataType.FLOAT8E5M2FNUZ: np.uint8,
}

# Weights inside an .onnx lie at odd offsets. x86 reads them there; elsewhere an aligned copy is made.
_LAYOUT: list[Literal["C", "A"]] = ["C"] if platform.machine() in ("x86_64", "AMD64") else ["C", "A"]


@dataclass
class Handover:
    """A model as a session takes it.

    Attributes:
        skeleton: The serialised ModelProto, its large weights marked external.
        values: Name -> OrtValue over the mapped weight.
        arrays: The arrays behind `values`; ONNX Runtime borrows them, so they live as long as it.
        tensors: The weights handed over.
    """

    skeleton: bytes = b""
    values: dict[str, OrtValue] = field(default_factory=dict)
    arrays: list[np.ndarray] = field(default_factory=list)
    tensors: list[ir.TensorProtocol] = field(default_factory=list)

    def release(self) -> None:
        """Lets go of what only opening the session needed; pages of weights come back when they are read."""
        self.skeleton = b""
        for tensor in self.tensors:
            weights.release(tensor)

    def options(self) -> SessionOptions:
        """SessionOptions with the weights handed over."""
        options = runtime().SessionOptions()
        options.use_deterministic_compute = True
        if self.values:
            options.add_external_initializers(list(self.values), list(self.values.values()))
        return options


def hand_over(model: Model) -> Handover:
    """Serialises a model for a session.

    Large weights of the main graph are handed over by reference; sub-byte tensors, small index tensors
    and defaults of inputs are put back into the skeleton.

    Args:
        model: The model; it stays as it is.

    Returns:
        The skeleton and the weights.

    Raises:
        ModelError: What has to stay inside is above protobuf's 2 GB.
    """
    result = Handover()
    skeleton = model.skeleton()
    defaults = {value.name for value in model.graph.inputs if value.is_initializer()}
    inline = {}
    for name, tensor in skeleton.weights.items():
        if name in defaults or not _can_borrow(tensor):
            inline[name] = tensor
        else:
            result.values[name] = _borrow(tensor, result.arrays)
            result.tensors.append(tensor)
    for proto in skeleton.proto.graph.initializer:
        if proto.name in inline:
            _put_back(proto, inline[proto.name])
    try:
        result.skeleton = skeleton.proto.SerializeToString()
    except Exception as error:  # protobuf's EncodeError or ValueError, by version
        raise ModelError(
            f"model {model.graph.name!r} holds over 2 GB that ONNX Runtime cannot be handed in memory "
            f"({error}); store sub-byte weights as uint8"
        ) from error
    return result


def _can_borrow(tensor: ir.TensorProtocol) -> bool:
    if tensor.dtype in _INDEX:
        return tensor.nbytes >= INDEX_BYTES
    return tensor.dtype in _DIRECT or tensor.dtype in _BY_BITS


def _borrow(tensor: ir.TensorProtocol, arrays: list[np.ndarray]) -> OrtValue:
    array = np.require(weights.array(tensor), requirements=_LAYOUT)
    ort_value = runtime().OrtValue
    if tensor.dtype in _BY_BITS:
        array = array.view(_BY_BITS[tensor.dtype])
        arrays.append(array)
        return ort_value.ortvalue_from_numpy_with_onnx_type(array, int(tensor.dtype))
    arrays.append(array)
    return ort_value.ortvalue_from_numpy(array)


def _put_back(proto: onnx.TensorProto, tensor: ir.TensorProtocol) -> None:
    proto.ClearField("external_data")
    proto.data_location = onnx.TensorProto.DEFAULT
    proto.raw_data = tensor.tobytes()
