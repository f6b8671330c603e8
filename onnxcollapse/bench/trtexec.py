# SPDX-License-Identifier: Apache-2.0
"""TensorRT's own timing tool, where it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from onnxcollapse.calibration.signature import data_signature
from onnxcollapse.errors import ModelError, OptionError
from onnxcollapse.model.model import Model

_MEDIAN = re.compile(r"GPU Compute Time:.*?median\s*=\s*([0-9.eE+-]+)\s*ms")
LINE = 200
"""Characters of its messages that are passed on."""


def find() -> str:
    """Where trtexec is.

    Raises:
        OptionError: It is not on the PATH.
    """
    found = shutil.which("trtexec")
    if found is None:
        raise OptionError(
            "--trtexec: there is no trtexec on the PATH; install TensorRT's tools or leave it out"
        )
    return found


def seconds(tool: str, path: Path, model: Model, feeds: Mapping[str, np.ndarray]) -> float:
    """Median seconds of the computation on the GPU, of an engine that trtexec builds from the file.

    Args:
        tool: See find.
        path: The .onnx file.
        model: The model in it.
        feeds: Arrays by input name; their shapes count.

    Raises:
        ModelError: trtexec fails, or does not tell.
    """
    command = [tool, f"--onnx={path}", *_shapes(model, feeds)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (found on PATH)
    except OSError as error:
        raise ModelError(f"{tool} cannot be started: {error.strerror}; install it again") from error
    if done.returncode:
        raise ModelError(
            f"trtexec cannot run {path}: {_reason(done.stdout + done.stderr)}; leave --trtexec out"
        )
    found = median(done.stdout)
    if found is None:
        raise ModelError(
            f"trtexec told no median GPU Compute Time of {path}; install a release of TensorRT 8 to 10"
        )
    return found


def median(text: str) -> float | None:
    """The median GPU compute time in what trtexec prints, in seconds."""
    found = _MEDIAN.findall(text)
    return float(found[-1]) / 1000 if found else None


def _shapes(model: Model, feeds: Mapping[str, np.ndarray]) -> list[str]:
    """The option for shapes, which trtexec takes of inputs with free dimensions only."""
    free = [
        spec.name
        for spec in data_signature(model).inputs
        if any(not isinstance(dim, int) for dim in spec.shape or (None,))
    ]
    pairs = [f"{name}:{'x'.join(map(str, feeds[name].shape))}" for name in free]
    return [f"--shapes={','.join(pairs)}"] if pairs else []


def _reason(text: str) -> str:
    """Its first line of an error, else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "[E]" in line]
    return (errors[:1] or lines[-1:] or ["it says nothing"])[0][-LINE:]
