# SPDX-License-Identifier: Apache-2.0
"""A model's inputs as data sees them."""

from __future__ import annotations

from dataclasses import replace

from onnxcollapse.model.model import Model, Signature, TensorSpec


def data_signature(model: Model) -> Signature:
    """The signature with dimensions of -1, which some exporters write for free ones, as None."""
    signature = model.signature()
    return replace(
        signature,
        inputs=tuple(_freed(spec) for spec in signature.inputs),
        overridable=tuple(_freed(spec) for spec in signature.overridable),
    )


def _freed(spec: TensorSpec) -> TensorSpec:
    if spec.shape is None:
        return spec
    return replace(spec, shape=tuple(None if isinstance(dim, int) and dim < 0 else dim for dim in spec.shape))
