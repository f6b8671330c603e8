# SPDX-License-Identifier: Apache-2.0
"""What a model is timed on: feeds of a wanted batch size and sequence length, drawn or cut from data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from onnxcollapse.calibration import filling, synthetic
from onnxcollapse.calibration.data import open_data
from onnxcollapse.calibration.masks import batch_rows, is_cache_name
from onnxcollapse.calibration.sessions import first_line
from onnxcollapse.calibration.signature import data_signature
from onnxcollapse.errors import ModelError, OnnxCollapseError, OptionError
from onnxcollapse.model.model import Model, Signature, TensorSpec


@dataclass(frozen=True)
class Sizes:
    """What free dimensions become.

    Attributes:
        batch: Samples; None for 1, or for what the model fixes.
        sequence: Tokens of a sample; None for 16, or for what the model fixes.
        others: Sizes of other free dimensions, by symbol or as `input.axis`.
    """

    batch: int | None = None
    sequence: int | None = None
    others: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """Feeds, and how much work they are.

    Attributes:
        feeds: Arrays for every input.
        batch: Samples.
        sequence: Tokens of each; None where there is no sequence.
        symbols: What free dimensions are, by symbol.
    """

    feeds: dict[str, np.ndarray]
    batch: int
    sequence: int | None
    symbols: dict[str, int] = field(default_factory=dict)


def make(
    model: Model, sizes: Sizes, data: str | Mapping[str, np.ndarray] | None = None, seed: int = 0
) -> Case:
    """Makes the feeds for a model.

    Args:
        model: The model.
        sizes: What its free dimensions become.
        data: Samples to use, in any form that open_data takes; None to draw them from the signature: floats are
            standard normal, token ids random, masks 1, positions counted, caches empty.
        seed: Of the draw.

    Raises:
        OptionError: A size is for no free dimension, or not what the model or the data fixes.
        DataError: Data cannot be read or does not fit, or an input cannot be drawn.
    """
    signature = data_signature(model)
    _check(signature, sizes)
    feeds = (
        _draw(model, signature, sizes, seed) if data is None else _read(model, signature, sizes, data, seed)
    )
    spec = _sequence_spec(signature)
    symbols = {
        dim: size
        for one in signature.inputs
        if one.name in feeds
        for dim, size in zip(one.shape or (), feeds[one.name].shape, strict=False)
        if isinstance(dim, str)
    }
    return Case(feeds, batch_rows(feeds), None if spec is None else feeds[spec.name].shape[1], symbols)


@contextlib.contextmanager
def explained(name: str, feeds: Mapping[str, np.ndarray]) -> Iterator[None]:
    """Says which model it is that fails, and on what.

    Raises:
        ModelError: In the place of ONNX Runtime's own errors.
    """
    try:
        yield
    except OnnxCollapseError:
        raise
    except Exception as error:  # ONNX Runtime has no common base class for its errors
        known = [f"{name} {list(array.shape)}" for name, array in feeds.items() if not is_cache_name(name)]
        shapes = ", ".join(known)
        raise ModelError(f"{name} cannot run on {shapes}: {first_line(error)}; give other sizes") from error


def _draw(model: Model, signature: Signature, sizes: Sizes, seed: int) -> dict[str, np.ndarray]:
    names = {spec.name for spec in signature.inputs}
    known = _known(signature, sizes)
    drawn = [spec for spec in signature.inputs if not filling.is_fillable(spec, names, signature)]
    feeds = {spec.name: synthetic.draw(spec, _shape(spec, known), model, seed) for spec in drawn}
    filled = filling.complete(feeds, signature)
    sized = [spec for spec in signature.inputs if spec not in drawn and _is_sized_cache(spec, sizes)]
    for spec in sized:
        shape = [_lookup(spec, axis, known, size) for axis, size in enumerate(filled[spec.name].shape)]
        feeds[spec.name] = np.zeros(shape, filled[spec.name].dtype)
    return filling.complete(feeds, signature) if sized else filled


def _read(
    model: Model, signature: Signature, sizes: Sizes, data: str | Mapping[str, np.ndarray], seed: int
) -> dict[str, np.ndarray]:
    """The first samples of the data, repeated where they are too few."""
    if sizes.others:
        raise OptionError(
            f"--size {next(iter(sizes.others))}: sizes come from the data; leave it or --calib out"
        )
    text = isinstance(data, str) and data.startswith("text:")
    wanted = sizes.batch or 1
    dataset = open_data(
        data, model, seed=seed, batch_size=wanted, window=sizes.sequence if text and sizes.sequence else None
    )
    feeds = max(dataset.batches("all", 4 * wanted), key=batch_rows)
    feeds = _cut(feeds, signature, sizes.sequence)
    rows = batch_rows(feeds)
    if sizes.batch is None or rows == sizes.batch:
        return feeds
    places = np.arange(sizes.batch) % rows
    free = {spec.name for spec in signature.inputs if spec.shape and not isinstance(spec.shape[0], int)}
    return {name: array[places] if name in free else array for name, array in feeds.items()}


def _cut(feeds: dict[str, np.ndarray], signature: Signature, sequence: int | None) -> dict[str, np.ndarray]:
    """Cuts every input along the axis of tokens."""
    spec = _sequence_spec(signature)
    if sequence is None or spec is None:
        return feeds
    length = feeds[spec.name].shape[1]
    if length < sequence:
        raise OptionError(f"--sequence {sequence}: the data has {length} tokens a sample; ask for no more")
    return {
        name: array[:, :sequence]
        if array.ndim >= 2 and array.shape[1] == length and not is_cache_name(name)
        else array
        for name, array in feeds.items()
    }


def _check(signature: Signature, sizes: Sizes) -> None:
    """Every size has to be one of a free dimension, or what the model fixes it to."""
    first = next((spec for spec in signature.inputs if spec.shape and not is_cache_name(spec.name)), None)
    if sizes.batch is not None and first is not None:
        _check_dim("--batch", sizes.batch, first, 0, sizes.others)
    spec = _sequence_spec(signature)
    if sizes.sequence is not None:
        if spec is None:
            raise OptionError(f"--sequence {sizes.sequence}: no input has an axis of tokens; leave it out")
        _check_dim("--sequence", sizes.sequence, spec, 1, sizes.others)
    free = {
        name
        for spec in signature.inputs
        for axis, dim in enumerate(spec.shape or ())
        if not isinstance(dim, int)
        for name in (f"{spec.name}.{axis}", dim)
        if name is not None
    }
    unknown = next((name for name in sizes.others if name not in free), None)
    if unknown is not None:
        names = ", ".join(sorted(free)) or "none"
        raise OptionError(f"--size {unknown}: no input has such a free dimension (there is {names})")


def _check_dim(option: str, size: int, spec: TensorSpec, axis: int, others: Mapping[str, int]) -> None:
    dim = (spec.shape or ())[axis]
    if isinstance(dim, str) and others.get(dim, size) != size:
        raise OptionError(f"{option} {size} and --size {dim}={others[dim]} name one axis; leave one out")
    if isinstance(dim, int) and dim != size:
        raise OptionError(
            f"{option} {size}: the model fixes axis {axis} of input {spec.name!r} to {dim}; leave {option} out"
        )


def _sequence_spec(signature: Signature) -> TensorSpec | None:
    """The input whose axis 1 counts tokens: that of tokens, else integers [B, S] or floats [B, S, d]."""
    name = filling.tokens_name(signature)
    for spec in signature.inputs:
        rank = len(spec.shape or ())
        if name is not None:
            if spec.name == name and rank >= 2:
                return spec
        elif not is_cache_name(spec.name) and spec.dtype is not None:
            if rank == 2 and spec.dtype.is_integer():
                return spec
            if rank == 3 and spec.dtype.is_floating_point() and not isinstance((spec.shape or ())[1], int):
                return spec
    return None


def _known(signature: Signature, sizes: Sizes) -> dict[str, int]:
    """Sizes by symbol, or by `input.axis` where there is none: what the user says of one has precedence."""
    known = dict(sizes.others)
    for spec in signature.inputs:
        if spec.shape and not is_cache_name(spec.name):
            _learn(known, spec, 0, sizes.batch or 1)
    sequence = _sequence_spec(signature)
    if sequence is not None and sizes.sequence is not None:
        _learn(known, sequence, 1, sizes.sequence)
    return known


def _learn(known: dict[str, int], spec: TensorSpec, axis: int, size: int) -> None:
    dim = (spec.shape or ())[axis]
    if not isinstance(dim, int):
        known.setdefault(dim or f"{spec.name}.{axis}", size)


def _shape(spec: TensorSpec, known: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(
        _lookup(spec, axis, known, synthetic.length(spec, dim)) for axis, dim in enumerate(spec.shape or ())
    )


def _lookup(spec: TensorSpec, axis: int, known: Mapping[str, int], default: int) -> int:
    dim = (spec.shape or ())[axis]
    if isinstance(dim, int):
        return dim
    return known.get(f"{spec.name}.{axis}", known.get(dim, default) if dim is not None else default)


def _is_sized_cache(spec: TensorSpec, sizes: Sizes) -> bool:
    names = {f"{spec.name}.{axis}" for axis in range(len(spec.shape or ()))} | {*(spec.shape or ())}
    return is_cache_name(spec.name) and not names.isdisjoint(sizes.others)
