# SPDX-License-Identifier: Apache-2.0
"""Makes ONNX models structurally smaller and faster before deployment, without training.

>>> from onnxcollapse import Budget, Model, open_data, optimize
>>> model = Model.load("model.onnx")
>>> result = optimize(model, open_data("calib.npz", model), budget=Budget(0.01))
>>> result.model.save("small.onnx")
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from onnxcollapse.errors import OnnxCollapseError

if TYPE_CHECKING:
    from onnxcollapse.calibration import open_data
    from onnxcollapse.model import Model
    from onnxcollapse.rewriting import Budget, Decline, Pass, Proposal, Saving, Target
    from onnxcollapse.rewriting.analysis import Analysis, analyze
    from onnxcollapse.rewriting.frontier import frontier
    from onnxcollapse.rewriting.pipeline import Result, optimize
    from onnxcollapse.verification import compare

# From 1.29 on ONNX Runtime reports what models it opens to its makers unless it is told not to before it is loaded,
# and leaves a file in the temporary folder for that. What the user's environment says has precedence.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOMES = {
    "Analysis": "onnxcollapse.rewriting.analysis",
    "Budget": "onnxcollapse.rewriting",
    "Decline": "onnxcollapse.rewriting",
    "Model": "onnxcollapse.model",
    "Pass": "onnxcollapse.rewriting",
    "Proposal": "onnxcollapse.rewriting",
    "Result": "onnxcollapse.rewriting.pipeline",
    "Saving": "onnxcollapse.rewriting",
    "Target": "onnxcollapse.rewriting",
    "analyze": "onnxcollapse.rewriting.analysis",
    "compare": "onnxcollapse.verification",
    "frontier": "onnxcollapse.rewriting.frontier",
    "open_data": "onnxcollapse.calibration",
    "optimize": "onnxcollapse.rewriting.pipeline",
}

__all__ = [
    "Analysis",
    "Budget",
    "Decline",
    "Model",
    "OnnxCollapseError",
    "Pass",
    "Proposal",
    "Result",
    "Saving",
    "Target",
    "analyze",
    "compare",
    "frontier",
    "open_data",
    "optimize",
]


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that ``import onnxcollapse`` stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'onnxcollapse' has no attribute '{name}'")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
