# SPDX-License-Identifier: Apache-2.0
"""``onnxcollapse sweep``: the frontier of size against error and quality."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcollapse.cli import destinations, options
from onnxcollapse.cli.console import Bars, console, fail, print_json, set_up_logging, table, user_code
from onnxcollapse.cli.given import read
from onnxcollapse.errors import OptionError

if TYPE_CHECKING:
    from onnxcollapse.calibration import Dataset
    from onnxcollapse.model import Model
    from onnxcollapse.rewriting.budget import Target
    from onnxcollapse.rewriting.pipeline import Result

MEASURES = ("params", "flops", "bytes", "latency")


@click.command()
@click.argument("model")
@click.option("-o", "--output", "folder", required=True, metavar="DIR", help="Folder for models and tables.")
@click.option("--calib", required=True, metavar="DATA", help="Calibration data, in any form of optimize.")
@options.window
@click.option(
    "--targets",
    "shares",
    default="0.9,0.75,0.5,0.25",
    show_default=True,
    metavar="SHARE,...",
    help="Shares to keep, each at the least error.",
)
@click.option(
    "--measure", type=click.Choice(MEASURES), default="params", show_default=True, help="What is to be kept."
)
@options.metric
@click.option(
    "--eval", "evaluation", metavar="DATA",
    help="Data that is never used for calibration; each model is compared there with MODEL in every metric.",
)  # fmt: skip
@options.specs
@options.align
@options.provider
@options.memory
@options.seed
@options.as_json
@options.verbose
def sweep(
    model: str,
    folder: str,
    calib: str,
    window: int | None,
    shares: str,
    measure: str,
    metric: str,
    evaluation: str | None,
    specs: tuple[str, ...],
    align: int,
    provider: str,
    memory: str | None,
    seed: int,
    as_json: bool,
    verbose: int,
) -> None:
    """Makes MODEL smaller for several targets at once: statistics are gathered once for all of them.

    DIR gets a model for each target, sweep.csv, sweep.json and sweep.png.
    """
    set_up_logging(verbose)
    from onnxcollapse.rewriting.frontier import frontier

    targets = _targets(shares, measure)
    places = {target: _place(folder, model, target) for target in targets}
    _check(folder, list(places.values()), model, calib, evaluation)
    with user_code(), Bars(quiet=as_json) as progress:
        given = read(
            model, calib, window=window, metric=metric, measure=measure,
            specs=specs, align=align, provider=provider, memory=memory, seed=seed,
        )  # fmt: skip
        loaded = given.model
        judge = None if evaluation is None else _Judge(loaded, evaluation, seed, window, metric, provider)
        results = frontier(
            loaded, given.data, targets, metric=metric, seed=seed, progress=progress, **given.settings()
        )
        document = _begun(loaded, measure, metric, judge)
        missed = []
        for target, result in zip(targets, results, strict=True):
            missed += _take(document, target, result, judge, places[target], Path(folder))
    print_json(document) if as_json else _show(document, folder)
    if missed:
        fail(f"{len(missed)} of {len(targets)} targets missed: {'; '.join(missed)}", 1)


def _targets(shares: str, measure: str) -> list[Target]:
    """Reads shares; the largest comes first, whatever their order, and each once."""
    from onnxcollapse.rewriting.budget import Target

    found = {Target.parse(f"{measure}={share.strip()}") for share in shares.split(",")}
    named = {str(target): target for target in sorted(found, key=lambda target: -target.share)}
    return list(named.values())


def _place(folder: str, model: str, target: Target) -> Path:
    """Where a target's model goes: a file, or a folder for a model that is one."""
    ending = "" if Path(model).is_dir() else ".onnx"
    return Path(folder) / f"{target.measure}-{target.share:g}{ending}"


def _check(folder: str, places: list[Path], model: str, calib: str, evaluation: str | None) -> None:
    """Finds out before the work what cannot be written, and data that cannot judge.

    Raises:
        OptionError: A place is taken, not writable or what is read, or both data are one.
    """
    from onnxcollapse.report.sweep import FILES

    if evaluation is not None and (evaluation == calib or _same(evaluation, calib)):
        raise OptionError(
            f"--eval '{evaluation}' is the calibration data, which flatters; give data that was not calibrated on"
        )
    destinations.check_folder(folder)
    for place in places if Path(folder).is_dir() else ():
        if _same(place, model):
            raise OptionError(f"output '{place}' is the model that is read; choose another folder")
        destinations.check_model(str(place), model, calib)
    for name in FILES:
        path = Path(folder) / name
        if path.is_dir():
            raise OptionError(f"output '{path}' is a folder; move it or choose another folder for the sweep")


def _same(one: str | Path, other: str | Path) -> bool:
    first, second = Path(one), Path(other)
    return first.exists() and second.exists() and first.samefile(second)


class _Judge:
    """Measures quality on data that no calibration saw."""

    def __init__(
        self, model: Model, spec: str, seed: int, window: int | None, metric: str, provider: str
    ) -> None:
        from onnxcollapse.calibration import open_data
        from onnxcollapse.verification.compare import usual_metrics

        text = spec.startswith("text:")
        self._model, self._provider = model, provider
        self._data: Dataset = open_data(spec, model, seed=seed, window=window if text else None)
        self.metrics = list(dict.fromkeys((*usual_metrics(model, self._data), metric)))
        self.evidence = self._data.evidence

    def errors(self, model: Model) -> Mapping[str, float]:
        """Error of a model against the one that was given, by metric."""
        from onnxcollapse.verification import compare

        return compare(self._model, model, self._data, self.metrics, provider=self._provider).overall


def _begun(model: Model, measure: str, metric: str, judge: _Judge | None) -> dict[str, Any]:
    notes = []
    if judge is not None and not judge.evidence:
        notes.append("the evaluation data is random: the quality there says nothing about real inputs")
    return {
        "model": model.path.name if model.path else None,
        "measure": measure,
        "metric": metric,
        "quality": [] if judge is None else judge.metrics,
        "provider": "",
        "params": 0,
        "bytes": 0,
        "flops": 0,
        "targets": [],
        "missed": [],
        "notes": notes,
    }


def _take(
    document: dict[str, Any], target: Target, result: Result, judge: _Judge | None, place: Path, folder: Path
) -> list[str]:
    """Writes a target's model and all tables anew, so that what is done stays when a later target ends the run.

    Returns:
        What was missed, if anything was.
    """
    from onnxcollapse.calibration.planner import peak_resident
    from onnxcollapse.model import files
    from onnxcollapse.report.sweep import write_sweep
    from onnxcollapse.rewriting.pipeline import shortfall

    row = _row(target, result, {} if judge is None else judge.errors(result.model), place.name)
    missed = shortfall(result)
    document["targets"].append(row)
    document["missed"] += [] if missed is None else [missed]
    document["notes"] = list(dict.fromkeys((*document["notes"], *result.notes)))
    sizes = {"params": result.before.params, "bytes": result.before.bytes, "flops": result.flops_before}
    document |= {"provider": result.provider, **sizes, "peak_rss_bytes": peak_resident()}
    with files.existing(folder):
        result.model.save(place)
        write_sweep(document, folder)
    return [] if missed is None else [missed]


def _row(target: Target, result: Result, quality: Mapping[str, float], name: str) -> dict[str, Any]:
    row: dict[str, Any] = {"target": str(target), "share": target.share, "met": result.met}
    for measure in MEASURES if result.latency else MEASURES[:-1]:
        before, after = result.extent(measure)
        row |= {measure: after, f"{measure}_left": after / before if before else 1.0}
    return {
        **row,
        "error": result.error,
        **quality,
        "rewrites": len(result.journal.of("kept")),
        "seconds": round(result.seconds, 3),
        "output": name,
    }


def _show(document: Mapping[str, Any], folder: str) -> None:
    measure, quality = document["measure"], document["quality"]
    sized = list(dict.fromkeys((measure, "params", "flops")))
    rows = [
        (
            row["target"],
            "yes" if row["met"] else "no",
            *(f"{row[f'{name}_left']:.1%}" for name in sized),
            *(_figure(row[name]) for name in ("error", *quality)),
            row["output"],
        )
        for row in document["targets"]
    ]
    columns = ("target", "met", *(f"{name} left" for name in sized), document["metric"])
    table("", (*columns, *(f"eval {name}" for name in quality), "file"), rows)
    out = console()
    for note in document["notes"]:
        out.print(f"Note: {note}", markup=False)
    out.print(f"\nWrote {folder}, measured on {document['provider']}", markup=False)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
