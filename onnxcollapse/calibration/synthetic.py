# SPDX-License-Identifier: Apache-2.0
"""random:N: numbers of the right shape. They exercise a model and say nothing about its accuracy."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxcollapse.calibration import filling
from onnxcollapse.calibration.data import Chunk
from onnxcollapse.errors import DataError
from onnxcollapse.model.model import Model, TensorSpec

LENGTH = 16
"""What a free dimension becomes; equal for all, as inputs often share them."""

IMAGE = 64
"""The same for the height and width of an image."""

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
    signature = model.signature()
    names = {spec.name for spec in signature.inputs}
    specs = [spec for spec in signature.inputs if not filling.is_fillable(spec, names, signature)]
    arrays = {}
    for name, shape in _shapes(specs, int(count)).items():
        stream = np.random.default_rng([seed, zlib.crc32(name.encode())])
        spec = next(spec for spec in specs if spec.name == name)
        arrays[name] = _draw(spec, shape, model, stream)
    return [Chunk.of(f"random:{count}", arrays)]


def _draw(spec: TensorSpec, shape: tuple[int, ...], model: Model, stream: np.random.Generator) -> np.ndarray:
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
    fixed = {dim for dim in firsts if isinstance(dim, int)}
    stacked = 0 in fixed or len(fixed) > 1 or (bool(fixed) and len(firsts) > 1)
    batch = {dim for dim in firsts if isinstance(dim, str)}
    shapes = {}
    for spec in specs:
        dims = spec.shape or ()
        free = (
            IMAGE if len(dims) == 4 and spec.dtype is not None and spec.dtype.is_floating_point() else LENGTH
        )
        sizes = [
            d if isinstance(d, int) else 1 if stacked and (d in batch or not a) else free
            for a, d in enumerate(dims)
        ]
        shapes[spec.name] = (rows, *sizes) if stacked else (rows, *sizes[1:])
    return shapes


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
