# SPDX-License-Identifier: Apache-2.0
"""Compares two models, output by output, on the same data and provider."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onnxcollapse.calibration.data import DataPart, Dataset
from onnxcollapse.calibration.masks import is_cache_name
from onnxcollapse.calibration.providers import Provider
from onnxcollapse.calibration.sessions import open_session
from onnxcollapse.errors import MetricError
from onnxcollapse.model.model import Model
from onnxcollapse.verification.generation import Continuations
from onnxcollapse.verification.metrics import CONTINUATION, Metric, PerOutput, check, metric
from onnxcollapse.verification.perplexity import LOGITS, PERPLEXITY, TOKENS, Perplexity, takes_tokens
from onnxcollapse.verification.rows import Outputs, is_float, row_blocks
from onnxcollapse.verification.sums import METRICS


@dataclass(frozen=True)
class OutputComparison:
    """One output of both models.

    Attributes:
        name: Its name.
        errors: Metric name -> error; empty for outputs that are no floating-point numbers.
        max_abs: Largest absolute difference; None for outputs that are no numbers or differ in shape.
        mismatch: Share of unequal elements, for integer, boolean and string outputs; None for others.
        cache: Whether it is a KV cache, which does not count in the overall error.
        note: What keeps it from being compared; "" if nothing does.
    """

    name: str
    errors: dict[str, float] = field(default_factory=dict)
    max_abs: float | None = None
    mismatch: float | None = None
    cache: bool = False
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """Two models side by side.

    Attributes:
        outputs: What both have, in the first one's order.
        missing: Outputs of the first that the second has not.
        extra: Outputs of the second that the first has not.
        overall: Metric -> the error of the worst output that is no KV cache; perplexity,
            continuation and user metrics have only this.
        samples: Samples compared.
        providers: What each ran on.
        perplexities: Those of both where they were measured.
    """

    outputs: tuple[OutputComparison, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    overall: dict[str, float]
    samples: int
    providers: tuple[Provider, Provider]
    perplexities: tuple[float, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON takes it."""
        both = self.perplexities
        return {
            "samples": self.samples,
            "provider": self.providers[1].obtained,
            "overall": dict(self.overall),
            **({} if both is None else {"perplexity": {"a": both[0], "b": both[1]}}),
            "outputs": {output.name: _numbers(output) for output in self.outputs},
            "notes": {output.name: output.note for output in self.outputs if output.note},
            "caches": [output.name for output in self.outputs if output.cache],
            "missing": list(self.missing),
            "extra": list(self.extra),
        }


def compare(
    a: Model,
    b: Model,
    data: Dataset,
    metrics: Sequence[str] | None = None,
    part: DataPart = "all",
    provider: str = "auto",
) -> Comparison:
    """Runs both models and measures each output of the second against the first's.

    Args:
        a: The reference.
        b: The candidate. It may lack outputs (KV caches of removed layers) and have inputs less; where its caches
            are other ones, none are compared, for their numbers do not mean the same layers.
        data: Data for `a`.
        metrics: Metric specs (see metric); None for `usual_metrics`.
        part: The part of the data.
        provider: See open_session; both run on it.

    Returns:
        The comparison.

    Raises:
        MetricError: A metric is unknown or fails.
        ModelError: A model cannot run.
    """
    specs = usual_metrics(a, data, part) if metrics is None else tuple(metrics)
    for spec in specs:
        check(spec)
    whole = {spec: metric(spec) for spec in specs if spec not in METRICS and spec != CONTINUATION}
    tallies: dict[str, _Tally] = {}
    samples = 0
    with open_session(a, provider=provider) as first, open_session(b, provider=provider) as second:
        common = [name for name in first.outputs if name in second.outputs]
        moved = {name for name in common if is_cache_name(name)}
        if _caches(first.outputs) == _caches(second.outputs):
            moved = set()
        tallies = {name: _Tally(name, [spec for spec in specs if spec in METRICS]) for name in common}
        for name in moved:
            tallies[name].leave("layers are gone, and its number may mean another one now")
        for batch in data.batches(part):
            reference, outputs = first.run(batch), second.run(batch)
            for name, tally in tallies.items():
                tally.update(outputs[name], reference[name], batch)
            for spec in list(whole):
                _update(whole, spec, outputs, reference, batch, wanted=metrics is not None)
        samples = data.count(part)
        if metrics is None:  # all of it may be padding
            whole = {s: m for s, m in whole.items() if not isinstance(m, Perplexity) or m.tokens}
        results = tuple(tally.result() for tally in tallies.values())
        found = Comparison(
            outputs=results,
            missing=tuple(name for name in first.outputs if name not in second.outputs),
            extra=tuple(name for name in second.outputs if name not in first.outputs),
            overall=_overall(results, specs) | {spec: one.value() for spec, one in whole.items()},
            samples=samples,
            providers=(first.provider, second.provider),
            perplexities=next((m.perplexities for m in whole.values() if isinstance(m, Perplexity)), None),
        )
    if CONTINUATION in specs:  # its sessions come after these two, which would lie beside them in memory
        found.overall[CONTINUATION] = Continuations(a, data, part, provider).error(b)
    return found


def _caches(names: Sequence[str]) -> set[str]:
    return {name for name in names if is_cache_name(name)}


def usual_metrics(model: Model, data: Dataset, part: DataPart = "all") -> tuple[str, ...]:
    """The metrics that cost nothing more: those of every output, and perplexity for models from tokens to logits."""
    if takes_tokens(model):
        tokens = next(data.batches(part))[TOKENS]
        for spec in model.signature().outputs:
            width = spec.shape[-1] if spec.shape and len(spec.shape) == 3 and LOGITS in spec.name else None
            if isinstance(width, int) and tokens.ndim == 2 and tokens.shape[1] > 1 and tokens.max() < width:
                return (*METRICS, PERPLEXITY)
    return tuple(METRICS)


def _update(
    whole: dict[str, Metric], spec: str, outputs: Outputs, reference: Outputs, batch: Outputs, *, wanted: bool
) -> None:
    """Adds a batch to a metric of all outputs; one that nobody asked for and that does not suit the data goes."""
    try:
        whole[spec].update(outputs, reference, batch)
    except MetricError:
        if wanted:
            raise
        del whole[spec]


class _Tally:
    """The running comparison of one output."""

    def __init__(self, name: str, metrics: Sequence[str]) -> None:
        self._name = name
        self._metrics = [PerOutput(spec) for spec in metrics]
        self._float = True
        self._max_abs = 0.0
        self._unequal = self._elements = 0
        self._note = ""

    def leave(self, why: str) -> None:
        """Does not compare it."""
        self._note = why

    def update(self, got: object, want: object, batch: Outputs) -> None:
        if self._note or not (isinstance(got, np.ndarray) and isinstance(want, np.ndarray)):
            self._note = self._note or "no tensor, not compared"
        elif got.shape != want.shape:
            self._note = f"shapes differ: {list(want.shape)} and {list(got.shape)}"
        elif is_float(got) and is_float(want):
            self._max_abs = max(self._max_abs, _largest_difference(got, want))
            for one in self._metrics:
                one.update({self._name: got}, {self._name: want}, batch)
        else:
            self._float = False
            self._unequal += int(np.count_nonzero(got != want))
            self._elements += want.size

    def result(self) -> OutputComparison:
        cache = is_cache_name(self._name)
        if self._note:
            return OutputComparison(self._name, cache=cache, note=self._note)
        if not self._float:
            share = self._unequal / self._elements if self._elements else 0.0
            return OutputComparison(self._name, mismatch=share, cache=cache)
        errors = {one.name: one.value() for one in self._metrics}
        return OutputComparison(self._name, errors, max_abs=self._max_abs, cache=cache)


def _largest_difference(got: np.ndarray, want: np.ndarray) -> float:
    largest = 0.0
    for part, truth in row_blocks(got, want, None):
        same = part == truth  # also infinities, whose difference is NaN
        with np.errstate(invalid="ignore"):
            difference = np.where(same, 0.0, np.abs(part - truth))
        largest = max(largest, float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0)))
    return largest


def _overall(results: Sequence[OutputComparison], specs: Sequence[str]) -> dict[str, float]:
    measured = [r for r in results if r.errors]
    main = [r for r in measured if not r.cache] or measured
    broken = any(r.note or r.mismatch for r in results if not r.cache)
    return {
        spec: float("inf") if broken and not main else max((r.errors[spec] for r in main), default=0.0)
        for spec in specs
        if spec in METRICS
    }


def _numbers(output: OutputComparison) -> dict[str, float]:
    numbers = dict(output.errors)
    if output.max_abs is not None:
        numbers["max-abs"] = output.max_abs
    if output.mismatch is not None:
        numbers["mismatch"] = output.mismatch
    return numbers
