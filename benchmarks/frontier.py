# SPDX-License-Identifier: Apache-2.0
"""Size against quality: ours, what is left of it without its parts, the published criterion, controls, a rival.

    python -m benchmarks.frontier -o out
    python -m benchmarks.frontier -o out --models mlp --methods ours magnitude --shares 0.16 0.05 --missing

Models and data come from the recipes in `models/`, built into OUT when they are not there; quality is what their
`--measure` says on data that is never calibrated on. A row replaces the one of the same model, method and share in
`benchmarks/results/frontier.json`, so that parts can be run again; `--missing` runs what is not there yet.

`share` is the share of the parameters asked for; for models marked `ffn` that of the parameters of their feed-forward
blocks, the others being out of a narrowing's reach. `params_left` is of the whole model, always. The published
criterion has a threshold instead of a target, so its rows have no share: they are its own curve. Rivals that only mask
weights shrink nothing; `params_left` then counts what is not zero, and `note` says so.

`seconds` is the tool's own wall time, `load` the machine's load average when it began: above the number of cores
something else ran beside it; `threads` is what OMP_NUM_THREADS allowed. `predicted` is what the rewrites' effects
alone give together (the root of the sum of their squares for rel-l2, their sum for kl), to be held against `error`;
`rewrites` has for each that was kept the error predicted at its site and the effect measured at the outputs of it
alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import frontier_ablation, frontier_table, machine, rivals, rows
from onnxcollapse.model import Model, size

Row = dict[str, Any]

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0)
_MLP = ("--activation", "relu", "--widths", "512,512,512,512,512", "--calibration", "12000")
_PAPER = ("--activation", "relu", "--published", "--calibration", "10000")


@dataclass(frozen=True)
class Setting:
    """A model and what is asked of it.

    Attributes:
        recipe: Name in `models`.
        options: Of the recipe.
        metric: Of the errors.
        shares: Asked for; `flops` of them in rows of their own.
        methods: In the order in which they run.
        ffn: Whether shares are of the feed-forward parameters.
        samples: That the rival sees, by method; all where it isn't named.
    """

    recipe: str
    options: tuple[str, ...]
    metric: str
    shares: tuple[float, ...]
    methods: tuple[str, ...]
    ffn: bool = False
    samples: dict[str, int] | None = None


@dataclass(frozen=True)
class Method:
    """A way to make a model smaller.

    Attributes:
        group: ours, ablation, control, published or rival.
        passes: Of `onnxcollapse optimize`; none for a rival.
        measure: That the target names.
        rival: Method in `benchmarks.rivals`.
        note: What a reader has to know.
        uniform: Whether every layer gets the same share of its width.
    """

    group: str
    passes: tuple[str, ...] = ()
    measure: str = "params"
    rival: str = ""
    note: str = ""
    uniform: bool = False


METHODS = {
    "ours": Method("ours", ("narrow-ffn", "refit")),
    "ours+ranks": Method("ours", ("factor-linear", "narrow-ffn", "refit")),
    "ours-flops": Method("ours", ("narrow-ffn", "refit"), measure="flops"),
    "no-refit-pass": Method("ablation", ("narrow-ffn",)),
    "no-compressed-prefix": Method(
        "ablation", ("narrow-ffn-ablated:again=false",), note="compare with no-refit-pass"
    ),
    "weights-kept": Method("ablation", ("narrow-ffn-ablated:fitted=false",), note="chosen by residual"),
    "uniform-widths": Method("ablation", ("narrow-ffn-ablated:share={share}", "refit"), uniform=True),
    "no-path": Method("ablation", ("narrow-ffn:skip=false", "refit")),
    "full-path": Method("ablation", ("narrow-ffn-ablated:path=full", "refit")),
    "magnitude": Method("control", ("narrow-ffn:criterion=magnitude,refit-rest=false",)),
    "magnitude+refit": Method("control", ("narrow-ffn:criterion=magnitude,refit-rest=true",)),
    "random": Method("control", ("narrow-ffn:criterion=random,refit-rest=false",)),
    "random+refit": Method("control", ("narrow-ffn:criterion=random,refit-rest=true",)),
    "activation-rate": Method("published", ("narrow-ffn:criterion=activation-rate,threshold={threshold}",)),
    "rival-magnitude": Method("rival", rival="magnitude"),
    "rival-wanda": Method("rival", rival="wanda"),
    "rival-wanda+finetune": Method("rival", rival="wanda+finetune"),
    "rival-wanda+train": Method("rival", rival="wanda+train", note="trains"),
    "rival-sparsegpt-mask": Method("rival", rival="sparsegpt-mask", note="masks only: nothing gets smaller"),
}
_OURS = ("ours", "ours+ranks")
_CONTROLS = ("magnitude", "magnitude+refit", "random", "random+refit")
_ABLATIONS = (
    "no-refit-pass",
    "no-compressed-prefix",
    "weights-kept",
    "uniform-widths",
    "no-path",
    "full-path",
)
_RIVALS = ("rival-magnitude", "rival-wanda", "rival-wanda+finetune")

SETTINGS = {
    "mlp": Setting(
        "fashion_mlp",
        _MLP,
        "kl",
        (0.5, 0.25, 0.16, 0.05),
        (*_OURS, "activation-rate", *_RIVALS, "rival-wanda+train", "rival-sparsegpt-mask", *_CONTROLS, *_ABLATIONS),
    ),
    "paper": Setting("fashion_mlp", _PAPER, "kl", (0.5, 0.25, 0.16, 0.05), ("activation-rate", *_OURS)),
    "minilm_l6": Setting(
        "minilm_l6",
        (),
        "rel-l2",
        (0.8, 0.6, 0.46, 0.33, 0.15),
        (*_OURS, "magnitude", "magnitude+refit", "random", "rival-wanda", "rival-wanda+finetune",
         "no-refit-pass", "uniform-widths", "no-path"),
        ffn=True,
        samples={"wanda+finetune": 32},
    ),
    "smollm2": Setting(
        "smollm2", (), "kl", (0.75, 0.5), ("ours", "magnitude", "random", "rival-wanda"), ffn=True,
        samples={"wanda": 8},
    ),
    "vgg": Setting(
        "fashion_vgg", (), "kl", (0.75, 0.5, 0.25),
        (*_OURS, "ours-flops", *_CONTROLS, *_RIVALS, "no-refit-pass"),
    ),
    "vit": Setting(
        "fashion_vit", (), "kl", (0.75, 0.5, 0.25),
        (*_OURS, "ours-flops", *_CONTROLS, *_RIVALS, "no-refit-pass",
         "uniform-widths"),
        ffn=True,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """One row to be made."""

    model: str
    method: str
    share: float | None
    threshold: float | None = None

    @property
    def label(self) -> str:
        """The method, with the threshold where it has one."""
        return self.method if self.threshold is None else f"{self.method} {self.threshold:g}"

    @property
    def key(self) -> tuple[str, str, float | None]:
        """What makes a row the same as an earlier one."""
        return self.model, self.label, self.share


def jobs(models: Sequence[str], methods: Sequence[str], shares: Sequence[float]) -> Iterator[Job]:
    """The rows asked for, in order; no methods or shares means all that the model has."""
    for model in models:
        setting = SETTINGS[model]
        yield Job(model, "original", None)
        for method in setting.methods:
            if methods and method not in methods:
                continue
            if method == "activation-rate":
                yield from (Job(model, method, None, threshold) for threshold in THRESHOLDS)
            elif METHODS[method].measure == "flops":
                yield Job(model, method, 0.5)
            else:
                yield from (Job(model, method, s) for s in setting.shares if not shares or s in shares)


class Bench:
    """Runs jobs on one model.

    Args:
        name: Of the setting.
        output: Folder of models; the recipe's files lie in a folder of it.
        path: PYTHONPATH under which the ablated pass is found.
    """

    def __init__(self, name: str, output: Path, path: str) -> None:
        self.setting, self.folder = SETTINGS[name], output / name
        self._path = path
        recipe = f"models.{self.setting.recipe}"
        rows.run("-m", recipe, "-o", str(self.folder), *self.setting.options, path=path)
        self.model = Model.load(self.folder / "model.onnx")
        self.params = size(self.model).params
        self.ffn = frontier_ablation.ffn_params(self.model) if self.setting.ffn else self.params

    def row(self, job: Job) -> Row:
        """Makes one row; what cannot be done is a row with the reason in `problem`."""
        start: Row = {"model": job.model, "method": job.label, "share": job.share}
        start |= {"load": round(os.getloadavg()[0], 1), "threads": _threads(), "problem": None}
        if job.method == "original":
            return {
                **start,
                "group": "original",
                "params_left": 1.0,
                **self._quality(self.folder / "model.onnx"),
            }
        method = METHODS[job.method]
        share = None if job.share is None else self.whole(job.share)
        start |= {"group": method.group, "note": method.note}
        target = self.folder / f"{job.label.replace(' ', '-')}-{job.share}.onnx"
        try:
            found = (
                self._rival(method, job, share, target)
                if method.rival
                else self._ours(method, job, share, target)
            )
            if found.get("problem") is None:
                found |= self._quality(target)
        except (subprocess.CalledProcessError, ValueError) as error:
            found = {"problem": f"{type(error).__name__}: {str(error)[-300:]}"}
        finally:
            for file in (target, target.with_name(target.name + ".data")):
                file.unlink(missing_ok=True)
        return {**start, **found}

    def whole(self, share: float) -> float:
        """The share of all parameters that is left when `share` of what may be cut is left."""
        return 1 - (1 - share) * self.ffn / self.params

    def _ours(self, method: Method, job: Job, share: float | None, target: Path) -> Row:
        width = (
            frontier_ablation.uniform_share(self.model, self.params, share)
            if share and method.uniform
            else 0.0
        )
        specs = [spec.format(share=width, threshold=job.threshold) for spec in method.passes]
        metric = self.setting.metric if share is not None else "rel-l2"
        command = ["-m", "onnxcollapse", "optimize", str(self.folder / "model.onnx"), "-o", str(target), "--calib",
                   str(self.folder / "calib.npz"), "--provider", "cpu", "--json", "--metric", metric,
                   "--allow-partial", *(part for spec in specs for part in ("--pass", spec))]  # fmt: skip
        wanted = job.share if method.measure == "flops" else share
        command += ["--budget", "1e9"] if wanted is None else ["--target", f"{method.measure}={wanted:.6f}"]
        return of_summary(json.loads(rows.run(*command, accepted=(0, 1), path=self._path)))

    def _rival(self, method: Method, job: Job, share: float | None, target: Path) -> Row:
        samples = (self.setting.samples or {}).get(method.rival)
        wanted: Row = {"ratio": job.share} if self.setting.ffn else {"ratio": None, "params_share": share}
        row = rivals.run(
            method.rival,
            self.folder / "model.onnx",
            self.folder / "calib.npz",
            output=target,
            samples=samples,
            **wanted,
        )
        return {
            "params_left": None if row["share"] is None else round(row["share"], 4),
            "seconds": row.get("seconds"),
            "samples": samples,
            "problem": row["error"],
        }

    def _quality(self, model: Path) -> Row:
        recipe = f"models.{self.setting.recipe}"
        line = rows.run("-m", recipe, "-o", str(self.folder), "--measure", str(model), path=self._path)
        found = json.loads(line)
        return {"measure": found["measure"], "quality": round(found["value"], 5)}


def _threads() -> int:
    """Threads of the numerical libraries: all cores, unless the environment says otherwise."""
    return int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count() or 1)


def of_summary(summary: Row) -> Row:
    """What a row keeps of the summary that `optimize --json` prints."""
    rewrites = [
        (round(r["predicted_error"], 6), float(f"{r['impact']:.4g}"))
        for r in summary["rewrites"]
        if r["impact"] is not None
    ]
    impacts = [impact for _, impact in rewrites]
    together = sum(impacts) if summary["metric"] == "kl" else sum(i * i for i in impacts) ** 0.5
    left = {
        f"{name}_left": round(summary[f"{name}_after"] / summary[f"{name}_before"], 4)
        for name in ("params", "flops")
    }
    return {
        **left,
        "metric": summary["metric"],
        "error": float(f"{summary['error']:.5g}"),
        "predicted": float(f"{together:.5g}"),
        "met": summary["met"],
        "seconds": summary["seconds"],
        "peak_rss_mib": round(summary["peak_rss_bytes"] / 2**20),
        "rewrites": rewrites,
        "variants": [f"{r['site']}: {r['variant']}" for r in summary["rewrites"] if r["impact"] is not None],
    }


def merged(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """Old rows and new ones, which replace those of the same model, method and share; in the order of the tables."""
    found = {(row["model"], row["method"], row["share"]): row for row in old}
    for row in new:
        found[row["model"], row["method"], row["share"]] = row
    models, methods = list(SETTINGS), ["original", *METHODS]

    def place(row: Row) -> tuple[int, int, float, float]:
        method, _, threshold = row["method"].partition(" ")
        share = row["share"] or 0.0
        return models.index(row["model"]), methods.index(method), -share, float(threshold or 0)

    return sorted(found.values(), key=place)


def results() -> list[Row]:
    """The rows written so far."""
    return machine.read("frontier")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    parser = rows.parser(__doc__, list(SETTINGS), list(METHODS))
    parser.add_argument("--shares", nargs="+", type=float, default=[])
    parser.add_argument("--table", action="store_true", help="only print what has been written")
    args = parser.parse_args(arguments)
    if args.table:
        args.models = []
    with frontier_ablation.registered() as path:
        for name in args.models:
            bench = Bench(name, args.output, path)
            for job in jobs([name], args.methods, args.shares):
                done = {(row["model"], row["method"], row["share"]) for row in results()}
                if job.key in done and (args.missing or job.method == "original"):
                    continue
                row = bench.row(job)
                print(json.dumps(row), flush=True)
                machine.write("frontier", merged(results(), [row]))
    print(frontier_table.text(results()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
