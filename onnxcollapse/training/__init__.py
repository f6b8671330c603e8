# SPDX-License-Identifier: Apache-2.0
"""Training kit of LayerCollapse (arXiv 2311.17943): swap activations for PReLUs, drive them to the identity.

The loop stays the user's own. Before it: `swap_activations` and an optimizer over `parameter_groups`. In
it: add `Schedule(...)(progress) * collapse_penalty(...)` to the loss (or call `pull_alphas` after the
step). After it: look at `alpha_report`, export to ONNX, and let the collapse-ffn pass fold what is near
enough to linear.
"""

from __future__ import annotations

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise ImportError("onnxcollapse.training needs torch: pip install 'onnxcollapse[train]'") from error

from onnxcollapse.training.distill import distillation_loss
from onnxcollapse.training.prelu import OneParameterPReLU, activations, swap_activations
from onnxcollapse.training.regularizer import (
    AlphaRow,
    Schedule,
    alpha_report,
    collapse_penalty,
    parameter_groups,
    pull_alphas,
)

__all__ = [
    "AlphaRow",
    "OneParameterPReLU",
    "Schedule",
    "activations",
    "alpha_report",
    "collapse_penalty",
    "distillation_loss",
    "parameter_groups",
    "pull_alphas",
    "swap_activations",
]
