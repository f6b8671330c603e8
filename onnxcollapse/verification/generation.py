# SPDX-License-Identifier: Apache-2.0
"""Greedy decoding, and how much of a reference's own continuations a candidate gives.

Tokens come one by one through the KV cache where every cache input of a model has an output with its next value; else
the growing sequence is run anew for each, with caches left empty.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxcollapse.calibration import filling
from onnxcollapse.calibration.data import DataPart, Dataset
from onnxcollapse.calibration.masks import cache_pairs, row_mask
from onnxcollapse.calibration.providers import Provider
from onnxcollapse.calibration.sessions import Session, open_session
from onnxcollapse.calibration.signature import data_signature
from onnxcollapse.errors import MetricError
from onnxcollapse.model import Model
from onnxcollapse.verification.metrics import CONTINUATION
from onnxcollapse.verification.perplexity import TOKENS, logits_name, no_tokens, takes_tokens, tokens_of

TOKENS_GENERATED, PROMPT, PROMPTS = 32, 32, 8
"""Tokens of a continuation, of a prompt at most, and prompts."""


class Decoder:
    """A language model that generates.

    Args:
        model: The model. It may have inputs of token ids, masks, positions and caches only.
        provider: See open_session; the whole model runs in one session.

    Raises:
        MetricError: It has no input of token ids, or one that is not known how to fill.
        ModelError: It cannot be opened.
    """

    def __init__(self, model: Model, provider: str = "auto") -> None:
        if not takes_tokens(model):
            raise no_tokens(CONTINUATION)
        self._signature = data_signature(model)
        self._specs = {spec.name: spec for spec in self._signature.inputs}
        for spec in self._signature.inputs:
            known = spec.name in (TOKENS, "cache_position")
            if not known and not filling.is_fillable(spec, {TOKENS}, self._signature):
                raise MetricError(
                    f"metric {CONTINUATION!r}: input {spec.name!r} has no obvious value while generating; choose "
                    "another metric"
                )
        names = [spec.name for spec in model.signature().outputs]
        self._pairs = cache_pairs(list(self._specs), names)
        self._session: Session = open_session(model, provider=provider)

    @property
    def provider(self) -> Provider:
        """What it runs on."""
        return self._session.provider

    @property
    def cached(self) -> bool:
        """Whether it generates through a KV cache."""
        return self._pairs is not None

    def greedy(self, prompts: np.ndarray, count: int) -> np.ndarray:
        """The likeliest tokens after prompts, one by one.

        Args:
            prompts: Token ids [B, P], without padding.
            count: Tokens to generate; none ends a continuation early.

        Returns:
            Token ids [B, count].

        Raises:
            MetricError: There are no logits, or they are NaN.
            ModelError: The model cannot run.
        """
        fixed = self._specs[TOKENS].shape
        step = fixed[0] if fixed and isinstance(fixed[0], int) else len(prompts)
        found = []
        for start in range(0, len(prompts), step):
            part = prompts[start : start + step]
            filled = np.concatenate([part, np.repeat(part[-1:], step - len(part), 0)])
            found.append(self._greedy(filled, count)[: len(part)])
        return np.concatenate(found)

    def _greedy(self, prompts: np.ndarray, count: int) -> np.ndarray:
        tokens, past = prompts, 0
        cache: dict[str, np.ndarray] = {}
        made: list[np.ndarray] = []
        for _ in range(count):
            outputs = self._session.run(filling.step(self._signature, tokens, past, cache))
            made.append(_likeliest(outputs, len(prompts))[:, None])
            if self._pairs is None:
                tokens = np.concatenate([prompts, *made], axis=1)
            else:
                past += tokens.shape[1]
                cache = {name: outputs[output] for name, output in self._pairs.items()}
                tokens = made[-1]
        return np.concatenate(made, axis=1)

    def close(self) -> None:
        """Frees the session."""
        self._session.close()

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Continuations:
    """A reference's continuations of prompts, generated once, for candidates to be held against.

    Prompts are the first tokens of windows of the data, 32 or half of a shorter window; windows that are padded there
    are passed over.

    Args:
        reference: The model whose continuations count.
        data: Windows of tokens.
        part: The part of the data.
        provider: See open_session.
    """

    def __init__(
        self, reference: Model, data: Dataset, part: DataPart = "heldout", provider: str = "auto"
    ) -> None:
        self._reference, self._data, self._part, self._provider = reference, data, part, provider
        self._known: list[tuple[np.ndarray, np.ndarray]] | None = None
        self.provider: Provider | None = None

    def error(self, model: Model, limit: int | None = None) -> float:
        """1 - agreement of a model's continuations with the reference's.

        The agreement with one is the share of its 32 tokens up to the first that differs: what comes after a different
        token continues a different text.

        Args:
            model: The candidate.
            limit: Prompts at most, never more than 8.

        Raises:
            MetricError: The model or data is not one of tokens.
            ModelError: The candidate cannot run.
        """
        wanted = self._generated()
        left, shares = min(limit or PROMPTS, PROMPTS), list[np.ndarray]()
        with Decoder(model, self._provider) as decoder:
            for prompts, truth in wanted:
                if left <= 0:
                    break
                found = decoder.greedy(prompts, TOKENS_GENERATED)
                shares.append(agreement(found, truth)[:left])
                left -= len(prompts)
            self.provider = decoder.provider
        return 1.0 - float(np.concatenate(shares).mean())

    def _generated(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Prompts with the reference's continuations."""
        if self._known is None:
            with Decoder(self._reference, self._provider) as decoder:
                found = [
                    (prompts, decoder.greedy(prompts, TOKENS_GENERATED))
                    for prompts in _prompts(self._data, self._part)
                ]
            if not found:
                raise MetricError(
                    f"metric {CONTINUATION!r}: no window of {self._data.source} begins with 2 tokens or more that are "
                    "no padding; give longer windows, padded on the right"
                )
            self._known = found
        return self._known


def agreement(found: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The share of each row's tokens [B, n] before the first that differs, [B]."""
    same = np.logical_and.accumulate(found == truth, axis=1)
    return np.asarray(same.mean(1))


def _prompts(data: Dataset, part: DataPart) -> Iterator[np.ndarray]:
    """Prompts [B, P] of the first windows of a part."""
    left = PROMPTS
    for batch in data.batches(part, PROMPTS):
        tokens, mask = tokens_of(batch, CONTINUATION), row_mask(batch)
        length = min(PROMPT, tokens.shape[1] // 2)
        if not length:
            continue
        real = np.ones(len(tokens), bool) if mask is None else mask[:, :length].all(1)
        prompts = tokens[real, :length][:left]
        if len(prompts):
            yield prompts
        left -= len(prompts)


def _likeliest(outputs: dict[str, np.ndarray], rows: int) -> np.ndarray:
    """The next token of each row [B] by the logits of the last one."""
    logits = outputs[logits_name(outputs, (rows,), CONTINUATION)][:, -1]
    if np.isnan(logits).any():
        raise MetricError(f"metric {CONTINUATION!r}: the logits are NaN on this data; check model and data")
    return logits.argmax(-1)
