# SPDX-License-Identifier: Apache-2.0
"""How alike the final state of a model is to that of the one it was made from."""

from __future__ import annotations

import numpy as np

from onnxcollapse.calibration.data import Dataset
from onnxcollapse.calibration.walk import Walk
from onnxcollapse.errors import ModelError
from onnxcollapse.model import Model
from onnxcollapse.structure import layers, spine

SAMPLES = 16
"""Samples that states are compared on; the paper takes ten."""


class FinalState:
    """Compares final states, what the head of a model reads: the last tensor on the spine as wide as the stream.

    Args:
        reference: The original; not to be edited before the last comparison.
        data: Of which the first samples of the fit part are used.
        provider: See open_session.
    """

    def __init__(self, reference: Model, data: Dataset, provider: str = "auto") -> None:
        self._reference, self._data, self._provider = reference, data, provider
        self._states: list[np.ndarray] | None = None
        self._name = ""

    def __call__(self, model: Model) -> float:
        """Mean over samples of the cosine between the flattened states (as LaCo's code takes it).

        Raises:
            ModelError: The model has no layers, or does not run.
        """
        if self._states is None:
            self._name = final_state(self._reference)
            self._states = self._run(self._reference)
        found = [
            _cosine(a, b)
            for mine, theirs in zip(self._run(model), self._states, strict=True)
            for a, b in zip(mine, theirs, strict=True)
        ]
        return float(np.mean(found))

    def _run(self, model: Model) -> list[np.ndarray]:
        walk = Walk(model, self._data, parts=["fit"], limit=SAMPLES, provider=self._provider)
        try:
            return [step.outputs[self._name] for step in walk.pass_through(wanted=[self._name], hold=False)]
        finally:
            walk.close()


def final_state(model: Model) -> str:
    """Name of the last tensor on the spine that is as wide as the layers' stream.

    Raises:
        ModelError: The model has no layers.
    """
    runs = layers(model.graph)
    if not runs:
        raise ModelError("the model has no layers whose final state could be compared; use another search")
    end = max(runs, key=len)[-1].end
    width = None if end.shape is None else str(end.shape[-1])
    alike = [v for v in spine(model.graph) if v.shape is not None and str(v.shape[-1]) == width]
    return (alike[-1] if alike else end).name or ""


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    x, y = a.reshape(-1).astype(np.float64), b.reshape(-1).astype(np.float64)
    norms = float(np.linalg.norm(x) * np.linalg.norm(y))
    return float(x @ y) / norms if norms > 0 else 0.0
