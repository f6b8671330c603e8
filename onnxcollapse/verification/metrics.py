# SPDX-License-Identifier: Apache-2.0
"""Metrics: how far a model's outputs are from a reference's; 0 is identical, larger is worse."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from onnxcollapse.calibration.masks import batch_rows, is_cache_name, row_mask
from onnxcollapse.errors import MetricError
from onnxcollapse.verification import softmax
from onnxcollapse.verification.perplexity import PERPLEXITY, Perplexity
from onnxcollapse.verification.rows import Outputs, compared, row_blocks
from onnxcollapse.verification.softmax import Kept, Once, T
from onnxcollapse.verification.sums import METRICS, Sums

CONTINUATION = "continuation"
"""The metric that is measured by generating, see generation."""

NAMES = (*METRICS, PERPLEXITY, CONTINUATION)
"""All built-in metrics; METRICS are those of every output."""


class Metric(Protocol):
    """Takes outputs batch by batch and keeps running sums only."""

    name: str

    def update(self, outputs: Outputs, reference: Outputs, batch: Outputs) -> None:
        """Adds a batch: the candidate's outputs, the reference's, and the feeds."""

    def value(self) -> float:
        """The error so far."""


def additive_power(spec: str) -> int:
    """The power of a metric's error that adds up over independent changes; 1 for a user's own."""
    return METRICS[spec].power if spec in METRICS else 1


def metric(spec: str, kept: Kept | None = None) -> Metric:
    """Makes an empty metric.

    Args:
        spec: "rel-l2", "cosine", "kl", "top1", "perplexity", or `file.py:function` with
            function(outputs, reference, batch) -> float, 0 for identical outputs.
        kept: Shared by the metrics of several candidates that take turns at each batch of one reference.

    Raises:
        MetricError: There is no such metric, the file or function cannot be loaded, or it is "continuation", which
            models have to be run for.
    """
    if spec in METRICS:
        return PerOutput(spec, kept)
    if spec == PERPLEXITY:
        return Perplexity(kept)
    if ".py:" in spec:
        return UserMetric(spec)
    if spec == CONTINUATION:
        raise MetricError(
            f"metric {spec!r} is about what models generate, not about outputs; use a Verifier or compare"
        )
    raise MetricError(f"metric {spec!r} is unknown; choose {', '.join(NAMES)} or file.py:function")


def check(spec: str) -> None:
    """Makes sure that there is such a metric.

    Raises:
        MetricError: There is none, or the file or function cannot be loaded.
    """
    if spec != CONTINUATION:
        metric(spec)


def is_users(spec: str) -> bool:
    """Whether a metric is a user's function."""
    return spec not in NAMES


class PerOutput:
    """A built-in metric over every floating-point output; the worst output counts.

    Rows of padding are left out where an output begins with the attention mask's axes. KV caches are left out
    of `value`, not of `values`. A NaN or an infinity where the reference has none makes the error infinite.

    Attributes:
        name: The metric's.
    """

    def __init__(self, name: str, kept: Kept | None = None) -> None:
        self.name = name
        self._kept = kept
        self._sums: dict[str, Sums] = {}
        self._broken: set[str] = set()

    def update(self, outputs: Outputs, reference: Outputs, batch: Outputs) -> None:
        """Adds a batch.

        Raises:
            MetricError: An output is missing or has another shape, or the reference's is NaN or infinite.
        """
        names = compared(reference)
        if not names:
            raise MetricError(
                f"metric {self.name!r}: there is no floating-point output; give file.py:function"
            )
        mask = row_mask(batch)
        for name in names:
            if name not in outputs and is_cache_name(name):
                continue  # its layer was removed
            self._add(name, outputs.get(name), reference[name], mask)

    def values(self) -> dict[str, float]:
        """The error of each output."""
        return {name: float("inf") if name in self._broken else s.value() for name, s in self._sums.items()}

    def value(self) -> float:
        """The largest error of an output that is no KV cache (of any, if there are only those)."""
        values = self.values()
        main = [error for name, error in values.items() if not is_cache_name(name)]
        return max(main or values.values(), default=0.0)

    def _add(self, name: str, got: np.ndarray | None, want: np.ndarray, mask: np.ndarray | None) -> None:
        if got is None or got.shape != want.shape:
            found = (
                "is missing" if got is None else f"has shape {list(got.shape)} instead of {list(want.shape)}"
            )
            raise MetricError(f"output {name!r} {found}; metrics need models with the same outputs")
        sums = self._sums.setdefault(name, METRICS[self.name]())
        if not (sums.quick_when_wide and softmax.is_wide(got, want)):
            for part, truth in row_blocks(got, want, mask):
                self._add_rows(name, sums, part, truth)
            return
        blocks = row_blocks(got, want, mask, np.float32, softmax.BLOCK)
        for place, (part, truth) in enumerate(blocks):
            if not sums.add_wide(part, truth, self._once(want, place)):
                self._add_rows(name, sums, part.astype(np.float64), truth.astype(np.float64))

    def _once(self, want: np.ndarray, place: int) -> Once:
        """What keeps results for a block of the reference; the mask is the batch's, as the array is."""

        def once(what: str, make: Callable[[], T]) -> T:
            return make() if self._kept is None else self._kept.of(want, (what, place), make)

        return once

    def _add_rows(self, name: str, sums: Sums, part: np.ndarray, truth: np.ndarray) -> None:
        if np.isnan(truth).any() or np.isposinf(truth).any():
            raise MetricError(f"output {name!r} of the reference is NaN or infinite on this data; check both")
        part, truth = _fill_masked(part, truth, sums)
        if np.isfinite(part).all() and np.isfinite(truth).all():
            sums.add(part, truth)
        else:
            self._broken.add(name)


class UserMetric:
    """A user's function, averaged over batches by their samples.

    Attributes:
        name: `file.py:function` as given.
    """

    def __init__(self, spec: str) -> None:
        self.name = spec
        self._function = _load_function(spec)
        self._total, self._samples = 0.0, 0

    def update(self, outputs: Outputs, reference: Outputs, batch: Outputs) -> None:
        """Adds a batch.

        Raises:
            MetricError: The function fails or gives no number.
        """
        try:
            error = float(self._function(dict(outputs), dict(reference), dict(batch)))
        except (Exception, SystemExit) as problem:  # the user's code: anything may come
            kind = type(problem).__name__
            raise MetricError(
                f"metric {self.name} fails with {kind}: {problem}; correct the function"
            ) from problem
        samples = batch_rows(batch)
        self._total += (float("inf") if np.isnan(error) else error) * samples
        self._samples += samples

    def value(self) -> float:
        """The mean so far; NaN counts as infinite."""
        return self._total / self._samples if self._samples else 0.0


def _load_function(spec: str) -> Callable[[Any, Any, Any], float]:
    file, _, name = spec.rpartition(":")
    loader = importlib.util.spec_from_file_location(Path(file).stem, file) if Path(file).is_file() else None
    if loader is None or loader.loader is None:
        raise MetricError(f"metric {spec}: there is no file {file}; give file.py:function")
    module = importlib.util.module_from_spec(loader)
    try:
        loader.loader.exec_module(module)
    except (Exception, SystemExit) as problem:  # the user's code: anything may come
        raise MetricError(f"metric {spec}: running {file} fails with {problem!r}; correct it") from problem
    function = getattr(module, name, None)
    if not callable(function):
        raise MetricError(f"metric {spec}: {file} has no function {name!r}; correct the name")
    return function


def _fill_masked(got: np.ndarray, want: np.ndarray, sums: Sums) -> tuple[np.ndarray, np.ndarray]:
    """Makes the -inf of masked logits finite: where both have it; everywhere for metrics on a softmax."""
    masked = np.isneginf(want)
    if not masked.any():
        return got, want
    both = masked & np.isneginf(got)
    return np.where(both, sums.masked, got), np.where(masked if sums.logits else both, sums.masked, want)
