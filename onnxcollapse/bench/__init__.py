# SPDX-License-Identifier: Apache-2.0
"""Latency: of models, and of the stretches of a model that a rewrite may change."""

from onnxcollapse.bench.bench import Settings, bench
from onnxcollapse.bench.inputs import Sizes
from onnxcollapse.bench.ratio import Ratio, ratio
from onnxcollapse.bench.report import BenchReport, Latency, Subject
from onnxcollapse.bench.stretch import StretchTimer
from onnxcollapse.bench.timing import Timing, interleaved

__all__ = [
    "BenchReport",
    "Latency",
    "Ratio",
    "Settings",
    "Sizes",
    "StretchTimer",
    "Subject",
    "Timing",
    "bench",
    "interleaved",
    "ratio",
]
