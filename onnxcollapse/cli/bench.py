# SPDX-License-Identifier: Apache-2.0
"""``onnxcollapse bench``: how long models take, against each other."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from onnxcollapse.cli import options
from onnxcollapse.cli.console import console, print_json, set_up_logging, table, user_code
from onnxcollapse.errors import OptionError

if TYPE_CHECKING:
    from onnxcollapse.bench import BenchReport, Latency, Sizes, Subject


class _Counts(click.ParamType):
    """Positive whole numbers between commas."""

    name = "counts"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        parts = [part.strip() for part in str(value).split(",")]
        if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
            self.fail(f"{value!r} is no list of numbers above 0; write it as 1,8,32", param, ctx)
        return tuple(dict.fromkeys(map(int, parts)))


@click.command()
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@options.provider
@click.option("--batch", type=_Counts(), metavar="N,...", help="Batch sizes; 1, or what the model fixes.")
@click.option(
    "--sequence", type=_Counts(), metavar="N,...",
    help="Tokens a sample, those of the prompt for a decoder; 16, or what the model fixes.",
)  # fmt: skip
@click.option(
    "--size", "sizes", multiple=True, metavar="DIM=N",
    help="Another free dimension, by its symbol or as INPUT.AXIS; may be given several times.",
)  # fmt: skip
@click.option("--calib", metavar="DATA", help="Samples to run on, in any form of optimize; drawn by default.")
@click.option(
    "--tokens", type=click.IntRange(min=1), default=32, show_default=True,
    help="Steps of decoding in a turn, for models with a KV cache.",
)  # fmt: skip
@click.option(
    "--rounds", type=click.IntRange(min=4), default=20, show_default=True, help="Turns of each model in all."
)
@click.option(
    "--openings", type=click.IntRange(min=1), default=5, show_default=True,
    help="How often sessions are opened anew; the rounds are shared out among them.",
)  # fmt: skip
@click.option(
    "--warmup", type=click.IntRange(min=1), default=3, show_default=True, help="Untimed runs before."
)
@click.option(
    "--threads", type=click.IntRange(min=1), metavar="N",
    help="CPU threads an operator; ONNX Runtime's choice by default.",
)  # fmt: skip
@click.option("--cuda-graph", is_flag=True, help="Run as CUDA graphs; needs the CUDA provider.")
@click.option(
    "--trtexec", is_flag=True, help="Have trtexec time the models as well; it has to be on the PATH."
)
@click.option(
    "--footprint/--no-footprint", default=True, show_default=True,
    help="Measure memory and the time to open a session, in a process for each model.",
)  # fmt: skip
@click.option("--csv", "csv_file", metavar="FILE", help="Write the rows to a file as well.")
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of drawn inputs and intervals."
)
@options.as_json
@options.verbose
def bench(
    models: tuple[str, ...],
    provider: str,
    batch: tuple[int, ...] | None,
    sequence: tuple[int, ...] | None,
    sizes: tuple[str, ...],
    calib: str | None,
    tokens: int,
    rounds: int,
    openings: int,
    warmup: int,
    threads: int | None,
    cuda_graph: bool,
    trtexec: bool,
    footprint: bool,
    csv_file: str | None,
    seed: int,
    as_json: bool,
    verbose: int,
) -> None:
    """Times every MODEL in turns with the others, and says how many times as long as the first each takes.

    A decoder with a KV cache is timed over its prompt (prefill) and token by token (decode).
    """
    set_up_logging(verbose)
    from onnxcollapse.bench import Settings
    from onnxcollapse.bench import bench as measure

    if csv_file is not None:
        _check_file(Path(csv_file))
    settings = Settings(
        provider, threads, rounds, openings, warmup,
        tokens=tokens, seed=seed, cuda_graph=cuda_graph, footprint=footprint, trtexec=trtexec,
    )  # fmt: skip
    with user_code():
        report = measure(models, _sweep(batch, sequence, sizes), calib, settings)
    if csv_file is not None:
        _write(report, Path(csv_file))
    print_json(report.to_dict()) if as_json else _show(report)


def _sweep(
    batches: tuple[int, ...] | None, sequences: tuple[int, ...] | None, sizes: Sequence[str]
) -> list[Sizes]:
    from onnxcollapse.bench import Sizes

    others = dict(map(_size, sizes))
    return [
        Sizes(batch, sequence, others) for batch in batches or (None,) for sequence in sequences or (None,)
    ]


def _size(text: str) -> tuple[str, int]:
    name, _, count = text.rpartition("=")
    if not name or not (count.isascii() and count.isdigit() and int(count) > 0):
        raise OptionError(f"--size {text}: write it as DIM=N, DIM a symbol or INPUT.AXIS, N above 0")
    return name, int(count)


def _check_file(path: Path) -> None:
    """Before any work: it can be written."""
    if not path.absolute().parent.is_dir():
        raise OptionError(f"--csv {path}: its folder does not exist; create it first")
    if path.is_dir():
        raise OptionError(f"--csv {path}: it is a folder; name a file in it")


def _write(report: BenchReport, path: Path) -> None:
    rows = report.to_dict()["results"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _show(report: BenchReport) -> None:
    several = len(report.subjects) > 1
    tool = report.settings["trtexec"]
    columns = ["model", "phase", "batch", "tokens", "p50 ms", "p90 ms", "p99 ms", "samples/s", "tokens/s"]
    columns += ["ratio", "95 % interval"] if several else []
    columns += ["trtexec ms"] if tool else []
    rows = [_row(latency, several, tool) for latency in report.latencies]
    table("", columns, rows)
    table(
        "", ("model", "file MB", "session ms", "resident MB", "device MB"), list(map(_facts, report.subjects))
    )
    out = console()
    if several:
        out.print(
            "\nRatios are to the first model with the phase, medians over rounds of mean runs: below 1 is faster",
            markup=False,
        )
    out.print(f"Measured on {report.provider}", markup=False)


def _row(latency: Latency, several: bool, tool: bool) -> list[str]:
    cells = [
        latency.model, latency.phase, str(latency.batch), _cell(latency.sequence),
        *(_ms(seconds) for seconds in (latency.p50, latency.p90, latency.p99)),
        _cell(latency.samples_per_second), _cell(latency.tokens_per_second),
    ]  # fmt: skip
    if several:
        found = latency.ratio
        interval = "" if found is None else f"{found.low:.3f} to {found.high:.3f}"
        cells += ["" if found is None else f"{found.value:.3f}", interval]
    return [*cells, _ms(latency.trtexec)] if tool else cells


def _facts(subject: Subject) -> list[str]:
    found = subject.footprint
    seconds, resident, device = (
        (None, None, None)
        if found is None
        else (found.session_seconds, found.resident_bytes, found.device_bytes)
    )
    return [subject.model, _mb(subject.file_bytes), _ms(seconds), _mb(resident), _mb(device)]


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}".removesuffix(".0")


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:.4g}"


def _mb(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.1f}"
