# SPDX-License-Identifier: Apache-2.0
"""Whether `onnxcollapse bench` can be believed: a model against itself, and against half of itself.

    python -m benchmarks.bench_check -o out
    python -m benchmarks.bench_check -o out --provider cuda --width 1024 --batch 4096

A model against itself has a ratio of 1, and of 20 intervals of 95 % at least 19 should hold it. Half its layers should
take what half its FLOPs say, within 10 %. The model is a stack of feed-forward layers, on a batch that makes it bound
by arithmetic. One thread by default: on a machine that is shared, two wait for each other when one of them has lost
its processor, and what is measured then is the scheduler (`--threads`). A GPU needs larger sizes, and
its rows go to `benchmarks/results/bench_check_cuda.json`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save

from benchmarks import machine
from onnxcollapse.bench import Latency, Settings, Sizes, bench
from onnxcollapse.model import Model
from onnxcollapse.model.counts import flops

LAYERS, WIDTH, BATCH = 12, 256, 256
LEAST_HELD, DEVIATION = 0.95, 0.1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns 1 where one of the two does not hold."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for the models")
    parser.add_argument("--runs", type=int, default=20, help="of the model against itself")
    parser.add_argument("--threads", type=int, default=1, help="of one operator")
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--width", type=int, default=WIDTH, help="of the stack; its blocks are four times as wide"
    )
    parser.add_argument("--batch", type=int, default=BATCH, help="samples")
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    whole, half = (build(args.output, layers, args.width) for layers in (LAYERS, LAYERS // 2))
    threads = args.threads if args.provider == "cpu" else None
    settings = Settings(args.provider, threads, footprint=False)
    rows = []
    for seed in range(args.runs):
        rows.append(against(whole, whole, 1.0, args.batch, replace(settings, seed=seed)))
        print(json.dumps(rows[-1]), flush=True)
    share = _flops(half) / _flops(whole)
    rows.append(against(whole, half, share, args.batch, settings))
    print(json.dumps(rows[-1]), flush=True)
    held = sum(row["holds"] for row in rows[:-1])
    print(
        f"{held} of {args.runs} intervals hold 1; half the layers: {rows[-1]['ratio']:.3f} for {share:.3f} of the FLOPs"
    )
    print(machine.write("bench_check" if args.provider == "cpu" else f"bench_check_{args.provider}", rows))
    return int(held < LEAST_HELD * args.runs or abs(rows[-1]["ratio"] / share - 1) > DEVIATION)


def build(folder: Path, layers: int, width: int = WIDTH) -> Path:
    """Writes a stack of layers h += W2 relu(W1 h)."""
    random, nodes, weights, value = np.random.default_rng(0), [], [], "x"
    for layer in range(layers):
        for name, shape in (("up", (width, 4 * width)), ("down", (4 * width, width))):
            matrix = random.normal(size=shape) / shape[0] ** 0.5
            weights.append(numpy_helper.from_array(matrix.astype(np.float32), f"{name}{layer}"))
        nodes += [
            helper.make_node("MatMul", [value, f"up{layer}"], [f"z{layer}"]),
            helper.make_node("Relu", [f"z{layer}"], [f"a{layer}"]),
            helper.make_node("MatMul", [f"a{layer}", f"down{layer}"], [f"u{layer}"]),
            helper.make_node("Add", [value, f"u{layer}"], [f"h{layer}"]),
        ]
        value = f"h{layer}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", width]) for name in ("x", value)]
    graph = helper.make_graph(nodes, "stack", ends[:1], ends[1:], weights)
    path = folder / f"stack{layers}.onnx"
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def against(base: Path, other: Path, expected: float, batch: int, settings: Settings) -> dict[str, Any]:
    """One bench of two models; `holds` says whether its interval holds the ratio that is expected."""
    report = bench([base, other], [Sizes(batch)], settings=settings)
    first, second = report.latencies
    found = second.ratio
    if found is None:
        raise ValueError("the second model has no ratio to the first")
    return {
        "base": base.name,
        "model": other.name,
        "threads": settings.threads,
        "seed": settings.seed,
        "expected": expected,
        "ratio": round(found.value, 4),
        "low": round(found.low, 4),
        "high": round(found.high, 4),
        "holds": found.low <= expected <= found.high,
        "p50_ms": [_ms(first), _ms(second)],
        "load": round(os.getloadavg()[0], 1),
    }


def _ms(latency: Latency) -> float:
    return round(latency.p50 * 1000, 3)


def _flops(path: Path) -> int:
    return flops(Model.load(path), {"batch": BATCH})


if __name__ == "__main__":
    sys.exit(main())
