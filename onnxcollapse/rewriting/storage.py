# SPDX-License-Identifier: Apache-2.0
"""What shared weights save where a model is stored and where it runs, measured."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from onnxcollapse.bench.footprint import file_bytes, measure
from onnxcollapse.calibration import Dataset
from onnxcollapse.errors import OnnxCollapseError
from onnxcollapse.model import Model

logger = logging.getLogger(__name__)


def shared_weights(original: Model, work: Model, data: Dataset, provider: str) -> str:
    """Says what a model with shared weights takes on disk and in memory, each measured in a process of its own.

    A runtime need not hold what is stored once only once: ONNX Runtime's CPU provider packs the weights of each
    product anew.

    Args:
        original: The model before.
        work: The model now.
        data: Of which one sample is run.
        provider: Where.
    """
    before, after = (_footprint(model, data, provider) for model in (original, work))
    files = f"weights that blocks share are stored once: the files take {_megabytes(before[0], after[0])}"
    if before[1] is None or after[1] is None:
        return f"{files}; FLOPs stay; resident memory could not be measured"
    return f"{files}, a session that has run once {_megabytes(before[1], after[1])} of memory; FLOPs stay"


def _footprint(model: Model, data: Dataset, provider: str) -> tuple[int, int | None]:
    """Bytes of the files, and of resident memory where that can be measured."""
    with tempfile.TemporaryDirectory(prefix="onnxcollapse-") as folder:
        path = Path(folder) / "model.onnx"
        model.save(path)
        size = file_bytes(Model.load(path))
        names = {spec.name for spec in model.signature().inputs}
        feeds = {name: a for name, a in next(iter(data.batches("all", limit=1))).items() if name in names}
        try:
            return size, measure(path, feeds, provider).resident_bytes
        except OnnxCollapseError as problem:
            logger.info("%s", problem)
            return size, None


def _megabytes(before: int, after: int) -> str:
    return f"{after / 1e6:.1f} MB instead of {before / 1e6:.1f}"
