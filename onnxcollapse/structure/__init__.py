# SPDX-License-Identifier: Apache-2.0
"""Reading what a graph means: constants, Linears, FeedForward sites, ranges, the spine and its blocks."""

from __future__ import annotations

from onnxcollapse.structure.affine import Affine, affine_of, keeps_layout
from onnxcollapse.structure.blocks import Block, blocks, layers
from onnxcollapse.structure.building import build_convolution, build_linear
from onnxcollapse.structure.constants import (
    Folded,
    constant,
    constant_array,
    folded,
    is_op,
    is_overridable,
    is_shared,
    readers,
)
from onnxcollapse.structure.convolution import Convolution, Window, convolution_at
from onnxcollapse.structure.feedforward import FeedForward, feedforwards
from onnxcollapse.structure.hidden import HiddenLayer, hidden_layer_at, hidden_layers, operator_of
from onnxcollapse.structure.linear import Linear, linear_at, linears
from onnxcollapse.structure.narrowing import narrow
from onnxcollapse.structure.pointwise import ELEMENTWISE, Region, is_elementwise, region_behind
from onnxcollapse.structure.prelu import prelu_slope
from onnxcollapse.structure.ranges import Ranges, ranges
from onnxcollapse.structure.refusal import Refusal
from onnxcollapse.structure.spine import main_output, spine

__all__ = [
    "ELEMENTWISE",
    "Affine",
    "Block",
    "Convolution",
    "FeedForward",
    "Folded",
    "HiddenLayer",
    "Linear",
    "Ranges",
    "Refusal",
    "Region",
    "Window",
    "affine_of",
    "blocks",
    "build_convolution",
    "build_linear",
    "constant",
    "constant_array",
    "convolution_at",
    "feedforwards",
    "folded",
    "hidden_layer_at",
    "hidden_layers",
    "is_elementwise",
    "is_op",
    "is_overridable",
    "is_shared",
    "keeps_layout",
    "layers",
    "linear_at",
    "linears",
    "main_output",
    "narrow",
    "operator_of",
    "prelu_slope",
    "ranges",
    "readers",
    "region_behind",
    "spine",
]
