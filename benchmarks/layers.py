# SPDX-License-Identifier: Apache-2.0
"""Whole layers out: every way to merge and to search, with drop and random as controls.

    python -m benchmarks.layers -o out                                    # SmolLM2-135M, MiniLM-L6, a ViT of 12 layers
    python -m benchmarks.layers -o out --models smollm2 --methods fit drop --layers 4 7 --missing

Models and data come from the recipes in `models/`. Calibration is on one part of a text, quality on documents that
share no paragraph with it: perplexity (`quality`), the share of next-token choices that agree with the original's
(`top1`) and of 32 greedily continued tokens (`continuation`); for SmolLM2 also perplexity on the King James Bible
(`kjv`), where Debian's bible-kjv is installed. `latency` is the ratio of medians to the original, measured in turns on
the evaluation's first sample.

`layers` counts the layers taken away. A fitted map stands in for each span, so `params_left` is not the same for all
methods; `refit` rows also let later projections be fitted again. `laco` has a threshold in place of a count. `seconds`
is the tool's own wall time, `load` the machine's load average when it began.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.rows import by_model, put, run
from benchmarks.rows import parser as parser_of
from onnxcollapse import Budget, Target, optimize
from onnxcollapse.bench import StretchTimer
from onnxcollapse.calibration import open_data
from onnxcollapse.errors import OnnxCollapseError
from onnxcollapse.model import Model, size
from onnxcollapse.rewriting import Pass, registry
from onnxcollapse.rewriting.frontier import frontier
from onnxcollapse.rewriting.pipeline import Result
from onnxcollapse.structure.spans import Span, first_projection, streams
from onnxcollapse.verification import compare

Row = dict[str, Any]

THRESHOLDS = (0.45, 0.65, 0.85)


@dataclass(frozen=True)
class Setting:
    """A model, its recipe's options, the metric of errors and the counts of layers asked for."""

    recipe: str
    options: tuple[str, ...]
    metric: str
    counts: tuple[int, ...]
    language: bool = False


SETTINGS = {
    "smollm2": Setting("smollm2", (), "kl", (1, 2, 4, 7, 10), language=True),
    "minilm_l6": Setting("minilm_l6", (), "rel-l2", (1, 2, 3, 4)),
    "vit12": Setting("fashion_vit", ("--depth", "12"), "kl", (1, 2, 3, 4)),
}

METHODS = {
    "fit+refit": ("collapse-layers:parts=false", "refit"),
    "fit": ("collapse-layers:parts=false",),
    "fold": ("collapse-layers:parts=false,merge=fold",),
    "drop": ("collapse-layers:parts=false,merge=drop",),
    "mean": ("collapse-layers:parts=false,merge=mean",),
    "last": ("collapse-layers:parts=false,merge=last",),
    "rdsc": ("collapse-layers:parts=false,merge=rdsc",),
    "greedy drop": ("collapse-layers:merge=drop,search=greedy",),
    "random drop": ("collapse-layers:merge=drop,search=random",),
    "laco rdsc": ("collapse-layers:merge=rdsc,search=laco,threshold={threshold}",),
    "laco last": ("collapse-layers:merge=last,search=laco,threshold={threshold}",),
}


@dataclass(frozen=True)
class Job:
    """One row to be made."""

    model: str
    method: str
    layers: int | None
    threshold: float | None = None

    @property
    def key(self) -> tuple[str, str, int | None, float | None]:
        """What makes a row the same as an earlier one."""
        return self.model, self.method, self.layers, self.threshold

    @property
    def facts(self) -> Row:
        """The same for a row."""
        return dict(zip(("model", "method", "layers", "threshold"), self.key, strict=True))


def jobs(models: Sequence[str], methods: Sequence[str], counts: Sequence[int]) -> Iterator[Job]:
    """The rows asked for; none given means all."""
    for model in models:
        yield Job(model, "original", None)
        for method in METHODS:
            if methods and method not in methods:
                continue
            if "{threshold}" in METHODS[method][0]:
                yield from (Job(model, method, None, threshold) for threshold in THRESHOLDS)
            else:
                yield from (
                    Job(model, method, n) for n in SETTINGS[model].counts if not counts or n in counts
                )


class Bench:
    """Runs jobs on one model."""

    def __init__(self, name: str, output: Path) -> None:
        self.setting, self.folder = SETTINGS[name], output / name
        run("-m", f"models.{self.setting.recipe}", "-o", str(self.folder), *self.setting.options)
        self.original = Model.load(self.folder / "model.onnx")
        self.kjv = output / "smollm2-kjv"
        if self.setting.language and shutil.which("bible"):
            run("-m", "models.smollm2", "-o", str(self.kjv), "--text", "kjv")
        stream = max(streams(self.original.graph), key=lambda found: len(found.layers))
        self.layer = stream.layers[0].params
        reader = first_projection(Span(stream.layers[:1], 1))  # a map stands in the stream that this reads
        self.width = 0 if reader is None else reader.in_features

    def rows(self, jobs: Sequence[Job]) -> Iterator[Row]:
        """Makes the rows of one method; statistics and first prices are shared between its counts of layers."""
        start: Row = {"load": round(os.getloadavg()[0], 1), "problem": None}
        if jobs[0].method == "original":
            facts = {"params_left": 1.0, **self._quality(self.folder / "model.onnx")}
            yield jobs[0].facts | start | facts
            return
        results = self._results(jobs)
        for job in jobs:
            try:
                result = next(results)
            except OnnxCollapseError as error:
                yield job.facts | start | {"problem": str(error)}
                return
            target = self.folder / f"{job.method.replace(' ', '-')}-{job.layers}-{job.threshold}.onnx"
            result.model.save(target)
            try:
                yield job.facts | start | _facts(result) | self._quality(target)
            finally:
                target.unlink()

    def _results(self, jobs: Sequence[Job]) -> Iterator[Result]:
        """A result for each job of one method."""
        data = open_data(str(self.folder / "calib.npz"), self.original)
        metric = self.setting.metric
        if jobs[0].layers is None:
            for job in jobs:
                passes = _passes(job)
                yield optimize(self.original, data, budget=Budget(1e9, metric), passes=passes, provider="cpu")
            return
        targets, passes = [Target("params", self._share(job)) for job in jobs], _passes(jobs[0])
        yield from frontier(self.original, data, targets, metric=metric, passes=passes, provider="cpu")

    def _share(self, job: Job) -> float:
        """What is left of the parameters when so many layers are gone, with a map in the place of each if need be."""
        maps = self.width**2 + self.width if job.method.startswith("fit") else 0
        saved = (job.layers or 0) * (self.layer - maps)
        return 1 - 0.999 * saved / size(self.original).params

    def _quality(self, model: Path) -> Row:
        recipe = f"models.{self.setting.recipe}"
        found: Row = {"quality": _measured(recipe, self.folder, model)}
        if self.setting.language and self.kjv.exists():
            found["kjv"] = _measured(recipe, self.kjv, model)
        candidate = Model.load(model)
        data = open_data(str(self.folder / "eval.npz"), self.original)
        wanted = ["top1", "continuation"] if self.setting.language else [self.setting.metric]
        overall = compare(self.original, candidate, data, wanted, provider="cpu").overall
        if self.setting.language:
            found |= {name: round(1.0 - overall[name], 4) for name in wanted}
        else:
            found["eval_error"] = overall[self.setting.metric]
        timer = StretchTimer(next(iter(data.batches("all", limit=1))), "cpu")
        before, after = timer.compare_whole(self.original, candidate)
        return found | {"latency": round(after / before, 4)}


def _passes(job: Job) -> list[Pass]:
    return registry.chosen(
        ["cleanup", *(spec.format(threshold=job.threshold) for spec in METHODS[job.method])]
    )


def _facts(result: Result) -> Row:
    """What a row keeps of a result."""
    kept = [entry for entry in result.journal.of("kept") if entry.pass_name.startswith("collapse-layers")]
    before, after = result.before.params, result.after.params
    return {
        "error": result.error,
        "met": result.met,
        "seconds": round(result.seconds, 1),
        "spans": [f"{entry.site}: {entry.variant}" for entry in kept],
        "removed": sum(int(entry.variant.split()[-1]) for entry in kept),
        "params_left": round(after / before, 4),
        "flops_left": round(result.flops_after / result.flops_before, 4),
    }


def _measured(recipe: str, folder: Path, model: Path) -> float:
    return round(json.loads(run("-m", recipe, "-o", str(folder), "--measure", str(model)))["value"], 5)


def results() -> list[Row]:
    """The rows written so far."""
    return machine.read("layers")


def _key(row: Row) -> tuple[Any, ...]:
    return row["model"], row["method"], row["layers"], row["threshold"]


def _write(row: Row) -> None:
    """Puts a row in the place of the one of the same model, method and count."""
    put("layers", row, _key, (job.key for job in jobs(list(SETTINGS), [], [])))


def table(rows: Sequence[Row]) -> str:
    """Rows as text."""
    names = ("method", "layers", "threshold", "removed", "params_left", "flops_left", "quality", "kjv", "top1",
             "continuation", "error", "latency", "seconds")  # fmt: skip
    return by_model(rows, SETTINGS, names)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = parser_of(__doc__, list(SETTINGS), list(METHODS))
    parser.add_argument("--layers", nargs="+", type=int, default=[])
    args = parser.parse_args(arguments)
    for name in args.models:
        bench = Bench(name, args.output)
        done = {_key(row) for row in results()}
        wanted = [
            job for job in jobs([name], args.methods, args.layers)
            if job.key not in done or not (args.missing or job.method == "original")
        ]  # fmt: skip
        for _, group in itertools.groupby(wanted, key=lambda job: job.method):
            for row in bench.rows(list(group)):
                print(json.dumps(row), flush=True)
                _write(row)
    print(table(results()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
