# SPDX-License-Identifier: Apache-2.0
"""The main job on real models: what is saved at which error, what quality is left, and what it costs.

    python -m benchmarks.main_job -o out                          # all models at budgets 0.01, 0.05 and 0.1
    python -m benchmarks.main_job -o out --models fashion_relu --budgets 0.05

Models and data come from the recipes in `models/`, built into OUT when they are not there. Calibration data and
the data that the quality is measured on never overlap. `forward_seconds` is one plain run of the same calibration
data through ONNX Runtime; `ratio` is the time of the whole optimization over that.
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

from benchmarks import machine
from onnxcollapse.calibration import open_data, open_session
from onnxcollapse.model import Model

RECIPES = {
    "fashion_prelu": ("fashion_mlp", ["--activation", "prelu"]),
    "fashion_relu": ("fashion_mlp", ["--activation", "relu"]),
    "minilm_l3": ("minilm_l3", []),
    "minilm_l6": ("minilm_l6", []),
}
FOLD = ["--pass", "collapse-ffn:method=fold", "--pass", "cleanup", "--pass", "fold-affine"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder for models and results")
    parser.add_argument("--models", nargs="+", choices=list(RECIPES), default=list(RECIPES))
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.01, 0.05, 0.1])
    args = parser.parse_args(arguments)
    rows = []
    for name in args.models:
        folder = args.output / name
        recipe, options = RECIPES[name]
        _python("-m", f"models.{recipe}", "-o", str(folder), *options)
        base = {
            "model": name,
            "forward_seconds": round(_forward(folder), 3),
            **_quality(recipe, folder, "model.onnx"),
        }
        rows.append({**base, "run": "original"})
        print(json.dumps(rows[-1]), flush=True)
        runs: list[tuple[str, list[str]]] = [(f"budget {b:g}", ["--budget", f"{b:g}"]) for b in args.budgets]
        if name == "fashion_prelu":
            runs.append(("fold (LayerCollapse)", FOLD))
        for label, flags in runs:
            rows.append({**base, "run": label, **_optimize(recipe, folder, flags, base["forward_seconds"])})
            print(json.dumps(rows[-1]), flush=True)
    print(machine.write("main_job", rows))
    return 0


def _python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def _forward(folder: Path) -> float:
    """Seconds of one plain run of the calibration data, the session open and warm."""
    model = Model.load(folder / "model.onnx")
    data = open_data(str(folder / "calib.npz"), model)
    with open_session(model, provider="cpu") as session:
        session.run(next(data.batches("all")))
        began = time.perf_counter()
        for batch in data.batches("all"):
            session.run(batch)
        return time.perf_counter() - began


def _quality(recipe: str, folder: Path, model: str) -> dict[str, Any]:
    line = json.loads(_python("-m", f"models.{recipe}", "-o", str(folder), "--measure", str(folder / model)))
    return {"measure": line["measure"], "quality": line["value"]}


def _optimize(recipe: str, folder: Path, flags: list[str], forward: float) -> dict[str, Any]:
    command = ["-m", "onnxcollapse", "optimize", str(folder / "model.onnx"), "-o", str(folder / "small.onnx"),
               "--calib", str(folder / "calib.npz"), "--provider", "cpu", "--json", *flags]  # fmt: skip
    summary = json.loads(_python(*command))
    share = {
        f"{name}_left": round(summary[f"{name}_after"] / summary[f"{name}_before"], 4)
        for name in ("params", "bytes", "flops")
    }
    return {
        **share,
        "error": summary["error"],
        "kept": len([r for r in summary["rewrites"] if r["pass"].startswith("collapse")]),
        "declined": len(summary["declined"]),
        "seconds": summary["seconds"],
        "ratio": round(summary["seconds"] / forward, 1),
        "peak_rss_mib": round(summary["peak_rss_bytes"] / 2**20),
        **_quality(recipe, folder, "small.onnx"),
    }


if __name__ == "__main__":
    sys.exit(main())
