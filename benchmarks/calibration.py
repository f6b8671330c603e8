# SPDX-License-Identifier: Apache-2.0
"""What statistics cost: time against one plain forward run of the same data, and peak memory.

    python -m benchmarks.calibration -o out                       # SmolLM2-135M, 64 x 256 tokens
    python -m benchmarks.calibration -o out --samples 16

Each measurement runs in a process of its own, so that its peak resident memory is its own. `collapse` asks for what
collapse-ffn needs of every feed-forward block (features x, targets y), `subset` for what subset-and-refit needs as well
(features x and hidden activations, targets y). `whole` runs the model in one session, `segments` layer by layer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from onnxcollapse.calibration import Dataset, Gram, Ref, Sweep, cut_points, open_data, open_session
from onnxcollapse.calibration.planner import peak_resident
from onnxcollapse.model import Model
from onnxcollapse.structure import FeedForward, feedforwards

KINDS = ("forward", "collapse whole", "collapse segments", "subset segments")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the model")
    parser.add_argument("--samples", type=int, default=64, help="windows of 256 tokens")
    parser.add_argument("--one", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    folder = args.output / "smollm2"
    if args.one:
        print(json.dumps(measure(args.one, folder, args.samples)))
        return 0
    subprocess.run([sys.executable, "-m", "models.smollm2", "-o", str(folder)], check=True)
    rows = []
    for kind in (*KINDS, "forward"):  # the forward run twice, before and after: the machine is noisy
        command = [sys.executable, "-m", "benchmarks.calibration", "-o", str(args.output), "--one", kind]
        done = subprocess.run(
            [*command, "--samples", str(args.samples)], check=True, stdout=subprocess.PIPE, text=True
        )
        rows.append(json.loads(done.stdout))
        print(json.dumps(rows[-1]), flush=True)
    forward = float(np.mean([row["seconds"] for row in rows if row["kind"] == "forward"]))
    for row in rows:
        row["ratio"] = round(row["seconds"] / forward, 2)
    print(machine.write("calibration", rows))
    return 0


def measure(kind: str, folder: Path, samples: int) -> dict[str, Any]:
    """Runs one measurement in this process."""
    model = Model.load(folder)
    with np.load(folder / "calib.npz") as arrays:
        data = open_data({name: arrays[name][:samples] for name in arrays.files}, model)
    began = time.perf_counter()
    if kind == "forward":
        _forward(model, data)
    else:
        _statistics(model, data, kind)
    return {
        "kind": kind,
        "samples": samples,
        "seconds": round(time.perf_counter() - began, 2),
        "peak_rss_mib": peak_resident() >> 20,
    }


def _forward(model: Model, data: Dataset) -> None:
    with open_session(model, provider="cpu", outputs=["logits"]) as session:
        for batch in data.batches("all"):
            session.run(batch)


def _statistics(model: Model, data: Dataset, kind: str) -> None:
    sites, _ = feedforwards(model.graph)
    requests = [_request(site, hidden=kind.startswith("subset")) for site in sites]
    cuts = cut_points(model.graph) if kind.endswith("segments") else []
    for _, statistics in Sweep(model, requests, data, provider="cpu", cuts=cuts):
        del statistics  # a pass would read it here; nothing keeps it


def _request(site: FeedForward, *, hidden: bool) -> Gram:
    features = [Ref(site.input.name or "")]
    if hidden:
        features.append(Ref(site.hidden.name or ""))
    return Gram(tuple(features), (Ref(site.output.name or ""),))


if __name__ == "__main__":
    sys.exit(main())
