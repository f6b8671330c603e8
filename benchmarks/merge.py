# SPDX-License-Identifier: Apache-2.0
"""Feed-forward blocks that share weights: every tie, window and alignment, without training.

    python -m benchmarks.merge -o out                                     # a ViT of 12 layers, MiniLM-L6, SmolLM2-135M
    python -m benchmarks.merge -o out --models minilm_l6 --methods fit average --windows 2 3 --missing

One window of the model is merged, the one that costs least at the outputs. `quality` is the recipe's measure on data
that no calibration saw; `file_bytes` and `resident_bytes` are what the file takes and what ONNX Runtime holds after a
first run, in a process of its own. `none` is the original. `anchor` needs no alignment: the first block's weights are
what they are, however the others' neurons are ordered.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.layers import SETTINGS
from benchmarks.rows import by_model, put, run
from benchmarks.rows import parser as parser_of
from onnxcollapse import Budget, Target, optimize
from onnxcollapse.bench.footprint import file_bytes, measure
from onnxcollapse.calibration import open_data
from onnxcollapse.errors import OnnxCollapseError
from onnxcollapse.model import Model, size
from onnxcollapse.rewriting import registry
from onnxcollapse.structure import feedforwards

Row = dict[str, Any]

MODELS = ("vit12", "minilm_l6", "smollm2")
WINDOWS = (2, 3, 4, 6)
METHODS = {
    "none": None,
    "average": "tie=average",
    "average, unaligned": "tie=average,permute=false",
    "anchor": "tie=anchor",
    "fit": "tie=fit",
    "fit, unaligned": "tie=fit,permute=false",
    "fit, no scales": "tie=fit,scale=false",
}


class Bench:
    """Merges windows of one model."""

    def __init__(self, name: str, output: Path) -> None:
        self.name, self.setting, self.folder = name, SETTINGS[name], output / name
        run("-m", f"models.{self.setting.recipe}", "-o", str(self.folder), *self.setting.options)
        self.original = Model.load(self.folder / "model.onnx")
        self.block = feedforwards(self.original.graph)[0][0].params

    def row(self, method: str, window: int | None) -> Row:
        """Merges and measures."""
        start: Row = {
            "model": self.name,
            "method": method,
            "window": window,
            "load": round(os.getloadavg()[0], 1),
        }
        if window is None:
            return start | {"params_left": 1.0} | self._quality(self.folder / "model.onnx")
        spec = f"merge-ffn:window={window},{METHODS[method]}"
        share = 1 - 0.9 * (window - 1) * self.block / size(self.original).params
        try:
            result = optimize(
                self.original,
                open_data(str(self.folder / "calib.npz"), self.original),
                budget=Budget(None, self.setting.metric, Target("params", share)),
                passes=registry.chosen(["cleanup", spec]),
                provider="cpu",
            )
        except OnnxCollapseError as problem:
            return start | {"problem": str(problem)}
        kept = [entry for entry in result.journal.of("kept") if entry.pass_name.startswith("merge-ffn")]
        target = self.folder / f"merged-{window}.onnx"
        result.model.save(target)
        facts: Row = {
            "windows": [entry.site for entry in kept],
            "block_error": [round(entry.predicted_error, 4) for entry in kept],
            "error": result.error,
            "params_left": round(result.after.params / result.before.params, 4),
            "flops_left": round(result.flops_after / result.flops_before, 4),
            "seconds": round(result.seconds, 1),
        }
        try:
            return start | facts | self._quality(target)
        finally:
            target.unlink()

    def _quality(self, model: Path) -> Row:
        recipe = f"models.{self.setting.recipe}"
        found = json.loads(run("-m", recipe, "-o", str(self.folder), "--measure", str(model)))
        data = open_data(str(self.folder / "eval.npz"), self.original)
        feeds = next(iter(data.batches("all", limit=1)))
        resident = measure(model, feeds, "cpu", 1).resident_bytes
        return {
            "quality": round(found["value"], 5),
            "file_bytes": file_bytes(Model.load(model)),
            "resident_bytes": resident,
        }


def jobs(
    models: Sequence[str], methods: Sequence[str], windows: Sequence[int]
) -> Iterator[tuple[str, str, int | None]]:
    """The rows asked for; none given means all."""
    for model in models:
        yield model, "none", None
        for window in windows or WINDOWS:
            for method in list(METHODS)[1:]:
                if not methods or method in methods:
                    yield model, method, window


def results() -> list[Row]:
    """The rows written so far."""
    return machine.read("merge")


def _key(row: Row) -> tuple[Any, ...]:
    return row["model"], row["method"], row["window"]


def _write(row: Row) -> None:
    """Puts a row in the place of the one of the same model, method and window."""
    put("merge", row, _key, jobs(MODELS, [], []))


def table(rows: Sequence[Row]) -> str:
    """Rows as text."""
    names = (
        "method",
        "window",
        "params_left",
        "quality",
        "error",
        "block_error",
        "file_bytes",
        "resident_bytes",
        "seconds",
    )
    return by_model(rows, MODELS, names)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = parser_of(__doc__, list(MODELS), list(METHODS))
    parser.add_argument("--windows", nargs="+", type=int, default=[])
    args = parser.parse_args(arguments)
    for name in args.models:
        bench = Bench(name, args.output)
        done = {_key(row) for row in results()}
        for job in jobs([name], args.methods, args.windows):
            if job not in done or not args.missing:
                row = bench.row(*job[1:])
                print(json.dumps(row), flush=True)
                _write(row)
    print(table(results()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
