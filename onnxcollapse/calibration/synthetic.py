# SPDX-License-Identifier: Apache-2.0
"""random:N: numbers of the right shape. They exercise a model and say nothing about its accuracy."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxcollapse.calibration import filling
from onnxcollapse.calibration.data import Chunk
from onnxcollapse.calibration.signature import data_signature
from onnxcollapse.errors import DataError
from onnxcollapse.model.model import Model, TensorSpec

LENGTH = 16
"""What a free dimension becomes; equal for all, as inputs often share them."""

FLOAT_LENGTHS = {2: 512, 4: 64}
"""The same for floating-point inputs of these ranks: signals [B, time] and images [B, C, H, W]."""

LARGEST_ID = 1000


def read(count: str, model: Model, seed: int) -> list[Chunk]:
    """Draws samples from the model's signature.

    Floats are standard normal; integers are small ids that fit the embedding they index, 0 or 1 where none is
    found. Masks, positions and caches are filled as for any data.

    Args:
        count: N, as text.
        model: The model.
        seed: Of the draw; each input has a stream of its own.

    Returns:
        One chunk.

    Raises:
        DataError: N is no positive number, or an input has a type that cannot be drawn.
    """
    if not count.isdigit() or int(count) == 0:
        raise DataError(f"random:{count}: is no number of samples; give for example random:64")
    signature = data_signature(model)
    names = {spec.name for spec in signature.inputs}
    specs = [spec for spec in signature.inputs if not filling.is_fillable(spec, names, signature)]
    arrays = {}
    for name, shape in _shapes(specs, int(count)).items():
        spec = next(spec for spec in specs if spec.name == name)
        arrays[name] = draw(spec, shape, model, seed)
    return [Chunk.of(f"random:{count}", arrays)]


def draw(spec: TensorSpec, shape: tuple[int, ...], model: Model, seed: int) -> np.ndarray:
    """Numbers for one input, from a stream of its own.

    Raises:
        DataError: It has a type that cannot be drawn.
    """
    stream = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
    if spec.dtype is not None and spec.dtype.is_floating_point():
        return stream.standard_normal(shape).astype(spec.dtype.numpy())
    if spec.dtype == ir.DataType.BOOL:
        return stream.random(shape) < 0.5
    if spec.dtype is not None and spec.dtype.is_integer():
        return stream.integers(0, _largest_id(model.graph, spec.name), shape).astype(spec.dtype.numpy())
    raise DataError(f"random: input {spec.name!r} is {spec.dtype}, which cannot be drawn; give a .npz")


def _shapes(specs: Sequence[TensorSpec], rows: int) -> dict[str, tuple[int, ...]]:
    """Samples on axis 0; on a new axis 0 where the inputs do not share a batch axis (see layout)."""
    firsts = {spec.shape[0] if spec.shape else 0 for spec in specs}
    fixed = {dim for dim in firsts if isinstance(dim, int)}  # 0 for an input that is a scalar
    stacked = 0 in fixed or len(fixed) > 1 or (bool(fixed) and len(firsts) > 1)
    batch = {dim for dim in firsts if isinstance(dim, str)}
    shapes = {}
    for spec in specs:
        sizes = [length(spec, dim) for dim in spec.shape or ()]
        if stacked:
            single = [
                1 if dim in batch or (place == 0 and dim is None) else size
                for place, (dim, size) in enumerate(zip(spec.shape or (), sizes, strict=True))
            ]
            shapes[spec.name] = (rows, *single)
        else:
            shapes[spec.name] = (rows, *sizes[1:])
    return shapes


def length(spec: TensorSpec, dim: int | str | None) -> int:
    """What a dimension of an input becomes: itself where the model fixes it."""
    if isinstance(dim, int):
        return dim
    floating = spec.dtype is not None and spec.dtype.is_floating_point()
    return FLOAT_LENGTHS.get(len(spec.shape or ()), LENGTH) if floating else LENGTH


def _largest_id(graph: ir.Graph, name: str) -> int:
    """One more than the largest id that every Gather of this input can look up."""
    value = next(value for value in graph.inputs if value.name == name)
    sizes = [LARGEST_ID]
    for node, place in value.uses():
        table = node.inputs[0]
        if node.op_type == "Gather" and place == 1 and table is not None and table.shape is not None:
            size = table.shape[node.attributes.get_int("axis", 0)]
            sizes += [size] if isinstance(size, int) else []
    return min(sizes) if len(sizes) > 1 else 2
