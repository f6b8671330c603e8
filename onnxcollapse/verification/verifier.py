# SPDX-License-Identifier: Apache-2.0
"""Measures candidates against one reference on the same data: the global gate."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from onnxcollapse.calibration.data import DataPart, Dataset
from onnxcollapse.calibration.masks import is_cache_name
from onnxcollapse.calibration.providers import Provider, chain
from onnxcollapse.calibration.sessions import Session, open_session
from onnxcollapse.model.model import Model
from onnxcollapse.verification import metrics

CACHE_BYTES = 256 << 20
"""Reference outputs up to this size are kept, larger ones computed again."""


class Verifier:
    """Measures candidates against one reference on the same data.

    The reference's outputs are kept where they are small, else its session is.

    Attributes:
        metric: Its metric's spec.
    """

    def __init__(
        self, reference: Model, data: Dataset, metric: str = "rel-l2", provider: str = "auto"
    ) -> None:
        """Prepares a verifier; the reference runs when it is first needed.

        Args:
            reference: The model the candidates come from.
            data: Data for it.
            metric: Metric spec.
            provider: See open_session; all models run on it.

        Raises:
            MetricError: The metric is unknown.
        """
        self.metric = metric
        metrics.metric(metric)
        self._reference = reference.clone()
        self._data, self._provider = data, provider
        self._session: Session | None = None
        self._cache: dict[tuple[DataPart, int | None], list[dict[str, np.ndarray]]] = {}
        self._cached_bytes = 0
        self._obtained: Provider | None = None

    @property
    def provider(self) -> Provider:
        """What models run on: as the last one did, or as one would."""
        return self._obtained or Provider(self._provider, chain(self._provider)[0])

    def error(self, model: Model, part: DataPart = "heldout", limit: int | None = None) -> float:
        """The metric's error of a candidate at its outputs.

        Args:
            model: The candidate.
            part: The part of the data.
            limit: About how many samples of it, None for all.

        Returns:
            The error; infinite when an output becomes NaN.

        Raises:
            MetricError: An output that is no KV cache is missing or has another shape.
            ModelError: The candidate cannot run.
        """
        result = metrics.metric(self.metric)
        wanted = self._wanted(model)
        with open_session(model, provider=self._provider, outputs=wanted) as session:
            for batch, reference in self._references(part, limit):
                result.update(session.run(batch), reference, batch)
            self._obtained = session.provider
        return result.value()

    def close(self) -> None:
        """Frees the reference's session and its outputs."""
        if self._session is not None:
            self._session.close()
        self._session = None
        self._cache.clear()
        self._cached_bytes = 0

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _wanted(self, model: Model) -> list[str] | None:
        """All outputs for a user's metric; what it takes to run without the caches for a built-in one."""
        names = [spec.name for spec in model.signature().outputs]
        if self.metric not in metrics.METRICS:
            return names
        return [name for name in names if not is_cache_name(name)] or names

    def _references(
        self, part: DataPart, limit: int | None
    ) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
        """Every batch with the reference's outputs, from memory where they are there."""
        key = (part, limit)
        if key in self._cache:
            yield from zip(self._data.batches(part, limit), self._cache[key], strict=True)
            return
        if self._session is None:
            wanted = self._wanted(self._reference)
            self._session = open_session(self._reference, provider=self._provider, outputs=wanted)
        kept: list[dict[str, np.ndarray]] | None = []
        size = 0
        for batch in self._data.batches(part, limit):
            outputs = self._session.run(batch)
            size += sum(getattr(array, "nbytes", 0) for array in outputs.values())
            if kept is not None and self._cached_bytes + size <= CACHE_BYTES:
                kept.append(outputs)
            else:
                kept = None
            yield batch, outputs
        if kept is not None:
            self._cache[key] = kept
            self._cached_bytes += size
