# SPDX-License-Identifier: Apache-2.0
"""Verification: how far a model's outputs are from another's on the same data."""

from __future__ import annotations

from onnxcollapse.verification.compare import Comparison, OutputComparison, compare
from onnxcollapse.verification.metrics import METRICS, Metric, metric
from onnxcollapse.verification.verifier import States, Verifier

__all__ = ["METRICS", "Comparison", "Metric", "OutputComparison", "States", "Verifier", "compare", "metric"]
