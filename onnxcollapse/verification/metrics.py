# SPDX-License-Identifier: Apache-2.0
"""Metrics: how far a model's outputs are from a reference's; 0 is identical, larger is worse."""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np

from onnxcollapse.calibration.masks import batch_rows, is_cache_name, row_mask
from onnxcollapse.errors import MetricError

Outputs = Mapping[str, np.ndarray]

BLOCK = 1 << 20
"""Elements widened to float64 at a time."""


class Metric(Protocol):
    """Takes outputs batch by batch and keeps running sums only."""

    name: str

    def update(self, outputs: Outputs, reference: Outputs, batch: Outputs) -> None:
        """Adds a batch: the candidate's outputs, the reference's, and the feeds."""

    def value(self) -> float:
        """The error so far."""


class Sums(ABC):
    """The running sums of one metric over the rows of one output."""

    name: ClassVar[str]
    logits: ClassVar[bool] = False
    """Whether an entry of -inf in the reference means a probability of 0."""
    masked: ClassVar[float] = 0.0
    """What stands for -inf."""
    power: ClassVar[int] = 1
    """The power of the error that adds up over independent changes: squares of a norm, divergences as they are."""

    @abstractmethod
    def add(self, got: np.ndarray, want: np.ndarray) -> None:
        """Adds rows [n, C] in float64: finite `want`, `got` of the same shape."""

    @abstractmethod
    def value(self) -> float:
        """The error so far."""


class RelL2(Sums):
    """sqrt(sum |got - want|^2 / sum |want|^2); against a reference of zeros 0 or infinite."""

    name = "rel-l2"
    power = 2

    def __init__(self) -> None:
        self._difference = self._norm = 0.0

    def add(self, got: np.ndarray, want: np.ndarray) -> None:  # noqa: D102 (as in Sums)
        difference = got - want
        self._difference += float(np.vdot(difference, difference))
        self._norm += float(np.vdot(want, want))

    def value(self) -> float:  # noqa: D102 (as in Sums)
        if self._norm == 0:
            return 0.0 if self._difference == 0 else float("inf")
        return float(np.sqrt(self._difference / self._norm))


class _MeanOverRows(Sums):
    def __init__(self) -> None:
        self._total, self._rows = 0.0, 0

    def add(self, got: np.ndarray, want: np.ndarray) -> None:
        self._total += float(self.rows(got, want).sum())
        self._rows += len(want)

    def value(self) -> float:
        return self._total / self._rows if self._rows else 0.0

    @abstractmethod
    def rows(self, got: np.ndarray, want: np.ndarray) -> np.ndarray:
        """The error of each row [n]."""


class Cosine(_MeanOverRows):
    """1 - mean cosine of the rows; a zero row agrees with a zero row only."""

    name = "cosine"

    def rows(self, got: np.ndarray, want: np.ndarray) -> np.ndarray:
        """1 - cos, [n], as |got/|got| - want/|want||^2 / 2: exactly 0 for equal rows."""
        units = [rows / _safe(np.linalg.norm(rows, axis=1, keepdims=True)) for rows in (got, want)]
        distance = np.square(units[0] - units[1]).sum(1) / 2
        one_zero = got.any(1) != want.any(1)
        return np.where(one_zero, 1.0, distance)


class Kl(_MeanOverRows):
    """Mean over rows of KL(softmax(want) || softmax(got)), the softmax over the last axis."""

    name = "kl"
    logits, masked = True, -1e300

    def rows(self, got: np.ndarray, want: np.ndarray) -> np.ndarray:
        """Sum p (log p - log q), [n]; never negative."""
        log_p, log_q = _log_softmax(want), _log_softmax(got)
        return np.maximum((np.exp(log_p) * (log_p - log_q)).sum(1), 0.0)


class Top1(_MeanOverRows):
    """Share of rows whose largest entry is at another place."""

    name = "top1"
    logits, masked = True, -1e300

    def rows(self, got: np.ndarray, want: np.ndarray) -> np.ndarray:
        """1 where the places differ, [n]."""
        return (got.argmax(1) != want.argmax(1)).astype(np.float64)


METRICS: dict[str, type[Sums]] = {kind.name: kind for kind in (RelL2, Cosine, Kl, Top1)}
"""The built-in metrics by name."""


def additive_power(spec: str) -> int:
    """The power of a metric's error that adds up over independent changes; 1 for a user's own."""
    return METRICS[spec].power if spec in METRICS else 1


def metric(spec: str) -> Metric:
    """Makes an empty metric.

    Args:
        spec: "rel-l2", "cosine", "kl", "top1", or `file.py:function` with
            function(outputs, reference, batch) -> float, 0 for identical outputs.

    Raises:
        MetricError: There is no such metric, or the file or function cannot be loaded.
    """
    if spec in METRICS:
        return PerOutput(spec)
    if ".py:" in spec:
        return UserMetric(spec)
    raise MetricError(f"metric {spec!r} is unknown; choose {', '.join(METRICS)} or file.py:function")


class PerOutput:
    """A built-in metric over every floating-point output; the worst output counts.

    Rows of padding are left out where an output begins with the attention mask's axes. KV caches are left out
    of `value`, not of `values`. A NaN or an infinity where the reference has none makes the error infinite.

    Attributes:
        name: The metric's.
    """

    def __init__(self, name: str) -> None:
        self.name = name
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
        for part, truth in row_blocks(got, want, mask):
            if np.isnan(truth).any() or np.isposinf(truth).any():
                raise MetricError(
                    f"output {name!r} of the reference is NaN or infinite on this data; check both"
                )
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


def is_float(array: object) -> bool:
    """Whether an output is a floating-point array."""
    return isinstance(array, np.ndarray) and np.issubdtype(array.dtype, np.floating)


def compared(outputs: Outputs) -> list[str]:
    """The outputs that metrics look at: the floating-point ones."""
    return [name for name, array in outputs.items() if is_float(array)]


def row_blocks(
    got: np.ndarray, want: np.ndarray, mask: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Both tensors as float64 rows over the last axis [n, C], padding left out, a block at a time."""
    width = want.shape[-1] if want.ndim else 1
    flat_got, flat_want = got.reshape(-1, width or 1), want.reshape(-1, width or 1)
    keep = _kept_rows(want.shape, mask)
    step = max(BLOCK // max(width, 1), 1)
    for start in range(0, len(flat_want), step):
        part = slice(start, start + step)
        rows = slice(None) if keep is None else keep[part]
        yield flat_got[part][rows].astype(np.float64), flat_want[part][rows].astype(np.float64)


def _kept_rows(shape: tuple[int, ...], mask: np.ndarray | None) -> np.ndarray | None:
    """Bool [n] for the rows of a [B, S, ..., C] output, None where the mask does not apply."""
    if mask is None or len(shape) < 3 or shape[:2] != mask.shape:
        return None
    return np.repeat(mask.reshape(-1), int(np.prod(shape[2:-1], dtype=np.int64)))


def _safe(norms: np.ndarray) -> np.ndarray:
    return np.where(norms == 0, 1.0, norms)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
