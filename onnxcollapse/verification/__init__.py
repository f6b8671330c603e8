# SPDX-License-Identifier: Apache-2.0
"""Verification: how far a model's outputs are from another's on the same data."""

from __future__ import annotations

from onnxcollapse.verification.compare import Comparison, OutputComparison, compare
from onnxcollapse.verification.metrics import NAMES, Metric, metric
from onnxcollapse.verification.similarity import FinalState
from onnxcollapse.verification.sums import METRICS
from onnxcollapse.verification.trials import Outcome, Trials, Variant
from onnxcollapse.verification.verifier import Verifier

__all__ = [
    "METRICS",
    "NAMES",
    "Comparison",
    "FinalState",
    "Metric",
    "Outcome",
    "OutputComparison",
    "Trials",
    "Variant",
    "Verifier",
    "compare",
    "metric",
]
