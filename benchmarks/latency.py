# SPDX-License-Identifier: Apache-2.0
"""What the smaller models of real networks take to run: in fp32 and fp16, at several batch sizes, on CPU or GPU.

    python -m benchmarks.latency -o out                                    # MiniLM-L6, a ViT of 12 layers, SmolLM2-135M
    python -m benchmarks.latency -o out --provider cuda
    python -m benchmarks.latency -o out --provider cuda --models minilm_l6 vit12 --cuda-graph

Models and data come from the recipes in `models/`. Each variant is made once, on the same provider, and stays in OUT:
`optimized` has 80 % of the parameters by the default passes, `shared` one window of feed-forward blocks that share
weights, and `half`, the control, half of the layers, dropped at random: what it takes shows how far latency follows
FLOPs at a size. fp16 models are made by ONNX Runtime's converter, caches, inputs and outputs included. All variants of
one model are timed in turns by `onnxcollapse bench`; `ratio` is to the original of the same precision.

Rows go to `benchmarks/results/latency_cpu.json` or `latency_cuda.json`; `make_seconds` is the tool's own wall time for
the variant, `resident_bytes` and `device_bytes` are of a process of its own after a run at the first batch size.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from benchmarks import machine
from benchmarks.layers import SETTINGS
from benchmarks.rows import by_model, put, run
from benchmarks.rows import parser as parser_of
from onnxcollapse import Budget, Target, optimize
from onnxcollapse.bench import BenchReport, Settings, Sizes, bench
from onnxcollapse.bench.report import row
from onnxcollapse.calibration import open_data
from onnxcollapse.errors import OnnxCollapseError
from onnxcollapse.model import Model, size
from onnxcollapse.rewriting import registry
from onnxcollapse.structure.spans import streams

Row = dict[str, Any]

MODELS = ("minilm_l6", "vit12", "smollm2")
PRECISIONS = ("fp32", "fp16")
BATCHES = (1, 8, 32)
RATIO = ("ratio", "ratio_low", "ratio_high")
SEQUENCE = {"minilm_l6": 128, "smollm2": 128}
"""Tokens a sample, or of the prompt."""


@dataclass(frozen=True)
class Variant:
    """How a model is made from the original.

    Attributes:
        passes: As --pass; none for the default ones.
        share: Of the parameters, what is to be left; None for that of half of the layers.
    """

    passes: tuple[str, ...] = ()
    share: float | None = None


VARIANTS = {
    "original": None,
    "optimized": Variant(share=0.8),
    "shared": Variant(("cleanup", "merge-ffn:window=3"), 0.999),
    "half": Variant(("cleanup", "collapse-layers:merge=drop,search=random,parts=false")),
}


def made(name: str, variant: str, folder: Path, provider: str) -> tuple[Path, Row]:
    """A variant's file and what is known of it; made where it is not there."""
    way, original = VARIANTS[variant], folder / "model.onnx"
    if way is None:
        return original, {"params_left": 1.0, "flops_left": 1.0}
    target, told = folder / f"{variant}.onnx", folder / f"{variant}.json"
    if not (target.exists() and told.exists()):
        model, setting = Model.load(original), SETTINGS[name]
        result = optimize(
            model,
            open_data(str(folder / "calib.npz"), model),
            budget=Budget(None, setting.metric, Target("params", way.share or _half(model))),
            passes=registry.chosen(way.passes, {"align": 8}, "params"),
            provider=provider,
        )
        result.model.save(target)
        facts = {
            "params_left": round(result.after.params / result.before.params, 4),
            "flops_left": round(result.flops_after / result.flops_before, 4),
            "error": result.error,
            "make_seconds": round(result.seconds, 1),
        }
        told.write_text(json.dumps(facts))
    return target, json.loads(told.read_text())


def _half(model: Model) -> float:
    """The share of the parameters that is left without every second layer."""
    stream = max(streams(model.graph), key=lambda found: len(found.layers))
    gone = len(stream.layers) // 2 * stream.layers[0].params
    return 1 - 0.999 * gone / size(model).params


def halved(path: Path) -> Path:
    """The model in fp16, beside it; made where it is not there or older."""
    target = path.with_name(f"{path.stem}-fp16.onnx")
    if not target.exists() or target.stat().st_mtime < path.stat().st_mtime:
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(onnx.load(path), keep_io_types=False), target)
    return target


def rows(
    name: str, precision: str, files: Mapping[str, tuple[Path, Row]], settings: Settings
) -> Iterator[Row]:
    """Times the variants of one model in one precision."""
    variants = list(files)
    paths = [path if precision == "fp32" else halved(path) for path, _ in files.values()]
    start: Row = {"model": name, "precision": precision, "graph": settings.cuda_graph}
    load = round(os.getloadavg()[0], 1)
    try:
        report = bench(paths, [Sizes(batch, SEQUENCE.get(name)) for batch in BATCHES], settings=settings)
    except OnnxCollapseError as problem:
        yield start | dict.fromkeys(("phase", "batch", "variant")) | {"problem": str(problem)}
        return
    for found, latency in zip(map(row, report.latencies), report.latencies, strict=True):
        variant = variants[latency.number]
        yield start | {
            "variant": variant,
            "phase": latency.phase,
            "batch": latency.batch,
            "sequence": latency.sequence,
            "p50_ms": round(latency.p50 * 1000, 4),
            "p90_ms": round(latency.p90 * 1000, 4),
            **{key: None if found[key] is None else round(found[key], 4) for key in RATIO},
            **files[variant][1],
            **_footprint(report, latency.number),
            "load": load,
        }  # fmt: skip


def _footprint(report: BenchReport, number: int) -> Row:
    subject = report.subjects[number]
    found = subject.footprint
    measured = {} if found is None else {
        "session_seconds": round(found.session_seconds, 3),
        "resident_bytes": found.resident_bytes,
        "device_bytes": found.device_bytes,
    }  # fmt: skip
    return {"provider": subject.provider, "file_bytes": subject.file_bytes, **measured}


def _keys() -> Iterator[Hashable]:
    """All keys in the order of the tables, decode behind what its prompt takes."""
    for model in MODELS:
        for precision in PRECISIONS:
            for graph in (False, True):
                for phase in ("run", "prefill", "decode"):
                    for batch in BATCHES:
                        yield from ((model, precision, graph, phase, batch, variant) for variant in VARIANTS)


def _key(one: Mapping[str, Any]) -> Hashable:
    return tuple(one[name] for name in ("model", "precision", "graph", "phase", "batch", "variant"))


def table(found: Sequence[Row]) -> str:
    """Rows as text."""
    names = ("precision", "graph", "phase", "batch", "variant", "p50_ms", "ratio", "ratio_low", "ratio_high",
             "params_left", "flops_left", "resident_bytes", "device_bytes", "make_seconds", "problem")  # fmt: skip
    return by_model(found, MODELS, names)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = parser_of(__doc__, list(MODELS), list(VARIANTS))
    parser.add_argument("--provider", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--cuda-graph", action="store_true", help="run as CUDA graphs")
    parser.add_argument("--threads", type=int, help="of an operator on the CPU")
    args = parser.parse_args(arguments)
    settings = Settings(args.provider, args.threads, cuda_graph=args.cuda_graph)
    results = f"latency_{args.provider}"
    for name in args.models:
        folder = args.output / name
        run("-m", f"models.{SETTINGS[name].recipe}", "-o", str(folder), *SETTINGS[name].options)
        variants = [one for one in VARIANTS if one == "original" or not args.methods or one in args.methods]
        files = {one: made(name, one, folder, args.provider) for one in variants}
        for precision in args.precisions:
            for one in rows(name, precision, files, settings):
                print(json.dumps(one), flush=True)
                put(results, one, _key, _keys())
    print(table(machine.read(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
