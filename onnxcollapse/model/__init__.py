# SPDX-License-Identifier: Apache-2.0
"""Models: loaded without their weights, edited, counted and saved in one piece."""

from onnxcollapse.model.counts import Size, flops, size
from onnxcollapse.model.model import Model, Signature, TensorSpec
from onnxcollapse.model.provenance import record
from onnxcollapse.model.skeleton import Skeleton

__all__ = ["Model", "Signature", "Size", "Skeleton", "TensorSpec", "flops", "record", "size"]
