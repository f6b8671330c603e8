# SPDX-License-Identifier: Apache-2.0
"""The machine that a result was measured on, and where results go."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
_PACKAGES = ("onnxcollapse", "onnx", "onnx-ir", "onnxruntime-gpu", "numpy", "scipy")


def describe() -> dict[str, Any]:
    """Processor, cores, memory, the GPU where there is one, and the versions that matter."""
    return {
        "processor": _processor(),
        **({} if (gpu := _gpu()) is None else {"gpu": gpu}),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.partition(":")[2].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        if names:
            return names[0]
    return platform.processor() or platform.machine()


def _gpu() -> str | None:
    """The first GPU's name and driver, as nvidia-smi tells."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)
    return next(iter(done.stdout.strip().splitlines()), None) if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def read(name: str) -> list[dict[str, Any]]:
    """The rows of ``benchmarks/results/NAME.json``; none where it is not there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []


def write(name: str, rows: list[dict[str, Any]]) -> Path:
    """Writes rows with the machine to ``benchmarks/results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": describe(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return path
