# SPDX-License-Identifier: Apache-2.0
"""Calibration data: opened from any of the forms DATA may have, checked, split and cut into batches."""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from onnxcollapse.calibration import filling, layout
from onnxcollapse.calibration.layout import Layout
from onnxcollapse.calibration.masks import row_mask
from onnxcollapse.calibration.signature import data_signature
from onnxcollapse.errors import DataError, OptionError
from onnxcollapse.model.model import Model, Signature

logger = logging.getLogger(__name__)

BATCH, LONG_BATCH, VECTOR_BATCH = 32, 8, 512
BATCH_ELEMENTS = 1 << 22
"""No input has more elements in a batch: 27 images of 3 x 224 x 224."""

LONG = 64
"""Sequences longer than this come in LONG_BATCH samples a batch, plain vectors in VECTOR_BATCH."""

DataPart = Literal["fit", "heldout", "all"]


@dataclass(frozen=True)
class Chunk:
    """Some samples that are loaded together.

    Attributes:
        label: What to call them in errors.
        load: Gives the arrays by input name, the same each time.
        rows: Samples, where known without loading; the arrays are checked when they are first used then.
        whole: One batch as a reader made it: neither cut nor joined with others.
    """

    label: str
    load: Callable[[], Mapping[str, np.ndarray]]
    rows: int | None = None
    whole: bool = False

    @classmethod
    def of(cls, label: str, arrays: Mapping[str, np.ndarray], *, whole: bool = False) -> Chunk:
        """A chunk held in memory."""
        return cls(label, lambda: arrays, whole=whole)


@dataclass(frozen=True)
class _Unit:
    """Samples start..stop of a chunk that stay together when the data is split."""

    chunk: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        return self.stop - self.start


class Dataset:
    """Samples for a model, split in two by a seeded permutation.

    The split is by sample; by batch where the model's batch size is fixed or a reader gives batches. Within a
    part samples keep the data's order. One chunk is in memory at a time.

    Attributes:
        samples: Samples used (those a fixed batch size leaves over excluded).
        source: Where they come from, as given.
        evidence: False for random numbers: results on them say nothing about accuracy.
        batch_size: Samples a batch at most.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        signature: Signature,
        *,
        source: str,
        evidence: bool = True,
        seed: int = 0,
        heldout: float = 0.25,
        batch_size: int | None = None,
    ) -> None:
        self._signature = signature
        self._wanted: frozenset[str] | None = None
        self._loaded: tuple[int, Mapping[str, np.ndarray]] = (-1, {})
        self._selected: dict[tuple[DataPart, int | None], tuple[list[_Unit], int]] = {}
        self._chunks = list(chunks)
        self._layouts = self._check_all()
        self._units = self._cut()
        self.source, self.evidence = source, evidence
        self.samples = sum(unit.rows for unit in self._units)
        if not self._units:
            raise DataError(
                f"{source}: holds no full batch of {self._layouts[0].batch} samples; give more samples"
            )
        self.batch_size = self._layouts[0].batch or batch_size or self._default_batch()
        self._order = np.random.default_rng(seed).permutation(len(self._units))
        self._kept_back = min(max(round(heldout * len(self._units)), 1), len(self._units) - 1)

    def batches(self, part: DataPart, limit: int | None = None) -> Iterator[dict[str, np.ndarray]]:
        """The feeds of a part, batch by batch, every input filled in.

        Args:
            part: "fit", "heldout" or "all".
            limit: Stop after about this many samples, drawn from the whole part.

        Raises:
            DataError: The data is too little to be split, or a lazily read file does not fit the model.
        """
        pieces: list[dict[str, np.ndarray]] = []
        rows, kind = 0, None
        for unit in self._select(part, limit):
            piece = self._slice(unit)
            new_kind = self._kind(unit, piece)
            if pieces and (kind != new_kind or new_kind is None or rows + unit.rows > self.batch_size):
                yield self._join(pieces)
                pieces, rows = [], 0
            pieces.append(piece)
            rows, kind = rows + unit.rows, new_kind
        if pieces:
            yield self._join(pieces)

    @functools.cached_property
    def padded(self) -> bool:
        """Whether any token is padding by the attention mask; where none is, nothing need be masked."""
        masks = (row_mask(batch) for batch in self.batches("all"))
        return any(mask is not None and not mask.all() for mask in masks)

    def in_batches_of(self, size: int | None) -> Dataset:
        """The same samples in smaller batches; a size that the model or a reader fixes stays."""
        if size is None or size >= self.batch_size or self._layouts[0].batch is not None:
            return self
        smaller = copy.copy(self)
        smaller.batch_size = size
        return smaller

    def fed_to(self, model: Model) -> Dataset:
        """The same samples for a model that has only some of the inputs, as a branch of a merged decoder has."""
        fewer = copy.copy(self)
        fewer._wanted = frozenset(spec.name for spec in model.signature().inputs)
        return fewer

    def count(self, part: DataPart, limit: int | None = None) -> int:
        """Samples that `batches` gives for these arguments."""
        self._select(part, limit)
        return self._selected[part, limit][1]

    def shapes(self, model: Model | None = None) -> dict[str, tuple[int, ...]]:
        """The shapes of one sample's feeds (of one batch where the model fixes its size), by input name.

        Args:
            model: Leave out inputs that this one does not have: a removed layer has taken its caches along.
        """
        first = self._join([self._slice(self._units[0])])
        known = None if model is None else {value.name for value in model.graph.inputs}
        return {name: array.shape for name, array in first.items() if known is None or name in known}

    def _check_all(self) -> list[Layout]:
        if not self._chunks:
            raise DataError("the calibration data holds no samples; give at least 2")
        layouts = [self._layout(index) for index in range(len(self._chunks))]
        only = self._chunks[0]
        if len(self._chunks) == 1 and only.whole and layouts[0].rows > 1 and layouts[0].batch is None:
            self._chunks = [Chunk(only.label, only.load)]  # a reader's single batch: its rows are the samples
            layouts = [self._layout(0)]
        return layouts

    def _layout(self, index: int) -> Layout:
        chunk = self._chunks[index]
        if chunk.rows is not None and index:
            return Layout(chunk.rows, self._layout(0).batch)
        return layout.check(self._load(index), self._signature, chunk.label, whole=chunk.whole)

    def _cut(self) -> list[_Unit]:
        units, left = [], 0
        for index, (chunk, found) in enumerate(zip(self._chunks, self._layouts, strict=True)):
            step = found.rows if chunk.whole else found.batch or 1
            starts = range(0, found.rows - step + 1, step)
            units += [_Unit(index, start, start + step) for start in starts]
            left += found.rows - len(starts) * step
        if left:
            logger.warning("%d samples left over by the model's fixed batch size are not used", left)
        return units

    def _default_batch(self) -> int:
        """Less for long sequences (integer [B, S] or float [B, S, d] inputs) and for large samples."""
        unit = self._units[0]
        sample = self._slice(unit)
        kinds = {"i": 2, "u": 2, "f": 3}
        long = any(a.ndim == kinds.get(a.dtype.kind) and a.shape[1] > LONG for a in sample.values())
        vectors = all(array.ndim <= 2 and array.dtype.kind == "f" for array in sample.values())
        elements = max(array.size for array in sample.values()) // unit.rows
        most = LONG_BATCH if long else VECTOR_BATCH if vectors else BATCH
        return max(min(most, BATCH_ELEMENTS // max(elements, 1)), 1)

    def _select(self, part: DataPart, limit: int | None) -> list[_Unit]:
        if (part, limit) not in self._selected:  # asked for at every batch, by what counts progress
            units = self._sorted(part, limit)
            self._selected[part, limit] = units, sum(unit.rows for unit in units)
        return self._selected[part, limit][0]

    def _sorted(self, part: DataPart, limit: int | None) -> list[_Unit]:
        if part != "all" and len(self._units) < 2:
            unit = "batches of the model's fixed size" if self._units[0].rows > 1 else "samples"
            raise DataError(
                f"{self.source}: one part fits and one measures, which takes at least 2 {unit}; give more"
            )
        cut = self._kept_back
        chosen = {"all": self._order, "heldout": self._order[:cut], "fit": self._order[cut:]}[part]
        units = [self._units[index] for index in chosen]
        if limit is not None:
            before = np.cumsum([0, *(unit.rows for unit in units)])[:-1]
            units = [unit for unit, seen in zip(units, before, strict=True) if seen < max(limit, 1)]
        return sorted(units, key=lambda unit: (unit.chunk, unit.start))

    def _slice(self, unit: _Unit) -> dict[str, np.ndarray]:
        return self._layouts[unit.chunk].slice(self._load(unit.chunk), unit.start, unit.stop)

    def _load(self, index: int) -> Mapping[str, np.ndarray]:
        if self._loaded[0] != index:
            chunk = self._chunks[index]
            arrays = chunk.load()
            if chunk.rows is not None:
                layout.check(arrays, self._signature, chunk.label, whole=chunk.whole)
            self._loaded = (index, arrays)
        return self._loaded[1]

    def _kind(self, unit: _Unit, piece: Mapping[str, np.ndarray]) -> object:
        """Pieces of one kind may be joined to a batch; None is joined with nothing."""
        found = self._layouts[unit.chunk]
        if self._chunks[unit.chunk].whole or found.batch is not None:
            return None
        shapes = tuple((name, array.shape[1:]) for name, array in sorted(piece.items()))
        return (shapes, unit.chunk if found.shared else None)

    def _join(self, pieces: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        joined = first = pieces[0]
        if len(pieces) > 1:
            joined = {
                name: array if array is pieces[1][name] else np.concatenate([piece[name] for piece in pieces])
                for name, array in first.items()
            }
        feeds = filling.complete(joined, self._signature)
        if self._wanted is None:
            return feeds
        return {name: array for name, array in feeds.items() if name in self._wanted}


def open_data(
    spec: str | Mapping[str, np.ndarray],
    model: Model,
    *,
    seed: int = 0,
    heldout: float = 0.25,
    batch_size: int | None = None,
    window: int | None = None,
) -> Dataset:
    """Opens calibration data and checks it against a model.

    Args:
        spec: Arrays by input name, samples on axis 0, or one of: a `.npz` file; a folder of them, or of ONNX
            `test_data_set_*`; `pkg.mod:reader`, a CalibrationDataReader or what makes one; `text:FILE`;
            `images:DIR`; `random:N`.
        model: The model the data is for.
        seed: Of the split and of `random:N`.
        heldout: Share of the samples kept back; at least one sample, or batch of a fixed size, in each part.
        batch_size: Samples a batch; a size fixed by the model has precedence.
        window: Tokens a window of `text:FILE`; by default what the model takes, 128 at most.

    Returns:
        The data.

    Raises:
        DataError: It cannot be read or does not fit the model.
        OptionError: The window does not fit the model, or the data is no text.
    """
    from onnxcollapse.calibration.readers import read

    if window is not None and not (isinstance(spec, str) and spec.startswith("text:")):
        raise OptionError(f"window {window}: only text:FILE is cut into windows; leave it out")
    if isinstance(spec, Mapping):
        arrays = {name: np.asarray(array) for name, array in spec.items()}
        chunks, source = [Chunk.of("data", arrays)], "arrays in memory"
    else:
        chunks, source = read(spec, model, seed, window), spec
    return Dataset(
        chunks,
        data_signature(model),
        source=source,
        evidence=not source.startswith("random:"),
        seed=seed,
        heldout=heldout,
        batch_size=batch_size,
    )
