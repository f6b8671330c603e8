# SPDX-License-Identifier: Apache-2.0
"""Perplexity: how well a language model foresees the data's own next tokens."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from onnxcollapse.calibration.masks import is_cache_name, row_mask
from onnxcollapse.errors import MetricError
from onnxcollapse.model import Model
from onnxcollapse.verification import softmax
from onnxcollapse.verification.rows import Outputs, is_float
from onnxcollapse.verification.softmax import Kept

PERPLEXITY = "perplexity"

TOKENS, LOGITS = "input_ids", "logits"


def tokens_of(batch: Outputs, metric: str) -> np.ndarray:
    """The token ids [B, S] of a batch.

    Raises:
        MetricError: The model has none.
    """
    tokens = batch.get(TOKENS)
    if tokens is None or tokens.ndim != 2:
        raise no_tokens(metric)
    return tokens


def takes_tokens(model: Model) -> bool:
    """Whether a model has an input of token ids."""
    return any(spec.name == TOKENS for spec in model.signature().inputs)


def no_tokens(metric: str) -> MetricError:
    """The error for a model that is no language model."""
    return MetricError(
        f"metric {metric!r}: the model has no input {TOKENS!r} [batch, tokens]; it is for language models, "
        "choose another metric"
    )


def logits_name(outputs: Mapping[str, np.ndarray], rows: tuple[int, ...], metric: str) -> str:
    """The name of the output with scores over the vocabulary: "logits", else the widest that may be it.

    Args:
        outputs: By name.
        rows: How its shape begins: (B, S), or (B,) where the last token's are enough.
        metric: The metric's name.

    Raises:
        MetricError: No output has that shape.
    """
    found = {
        name: array.shape[-1]
        for name, array in outputs.items()
        if is_float(array)
        and array.ndim == 3
        and array.shape[: len(rows)] == rows
        and not is_cache_name(name)
    }
    if not found:
        shapes = ", ".join(f"{name!r} {list(array.shape)}" for name, array in outputs.items())
        raise MetricError(
            f"metric {metric!r}: no output has scores [batch, tokens, vocabulary] for every one of {list(rows)} "
            f"(there is {shapes}); export the model with its logits or choose another metric"
        )
    return LOGITS if LOGITS in found else max(found, key=lambda name: found[name])


class Perplexity:
    """max(perplexity of the candidate / perplexity of the reference - 1, 0) over the data's own next tokens.

    The perplexity is exp of the mean negative log-likelihood of every token but the first of a window, given those
    before it. Padding is left out, as a row and as what is to be foreseen.

    Attributes:
        name: "perplexity".
        tokens: Tokens that were to be foreseen so far.
    """

    name = PERPLEXITY

    def __init__(self, kept: Kept | None = None) -> None:
        self._kept = kept
        self._candidate = self._reference = 0.0
        self.tokens, self._updated = 0, False

    def update(self, outputs: Outputs, reference: Outputs, batch: Outputs) -> None:
        """Adds a batch.

        Raises:
            MetricError: The model has no `input_ids` or no logits of every token, the candidate's have another shape,
                or the reference gives a token of the data no probability.
        """
        tokens = tokens_of(batch, self.name)
        name = logits_name(reference, tokens.shape, self.name)
        got, want = outputs.get(name), reference[name]
        if got is None or got.shape != want.shape:
            found = (
                "is missing" if got is None else f"has shape {list(got.shape)} instead of {list(want.shape)}"
            )
            raise MetricError(f"output {name!r} {found}; metrics need models with the same outputs")
        rows, targets = _next_tokens(tokens, row_mask(batch))
        self._updated = True
        if not len(rows):
            return
        _check_vocabulary(name, want.shape[-1], targets)
        if self._kept is None:
            truth = _surprise(want, rows, targets)
        else:
            key = (rows.tobytes(), targets.tobytes())
            truth = self._kept.of(want, key, lambda: _surprise(want, rows, targets))
        if not math.isfinite(truth):
            raise MetricError(
                f"output {name!r} of the reference is NaN or infinite, or gives a token of the data no probability; "
                "check model and data"
            )
        found_now = _surprise(got, rows, targets)
        self._candidate += found_now if not math.isnan(found_now) else math.inf
        self._reference += truth
        self.tokens += len(rows)

    def value(self) -> float:
        """The error so far; infinite when the candidate's logits become NaN.

        Raises:
            MetricError: There was data, but no token that follows another.
        """
        if self._updated and not self.tokens:
            raise MetricError(
                f"metric {self.name!r}: no token of the data follows another; give windows of at least 2 tokens"
            )
        if not self.tokens:
            return 0.0
        return max(_exp((self._candidate - self._reference) / self.tokens) - 1.0, 0.0)

    @property
    def perplexities(self) -> tuple[float, float]:
        """Those of the reference and the candidate."""
        count = max(self.tokens, 1)
        return _exp(self._reference / count), _exp(self._candidate / count)


def _next_tokens(tokens: np.ndarray, mask: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Which of the B * S rows foresee a real token, [n], and which token that is, [n]."""
    real = np.ones(tokens.shape, bool) if mask is None or mask.shape != tokens.shape else mask
    pairs = np.zeros(tokens.shape, bool)
    pairs[:, :-1] = real[:, :-1] & real[:, 1:]
    rows = np.flatnonzero(pairs)
    return rows, tokens.reshape(-1)[rows + 1].astype(np.int64)


def _check_vocabulary(name: str, width: int, targets: np.ndarray) -> None:
    outside = targets[(targets < 0) | (targets >= width)]
    if len(outside):
        raise MetricError(
            f"output {name!r} has {width} entries a row and token {outside[0]} is none of them; perplexity needs "
            "logits over the vocabulary"
        )


def _surprise(logits: np.ndarray, rows: np.ndarray, targets: np.ndarray) -> float:
    """The sum of the negative log-likelihoods of the targets."""
    flat = logits.reshape(-1, logits.shape[-1])
    dtype = np.float32 if softmax.is_wide(logits) else np.float64
    step, total = max(softmax.BLOCK // flat.shape[1], 1), 0.0
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        total += float(softmax.surprise(flat[rows[part]].astype(dtype, copy=False), targets[part]).sum())
    return total


def _exp(value: float) -> float:
    return math.exp(value) if value < 700.0 else math.inf
