# SPDX-License-Identifier: Apache-2.0
"""Reading what a graph means: constants, Linears, FeedForward sites, ranges, the spine and its blocks."""

from __future__ import annotations

from onnxcollapse.structure.affine import Affine, affine_of, keeps_layout
from onnxcollapse.structure.building import build_linear
from onnxcollapse.structure.constants import (
    Folded,
    constant,
    constant_array,
    folded,
    is_overridable,
    is_shared,
    readers,
)
from onnxcollapse.structure.feedforward import FeedForward, feedforwards
from onnxcollapse.structure.linear import Linear, linear_at, linears
from onnxcollapse.structure.pointwise import ELEMENTWISE, Region, is_elementwise, region_behind
from onnxcollapse.structure.prelu import prelu_slope
from onnxcollapse.structure.refusal import Refusal

__all__ = [
    "ELEMENTWISE",
    "Affine",
    "FeedForward",
    "Folded",
    "Linear",
    "Refusal",
    "Region",
    "affine_of",
    "build_linear",
    "constant",
    "constant_array",
    "feedforwards",
    "folded",
    "is_elementwise",
    "is_overridable",
    "is_shared",
    "keeps_layout",
    "linear_at",
    "linears",
    "prelu_slope",
    "readers",
    "region_behind",
]
