# SPDX-License-Identifier: Apache-2.0
"""A decoder of 6.6 GB through the command line: peak memory, and time and memory of each layer.

    python -m benchmarks.large_model -o out
    python -m benchmarks.large_model -o out --memory 2.2GB --layers 30

The weights are random (`models.synthetic_decoder`), so nothing can be saved and nothing is said of accuracy: this is
about time and memory alone. Seconds and resident memory are those that the command logs for each segment it runs.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine

_SEGMENT = re.compile(r"segment (\d+) of (\d+): ([\d.]+) s, peak resident (\d+) MB")
PASSES = ("cleanup", "tie-weights", "fold-affine", "collapse-ffn")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the model")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--memory", default="2.2GB", help="passed to the command")
    args = parser.parse_args(arguments)
    folder = args.output / f"decoder{args.layers}"
    subprocess.run(
        [sys.executable, "-m", "models.synthetic_decoder", "-o", str(folder), "--layers", str(args.layers)],
        check=True,
    )
    row = {"layers": args.layers, "memory": args.memory, **_optimize(folder, args.memory)}
    print(json.dumps(row))
    print(machine.write("large_model", [row]))
    return 0


def _optimize(folder: Path, memory: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "onnxcollapse", "optimize", str(folder / "model.onnx"),
               "-o", str(folder / "small.onnx"), "--calib", str(folder / "calib.npz"), "--memory", memory,
               "--provider", "cpu", "--json", "-vv"]  # fmt: skip
    command += [word for name in PASSES for word in ("--pass", name)]
    began = time.perf_counter()
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    summary = json.loads(done.stdout)
    weights = sum(path.stat().st_size for path in folder.glob("model.onnx*"))
    return {
        "weights_gib": round(weights / 2**30, 2),
        "seconds": round(time.perf_counter() - began, 1),
        "peak_rss_mib": summary["peak_rss_bytes"] >> 20,
        "kept": len(summary["rewrites"]),
        "declined": len(summary["declined"]),
        **_by_layer(done.stderr),
    }


def _by_layer(log: str) -> dict[str, Any]:
    """Median seconds of each segment over all runs of it; peak resident memory when it had first run."""
    seconds: dict[int, list[float]] = {}
    peaks: dict[int, int] = {}
    for match in _SEGMENT.finditer(log):
        place = int(match[1])
        seconds.setdefault(place, []).append(float(match[3]))
        peaks.setdefault(place, int(match[4]))
    return {
        "segment_seconds": [round(statistics.median(seconds[place]), 2) for place in sorted(seconds)],
        "segment_peak_rss_mib": [peaks[place] for place in sorted(peaks)],
    }


if __name__ == "__main__":
    sys.exit(main())
