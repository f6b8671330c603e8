# SPDX-License-Identifier: Apache-2.0
"""What a model takes to be ready: seconds and memory, measured in a process of its own.

A child for each model, because memory that one session has given back stays with its process and is used again by the
next, and because the libraries, once loaded, are there for all: in one process the second of two equal models seems to
need less than the first.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from onnxcollapse.bench.inputs import explained
from onnxcollapse.calibration.planner import peak_resident
from onnxcollapse.calibration.providers import CUDA, TENSORRT, chain
from onnxcollapse.calibration.sessions import open_file
from onnxcollapse.errors import ModelError, OnnxCollapseError
from onnxcollapse.model import Model, walk
from onnxcollapse.model.source import FileTensor


@dataclass(frozen=True)
class Footprint:
    """What opening a session and running it once takes.

    Attributes:
        session_seconds: How long the session takes to open.
        resident_bytes: By how much that and the first run make resident memory grow, mapped weights included.
        device_bytes: Device memory of the process after the first run, the provider's context included; None where
            none is used or nvidia-smi does not tell.
    """

    session_seconds: float
    resident_bytes: int
    device_bytes: int | None


def file_bytes(model: Model) -> int:
    """Bytes of a model's file and of the files that its weights lie in."""
    tensors = [value.const_value for graph in walk.graphs(model.ir) for value in graph.initializers.values()]
    files = {tensor.source.path.absolute() for tensor in tensors if isinstance(tensor, FileTensor)}
    own = set() if model.path is None else {model.path.absolute()}
    return sum(path.stat().st_size for path in files | own)


def measure(
    path: Path, feeds: Mapping[str, np.ndarray], provider: str, threads: int | None = None
) -> Footprint:
    """Measures a model in a fresh process.

    Args:
        path: The .onnx file.
        feeds: What the first run is on.
        provider: See open_session.
        threads: See open_file.

    Raises:
        ModelError: The process cannot open or run the model.
    """
    with tempfile.TemporaryDirectory(prefix="onnxcollapse-") as folder:
        given, made = Path(folder) / "feeds.npz", Path(folder) / "footprint.json"
        np.savez(given, *feeds.values())  # without names: an input may be called "file"
        names = json.dumps(list(feeds))
        command = [
            sys.executable,
            "-P",
            "-c",
            f"import {__name__} as child; child.main()",
            str(path),
            provider,
            str(threads or 0),
            names,
        ]
        done = subprocess.run(  # noqa: S603 (this interpreter and this module)
            [*command, str(given), str(made)], capture_output=True, text=True, check=False
        )
        if not made.exists():
            reason = next(iter(done.stderr.strip().splitlines()[-1:]), f"it ended with {done.returncode}")
            raise ModelError(f"the memory of {path} cannot be measured: {reason}; try --no-footprint")
        found = json.loads(made.read_text())
    if "error" in found:
        raise ModelError(found["error"])
    return Footprint(**found)


def _here(path: Path, feeds: Mapping[str, np.ndarray], provider: str, threads: int | None) -> Footprint:
    """Measures in this process."""
    chain(provider)  # libraries and contexts are there before anything is measured
    before, began = _resident(), time.perf_counter()
    with open_file(path, provider, threads) as session:
        seconds = time.perf_counter() - began
        with explained(str(path), feeds):
            session.prepared(feeds)()
        grown = _resident() - before
        on_device = session.provider.obtained in (CUDA, TENSORRT)
        return Footprint(seconds, grown, _device_bytes() if on_device else None)


def _resident() -> int:
    """Resident memory of this process; its peak where the platform tells no more.

    What the allocator has been given back and keeps is handed to the system first: with it, equal models differ.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return peak_resident()


def _device_bytes() -> int | None:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)  # noqa: S603 (found on PATH)
    return parse_apps(done.stdout, os.getpid())


def parse_apps(text: str, process: int) -> int | None:
    """Bytes of a process in nvidia-smi's table of pid and MiB; None where it is not there or not told."""
    rows = [[cell.strip() for cell in line.split(",")] for line in text.splitlines()]
    told = [int(row[1]) for row in rows if len(row) == 2 and row[0] == str(process) and row[1].isdigit()]
    return sum(told) << 20 if told else None


def main() -> None:
    """Measures what the command line says and writes it to a file."""
    path, provider, threads, names, given, made = sys.argv[1:]
    with np.load(given) as arrays:
        feeds = dict(zip(json.loads(names), (arrays[name] for name in arrays.files), strict=True))
    try:
        found = asdict(_here(Path(path), feeds, provider, int(threads) or None))
    except OnnxCollapseError as error:
        found = {"error": str(error)}
    Path(made).write_text(json.dumps(found))
