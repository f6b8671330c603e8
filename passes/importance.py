# SPDX-License-Identifier: Apache-2.0
"""What errors of a Linear's outputs count for the hidden layer that they feed."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from scipy import special

from onnxcollapse.calibration.statistics import GramMatrix
from onnxcollapse.model import Model
from onnxcollapse.structure import HiddenLayer, hidden_layer_at, prelu_slope

FARTHEST = 8
"""Nodes between two hidden layers of a chain."""


def hidden_behind(model: Model, output: ir.Value) -> HiddenLayer | None:
    """The hidden layer whose only source has this output: a few elementwise nodes lie up to its consumer."""
    waiting, seen = [(output, FARTHEST)], {output}
    while waiting:
        value, left = waiting.pop(0)
        for node in value.consumers() if left else ():
            for made in (x for x in node.outputs if x not in seen):
                seen.add(made)
                found = hidden_layer_at(model.graph, made.name or "")
                if found is not None and [source.output for source in found.sources] == [output]:
                    return found
                waiting.append((made, left - 1))
    return None


def importance(after: HiddenLayer, gram: GramMatrix) -> np.ndarray | None:
    """What an error of each pre-activation counts for the layer behind it, float64 [width of that layer].

    A neuron hands on its error where it is on, times its outgoing weights: P(z > 0) |W[j,:]|^2, the probability that
    of a normal z with the moments of the last tensor of `gram`; 1 if the activation is no ReLU. None if nothing counts.
    """
    weights = np.square(after.matrix()).reshape(after.width, -1).sum(1)
    slopes = [slope for node in after.region if (slope := prelu_slope(node)) is not None]
    if len(slopes) != 1 or np.any(slopes[0]):
        return weights if np.any(weights) else None
    place = len(gram.widths)
    mean, columns = gram.mean(place), gram.columns(place)
    second = gram.matrix[columns, columns] / max(gram.count, 1.0)
    deviation = np.sqrt(np.maximum(second - np.square(mean), 1e-30))
    found = weights * special.ndtr(mean / deviation)
    return found if np.any(found) else None
