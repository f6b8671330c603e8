# SPDX-License-Identifier: Apache-2.0
"""Checks arrays against a model's inputs and says how samples lie in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxcollapse.calibration import filling
from onnxcollapse.errors import DataError
from onnxcollapse.model.model import Signature, TensorSpec


@dataclass(frozen=True)
class Layout:
    """How the samples of a set of arrays are cut into batches.

    Attributes:
        rows: Samples.
        batch: The batch size that the model or the arrays dictate; None when any will do.
        shared: Inputs fed whole with every batch.
        stacked: Inputs with one more axis than the model's: sample i is array[i].
    """

    rows: int
    batch: int | None = None
    shared: frozenset[str] = frozenset()
    stacked: frozenset[str] = frozenset()

    def slice(self, arrays: Mapping[str, np.ndarray], start: int, stop: int) -> dict[str, np.ndarray]:
        """The feeds for the samples start..stop; one sample only where inputs are stacked."""
        cut: dict[str, np.ndarray] = {}
        for name, array in arrays.items():
            if name in self.shared:
                cut[name] = array
            elif name in self.stacked:
                cut[name] = np.asarray(array[start])  # a scalar input stays an array
            else:
                cut[name] = array[start:stop]
        return cut


def check(
    arrays: Mapping[str, np.ndarray], signature: Signature, label: str, *, whole: bool = False
) -> Layout:
    """Checks arrays against the model and finds their layout.

    Args:
        arrays: By input name.
        signature: The model's inputs.
        label: What to call these arrays in errors.
        whole: They are one batch as it is, not samples on axis 0.

    Returns:
        The layout.

    Raises:
        DataError: A name, type, rank, dimension or value does not fit, or samples cannot be counted.
    """
    specs = {spec.name: spec for spec in [*signature.inputs, *signature.overridable]}
    unknown = [name for name in arrays if name not in specs]
    if unknown:
        names = ", ".join(spec.name for spec in signature.inputs)
        raise DataError(f"{label}: {unknown[0]!r} is no input of the model ({names}); rename or remove it")
    filling.check_missing(set(arrays), signature, label)
    for name, array in arrays.items():
        _check_values(array, specs[name], label)
    if whole:
        for name, array in arrays.items():
            _check_shape(name, array.shape, _dims(specs[name], array.ndim), label)
        return _whole_layout(arrays, specs)
    return _sample_layout(arrays, specs, label)


def _check_values(array: np.ndarray, spec: TensorSpec, label: str) -> None:
    where = f"{label}: input {spec.name!r}"
    if spec.kind != "tensor" or spec.dtype is None:
        raise DataError(
            f"{where} is a {spec.kind} of unknown elements, not an array; give the model a tensor input"
        )
    if spec.dtype == ir.DataType.STRING:
        if array.dtype.kind not in "USOT":
            raise DataError(f"{where} is {array.dtype}, the model wants strings; save an array of str")
        return
    if array.dtype.kind == "O":
        raise DataError(f"{where} is an array of Python objects; save it as {spec.dtype.numpy()}")
    if array.dtype != spec.dtype.numpy():
        wanted = spec.dtype.numpy()
        raise DataError(
            f"{where} is {array.dtype}, the model wants {wanted}; save it as array.astype('{wanted}')"
        )
    if array.dtype.kind in "fV" and not np.isfinite(array).all():
        bad = np.argwhere(~np.isfinite(array))[0].tolist()
        raise DataError(f"{where} holds NaN or infinity, first at {bad}; clean the data")


def _whole_layout(arrays: Mapping[str, np.ndarray], specs: Mapping[str, TensorSpec]) -> Layout:
    """One unit; its samples are counted where all inputs agree on axis 0."""
    lengths = {array.shape[0] for array in arrays.values() if array.ndim}
    rows = lengths.pop() if len(lengths) == 1 else 1
    free = all(not isinstance(dim, int) for n in arrays for dim in _dims(specs[n], arrays[n].ndim)[:1])
    return Layout(rows, None if free and all(a.ndim for a in arrays.values()) else rows)


def _sample_layout(arrays: Mapping[str, np.ndarray], specs: Mapping[str, TensorSpec], label: str) -> Layout:
    stacked, shared, lengths = set(), set(), {}
    for name, array in arrays.items():
        rank = len(_dims(specs[name], array.ndim))
        if array.ndim == rank + 1:
            stacked.add(name)
        elif rank == 0 and array.ndim == 0:
            shared.add(name)
            continue
        lengths[name] = array.shape[0] if array.ndim else 0
    rows = _rows(arrays, specs, lengths, shared, label)
    batched = [name for name in lengths if name not in stacked and name not in shared]
    for name, array in arrays.items():
        shape = array.shape[1:] if name in stacked else array.shape
        _check_shape(name, shape, _dims(specs[name], len(shape)), label, skip_first=name in batched)
    batch = 1 if stacked else _fixed_batch([specs[name] for name in batched], label)
    return Layout(rows, batch, frozenset(shared), frozenset(stacked))


def _rows(
    arrays: Mapping[str, np.ndarray],
    specs: Mapping[str, TensorSpec],
    lengths: dict[str, int],
    shared: set[str],
    label: str,
) -> int:
    """Counts the samples; an input of exactly the model's fixed shape may differ and is shared then."""
    per_sample = [n for n in lengths if arrays[n].shape != tuple(specs[n].shape or ()) or len(lengths) == 1]
    counts = {lengths[name] for name in per_sample or lengths}
    if len(counts) > 1:
        shown = ", ".join(f"{name} {lengths[name]}" for name in lengths)
        raise DataError(f"{label}: inputs disagree on the samples on axis 0 ({shown}); store as many of each")
    rows = counts.pop() if counts else 0
    if rows == 0:
        raise DataError(f"{label}: holds no samples; give at least 2")
    for name in [name for name in lengths if lengths[name] != rows]:
        shared.add(name)
    return rows


def _check_shape(
    name: str, shape: Sequence[int], dims: Sequence[int | str | None], label: str, skip_first: bool = False
) -> None:
    wanted = f"[{', '.join('?' if d is None else str(d) for d in dims)}]"
    if len(shape) != len(dims):
        raise DataError(
            f"{label}: input {name!r} has shape {list(shape)}, the model wants {wanted}; reshape the array"
        )
    for axis, (got, dim) in enumerate(zip(shape, dims, strict=True)):
        if isinstance(dim, int) and dim >= 0 and got != dim and not (skip_first and axis == 0):
            raise DataError(
                f"{label}: axis {axis} of input {name!r} is {got}, the model wants {dim} of {wanted}; "
                "give arrays of that shape"
            )


def _dims(spec: TensorSpec, rank: int) -> Sequence[int | str | None]:
    return (None,) * rank if spec.shape is None else spec.shape


def _fixed_batch(specs: Sequence[TensorSpec], label: str) -> int | None:
    fixed = {dim for spec in specs for dim in (spec.shape or ())[:1] if isinstance(dim, int)}
    if len(fixed) > 1:
        names = ", ".join(f"{spec.name} {list(spec.shape or ())}" for spec in specs)
        raise DataError(
            f"{label}: the model's inputs have different fixed sizes on axis 0 ({names}); "
            "give every input one more axis in front, one entry a sample"
        )
    return fixed.pop() if fixed else None
