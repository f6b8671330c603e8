# SPDX-License-Identifier: Apache-2.0
"""What shared weights save where a model is stored and where it runs, measured."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from onnxcollapse.bench.footprint import measure
from onnxcollapse.calibration import Dataset
from onnxcollapse.errors import OnnxCollapseError
from onnxcollapse.model import Model, size

logger = logging.getLogger(__name__)


def shared_weights(original: Model, work: Model, data: Dataset | None, provider: str) -> str:
    """Says what a model with shared weights takes on disk and in memory, the latter measured in processes of their own.

    A runtime need not hold only once what is stored once.

    Args:
        original: The model before.
        work: The model now.
        data: Of which one sample is run; None to leave memory out, as where the models do not fit in it whole.
        provider: Where.
    """
    stored = _change(size(original).bytes, size(work).bytes)
    said = f"weights that blocks share are stored once: weights take {stored}"
    before = None if data is None else _resident(original, data, provider)
    after = None if data is None or before is None else _resident(work, data, provider)
    if before is not None and after is not None:
        said += f", a session that has run once {_change(before, after)} of memory"
    return f"{said}; FLOPs stay"


def _resident(model: Model, data: Dataset, provider: str) -> int | None:
    """Bytes of resident memory; None where that cannot be measured, which is no reason to lose a result."""
    try:
        with tempfile.TemporaryDirectory(prefix="onnxcollapse-") as folder:
            path = Path(folder) / "model.onnx"
            model.save(path)
            names = {spec.name for spec in model.signature().inputs}
            feeds = next(iter(data.batches("all", limit=1)))
            fed = {name: array for name, array in feeds.items() if name in names}
            return measure(path, fed, provider).resident_bytes
    except (OnnxCollapseError, OSError) as problem:
        logger.info("resident memory is not measured: %s", problem)
        return None


def _change(before: int, after: int) -> str:
    unit, name = (1e6, "MB") if max(before, after) >= 1e6 else (1e3, "kB")
    return f"{after / unit:.1f} {name} instead of {before / unit:.1f}"
