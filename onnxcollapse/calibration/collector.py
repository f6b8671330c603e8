# SPDX-License-Identifier: Apache-2.0
"""Collects statistics: one run over the data, sums only, fp64 on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from onnxcollapse.calibration.data import Dataset
from onnxcollapse.calibration.joining import join
from onnxcollapse.calibration.masks import batch_rows, row_mask
from onnxcollapse.calibration.probes import MOMENT_ROWS, ROWS_INPUT, ProbeSet
from onnxcollapse.calibration.sessions import Session, adopt
from onnxcollapse.calibration.statistics import (
    Gram,
    GramMatrix,
    Moments,
    MomentSums,
    Part,
    Ref,
    Request,
    Result,
    Statistics,
)
from onnxcollapse.errors import DataError
from onnxcollapse.model.model import Model

Progress = Callable[[int, int], None]
"""Called with (samples done, samples in all) after each batch."""


def collect(
    model: Model,
    requests: Iterable[Request],
    data: Dataset,
    *,
    provider: str = "auto",
    reference: Model | None = None,
    parts: Sequence[Part] = ("fit", "heldout"),
    progress: Progress | None = None,
) -> Statistics:
    """Runs the data through a model, and a reference beside it, and sums what was asked for.

    Only the nodes the probes need run, and only sums leave the session.

    Args:
        model: The model that refs with source "model" name tensors of.
        requests: What to sum; equal requests are computed once.
        data: The calibration data.
        provider: See open_session.
        reference: The model that refs with source "reference" name tensors of. None, or a tensor it does not
            have: they name those of `model`.
        parts: The parts of the data to run.
        progress: Told how far the run is.

    Returns:
        The sums by part and request.

    Raises:
        ModelError: A tensor cannot be probed, or the model cannot run.
        DataError: A tensor becomes NaN or infinite on this data.
    """
    wanted = tuple(dict.fromkeys(requests))
    if not wanted:
        return Statistics()
    probes, session = _open(model, wanted, provider, reference)
    total, done = sum(data.count(part) for part in parts), 0
    results: dict[tuple[Part, Request], Result] = {}
    with session:
        for part in parts:
            sums = {request: _accumulator(request) for request in wanted}
            for batch in data.batches(part):
                outputs = _run(session, probes, batch)
                for accumulator in sums.values():
                    accumulator.add(probes, outputs)
                done += batch_rows(batch)
                if progress is not None:
                    progress(min(done, total), total)
            results.update({(part, request): accumulator.result() for request, accumulator in sums.items()})
    return Statistics(results)


def _open(
    model: Model, wanted: Sequence[Request], provider: str, reference: Model | None
) -> tuple[ProbeSet, Session]:
    scratch = model.clone()
    beside = any(ref.source == "reference" for request in wanted for ref in _refs(request))
    names = join(scratch, reference.clone()) if reference is not None and beside else {}
    probes = ProbeSet(scratch, names)
    probes.add(wanted)
    return probes, adopt(scratch, provider)


def _refs(request: Request) -> tuple[Ref, ...]:
    return request.refs if isinstance(request, Gram) else (request.tensor,)


def _run(session: Session, probes: ProbeSet, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    feeds = dict(batch)
    if probes.needs_rows:
        mask = row_mask(batch)
        kept = np.empty(0, np.float32) if mask is None else mask.reshape(-1).astype(np.float32)
        feeds[ROWS_INPUT] = np.append(kept, np.float32(1))
    return session.run(feeds)


def _accumulator(request: Request) -> _GramAccumulator | _MomentAccumulator:
    return _GramAccumulator(request) if isinstance(request, Gram) else _MomentAccumulator(request)


class _GramAccumulator:
    """Sums Z'Z of centred batches as raw products of [1, x...] in float64."""

    def __init__(self, request: Gram) -> None:
        self._request = request
        self._matrix: np.ndarray | None = None
        self._widths: tuple[int, ...] = ()

    def add(self, probes: ProbeSet, outputs: Mapping[str, np.ndarray]) -> None:
        """Adds a batch.

        With z = x - s the sums of x are x'x = z'z + s't + t's + n s's for t = sum z: one product of rank 2.
        The leading column is 1 in both, so its shift is 0 there and its t is n.
        """
        refs = self._request.refs
        means = [outputs[probes.mean(ref)][0].astype(np.float64) for ref in refs]
        for ref, mean in zip(refs, means, strict=True):
            _require_finite(mean, ref)
        batch = outputs[probes.sums(self._request)]
        _require_finite(batch, refs[0])
        if self._matrix is None:
            self._widths = tuple(len(mean) for mean in means)
            self._matrix = np.zeros(batch.shape)
        self._matrix += batch
        shift = np.concatenate([[0.0], *means])
        sums = batch[0].astype(np.float64)
        self._matrix += np.stack([shift, sums], 1) @ np.stack([sums + sums[0] * shift, shift])

    def result(self) -> GramMatrix:
        """The sums so far, exactly symmetric."""
        if self._matrix is None:
            raise DataError("no batch of calibration data reached the model; give more samples")
        matrix = (self._matrix + self._matrix.T) / 2
        return GramMatrix(float(matrix[0, 0]), self._request.refs, self._widths, matrix)


class _MomentAccumulator:
    """Merges the moments of batches in float64."""

    def __init__(self, request: Moments) -> None:
        self._request = request
        self._sums: MomentSums | None = None

    def add(self, probes: ProbeSet, outputs: Mapping[str, np.ndarray]) -> None:
        """Adds a batch."""
        ref = self._request.tensor
        rows = outputs[probes.sums(self._request)].astype(np.float64)
        _require_finite(rows, ref)
        count = float(outputs[probes.count(ref)][0, 0])
        if count == 0:
            return  # nothing but padding
        row = dict(zip(MOMENT_ROWS, rows, strict=True))
        left = row["residual"] / count  # what rounding left of the mean
        batch = MomentSums(
            count=count,
            mean=row["mean"] + left,
            variance=np.maximum(row["square"] / count - np.square(left), 0.0),
            minimum=row["minimum"],
            maximum=row["maximum"],
            positive_rate=row["positive"] / count,
            negative_square=row["negative_square"] / count,
        )
        self._sums = batch if self._sums is None else self._sums + batch

    def result(self) -> MomentSums:
        """The moments so far."""
        if self._sums is None:
            raise DataError("no batch of calibration data reached the model; give more samples")
        return self._sums


def _require_finite(array: np.ndarray, ref: Ref) -> None:
    if not np.isfinite(array).all():
        raise DataError(
            f"tensor {ref.value!r} of the {ref.source} becomes NaN or infinite on the calibration data; "
            "check the data, or run the model in float32"
        )
