# SPDX-License-Identifier: Apache-2.0
"""What statistics cost: time against one plain forward run of the same data, and peak memory.

    python -m benchmarks.calibration -o out                       # SmolLM2-135M, 64 x 256 tokens
    python -m benchmarks.calibration -o out --samples 16

Each measurement runs in a process of its own, so that its peak resident memory is its own. `collapse` asks for what
collapse-ffn needs of every feed-forward block (features x, targets y), `subset` for what subset-and-refit needs as well
(features x and hidden activations, targets y). `whole` runs the model in one session, `segments` layer by layer.
`accuracy` compares the sums of one block, gathered in fp32 on the device and read out every so many batches, with the
same in fp64: the largest |G - G64| / sqrt(diag G64 diag G64) over centred columns.
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
from onnxcollapse.calibration import (
    Dataset,
    Gram,
    Ref,
    Sweep,
    collect,
    collector,
    cut_points,
    open_data,
    open_session,
)
from onnxcollapse.calibration.planner import peak_resident
from onnxcollapse.model import Model
from onnxcollapse.structure import FeedForward, feedforwards

KINDS = ("forward", "collapse whole", "collapse segments", "subset segments", "accuracy")
READ_OUTS = (1, collector.READ_OUT, 1_000)


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
    for kind in (*KINDS[:-1], "forward", KINDS[-1]):  # forward before and after: the machine is noisy
        command = [sys.executable, "-m", "benchmarks.calibration", "-o", str(args.output), "--one", kind]
        done = subprocess.run(
            [*command, "--samples", str(args.samples)], check=True, stdout=subprocess.PIPE, text=True
        )
        rows.append(json.loads(done.stdout))
        print(json.dumps(rows[-1]), flush=True)
    forward = float(np.mean([row["seconds"] for row in rows if row["kind"] == "forward"]))
    for row in (row for row in rows if row["kind"] != "accuracy"):
        row["ratio"] = round(row["seconds"] / forward, 2)
    print(machine.write("calibration", rows))
    return 0


def measure(kind: str, folder: Path, samples: int) -> dict[str, Any]:
    """Runs one measurement in this process."""
    model = Model.load(folder)
    with np.load(folder / "calib.npz") as arrays:
        data = open_data({name: arrays[name][:samples] for name in arrays.files}, model)
    if kind == "accuracy":
        return {"kind": kind, "samples": samples, **_accuracy(model, data)}
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


def _accuracy(model: Model, data: Dataset) -> dict[str, float]:
    """The largest error of the sums of the middle block, by batches between two read-outs."""
    sites, _ = feedforwards(model.graph)
    request = _request(sites[len(sites) // 2], hidden=True)
    rows = []
    with open_session(model, provider="cpu", outputs=[ref.value for ref in request.refs]) as session:
        for batch in data.batches("fit"):
            outputs = session.run(batch)
            parts = [outputs[ref.value].reshape(-1, outputs[ref.value].shape[-1]) for ref in request.refs]
            rows.append(np.concatenate(parts, axis=1))
    centred = np.concatenate(rows).astype(np.float64)
    centred -= centred.mean(0)
    exact = centred.T @ centred / len(centred)
    scale = np.sqrt(np.outer(np.diag(exact), np.diag(exact)))
    errors = {}
    for every in READ_OUTS:
        collector.READ_OUT = every
        sums = collect(model, [request], data, provider="cpu", parts=["fit"]).fit(request)
        mean = sums.matrix[0, 1:] / sums.count
        covariance = sums.matrix[1:, 1:] / sums.count - np.outer(mean, mean)
        errors[f"every {every} batches"] = float(np.max(np.abs(covariance - exact) / scale))
    return errors


def _request(site: FeedForward, *, hidden: bool) -> Gram:
    features = [Ref(site.input.name or "")]
    if hidden:
        features.append(Ref(site.hidden.name or ""))
    return Gram(tuple(features), (Ref(site.output.name or ""),))


if __name__ == "__main__":
    sys.exit(main())
