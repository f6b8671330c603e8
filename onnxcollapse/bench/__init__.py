# SPDX-License-Identifier: Apache-2.0
"""Latency: of models, and of the stretches of a model that a rewrite may change."""

from onnxcollapse.bench.stretch import StretchTimer
from onnxcollapse.bench.timing import Timing, interleaved

__all__ = ["StretchTimer", "Timing", "interleaved"]
