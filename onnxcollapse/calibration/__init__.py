# SPDX-License-Identifier: Apache-2.0
"""Calibration: data, sessions, and statistics that are summed where the model runs."""

from __future__ import annotations

from onnxcollapse.calibration.collector import Progress, Sweep, collect
from onnxcollapse.calibration.data import Dataset, open_data
from onnxcollapse.calibration.leastsquares import (
    LinearFit,
    linear_error,
    rank_path,
    relative_error,
    ridge_fit,
)
from onnxcollapse.calibration.planner import Plan, parse_memory, plan
from onnxcollapse.calibration.providers import Provider, available_providers
from onnxcollapse.calibration.segments import cut_points
from onnxcollapse.calibration.sessions import Session, open_session
from onnxcollapse.calibration.statistics import (
    Cosine,
    CosineMean,
    Cross,
    CrossMoments,
    Gram,
    GramMatrix,
    Moments,
    MomentSums,
    Patches,
    Ref,
    Request,
    Statistics,
)
from onnxcollapse.calibration.store import Store
from onnxcollapse.calibration.subset import SubsetFit, eliminate, refit_subset

__all__ = [
    "Cosine",
    "CosineMean",
    "Cross",
    "CrossMoments",
    "Dataset",
    "Gram",
    "GramMatrix",
    "LinearFit",
    "MomentSums",
    "Moments",
    "Patches",
    "Plan",
    "Progress",
    "Provider",
    "Ref",
    "Request",
    "Session",
    "Statistics",
    "Store",
    "SubsetFit",
    "Sweep",
    "available_providers",
    "collect",
    "cut_points",
    "eliminate",
    "linear_error",
    "open_data",
    "open_session",
    "parse_memory",
    "plan",
    "rank_path",
    "refit_subset",
    "relative_error",
    "ridge_fit",
]
