# SPDX-License-Identifier: Apache-2.0
"""``onnxcollapse optimize``: the main job."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcollapse.cli import destinations, options
from onnxcollapse.cli.console import (
    Bars,
    console,
    fail,
    grouped,
    print_json,
    set_up_logging,
    table,
    user_code,
)
from onnxcollapse.cli.given import read

if TYPE_CHECKING:
    from onnxcollapse.rewriting.budget import Budget
    from onnxcollapse.rewriting.pipeline import Result


@click.command()
@click.argument("model")
@click.option("-o", "--output", "target", required=True, help="Model file, or folder when MODEL is one.")
@click.option(
    "--calib",
    metavar="DATA",
    help="Calibration data: .npz file, folder, pkg.mod:reader, text:FILE, images:DIR or random:N. Without it only "
    "exact rewrites run.",
)
@options.window
@click.option("--budget", type=float, help="Largest error at the outputs on held-out data.  [default: 0.01]")
@options.metric
@click.option(
    "--target",
    "target_share",
    help="Share to keep at the least error, as params=0.75; also flops, bytes and latency.",
)
@options.specs
@options.align
@options.provider
@options.memory
@click.option(
    "--report", "report_folder", metavar="DIR", help="Write report.html, report.json and journal.json there."
)
@options.seed
@click.option(
    "--allow-partial", is_flag=True, help="Write the best model even when budget or target are not met."
)
@options.as_json
@options.verbose
def optimize(
    model: str,
    target: str,
    calib: str | None,
    window: int | None,
    budget: float | None,
    metric: str,
    target_share: str | None,
    specs: tuple[str, ...],
    align: int,
    provider: str,
    memory: str | None,
    report_folder: str | None,
    seed: int,
    allow_partial: bool,
    as_json: bool,
    verbose: int,
) -> None:
    """Makes MODEL, an .onnx file or a folder as optimum exports it, smaller inside an error budget."""
    set_up_logging(verbose)
    from onnxcollapse.calibration.planner import peak_resident
    from onnxcollapse.report import write_report
    from onnxcollapse.rewriting import pipeline

    destinations.check_model(target, model, calib)
    if report_folder is not None:
        destinations.check_folder(report_folder)
    with user_code():
        allowed = _budget(budget, metric, target_share)
        given = read(
            model, calib, window=window, metric=metric,
            measure=allowed.target.measure if allowed.target else None,
            specs=specs, align=align, provider=provider, memory=memory, seed=seed,
        )  # fmt: skip
        with Bars(quiet=as_json) as progress:
            result = pipeline.optimize(
                given.model, given.data, budget=allowed, seed=seed, progress=progress, **given.settings()
            )
    missed = pipeline.shortfall(result)
    written = missed is None or allow_partial
    summary = {
        **result.to_dict(), "peak_rss_bytes": peak_resident(), "output": target if written else None,
    }  # fmt: skip
    if report_folder is not None:
        write_report(result, summary, Path(report_folder))
    if written:
        result.model.save(target)
    if as_json:
        print_json(summary)
    elif written:
        _show(result, summary)
    if not written:
        pipeline.require_met(result)
    if missed is not None:
        fail(f"{missed}; wrote the best model all the same", 1)


def _budget(error: float | None, metric: str, target: str | None) -> Budget:
    """Builds the budget: one not given is 0.01, or none at all beside a target."""
    from onnxcollapse.rewriting.budget import Budget, Target

    wanted = None if target is None else Target.parse(target)
    return Budget(error if error is not None else (None if wanted else 0.01), metric, wanted)


def _change(before: float, after: float) -> str:
    return f"{after / before - 1:+.1%}" if before else ""


def _show(result: Result, summary: dict[str, Any]) -> None:
    rows = [
        (
            name,
            f"{summary[f'{name}_before']:,}",
            f"{summary[f'{name}_after']:,}",
            _change(summary[f"{name}_before"], summary[f"{name}_after"]),
        )
        for name in ("params", "bytes", "flops")
    ]
    if result.latency is not None:
        before, after = result.latency
        rows.append(("latency", f"{1e3 * before:.4g} ms", f"{1e3 * after:.4g} ms", _change(before, after)))
    table("", ("", "before", "after", "change"), rows)
    kept = result.journal.of("kept")
    if kept:
        table(
            "\nRewritten",
            ("pass", "site", "params saved", "predicted", "at outputs", "what"),
            [
                (e.pass_name, e.site, f"{e.saving.params:,}", f"{e.predicted_error:.3g}",
                 "" if e.impact is None else f"{e.impact:.3g}", e.reason)
                for e in kept
            ],
        )  # fmt: skip
    left = [entry for entry in result.journal if entry.outcome != "kept"]
    if left:
        table(
            "\nLeft as it was",
            ("pass", "site", "outcome", "why"),
            grouped(left),
        )
    _show_end(result, summary)


def _show_end(result: Result, summary: dict[str, Any]) -> None:
    out = console()
    for note in result.notes:
        out.print(f"Note: {note}", markup=False)
    if result.error is None:
        out.print("\nError at the outputs: not measured (no calibration data)")
    else:
        cap = "no cap" if result.budget.error is None else f"budget {result.budget.error:g}"
        out.print(
            f"\nError at the outputs: {result.error:.4g} {result.budget.metric} on held-out data ({cap}), "
            f"measured on {result.provider}",
            markup=False,
        )
    memory = f"peak memory {summary['peak_rss_bytes'] / 2**20:,.0f} MiB"
    out.print(f"Wrote {summary['output']} in {result.seconds:.1f} s, {memory}", markup=False)
